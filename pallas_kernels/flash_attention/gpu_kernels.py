"""Attention's kernels for a GPU, in Triton by Pallas: FlashAttention-2 (arXiv:2307.08691, sections
3.1 and 3.2) between bounds that are given.

A program has one tile of queries (`forward`, `query_gradient`), or of keys (`key_gradient`), or a
diagonal of tiles (`distance_gradient`), and walks over the tiles that its mask leaves something of.
Each gradient has one writer, so that none is added up in an order that differs from run to run.
"""
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels import dropout
from pallas_kernels.flash_attention.reference import MASKED, NO_KEY, Options

LOG2_E = 1.4426950408889634
LEAST_SUM = 1e-30  # of a query that sees no key


class Tiles(NamedTuple):
  """What the kernels are compiled for: lengths, heads of H, and the queries and keys of a tile."""
  options: Options
  T: int
  S: int
  H: int
  queries: int
  keys: int

  @property
  def width(self) -> int:
    """Columns of a tile of heads: a power of two that the tensor cores take."""
    return max(16, pl.next_power_of_2(self.H))


def dot(x, y, contract: tuple[int, int]):
  """Contracts axis `contract[0]` of x with `contract[1]` of y, in float32."""
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
  return lax.dot_general(x, y, (((contract[0],), (contract[1],)), ((), ())), precision=precision,
                         preferred_element_type=jnp.float32)


def load(ref, index, mask):
  """The elements at an index, zeros where the mask is False; None is a mask of True."""
  return plgpu.load(ref.at[index], mask=mask, other=None if mask is None else 0)


def _within(first, size: int, length: int):
  """Boolean [size], False for what is beyond the length; None where nothing ever is."""
  return first + jnp.arange(size) < length if length % size else None


def _row(ref, first, size: int, length: int):
  """Elements first .. first + size of a row of `length`, zeros beyond it."""
  return load(ref, pl.ds(first, size), _within(first, size, length))


def _outer(rows, columns):
  """The mask [m, n] of masks [m] and [n], of which either may be None."""
  if rows is None or columns is None:
    return columns[None] if rows is None and columns is not None else (
        None if rows is None else rows[:, None])
  return rows[:, None] & columns[None]


def _place(tiles: Tiles, first, size: int, length: int):
  """(index, mask) of the rows first .. first + size in [length, width]."""
  columns = jnp.arange(tiles.width) < tiles.H if tiles.H < tiles.width else None
  return (pl.ds(first, size),), _outer(_within(first, size, length), columns)


def _queries(tiles, ref, name, first):
  return load(ref[name], *_place(tiles, first, tiles.queries, tiles.T))


def _keys(tiles, ref, name, first):
  return load(ref[name], *_place(tiles, first, tiles.keys, tiles.S))


def _store(tiles, ref, first, size: int, length: int, x):
  index, mask = _place(tiles, first, size, length)
  plgpu.store(ref.at[index], x.astype(ref.dtype), mask=mask)


def _sides(tiles, ref, first_q, first_k):
  """Columns [queries, 1] and rows [1, keys] by name, from which `_visible` judges."""
  queries = {'place': first_q + tiles.options.query_offset + jnp.arange(tiles.queries)}
  keys = {'place': first_k + jnp.arange(tiles.keys)}
  if 'offset' in ref:
    queries['place'] += ref['offset'][0]
  if 'query_ids' in ref:
    queries['ids'] = _row(ref['query_ids'], first_q, tiles.queries, tiles.T)
    keys['ids'] = _row(ref['key_ids'], first_k, tiles.keys, tiles.S)
  if 'prefix' in ref:
    keys['prefix'] = _row(ref['prefix'], first_k, tiles.keys, tiles.S) != 0
  return queries, keys


def _broadcast(tiles, ref, first_q, first_k, query_axis: int):
  """`_sides` with an axis of 1 each, so that they meet in a tile of queries along `query_axis`."""
  queries, keys = _sides(tiles, ref, first_q, first_k)
  return ({name: jnp.expand_dims(x, 1 - query_axis) for name, x in queries.items()},
          {name: jnp.expand_dims(x, query_axis) for name, x in keys.items()})


def _kept(tiles, ref, probs, first_q, first_k, query_axis: int):
  """A tile of probabilities, or of their gradients, after dropout."""
  if not tiles.options.dropout_rate:
    return probs
  queries, keys = _broadcast(tiles, ref, first_q, first_k, query_axis)
  seed = ref['seeds'][0]
  words = dropout.of_places(queries['place']) ^ (dropout.of_keys(keys['place']) ^ seed)
  return probs * dropout.of_words(tiles.options.dropout_rate, words)


