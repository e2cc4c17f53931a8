"""What both passes of the TPU kernel share: which blocks they visit, how heads lie in lanes, and
who sees whom within a block.

A tile is the lanes of one head, a multiple of 128, or 128 lanes of several narrower heads: arrays
are [B, length, heads * H] and a block never moves a head between lanes. Heads of a tile are told
apart by zeros in the operand that is contracted, and by selection in the result, so 64 wide heads
cost what the half-filled matrix unit costs and nothing more.
"""
from collections.abc import Callable
import functools
import itertools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import dropout
from pallas_kernels.chips import LANES
from pallas_kernels.flash_attention import reference
from pallas_kernels.flash_attention.reference import MASKED, Masking, Options

LOG2_E = 1.4426950408889634
BASE_2_MASKED = MASKED * LOG2_E


class Layout(NamedTuple):
  """How a call is cut into programs; all of it is known when the call is traced.

  T, S: lengths before padding to blocks. head: lanes of a head. share: heads of a tile.
  key_tiles: a program's. query_tiles: a program's for each of its key tiles. splits: programs
  among which the queries of one key tile are divided.
  """
  options: Options
  T: int
  S: int
  head: int
  share: int
  block_q: int
  block_k: int
  key_tiles: int
  query_tiles: int
  splits: int

  @property
  def width(self) -> int:
    """Lanes of a tile."""
    return self.head * self.share

  @property
  def heads(self) -> int:
    """Query heads of a program."""
    return self.key_tiles * self.query_tiles * self.share

  def tiles(self):
    """Yields ((lanes of queries, lanes of keys), first query head) of each tile of a program."""
    lanes = lambda tile: slice(tile * self.width, (tile + 1) * self.width)
    for tile in range(self.key_tiles * self.query_tiles):
      yield (lanes(tile), lanes(tile // self.query_tiles)), tile * self.share


def seen_distances(options: Options, prefix: bool) -> tuple[float, float]:
  """The least and the largest place(query) - place(key) at which a query may see a key."""
  reach = math.inf if options.window is None else options.window - 1.0
  return 0.0 if options.causal and not prefix else -reach, reach


def visited_blocks(options: Options, T: int, S: int, block_q: int, block_k: int,
                   masking: Masking = Masking()) -> list[tuple[int, int]]:
  """Lists the (query block, key block) of which some query may see some key, whatever the arrays of
  `masking` hold: all of them if those give an offset."""
  least, largest = seen_distances(options, masking.prefix is not None)
  queries = _chunks(options, T, block_q, options.query_offset)
  keys = _chunks(options, S, block_k, 0)

  def sees(q, k):
    return any(queries[q][chunk][1] - keys[k][chunk][0] >= least
               and queries[q][chunk][0] - keys[k][chunk][1] <= largest
               for chunk in queries[q].keys() & keys[k].keys())

  return [(q, k) for q, k in itertools.product(range(len(queries)), range(len(keys)))
          if masking.query_offset is not None or sees(q, k)]


def _chunks(options, length, block, offset):
  """The chunks that each block has a part of, as {chunk: the part's (first, last) place}."""
  size = options.chunk
  ends = [(start + offset, min(start + block, length) - 1 + offset)
          for start in range(0, length, block)]
  if size is None:
    return [{0: end} for end in ends]
  return [{chunk: (max(first, chunk * size), min(last, (chunk + 1) * size - 1))
           for chunk in range(first // size, last // size + 1)} for first, last in ends]


def visits(layout: Layout, masking: Masking, by_key: bool) -> jax.Array:
  """Lists the visits in order, int32 [4, visits]: query block, key block, and whether it is the
  first visit of that query block and of that key block.

  Visits of a query block, or `by_key` of a key block, follow each other. A block that nothing
  visits is visited once, for its result (zeros) to be written.
  """
  blocks = visited_blocks(layout.options, layout.T, layout.S, layout.block_q, layout.block_k,
                          masking)
  last_q, last_k = pl.cdiv(layout.T, layout.block_q) - 1, pl.cdiv(layout.S, layout.block_k) - 1
  blocks += [(q, last_k) for q in set(range(last_q + 1)) - {q for q, _ in blocks}]
  if by_key:
    blocks += [(last_q, k) for k in set(range(last_k + 1)) - {k for _, k in blocks}]
  blocks.sort(key=lambda block: block[::-1] if by_key else block)
  queries, keys = zip(*blocks)
  return jnp.array([queries, keys, _first_visits(queries), _first_visits(keys)], jnp.int32)


def _first_visits(blocks):
  seen = set()
  return [not (block in seen or seen.add(block)) for block in blocks]


def mask_arrays(layout: Layout, B: int, masking: Masking) -> dict[str, jax.Array]:
  """What a mask needs beside the offset, int32 [B, 1, length], as rows of lanes: the arrays of
  `masking`, and the chunk of each query and key."""
  options = layout.options
  named = {'query_ids': masking.query_segment_ids, 'key_ids': masking.key_segment_ids,
           'prefix': masking.prefix if options.causal else None}
  if options.chunk is not None:
    chunks = lambda places: jnp.broadcast_to(places // options.chunk, (B, places.shape[-1]))
    named['query_chunks'] = chunks(reference.places(options, layout.T, masking))
    named['key_chunks'] = chunks(jnp.arange(layout.S))
  return {name: x[:, None].astype(jnp.int32) for name, x in named.items() if x is not None}


class Visit(NamedTuple):
  """What a kernel knows of the block that it visits.

  first_q, first_k: its first query and key. query_axis: that of queries in a block of scores, 0 or
  1. mask: of `visible`. factors: of `dropout_factors`.
  """
  first_q: jax.Array
  first_k: jax.Array
  query_axis: int
  mask: jax.Array | None
  factors: Callable[[int], jax.Array | float]


def visit(layout: Layout, ref, first_q, first_k, offset, query_axis: int) -> Visit:
  """The visit of a block, where query 0 stands at place `offset`."""
  first_place = first_q + offset
  return Visit(first_q, first_k, query_axis,
               visible(layout, ref, first_place - first_k, first_k, query_axis),
               dropout_factors(layout, ref, first_place, first_k, query_axis))


def visible(layout: Layout, ref, distance, first_k, query_axis: int):
  """Boolean block of who sees whom, queries along `query_axis`; None if all see all.

  Args:
    layout: of the call.
    ref: the kernel's blocks by name; those of `mask_arrays` count.
    distance: the place of the block's first query among the keys, less that of its first key.
    first_k: the place of its first key.
    query_axis: 0 or 1.
  """
  shape = (layout.block_q, layout.block_k)[::1 - 2 * query_axis]
  index = functools.partial(lax.broadcasted_iota, jnp.int32, shape)
  spread = lambda row, axis: _columns(row, shape[1]) if axis == 0 else row
  ahead = index(query_axis) - index(1 - query_axis)
  least, largest = seen_distances(layout.options, 'prefix' in ref)
  masks = []
  if math.isfinite(least):
    masks.append(ahead >= int(least) - distance)
  if math.isfinite(largest):
    masks.append(ahead <= int(largest) - distance)
  if 'prefix' in ref:
    masks.append((ahead >= -distance) | (spread(ref['prefix'][0], 1 - query_axis) != 0))
  if layout.S % layout.block_k:
    masks.append(index(1 - query_axis) < layout.S - first_k)
  for of_queries, of_keys in (('query_ids', 'key_ids'), ('query_chunks', 'key_chunks')):
    if of_queries in ref:
      masks.append(spread(ref[of_queries][0], query_axis)
                   == spread(ref[of_keys][0], 1 - query_axis))
  return functools.reduce(jnp.logical_and, masks) if masks else None


def dropout_factors(layout: Layout, ref, first_place, first_k, query_axis: int):
  """A function of a program's head: what dropout multiplies a block of its probabilities by, with
  queries along `query_axis`."""
  rate, lengths = layout.options.dropout_rate, (layout.block_q, layout.block_k)
  if not rate:
    return lambda head: 1.0
  rows, lanes = lengths[::1 - 2 * query_axis]
  words = [dropout.of_places, dropout.of_keys][::1 - 2 * query_axis]
  first = [first_place, first_k][::1 - 2 * query_axis]
  down = words[0](lax.broadcasted_iota(jnp.int32, (rows, LANES), 0) + first[0])
  along = words[1](lax.broadcasted_iota(jnp.int32, (1, lanes), 1) + first[1])
  down = jnp.tile(down, (1, lanes // LANES))
  return lambda head: dropout.of_words(rate, down ^ (along ^ ref['seeds'][0, 0, 0, head]))


def _columns(row, m):
  """Turns [1, n] into [n, m]: each of its lanes becomes a row of equal elements."""
  column = jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))
  return jnp.tile(column, (1, m // LANES))


def base_2_scores(layout: Layout, products, bias, mask):
  """Scores in units of log 2, and d(score) / d(scaled product) where that is not 1 (or None)."""
  scale, softcap = layout.options.scale, layout.options.softcap
  if softcap is None:
    scores, slope = products * (scale * LOG2_E), None
  else:
    bent = jnp.tanh(products * (scale / softcap))
    scores, slope = bent * (softcap * LOG2_E), 1 - bent * bent
  if bias is not None:
    scores += bias * LOG2_E
  return scores if mask is None else jnp.where(mask, scores, BASE_2_MASKED), slope


def head_of_lane(layout: Layout):
  """int32 [1, width], the head within its tile of each lane."""
  return lax.broadcasted_iota(jnp.int32, (1, layout.width), 1) >> (layout.head.bit_length() - 1)


def one_head(layout: Layout, x, head: int):
  """A tile with zeros in all lanes but one head's."""
  return x if layout.share == 1 else jnp.where(head_of_lane(layout) == head, x, jnp.zeros_like(x))


def merge_heads(layout: Layout, of_heads: tuple):
  """Takes each head's lanes from its own array, of a tile's width."""
  merged = of_heads[0]
  for head, x in enumerate(of_heads[1:], 1):
    merged = jnp.where(head_of_lane(layout) == head, x, merged)
  return merged


def dot(x, y, contract: tuple[int, int]):
  """Contracts axis `contract[0]` of x with `contract[1]` of y, in float32."""
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
  return lax.dot_general(x, y, (((contract[0],), (contract[1],)), ((), ())), precision=precision,
                         preferred_element_type=jnp.float32)


def block_specs(layout: Layout) -> dict[str, pl.BlockSpec]:
  """The blocks of a program by the name of their array; a grid is (B, programs, visits)."""
  q_lanes = layout.key_tiles * layout.query_tiles * layout.width
  k_lanes = layout.key_tiles * layout.width
  block_q, block_k, heads = layout.block_q, layout.block_k, layout.heads
  # `index` takes the batch, the program, the query block and the key block.
  spec = lambda shape, index: pl.BlockSpec(
      shape, lambda b, h, s, q, k, *_: index(b, h, q[s], k[s]))
  queries = spec((1, block_q, q_lanes), lambda b, h, q, k: (b, q, h))
  of_program = lambda h: h if layout.splits == 1 else lax.div(h, jnp.int32(layout.splits))
  keys = spec((1, block_k, k_lanes), lambda b, h, q, k: (b, k, of_program(h)))
  query_row = spec((1, heads, 1, block_q), lambda b, h, q, k: (b, h, 0, q))
  query_ids = spec((1, 1, block_q), lambda b, h, q, k: (b, 0, q))
  key_ids = spec((1, 1, block_k), lambda b, h, q, k: (b, 0, k))
  scores = spec((1, heads, block_q, block_k), lambda b, h, q, k: (b, h, q, k))
  return {
      'query': queries, 'key': keys, 'value': keys, 'out': queries, 'dout': queries,
      'lse': query_row, 'delta': query_row, 'query_ids': query_ids, 'query_chunks': query_ids,
      'key_ids': key_ids, 'key_chunks': key_ids, 'prefix': key_ids,
      'bias': scores, 'dbias': scores,
      'shared_bias': spec((1, heads, block_q, block_k), lambda b, h, q, k: (0, h, q, k)),
      'dkey': spec((1, block_k, k_lanes), lambda b, h, q, k: (b, k, h)),
      'seeds': pl.BlockSpec((1, 1, 1, heads), lambda b, h, *_: (b, h, 0, 0),
                            memory_space=pltpu.SMEM),
      'sinks': pl.BlockSpec((1, 1, 1, heads), lambda b, h, *_: (0, h, 0, 0),
                            memory_space=pltpu.SMEM),
  }


def bias_of(ref, head: int):
  """The block of the bias of one head of a program, float32 [block_q, block_k], or None."""
  for name in ('bias', 'shared_bias'):
    if name in ref:
      return ref[name][0, head].astype(jnp.float32)
  return None
