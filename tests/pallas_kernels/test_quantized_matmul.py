"""Products with quantised weights: values, refusals, and what the TPU compiler says of them."""
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
import numpy as np
import pytest

from pallas_kernels import chips
from pallas_kernels.quantized_matmul import block_sizes, quantize, quantized_matmul, tpu
from pallas_kernels.quantized_matmul.block_sizes import Blocks

TOLERANCE = {'float32': 1e-5, 'bfloat16': 1e-2}
# dtype of x, bits, group_size, M, K, N
CASES = {
    'int8': ('bfloat16', 8, None, 5, 256, 130),
    'int8 in float32': ('float32', 8, None, 5, 256, 130),
    'int4': ('bfloat16', 4, None, 1, 384, 70),
    'int4 in groups of 32': ('bfloat16', 4, 32, 9, 256, 128),
    'int4 in groups of 128': ('bfloat16', 4, 128, 9, 1280, 300),
    'int4 in groups of 256, full rows': ('bfloat16', 4, 256, 128, 512, 70),
    'int8 in groups of 256': ('float32', 8, 256, 9, 512, 70),
    'many rows by int4': ('bfloat16', 4, 128, 300, 256, 130),
    'many rows by int8 in float32': ('float32', 8, 64, 270, 384, 130),
    'int8 by int8': ('int8', 8, None, 9, 1280, 130),
    'int8 by int4 in groups': ('int8', 4, 32, 300, 256, 130),
}


def operands(x_dtype, bits, group_size, M, K, N):
  """x [2, M, K] or [M, K], its scale, values and scales."""
  rng = np.random.default_rng(M + K + N)
  w = rng.normal(size=(K, N)) * np.exp(rng.normal(size=(1, N)))
  values, scales = quantize(jnp.asarray(w, jnp.float32), bits, group_size)
  if x_dtype == 'int8':
    return (jnp.asarray(rng.integers(-127, 128, (M, K)), jnp.int8), values, scales,
            jnp.asarray(rng.uniform(0.5, 2, (M, 1)), jnp.float32))
  return jnp.asarray(rng.normal(size=(2, M, K)), x_dtype), values, scales, None


