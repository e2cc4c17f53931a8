"""Attention over a length that is cut over devices: its keys go round a ring of them.

Each device keeps its queries and visits one part of the keys after another, which its neighbour
sends while it computes (ring attention, arXiv:2310.01889). Results over the parts are merged by
their log-sum-exp; the backward pass goes round once more, with the gradients of the keys, and keeps
no more than a device's own part.

Where queries see only what stands before them, the first devices of a row in its natural order
would idle. In zig-zag order device i of n has the chunks i and 2n - 1 - i of 2n (Llama 3,
arXiv:2407.21783, section 3.3.2; ring-flash-attention's zigzag form), and in each visit all devices
have equally much to do: two pairs of chunks, neither of which needs a causal mask.
"""
import functools
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from lm.parallel.rules import Rules, axes_of, per_device
from pallas_kernels.flash_attention import flash_attention

NO_KEY = -5e29  # the log-sum-exp of a query that sees no key, as the kernels have it
_SEED_STEP = 0x9e3779b9  # odd, so that all parts of the keys have seeds of their own

Part = tuple[jax.Array, jax.Array | None]  # out [B, T, N, H], and its log-sum-exp [B, N, T]


class Ring(NamedTuple):
  """What a program is compiled for.

  axes: mesh axes, over whose `size` devices the length is cut.
  zigzag: whether rows are in zig-zag order, for which attention must be causal.
  query_offset: the place of query 0 among the keys, in a natural order.
  options: of `flash_attention`, (name, value) pairs beside `causal` and `window`.
  """
  axes: tuple[str, ...]
  size: int
  zigzag: bool
  causal: bool
  window: int | None
  query_offset: int
  options: tuple[tuple[str, Any], ...]


class Arrays(NamedTuple):
  """Arguments of `flash_attention`: of the queries, of the keys, and of neither."""
  queries: dict[str, jax.Array]
  keys: dict[str, jax.Array]
  others: dict[str, jax.Array]


_KEYS = ('key', 'value', 'key_segment_ids', 'prefix')
_QUERIES = ('query', 'relative_query', 'query_segment_ids')
_DATA = ('key_segment_ids', 'prefix', 'query_segment_ids', 'dropout_seeds')  # without a gradient


def is_zigzag(rules: Rules, length: int) -> bool:
  """Whether rows of this many tokens are put into zig-zag order, where attention is causal."""
  shards = rules.shards('length')
  return rules.attention == 'ring' and shards > 1 and length % (2 * shards) == 0


def zigzag(x: jax.Array, rules: Rules) -> jax.Array:
  """Puts rows [B, T, ...] into zig-zag order; each device exchanges its halves with two others."""
  return _reorder(x, rules, _into_zigzag)


def unzigzag(x: jax.Array, rules: Rules) -> jax.Array:
  """Puts rows [B, T, ...] back into their natural order."""
  return _reorder(x, rules, _from_zigzag)


def _reorder(x, rules, function):
  names = ('batch', 'length', *[None] * (x.ndim - 2))
  exchange = functools.partial(function, axes_of(rules.length), rules.shards('length'))
  return per_device(exchange, rules, names, {'x': names}, x=x)


def _owner(chunk, size):
  """The device that has a chunk in zig-zag order."""
  return min(chunk, 2 * size - 1 - chunk)


def _into_zigzag(axes, size, x):
  """Of the natural chunks 2i and 2i + 1: two permutations of the devices, of all even and all odd
  chunks."""
  even, odd = (jax.lax.ppermute(half, axes, [(i, _owner(2 * i + odd, size)) for i in range(size)])
               for odd, half in enumerate(jnp.split(x, 2, axis=1)))
  is_even = jax.lax.axis_index(axes) % 2 == 0  # then so is chunk i, and 2n - 1 - i is odd
  return jnp.concatenate([jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)], axis=1)


def _from_zigzag(axes, size, x):
  """The inverse of `_into_zigzag`."""
  first, second = jnp.split(x, 2, axis=1)
  is_even = jax.lax.axis_index(axes) % 2 == 0
  halves = jnp.where(is_even, first, second), jnp.where(is_even, second, first)
  return jnp.concatenate(
      [jax.lax.ppermute(half, axes, [(_owner(2 * i + odd, size), i) for i in range(size)])
       for odd, half in enumerate(halves)], axis=1)


def ring_attention(ring: Ring, **arrays: jax.Array) -> jax.Array:
  """`flash_attention` of each device's queries to the keys of all; called in `jax.shard_map`.

  Dropout draws from the same distribution as on one device, but other numbers.

  Args:
    ring: what the program is compiled for.
    arrays: of `flash_attention`: the device's part of each that has a length, the whole of others.
  """
  pick = lambda names: {name: arrays[name] for name in names if name in arrays}
  others = {name: x for name, x in arrays.items() if name not in _KEYS + _QUERIES}
  return _attend(ring, Arrays(pick(_QUERIES), pick(_KEYS), others))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring, arrays):
  return _forward(ring, arrays)[0]


