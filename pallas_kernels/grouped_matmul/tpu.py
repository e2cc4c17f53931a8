"""`reference.product` and `reference.gradients` as Pallas kernels for TPUs.

The grid walks a list of visits, one for each pair of a tile of rows and a group that share rows,
prefetched as scalars: neighbouring visits share a tile or a group, so a matrix is read once for
each block of columns.
"""
import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import block_sizes
from pallas_kernels.grouped_matmul.block_sizes import LANES, LARGEST_CHUNK
from pallas_kernels.grouped_matmul.visits import Visits, visits


def refusal(x_MK, w_PKN) -> str | None:
  """Says why the kernels do not take these arrays, or None."""
  M, (groups, K, N) = len(x_MK), w_PKN.shape
  if x_MK.dtype not in (jnp.bfloat16, jnp.float32):
    return f'x is {x_MK.dtype}, the kernels take bfloat16 and float32'
  if not M * groups * K * N:
    return f'x is {x_MK.shape} and w {w_PKN.shape}, the kernels take no empty array'
  for size in (K, N):
    if size % LANES and size > LARGEST_CHUNK:
      return (f'w is {w_PKN.shape}, the kernels take contractions in multiples of {LANES} or up to '
              f'{LARGEST_CHUNK}')
  try:
    itemsize = x_MK.dtype.itemsize
    for name, *shape in (('product', K, N), ('product', N, K), ('weights', K, N)):
      block_sizes.find(name, M, *shape, groups, itemsize)
  except NotImplementedError as error:
    return str(error)
  return None


def product(x_MK, w_PKN, sizes_P, *, interpret, transposed=False, blocks=None):
  """Returns rows of group p times w[p] [M, N]; with `transposed` w is [P, N, K]."""
  (M, K), groups = x_MK.shape, len(w_PKN)
  w_PKN, N = w_PKN.astype(x_MK.dtype), w_PKN.shape[1 if transposed else 2]
  blocks = blocks or block_sizes.find('product', M, K, N, groups, x_MK.dtype.itemsize)
  rows, columns = blocks.rows, blocks.columns
  rest = M - sizes_P.sum(dtype=jnp.int32, keepdims=True)  # a last group, whose results are 0
  steps = visits(jnp.concatenate([sizes_P, rest]), M, rows, visits_empty=False)
  of = lambda step, visited: jnp.minimum(visited.group[step], groups - 1)
  w_spec = (pl.BlockSpec((None, columns, K), lambda j, s, *refs: (of(s, Visits(*refs)), j, 0))
            if transposed else
            pl.BlockSpec((None, K, columns), lambda j, s, *refs: (of(s, Visits(*refs)), 0, j)))
  return pl.pallas_call(
      functools.partial(_product_kernel, blocks, groups, transposed),
      jax.ShapeDtypeStruct((M, N), x_MK.dtype),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=len(steps), grid=(pl.cdiv(N, columns), len(steps.tile)),
          in_specs=[pl.BlockSpec((rows, K), lambda j, s, tile, *_: (tile[s], 0)), w_spec],
          out_specs=pl.BlockSpec((rows, columns), lambda j, s, tile, *_: (tile[s], j)),
          scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)]),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'),
                                           vmem_limit_bytes=blocks.vmem_bytes),
      name='grouped_matmul', interpret=interpret)(*steps, x_MK, w_PKN)


def _product_kernel(blocks, groups, transposed, *refs):
  visited, (x_ref, w_ref, y_ref, sums_ref) = Visits(*refs[:5]), refs[5:]
  step = pl.program_id(1)
  is_visit, group = step < visited.count[0], visited.group[step]
  sums_ref[...] = jnp.zeros_like(sums_ref)

  @pl.when(is_visit & (group < groups))
  def _():
    @pl.loop(0, x_ref.shape[1] // blocks.chunk)
    def _(k):
      at = pl.ds(pl.multiple_of(k * blocks.chunk, blocks.chunk), blocks.chunk)
      w = w_ref[:, at] if transposed else w_ref[at, :]
      sums_ref[...] += _dot(x_ref[:, at], w, 1, 1 if transposed else 0)

  @pl.when(is_visit)
  def _():
    is_own = _rows_of_group(visited, step, y_ref.shape)
    y_ref[...] = jnp.where(is_own, sums_ref[...].astype(y_ref.dtype), y_ref[...])


def weights_gradient(x_MK, dy_MN, sizes_P, dtype, *, interpret, blocks=None):
  """Returns x[rows of p]^T dy[rows of p], [P, K, N] in `dtype`."""
  (M, K), N, groups = x_MK.shape, dy_MN.shape[1], len(sizes_P)
  blocks = blocks or block_sizes.find('weights', M, K, N, groups, x_MK.dtype.itemsize)
  rows, columns, chunk = blocks[:3]
  steps = visits(sizes_P, M, rows, visits_empty=True)
  return pl.pallas_call(
      _weights_kernel, jax.ShapeDtypeStruct((groups, K, N), dtype),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=len(steps),
          grid=(pl.cdiv(K, chunk), pl.cdiv(N, columns), len(steps.tile)),
          in_specs=[pl.BlockSpec((rows, chunk), lambda i, j, s, tile, *_: (tile[s], i)),
                    pl.BlockSpec((rows, columns), lambda i, j, s, tile, *_: (tile[s], j))],
          out_specs=pl.BlockSpec((None, chunk, columns),
                                 lambda i, j, s, tile, group, *_: (group[s], i, j)),
          scratch_shapes=[pltpu.VMEM((chunk, columns), jnp.float32)]),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'arbitrary'),
          vmem_limit_bytes=blocks.vmem_bytes),
      name='grouped_matmul_weights', interpret=interpret)(*steps, x_MK, dy_MN)


def _weights_kernel(*refs):
  visited, (x_ref, dy_ref, dw_ref, sums_ref) = Visits(*refs[:5]), refs[5:]
  step = pl.program_id(2)
  group, last = visited.group[step], visited.count[0] - 1
  is_first = (step == 0) | (visited.group[jnp.maximum(step - 1, 0)] != group)

  @pl.when(step <= last)
  def _():
    # Written at each visit, the last one stands: vector units do that beside the matrix unit.
    own = lambda ref: jnp.where(_rows_of_group(visited, step, ref.shape), ref[...], 0)
    sums = jnp.where(is_first, 0, sums_ref[...]) + _dot(own(x_ref), own(dy_ref), 0, 0)
    sums_ref[...] = sums
    dw_ref[...] = sums.astype(dw_ref.dtype)


def gradients(x_MK, w_PKN, sizes_P, dy_MN, *, interpret, blocks=(None, None)):
  """The gradients of x and of w, each in its dtype."""
  dx_MK = product(dy_MN, w_PKN, sizes_P, interpret=interpret, transposed=True, blocks=blocks[0])
  return dx_MK, weights_gradient(x_MK, dy_MN, sizes_P, w_PKN.dtype, interpret=interpret,
                                 blocks=blocks[1])


def _rows_of_group(visited, step, shape):
  """Which rows of a tile [rows, columns] are of the visited group, as a mask of its shape."""
  group, rows = visited.group[step], shape[0]
  row = visited.tile[step] * rows + lax.broadcasted_iota(jnp.int32, shape, 0)
  return (row >= visited.start[group]) & (row < visited.end[group])


def _dot(a, b, a_axis, b_axis):
  """Contracts an axis of each in float32."""
  return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())),
                         precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
                         preferred_element_type=jnp.float32)
