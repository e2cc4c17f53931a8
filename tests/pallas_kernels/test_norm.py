"""`norm`'s kernels are the reference, in one pass over memory."""
import functools

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.norm import bench, norm, tpu
from pallas_kernels.norm.block_sizes import block_sizes
from pallas_kernels.measure import traffic
from pallas_kernels.norm.reference import Options
from pallas_kernels.norm.specs import SPECS

KINDS = ['layernorm', 'rmsnorm']
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}
LARGE_D = 8192


def operands(shape, dtype, has_bias=True, has_residual=True):
  """(x, residual, scale, bias) and gradients of y and of the sum; no mean is near 0."""
  rng = np.random.default_rng(sum(shape))
  draw = lambda dtype, *sizes: jnp.asarray(rng.normal(0.5, 1, sizes), dtype)
  x, residual, dy, dtotal = (draw(dtype, *shape) for _ in range(4))
  scale, bias = (draw(jnp.float32, shape[-1]) for _ in range(2))
  args = x, residual if has_residual else None, scale, bias if has_bias else None
  return args, (dy, dtotal) if has_residual else dy


def plain(kind, x, residual, scale, bias):
  """The formula, in the dtype of its arguments."""
  h = x if residual is None else x + residual
  y = h - h.mean(-1, keepdims=True) if kind == 'layernorm' else h
  y = scale * y / jnp.sqrt((y * y).mean(-1, keepdims=True) + 1e-5)
  y = y if bias is None else y + bias
  return y if residual is None else (y, h)


def exact(kind, args, gradients):
  """Values and gradients in float64, with x + residual as it is rounded."""
  x, residual, scale, bias = args
  rest = residual
  if residual is not None:  # x and residual have one gradient: put the rounded sum into x
    x, rest = x + residual, jnp.zeros_like(x)
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a.astype(jnp.float32)), jnp.float64),
                        ((x, rest, scale, bias), gradients))
    out, vjp = jax.vjp(functools.partial(plain, kind), *wide[0])
    return jax.tree.map(np.asarray, (out, vjp(wide[1])))


@functools.partial(jax.jit, static_argnames=('kind', 'implementation'))
def values_and_gradients(args, gradients, kind, implementation):
  call = lambda x, residual, scale, bias: norm(
      x, scale, bias, residual=residual, kind=kind, epsilon=1e-5, implementation=implementation)
  out, vjp = jax.vjp(call, *args)
  return out, vjp(gradients)


def assert_close(got, want, tolerance):
  got, want = jax.tree.leaves(got), jax.tree.leaves(want)
  assert len(got) == len(want)
  for x, y in zip(got, want):
    difference = np.asarray(x.astype(jnp.float32), np.float64) - y
    assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(y)  # NaN fails


@pytest.mark.supports('kernels', 'RMSNorm and LayerNorm with residual, forward and backward')
@pytest.mark.parametrize('implementation', ['reference', 'tpu'])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('kind, has_bias, has_residual, shape', [
    ('layernorm', True, True, (2, 37, 64)), ('rmsnorm', False, False, (1, 100))])
def test_values_and_gradients_are_float64s(implementation, dtype, kind, has_bias, has_residual,
                                           shape):
  args, gradients = operands(shape, dtype, has_bias, has_residual)
  got = values_and_gradients(args, gradients, kind, implementation)
  assert_close(got, exact(kind, args, gradients), TOLERANCE[dtype])
  assert jax.tree.map(lambda x: x.dtype, got[1]) == jax.tree.map(lambda x: x.dtype, args)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('implementation', ['reference', 'tpu'])
def test_values_are_those_of_the_layer(kind, implementation):
  from lm.layers.norms import Norm  # Here: the children that compile need no flax.

  (x, _, scale, bias), _ = operands((2, 9, 64), jnp.bfloat16)
  layer = Norm(kind, 1e-5, use_bias=True, unit_offset=True)
  want = layer.apply({'params': {'scale': scale, 'bias': bias}}, x)
  bias = bias if kind == 'layernorm' else None
  got = norm(x, 1 + scale, bias, kind=kind, epsilon=1e-5, implementation=implementation)
  assert_close([got], [np.asarray(want, np.float64)], 1e-3)  # a last bit of bfloat16 here or there