def _forward(ring, arrays):
  def visit(step, keys):
    here = arrays._replace(keys=keys)
    return _if_seen(ring, step, here, lambda: _visit(ring, step, here),
                    lambda: _nothing(arrays.queries['query']))

  def turn(carry, step, is_last=False):
    so_far, keys = carry
    arriving = keys if is_last else _pass_on(ring, keys)
    return (_merge(so_far, visit(step, keys)), arriving), None

  start = visit(0, arrays.keys), _pass_on(ring, arrays.keys)
  ((out, lse), _), _ = _turns(ring, turn, start)
  out = out.astype(arrays.queries['query'].dtype)
  out, lse = (checkpoint_name(x, 'attention') for x in (out, lse))  # a policy may keep them
  return out, (arrays, out, lse)


def _backward(ring, residuals, g):
  arrays, out, lse = residuals

  def gradients(step, keys):
    """Of what has a gradient in each of `arrays`, float32."""
    here = arrays._replace(keys=keys)
    split = lambda is_data: Arrays(*({name: x for name, x in group.items()
                                      if (name in _DATA) == is_data} for group in here))
    data, inputs = split(True), split(False)
    join = lambda inputs: Arrays(*(x | y for x, y in zip(inputs, data)))

    def seen():
      _, vjp = jax.vjp(lambda inputs: _visit(ring, step, join(inputs), (out, lse))[0], inputs)
      return jax.tree.map(lambda x: x.astype(jnp.float32), vjp(g)[0])

    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), inputs)
    return _if_seen(ring, step, here, seen, zeros)

  def turn(carry, step, is_last=False):
    so_far, keys = carry
    arriving = keys if is_last else _pass_on(ring, keys)
    so_far = so_far._replace(keys=_pass_on(ring, so_far.keys))  # theirs go with the keys
    return (jax.tree.map(jnp.add, so_far, gradients(step, keys)), arriving), None

  start = gradients(0, arrays.keys), _pass_on(ring, arrays.keys)
  (grads, _), _ = _turns(ring, turn, start)
  grads = grads._replace(keys=_pass_on(ring, grads.keys))  # home

  def of(group, found):
    return {name: found[name].astype(x.dtype) if name in found
            else jnp.zeros(x.shape, jax.dtypes.float0) for name, x in group.items()}
  return Arrays(*map(of, arrays, grads)),


_attend.defvjp(_forward, _backward)


def _turns(ring, turn, carry):
  """The visits 1 .. n - 1; the last one sends no keys on."""
  if ring.size > 2:
    carry, _ = jax.lax.scan(turn, carry, jnp.arange(1, ring.size - 1))
  return turn(carry, ring.size - 1, is_last=True)


def _pass_on(ring, tree):
  """Sends to the next device, and receives from the one before."""
  pairs = [(i, (i + 1) % ring.size) for i in range(ring.size)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axes, pairs), tree)


def _merge(a: Part, b: Part) -> Part:
  """Attention to two sets of keys as one; of shares, without log-sum-exps, the sum."""
  (a_out, a_lse), (b_out, b_lse) = a, b
  if a_lse is None:
    return a_out + b_out, None
  lse = jnp.logaddexp(a_lse, b_lse)
  weight = lambda x: jnp.exp(x - lse).swapaxes(1, 2)[..., None]
  return a_out * weight(a_lse) + b_out * weight(b_lse), lse


def _where(condition, part: Part) -> Part:
  """A part, or that of no keys."""
  out, lse = part
  if lse is None:
    return jnp.where(condition, out, 0), None
  return out, jnp.where(condition, lse, NO_KEY)


def _if_seen(ring, step, arrays, visit, otherwise):
  """Visits keys, where some query may see some of them."""
  if _is_own(step) or not (ring.causal or ring.window):
    return visit()
  index = jax.lax.axis_index(ring.axes)
  source = (index - step) % ring.size
  if ring.zigzag:
    if ring.window is None:
      return visit()
    nearest = jnp.min(_places(ring, index, source, arrays)) - _length(arrays.keys) // 2 + 1
    return jax.lax.cond(nearest < ring.window, visit, otherwise)
  T, S = _length(arrays.queries), _length(arrays.keys)
  place, is_seen = ring.query_offset + index * T - source * S, True
  if ring.causal and 'prefix' not in arrays.keys:
    is_seen &= place + T > 0
  if ring.window is not None:
    is_seen &= (place - S + 1 < ring.window) & (-(place + T - 1) < ring.window)
  return visit() if is_seen is True else jax.lax.cond(is_seen, visit, otherwise)


def _visit(ring: Ring, step, arrays: Arrays, whole=None) -> Part:
  """The device's queries and the keys that have come `step` devices far: float32 out and its
  log-sum-exp or, of the `whole` (out, lse), the share of these keys."""
  index = jax.lax.axis_index(ring.axes)
  source = (index - step) % ring.size
  if ring.zigzag and _is_own(step):
    return _visit_own(ring, index, arrays, whole)
  if ring.zigzag:
    return _visit_pairs(ring, index, source, arrays, whole)
  place = ring.query_offset + index * _length(arrays.queries) - source * _length(arrays.keys)
  return _part(ring, arrays, source, place, ring.causal, whole)


