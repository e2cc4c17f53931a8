"""Attention's forward pass on a TPU: FlashAttention (arXiv:2205.14135, algorithm 1) over a list of
the blocks that the mask leaves something of.

The result of a block of queries is normalised and written at each visit, the last one's stands: the
vector units do that while the matrix unit works, and no visit pays for a branch. There are two
forms. Of heads that fill the lanes, scores are [queries, keys]. Of narrower ones they are
transposed: the values' columns are then the rows of a product, so that half-empty tiles cost half,
and what is kept of a query is a lane of a single row.
"""
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.flash_attention import tpu_blocks, tpu_positions
from pallas_kernels.flash_attention.reference import NO_KEY
from pallas_kernels.flash_attention.tpu_blocks import LANES, LOG2_E

BASE_2_NO_KEY = NO_KEY * LOG2_E
LEAST_SUM = 1e-30  # of a query that sees no key
AHEAD = 2  # scores that the matrix unit computes before it waits for a softmax


def _row_of(column):
  """[n, 128] of equal lanes -> [1, n], by the diagonal of each square."""
  square = functools.partial(lax.broadcasted_iota, jnp.int32, (LANES, LANES))
  diagonal = square(0) == square(1)
  squares = jnp.split(column, column.shape[0] // LANES)
  return jnp.concatenate([jnp.where(diagonal, x, 0.0).sum(0, keepdims=True) for x in squares], 1)


def _inverse(x, newton_steps: int):
  """1 / x from the hardware's estimate of at least 8 bits, which each step doubles."""
  y = pl.reciprocal(x, approx=True)
  for _ in range(newton_steps):
    y *= 2.0 - x * y
  return y


def _start(ref, head):
  """The largest score and the total weight before any key: the sink's, if there is one."""
  return (ref['sinks'][0, 0, 0, head] * LOG2_E, 1.0) if 'sinks' in ref else (BASE_2_NO_KEY, 0.0)


def _wide(layout, ref, out_ref, lse_ref, state, visit, is_first, lanes, head):
  """A visit of one head that fills its tile.

  state: float32 [heads, block_q, width], the weighted sum of values; [heads, block_q, 128], the
  largest score in all lanes; and like it, the total weight as a sum over lanes.
  """
  sum_ref, max_ref, total_ref = state
  q_lanes, k_lanes = lanes
  value = ref['value'][0, :, k_lanes]
  wide = lambda x, width: jnp.tile(x, (1, width // LANES))
  products = tpu_blocks.dot(ref['query'][0, :, q_lanes], ref['key'][0, :, k_lanes], (1, 1))
  added = tpu_positions.scores(layout, ref, visit, q_lanes, head)
  scores, _ = tpu_blocks.base_2_scores(layout, products, added, visit.mask)
  largest, weight = _start(ref, head)
  before = jnp.where(is_first, largest, max_ref[head])
  largest = jnp.maximum(before, scores.max(1, keepdims=True))
  exps = jnp.exp2(scores - wide(largest, layout.block_k))
  shrink = jnp.exp2(before - largest)
  total = jnp.where(is_first, weight / LANES, total_ref[head]) * shrink + functools.reduce(
      jnp.add, jnp.split(exps, layout.block_k // LANES, 1))
  part = tpu_blocks.dot((exps * visit.factors(head)).astype(value.dtype), value, (1, 0))
  sums = jnp.where(is_first, 0.0, sum_ref[head]) * wide(shrink, layout.width) + part
  sum_ref[head], max_ref[head], total_ref[head] = sums, largest, total
  total = jnp.maximum(total.sum(1, keepdims=True), LEAST_SUM)
  total = jnp.broadcast_to(total, largest.shape)
  lse_ref[0, head] = (_row_of(largest) + jnp.log2(_row_of(total))) * (1 / LOG2_E)
  inverse = _inverse(total, 2 if value.dtype == jnp.float32 else 0)
  out_ref[0, :, q_lanes] = (sums * wide(inverse, layout.width)).astype(out_ref.dtype)


def _narrow(layout, ref, lse_ref, state, visit, is_first, products, lanes, head):
  """A visit of one of a tile's heads: returns its result so far, float32 [head, block_q].

  products: float32 [block_k, block_q], of its queries and keys.
  state: float32 [heads, head, block_q], the weighted sum of values; [heads, 1, block_q], the
  largest score; and like it, the total weight.
  """
  sum_ref, max_ref, total_ref = state
  q_lanes, k_lanes = lanes
  added = tpu_positions.scores(layout, ref, visit, q_lanes, head)
  scores, _ = tpu_blocks.base_2_scores(layout, products, added, visit.mask)
  largest, weight = _start(ref, head)
  before = jnp.where(is_first, largest, max_ref[head])
  largest = jnp.maximum(before, scores.max(0, keepdims=True))
  exps, shrink = jnp.exp2(scores - largest), jnp.exp2(before - largest)
  total = jnp.where(is_first, weight, total_ref[head]) * shrink + exps.sum(0, keepdims=True)
  rows = slice(head % layout.share * layout.head, (head % layout.share + 1) * layout.head)
  value_HS = ref['value'][0, :, k_lanes].T[rows]
  part = tpu_blocks.dot(value_HS, (exps * visit.factors(head)).astype(value_HS.dtype), (1, 0))
  sums = jnp.where(is_first, 0.0, sum_ref[head]) * shrink + part
  sum_ref[head], max_ref[head], total_ref[head] = sums, largest, total
  total = jnp.maximum(total, LEAST_SUM)
  lse_ref[0, head] = (largest + jnp.log2(total)) * (1 / LOG2_E)
  return sums * (1 / total)


def _narrow_tiles(layout, ref, out_ref, lse_ref, state, visit, is_first):
  """A visit of all tiles of narrow heads. Products are asked for AHEAD of the softmax that needs
  them: the compiler keeps the order, and else one unit would wait for the other."""
  waiting, outs = [], []

  def finish():
    products, lanes, head = waiting.pop(0)
    outs.append(_narrow(layout, ref, lse_ref, state, visit, is_first, products, lanes, head))
    if len(outs) == layout.share:
      out_ref[0, :, lanes[0]] = jnp.concatenate(outs).T.astype(out_ref.dtype)
      outs.clear()

  for lanes, first_head in layout.tiles():
    query, key = ref['query'][0, :, lanes[0]], ref['key'][0, :, lanes[1]]
    for i in range(layout.share):
      products = tpu_blocks.dot(key, tpu_blocks.one_head(layout, query, i), (1, 1))
      waiting.append((products, lanes, first_head + i))
      if len(waiting) > AHEAD:
        finish()
  while waiting:
    finish()


def _kernel(layout, query_block, key_block, first_visit, _, offset, ref, out_ref, lse_ref, *state):
  """A visit: updates the weighted sums of values, and writes what they are so far."""
  step = pl.program_id(2)
  first_q, first_k = query_block[step] * layout.block_q, key_block[step] * layout.block_k
  is_first, query_axis = first_visit[step] == 1, 0 if layout.share == 1 else 1
  visit = tpu_blocks.visit(layout, ref, first_q, first_k, offset[pl.program_id(0)], query_axis)
  if layout.share > 1:
    _narrow_tiles(layout, ref, out_ref, lse_ref, state, visit, is_first)
    return
  for lanes, head in layout.tiles():
    _wide(layout, ref, out_ref, lse_ref, state, visit, is_first, lanes, head)


def _state(layout):
  """The shapes of what is kept from visit to visit: see `_wide` and `_narrow`."""
  if layout.share > 1:
    shapes = (layout.head, layout.block_q), (1, layout.block_q), (1, layout.block_q)
  else:
    shapes = (layout.block_q, layout.width), (layout.block_q, LANES), (layout.block_q, LANES)
  return [pltpu.VMEM((layout.heads, *shape), jnp.float32) for shape in shapes]


def forward(layout: tpu_blocks.Layout, visits, offset, arrays: dict[str, jax.Array], *,
            interpret: bool | pltpu.InterpretParams, vmem_bytes: int):
  """Returns out, like arrays['query'], and the log-sum-exp, float32 [B, N, 1, T].

  Args:
    layout: whose blocks divide the lengths of `arrays`.
    visits: of `tpu_blocks.visits`, by query.
    offset: int32 [B].
    arrays: 'query' [B, T, N * head], 'key' and 'value' [B, S, K * head], and what more
      `tpu_blocks.block_specs` and `tpu_positions.block_specs` name of the inputs.
    interpret: whether to run without a TPU.
    vmem_bytes: the kernel's share of VMEM.
  """
  specs = tpu_blocks.block_specs(layout) | tpu_positions.block_specs(layout, arrays)
  B, T, q_lanes = arrays['query'].shape
  heads = q_lanes // layout.head
  lanes = specs['query'].block_shape[-1]
  grid_spec = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5, grid=(B, q_lanes // lanes, visits.shape[1]),
      in_specs=[{name: specs[name] for name in arrays}], out_specs=[specs['out'], specs['lse']],
      scratch_shapes=_state(layout))
  return pl.pallas_call(
      functools.partial(_kernel, layout), grid_spec=grid_spec,
      out_shape=[jax.ShapeDtypeStruct(arrays['query'].shape, arrays['query'].dtype),
                 jax.ShapeDtypeStruct((B, heads, 1, T), jnp.float32)],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=vmem_bytes),
      interpret=interpret, name='flash_attention_forward')(*visits, offset, arrays)