def test_there_are_no_races_and_nothing_beyond_the_last_row_is_used():
  M, rows = 40, block_sizes(40, LARGE_D, 4)[0]
  assert -(-M // rows) % 2  # of an odd number of blocks the second core visits one twice
  (x, residual, scale, bias), (dy, dtotal) = operands((M, LARGE_D), jnp.float32)
  interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan')
  options = Options('layernorm', 1e-5)
  total = x + residual
  y, h = tpu.forward(options, x, residual, scale, bias, interpret=interpret)
  dx, dscale, dbias = tpu.backward(options, True, total, scale, dy, dtotal, interpret=interpret)
  want = exact('layernorm', (x, residual, scale, bias), (dy, dtotal))
  assert_close(((y, h), (dx, dx, dscale, dbias)), want, 1e-5)
  races = jax._src.pallas.mosaic.interpret.interpret_pallas_call.races
  assert not races.races_found


@pytest.mark.parametrize('model', ['gpt2', 'llama3_70b'])
def test_each_array_moves_once(model):
  M, D, kind = SPECS[model]
  function, args = bench.case(*SPECS[model], 'tpu', is_training=True, has_residual=True)
  moved, rows, vectors = traffic(function, *args), 2 * M * D, 1 + (kind == 'layernorm')
  sums = vectors * 2 * 8 * D * 4  # of scale and bias, for each of two cores and each sublane
  assert moved['norm_forward'] == (2 * rows + vectors * 4 * D, 2 * rows)
  assert moved['norm_backward'] == (3 * rows + 4 * D, rows + sums)
  assert sums < 0.02 * rows


def lowered(platform, **options):
  x, scale = jax.ShapeDtypeStruct((32, 128), jnp.bfloat16), jnp.ones(128)
  call = lambda x, scale: jnp.sum(norm(x, scale, kind='rmsnorm', epsilon=1e-6, **options) * x)
  traced = jax.jit(jax.grad(call, argnums=(0, 1))).trace(x, scale)
  return traced.lower(lowering_platforms=(platform,))


def test_none_is_pallas_on_a_tpu_and_the_plain_program_on_a_cpu():
  on_tpu = lowered('tpu').as_text()
  assert 'norm_forward' in on_tpu and 'norm_backward' in on_tpu
  costs = [lowered('cpu', **options).compile().cost_analysis()
           for options in ({}, {'implementation': 'reference'})]
  for figure in ('flops', 'bytes accessed', 'transcendentals'):
    assert costs[0][figure] == costs[1][figure]


def test_what_the_kernels_do_not_take_is_refused_and_left_to_xla():
  x, scale = jnp.ones((2, 16), jnp.float16), jnp.ones(16)
  with pytest.raises(NotImplementedError, match='float16, the kernel takes bfloat16 and float32'):
    norm(x, scale, kind='rmsnorm', epsilon=0.0, implementation='tpu')
  np.testing.assert_allclose(norm(x, scale, kind='rmsnorm', epsilon=0.0), 1)
  with pytest.raises(NotImplementedError, match='D=32768 is more than 16384'):
    norm(jnp.ones((1, 2**15)), jnp.ones(2**15), kind='rmsnorm', epsilon=0.0, implementation='tpu')


@pytest.mark.parametrize('changes, message', [
    ({'scale': jnp.ones(15)}, r'scale has shape \(15,\), it must be \(16,\)'),
    ({'bias': jnp.ones(1)}, r'bias has shape \(1,\)'), ({'kind': 'batchnorm'}, "kind='batchnorm'"),
    ({'residual': jnp.ones((2, 16), jnp.bfloat16)}, 'residual is bfloat16'),
    ({'implementation': 'cuda'}, "implementation='cuda'")])
def test_arguments_that_do_not_fit_are_one_sentence(changes, message):
  fitting = dict(x=jnp.ones((2, 16)), scale=jnp.ones(16), kind='rmsnorm', epsilon=0.0)
  with pytest.raises(ValueError, match=message):
    norm(**{**fitting, **changes})