def _is_own(step):
  """Whether no key has moved yet."""
  return isinstance(step, int) and step == 0


def _places(ring, index, source, arrays):
  """Where the queries of the two pairs of `_visit_pairs` stand among their keys, [2]."""
  apart = jnp.stack([jnp.abs(index - source), 2 * ring.size - 1 - index - source])
  return apart * (_length(arrays.keys) // 2)


def _visit_own(ring, index, arrays, whole):
  """Each chunk sees itself up to each query, and the later chunk all of the earlier one."""
  last = 2 * ring.size - 1
  (first, second), (old, new) = _halves(arrays.queries), _halves(arrays.keys)
  (whole_first, whole_second) = _halves_of_whole(whole)
  both = _stack(arrays, (first, second), (old, new))
  own = _unstack(_part(ring, both, jnp.stack([index, last - index]), 0, True,
                       _stack_whole(whole_first, whole_second)))
  earlier = _part(ring, arrays._replace(queries=second, keys=old), index,
                  (last - 2 * index) * _length(old), False, whole_second)
  return _join(own[0], _merge(own[1], earlier))


def _visit_pairs(ring, index, source, arrays, whole):
  """The later chunk of queries sees all of the earlier chunk of keys, which stands before it on any
  two devices; and of the earlier chunks or of the later ones, one sees all of the other."""
  last, is_before = 2 * ring.size - 1, source < index
  (first, second), (old, new) = _halves(arrays.queries), _halves(arrays.keys)
  whole_first, whole_second = _halves_of_whole(whole)
  select = lambda x, y: jax.tree.map(lambda x, y: jnp.where(is_before, x, y), x, y)
  chunks = jnp.stack([jnp.where(is_before, source, last - source), source])
  places = _places(ring, index, source, arrays)
  both = _stack(arrays, (select(first, second), second), (select(old, new), old))
  whole = _stack_whole(select(whole_first, whole_second), whole_second)
  same, earlier = _unstack(_part(ring, both, chunks, places, False, whole))
  return _join(_where(is_before, same), _merge(earlier, _where(~is_before, same)))


def _part(ring, arrays, chunks, places, causal, whole) -> Part:
  """`flash_attention` of queries whose first stands at `places` among the keys, those of `chunks`;
  each one for all rows, or [2] for a stack of two."""
  B = arrays.queries['query'].shape[0]
  of_rows = lambda x: jnp.repeat(x, B // x.size, total_repeat_length=B).astype(jnp.int32)
  others = dict(arrays.others)
  by_place = bool(others) or causal or ring.window is not None
  if 'dropout_seeds' in others:
    step = of_rows(jnp.atleast_1d(chunks)).astype(jnp.uint32)[:, None] * jnp.uint32(_SEED_STEP)
    others['dropout_seeds'] += step
  if isinstance(places, int) or not by_place:
    offset = places if isinstance(places, int) else None
  else:
    offset = of_rows(jnp.atleast_1d(places))
  call = functools.partial(flash_attention, **arrays.queries, **arrays.keys, **others,
                           causal=causal, window=ring.window, query_offset=offset,
                           **dict(ring.options))
  if whole is not None:
    return call(whole=whole), None
  out, lse = call(return_lse=True)
  return out.astype(jnp.float32), lse


def _nothing(query) -> Part:
  """The part of keys that no query sees."""
  B, T, N, _ = query.shape
  return jnp.zeros(query.shape, jnp.float32), jnp.full((B, N, T), NO_KEY, jnp.float32)


def _length(group):
  return next(iter(group.values())).shape[1]


def _halves(group):
  """Both chunks of arrays [B, T, ...]."""
  cut = {name: jnp.split(x, 2, axis=1) for name, x in group.items()}
  return tuple({name: x[i] for name, x in cut.items()} for i in range(2))


def _halves_of_whole(whole):
  if whole is None:
    return None, None
  (out, out_2), (lse, lse_2) = jnp.split(whole[0], 2, axis=1), jnp.split(whole[1], 2, axis=2)
  return (out, lse), (out_2, lse_2)


def _stack(arrays, queries, keys):
  """Two calls as one, of twice as many rows."""
  rows = lambda pair: jax.tree.map(lambda *x: jnp.concatenate(x), *pair)
  others = dict(arrays.others)
  if 'dropout_seeds' in others:
    others['dropout_seeds'] = jnp.tile(others['dropout_seeds'], (2, 1))
  return Arrays(rows(queries), rows(keys), others)


def _stack_whole(first, second):
  return None if first is None else jax.tree.map(lambda *x: jnp.concatenate(x), first, second)


def _unstack(part: Part) -> tuple[Part, Part]:
  out, lse = part
  outs = jnp.split(out, 2)
  return tuple(zip(outs, (None, None) if lse is None else jnp.split(lse, 2)))


def _join(first: Part, second: Part) -> Part:
  """The inverse of `_halves_of_whole`."""
  out = jnp.concatenate([first[0], second[0]], axis=1)
  return out, None if first[1] is None else jnp.concatenate([first[1], second[1]], axis=2)
