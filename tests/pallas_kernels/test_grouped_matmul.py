"""Products of groups of rows: values, gradients, visits, and what the TPU compiler says of them."""
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
import numpy as np
import pytest

from pallas_kernels import chips
from pallas_kernels.grouped_matmul import block_sizes, grouped_matmul, tpu
from pallas_kernels.grouped_matmul.block_sizes import Blocks

TOLERANCE = {'float32': 1e-5, 'bfloat16': 1e-2}
SMALL = Blocks(rows=32, columns=128, chunk=128)
# sizes of the groups, M, K, N, dtypes of x and of w
CASES = {
    'even': ((64, 64, 64), 192, 128, 128, 'float32', 'float32'),
    'tails': ((3, 50, 1, 77), 131, 24, 130, 'float32', 'float32'),
    'empty groups': ((0, 70, 0, 0, 31, 0), 101, 128, 40, 'float32', 'float32'),
    'rows of no group': ((20, 0, 45), 140, 64, 70, 'float32', 'float32'),
    'no rows': ((0, 0), 40, 32, 64, 'float32', 'float32'),
    'bfloat16': ((130, 7, 163), 300, 256, 130, 'bfloat16', 'bfloat16'),
    'masters': ((33, 0, 64), 97, 128, 256, 'bfloat16', 'float32'),
}


def operands(sizes, M, K, N, x_dtype, w_dtype):
  """x, w, group_sizes and the gradient of the product."""
  rng = np.random.default_rng(M + K + N)
  draw = lambda dtype, *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return (draw(x_dtype, M, K), draw(w_dtype, len(sizes), K, N), jnp.asarray(sizes, jnp.int32),
          draw(x_dtype, M, N))


def exact(x, w, sizes, dy):
  """The product and its gradients in float64, of the values multiplied."""
  w = w.astype(x.dtype)
  x, w, dy = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, w, dy))
  y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
  end = np.cumsum(sizes)
  for g, (start, stop) in enumerate(zip(end - sizes, end)):
    rows = slice(start, stop)
    y[rows], dx[rows], dw[g] = x[rows] @ w[g], dy[rows] @ w[g].T, x[rows].T @ dy[rows]
  return y, dx, dw


def error(got, want):
  norm = np.linalg.norm(want)
  return np.linalg.norm(np.asarray(got, np.float64) - want) / (norm if norm else 1)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(implementation, x, w, sizes, dy):
  y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
  return y, *vjp(dy)


@pytest.mark.supports('kernels', 'experts that drop no token, in groups of any size')
@pytest.mark.parametrize('implementation', ['reference', 'tpu'])
@pytest.mark.parametrize('case', CASES)
def test_products_and_gradients_are_float64s(case, implementation):
  x, w, sizes, dy = args = operands(*CASES[case])
  got = with_gradients(implementation, *args)
  assert [a.dtype for a in got] == [x.dtype, x.dtype, w.dtype]
  errors = [error(a, b) for a, b in zip(got, exact(*args))]
  assert all(e <= TOLERANCE[x.dtype.name] for e in errors), errors  # NaN fails


def test_gradients_of_float32_masters_are_not_rounded():
  x, w, sizes, dy = args = operands(*CASES['masters'])
  assert error(with_gradients('tpu', *args)[2], exact(*args)[2]) <= 1e-6


@pytest.mark.parametrize('case', ['tails', 'rows of no group'])
def test_small_blocks_change_nothing_and_read_nothing_unwritten(case):
  """In a simulated memory whose unwritten places are NaN, also behind the arrays' ends."""
  x, w, sizes, dy = args = operands(*CASES[case])
  interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan',
                                    out_of_bounds_reads='uninitialized')
  y = tpu.product(x, w, sizes, interpret=interpret, blocks=small(x.shape[1]))
  grads = tpu.gradients(x, w, sizes, dy, interpret=interpret,
                        blocks=(small(dy.shape[1]), SMALL))
  errors = [error(a, b) for a, b in zip((y, *grads), exact(*args))]
  assert all(e <= 1e-5 for e in errors), errors
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call
  assert not interpret_pallas_call.races.races_found


def small(contraction):
  """Blocks that cut tiny arrays several times."""
  return SMALL._replace(chunk=128 if contraction % 128 == 0 else contraction)


@pytest.mark.parametrize('visits_empty', [False, True])
@pytest.mark.parametrize('sizes', [(64, 64), (3, 50, 1, 77), (0, 70, 0, 0, 61, 0), (0, 0, 131)])
def test_only_pairs_of_a_tile_and_a_group_that_share_rows_are_visited(sizes, visits_empty):
  M = sum(sizes)
  steps = tpu.visits(jnp.array(sizes, jnp.int32), M, 32, visits_empty)
  pairs = [(int(t), int(g)) for t, g in zip(steps.tile, steps.group)]
  end, want = np.cumsum(sizes), []
  for g, size in enumerate(sizes):
    tiles = sorted({row // 32 for row in range(end[g] - size, end[g])})
    nearest = min((end[g] - size) // 32, (M - 1) // 32)
    want += [(t, g) for t in tiles] or [(nearest, g)] * visits_empty
  count = int(steps.count[0])
  assert pairs[:count] == want
  assert set(pairs[count:]) <= {want[-1]}  # the others move nothing and compute nothing


def test_what_does_not_fit_is_named():
  x, w, sizes, _ = operands(*CASES['even'])
  with pytest.raises(ValueError, match=r'must be \[M, K\] and \[G, K, N\]'):
    grouped_matmul(x[:, :5], w, sizes)
  with pytest.raises(ValueError, match='group_sizes is float32'):
    grouped_matmul(x, w, sizes.astype(jnp.float32))


def test_what_the_kernels_refuse_is_named_and_left_to_xla():
  x, w, sizes, dy = args = operands((5, 6), 11, 1030, 8, 'float32', 'float32')
  with pytest.raises(NotImplementedError, match='contractions in multiples of 128'):
    grouped_matmul(x, w, sizes, implementation='tpu')
  assert error(grouped_matmul(x, w, sizes), exact(*args)[0]) <= 1e-5


@pytest.mark.parametrize('chip', chips.VMEM_MIB)
def test_blocks_fit_their_generation(chip):
  for M, K, N in ((16, 24, 130), (16384, 4096, 14336), (16384, 14336, 4096), (65536, 2048, 768)):
    for name in ('product', 'weights'):
      blocks = block_sizes.find(name, M, K, N, 8, 2, chip)
      assert not blocks.rows % 32 and not blocks.columns % 128
      assert block_sizes.vmem_bytes(name, blocks, K, 2) <= blocks.vmem_bytes
      assert name == 'weights' or not K % blocks.chunk