def exact(x, values, scales, x_scale):
  """The product in float64, of the values given."""
  x, values, scales = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, values, scales))
  scales = scales.reshape(-1, values.shape[1])
  y = x @ (values * np.repeat(scales, len(values) // len(scales), axis=0))
  return y if x_scale is None else y * np.asarray(x_scale, np.float64)


def error(got, want):
  return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@pytest.mark.supports('kernels', 'int8 and int4 weights', 'scales in groups', 'int8 activations')
@pytest.mark.parametrize('implementation', ['reference', 'tpu'])
@pytest.mark.parametrize('case', CASES)
def test_products_are_float64s(case, implementation):
  x, values, scales, x_scale = args = operands(*CASES[case])
  dtypes = (None, 'float32') if x.dtype == jnp.int8 else (None,)
  for dtype in dtypes:
    run = jax.jit(functools.partial(quantized_matmul, dtype=dtype, implementation=implementation))
    y = run(x, values, scales, x_scale=x_scale)
    assert y.dtype == (dtype or (jnp.bfloat16 if x.dtype == jnp.int8 else x.dtype))
    assert y.shape == (*x.shape[:-1], values.shape[1])
    assert error(y, exact(*args)) <= TOLERANCE[y.dtype.name]


def test_blocks_that_do_not_divide_the_arrays_change_nothing():
  x, values, scales, _ = args = operands('float32', 8, 128, 300, 512, 300)
  blocks = Blocks(rows=128, columns=128, chunk=256, inner=64)
  y = tpu.quantized_matmul(x[0], values, scales, None, dtype=jnp.dtype(jnp.float32),
                           interpret=True, blocks=blocks)
  assert error(y, exact(*args)[0]) <= 1e-5


@pytest.mark.parametrize('x_dtype', ['float32', 'int8'])
def test_the_kernel_reads_nothing_unwritten_and_waits_for_every_copy(x_dtype):
  """In a simulated memory whose unwritten places are NaN, also behind the arrays' ends."""
  x, values, scales, x_scale = args = operands(x_dtype, 8, 128, 72, 256, 300)
  y = tpu.quantized_matmul(
      x.reshape(-1, 256), values, scales, x_scale, dtype=jnp.dtype(jnp.float32),
      blocks=Blocks(rows=64, columns=128, chunk=128, inner=32),
      interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan',
                                      out_of_bounds_reads='uninitialized'))
  assert error(y, exact(*args).reshape(y.shape)) <= 1e-5
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call
  assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize('group_size', [None, 32])
@pytest.mark.parametrize('bits', [8, 4])
def test_quantised_weights_are_within_half_a_step(bits, group_size):
  w = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
  w[:, 3] = 0
  values, scales = quantize(jnp.asarray(w), bits, group_size)
  assert values.dtype == f'int{bits}' and scales.dtype == jnp.float32
  assert scales.shape == ((5,) if group_size is None else (2, 5))
  steps = np.repeat(np.asarray(scales).reshape(-1, 5), group_size or 64, axis=0)
  values = np.asarray(values.astype(jnp.float32))
  assert (abs(values * steps - w) <= steps * 0.5001).all()
  assert abs(values[:, :3]).max() == 2 ** (bits - 1) - 1 and not values[:, 3].any()


def test_what_does_not_fit_is_named():
  x, values, scales, _ = operands('float32', 8, 64, 3, 256, 70)
  with pytest.raises(ValueError, match=r'scales \(3, 70\) must be'):
    quantized_matmul(x, values, scales[:3])
  with pytest.raises(ValueError, match='int8 x .* needs x_scale'):
    quantized_matmul(x.astype(jnp.int8), values, scales)
  with pytest.raises(ValueError, match='group_size=48 must divide'):
    quantize(x[0].T, 8, 48)


def test_what_the_kernel_refuses_is_named_and_left_to_xla():
  x, values, scales, _ = args = operands('float32', 8, None, 40, 100, 70)
  with pytest.raises(NotImplementedError, match='kernel takes K in multiples of 128'):
    quantized_matmul(x, values, scales, implementation='tpu')
  assert error(quantized_matmul(x, values, scales), exact(*args)) <= 1e-5
  x, values, scales, _ = operands('int8', 8, None, 3, 128, 70)
  reason = tpu.refusal(x, values, scales[None], jnp.dtype('bfloat16'), 'v4')
  assert reason == 'x is int8, which the matrix units of v4 do not multiply'
  assert not tpu.refusal(x, values, scales[None], jnp.dtype('bfloat16'), 'v5e')


@pytest.mark.parametrize('chip', chips.VMEM_MIB)
def test_decoding_moves_each_array_once(chip):
  """All rows are one block, and the grid walks the columns of the weights."""
  shape = jax.ShapeDtypeStruct
  x, values = shape((64, 4096), jnp.bfloat16), shape((4096, 14336), jnp.int4)
  blocks = block_sizes.find(64, 4096, 14336, 32, x.dtype, values.dtype, chip)
  run = functools.partial(tpu.quantized_matmul, dtype=x.dtype, interpret=False, blocks=blocks)
  program = jax.make_jaxpr(run)(x, values, shape((32, 14336), jnp.float32), None)
  grids = [call.params['grid_mapping'].grid for call in program.eqns
           if call.primitive.name == 'pallas_call']
  assert grids == [(1, 14336 // blocks.columns)]


@pytest.mark.parametrize('chip', chips.VMEM_MIB)
def test_blocks_fit_their_generation_at_any_size(chip):
  for M, K, N in ((1, 128, 8), (16, 4096, 14336), (300, 896, 4864), (2048, 28672, 8192)):
    for x_dtype, groups in ((jnp.bfloat16, 1), (jnp.bfloat16, K // 32), (jnp.int8, K // 128)):
      blocks = block_sizes.find(M, K, N, groups, x_dtype, jnp.int8, chip)
      assert not blocks.rows % blocks.inner and not K % blocks.chunk and not blocks.columns % 128
      assert not blocks.inner % 32 or blocks.inner == M
      need = block_sizes.vmem_bytes(blocks, K, groups, x_dtype, jnp.int8)
      assert need <= blocks.vmem_bytes == 15 * chips.VMEM_MIB[chip] * 2**16