def _visible(tiles, ref, first_q, first_k, query_axis: int):
  """Boolean tile of who sees whom, queries along `query_axis`; None if all see all."""
  options = tiles.options
  queries, keys = _broadcast(tiles, ref, first_q, first_k, query_axis)
  masks = []
  if options.causal:
    before = queries['place'] >= keys['place']
    masks.append(before | keys['prefix'] if 'prefix' in keys else before)
  if options.window is not None:
    masks.append(queries['place'] - keys['place'] < options.window)
    if not options.causal or 'prefix' in keys:
      masks.append(keys['place'] - queries['place'] < options.window)
  if tiles.S % tiles.keys:
    masks.append(jnp.expand_dims(first_k + jnp.arange(tiles.keys), query_axis) < tiles.S)
  if options.chunk is not None:
    masks.append(queries['place'] // options.chunk == keys['place'] // options.chunk)
  if 'ids' in keys:
    masks.append(queries['ids'] == keys['ids'])
  mask = None
  for more in masks:
    mask = more if mask is None else mask & more
  return mask


def _bias_place(tiles, first_q, first_k):
  """(index, mask) of a tile of [T, S]."""
  mask = _outer(_within(first_q, tiles.queries, tiles.T), _within(first_k, tiles.keys, tiles.S))
  return (pl.ds(first_q, tiles.queries), pl.ds(first_k, tiles.keys)), mask


def _base_2_scores(tiles, ref, products, first_q, first_k, query_axis: int):
  """Scores in units of log 2, and d(score) / d(scaled product) where that is not 1 (or None)."""
  scale, softcap = tiles.options.scale, tiles.options.softcap
  if softcap is None:
    scores, slope = products * (scale * LOG2_E), None
  else:
    bent = jnp.tanh(products * (scale / softcap))
    scores, slope = bent * (softcap * LOG2_E), 1 - bent * bent
  if 'bias' in ref:
    bias = load(ref['bias'], *_bias_place(tiles, first_q, first_k)).astype(jnp.float32)
    scores += (bias.T if query_axis else bias) * LOG2_E
  if 'distance_bias' in ref:
    queries, keys = _broadcast(tiles, ref, first_q, first_k, query_axis)
    reach = ref['distance_bias'].shape[-1] // 2
    entry = jnp.clip(keys['place'] - queries['place'], -reach, reach) + reach
    bias = load(ref['distance_bias'], (entry,), None)
    scores += bias.astype(jnp.float32) * LOG2_E
  mask = _visible(tiles, ref, first_q, first_k, query_axis)
  return scores if mask is None else jnp.where(mask, scores, MASKED * LOG2_E), slope


def forward(tiles: Tiles, ref, out):
  """Attends with one tile of queries of one head."""
  block = pl.num_programs(0) - 1 - pl.program_id(0)  # those that see most begin first
  first_q = block * tiles.queries
  query = _queries(tiles, ref, 'query', first_q)

  def visit(i, state):
    sums, largest, total = state
    first_k = i * tiles.keys
    products = dot(query, _keys(tiles, ref, 'key', first_k), (1, 1))
    scores, _ = _base_2_scores(tiles, ref, products, first_q, first_k, 0)
    above = jnp.maximum(largest, scores.max(1))
    exps, shrink = jnp.exp2(scores - above[:, None]), jnp.exp2(largest - above)
    value = _keys(tiles, ref, 'value', first_k)
    kept = _kept(tiles, ref, exps, first_q, first_k, 0)
    part = dot(kept.astype(value.dtype), value, (1, 0))
    return sums * shrink[:, None] + part, above, total * shrink + exps.sum(1)

  # The largest score and the total weight before any key: the sink's, if there is one.
  start = (ref['sinks'][0] * LOG2_E, 1.0) if 'sinks' in ref else (NO_KEY * LOG2_E, 0.0)
  state = (jnp.zeros((tiles.queries, tiles.width), jnp.float32),
           *(jnp.full(tiles.queries, x, jnp.float32) for x in start))
  bounds = ref['first'][block], ref['end'][block]
  sums, largest, total = lax.fori_loop(*bounds, visit, state)
  total = jnp.maximum(total, LEAST_SUM)
  _store(tiles, out['out'], first_q, tiles.queries, tiles.T, sums / total[:, None])
  plgpu.store(out['lse'].at[pl.ds(first_q, tiles.queries)],
              (largest + jnp.log2(total)) * (1 / LOG2_E),
              mask=_within(first_q, tiles.queries, tiles.T))


def _dscores(tiles, ref, operands, first_q, first_k, query_axis: int):
  """Recomputes a tile: its probabilities after dropout, the gradient of its scores and that of its
  products before they are scaled; `operands` are query, key, value and dout."""
  query, key, value, dout = operands
  sides = lambda q, k: (k, q) if query_axis else (q, k)
  products = dot(*sides(query, key), (1, 1))
  scores, slope = _base_2_scores(tiles, ref, products, first_q, first_k, query_axis)
  lse, delta = (jnp.expand_dims(_row(ref[name], first_q, tiles.queries, tiles.T),
                                1 - query_axis) for name in ('lse', 'delta'))
  probs = jnp.exp2(scores - lse * LOG2_E)
  kept = lambda x: _kept(tiles, ref, x, first_q, first_k, query_axis)
  dscores = probs * (kept(dot(*sides(dout, value), (1, 1))) - delta)
  return kept(probs), dscores, dscores if slope is None else dscores * slope


def query_gradient(tiles: Tiles, ref, out):
  """Computes 'dquery' of one tile of queries of one head and, where it is wanted, 'dbias'."""
  block = pl.num_programs(0) - 1 - pl.program_id(0)
  first_q = block * tiles.queries
  query, dout = (_queries(tiles, ref, name, first_q) for name in ('query', 'dout'))

  def write_dbias(i, x):
    index, mask = _bias_place(tiles, first_q, i * tiles.keys)
    plgpu.store(out['dbias'].at[index], x.astype(out['dbias'].dtype), mask=mask)

  def visit(i, dquery):
    first_k = i * tiles.keys
    key, value = (_keys(tiles, ref, name, first_k) for name in ('key', 'value'))
    _, dscores, dproducts = _dscores(tiles, ref, (query, key, value, dout), first_q, first_k,
                                     0)
    if 'dbias' in out:
      write_dbias(i, dscores)
    return dquery + dot(dproducts.astype(key.dtype), key, (1, 0))

  def unseen(i, _):
    write_dbias(i, jnp.zeros((tiles.queries, tiles.keys), jnp.float32))

  first, end = ref['first'][block], ref['end'][block]
  dquery = lax.fori_loop(first, end, visit,
                         jnp.zeros((tiles.queries, tiles.width), jnp.float32))
  _store(tiles, out['dquery'], first_q, tiles.queries, tiles.T, dquery * tiles.options.scale)
  if 'dbias' in out:
    lax.fori_loop(0, first, unseen, None)
    lax.fori_loop(end, pl.cdiv(tiles.S, tiles.keys), unseen, None)


def key_gradient(tiles: Tiles, ref, out):
  """Computes the gradients of one tile of keys and values by one head of queries.

  Scores are transposed, [keys, queries]: so the products that follow need no transpose.
  """
  block = pl.program_id(0)
  first_k = block * tiles.keys
  key, value = (_keys(tiles, ref, name, first_k) for name in ('key', 'value'))

  def visit(i, sums):
    dkey, dvalue = sums
    first_q = i * tiles.queries
    query, dout = (_queries(tiles, ref, name, first_q) for name in ('query', 'dout'))
    probs, _, dproducts = _dscores(tiles, ref, (query, key, value, dout), first_q, first_k, 1)
    dvalue += dot(probs.astype(dout.dtype), dout, (1, 0))
    return dkey + dot(dproducts.astype(query.dtype), query, (1, 0)), dvalue

  zeros = jnp.zeros((tiles.keys, tiles.width), jnp.float32)
  dkey, dvalue = lax.fori_loop(ref['first'][block], ref['end'][block], visit, (zeros, zeros))
  _store(tiles, out['dkey'], first_k, tiles.keys, tiles.S, dkey * tiles.options.scale)
  _store(tiles, out['dvalue'], first_k, tiles.keys, tiles.S, dvalue)


def distance_gradient(tiles: Tiles, ref, out):
  """Sums the gradients of scores over the tiles of one head on one diagonal of tiles."""
  diagonal = pl.program_id(0)
  ahead = diagonal - (pl.cdiv(tiles.T, tiles.queries) - 1)

  def visit(i, sums):
    first_q, first_k = i * tiles.queries, (i + ahead) * tiles.keys
    query, dout = (_queries(tiles, ref, name, first_q) for name in ('query', 'dout'))
    key, value = (_keys(tiles, ref, name, first_k) for name in ('key', 'value'))
    return sums + _dscores(tiles, ref, (query, key, value, dout), first_q, first_k, 0)[1]

  out['sums'][...] = lax.fori_loop(ref['first'][diagonal], ref['end'][diagonal], visit,
                                   jnp.zeros((tiles.queries, tiles.keys), jnp.float32))
