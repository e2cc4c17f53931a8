"""A cache of a window of tokens, whatever the length of the text, and perhaps of its first tokens.
"""
from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.layers import adapted
from lm.layers import cache as caches
from lm.layers.cache import KVCache, Places
from lm.layers.kernels import attend, attend_to_cache, Implementation
from lm.layers.positions import Rotation, rotary
from lm.parallel.rules import Rules

MASKED = -1e30  # finite, so that no row of scores gives NaN
# Tokens that a rolling cache has room for beyond its window: as many may be taken back, and one
# more may be written at once without a copy.
SLACK = 31


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rolling:
  """The last tokens of each row: those of place p from `num_sinks` on in slot (p - num_sinks) % S.

  kept: `KVCache` of S slots, at least `window`.
  sinks: `KVCache` of the row's first tokens, which every later one sees too (StreamingLLM,
    arXiv:2309.17453, section 3.2), or None. Their distance is that in the cache: at most
    num_sinks + window - 1 from the first of them.
  window: keys that a query sees at most beside the sinks, its own included.
  """
  kept: Any
  sinks: Any = None
  window: int = dataclasses.field(default=0, metadata={'static': True})

  @classmethod
  def zeros(cls, shape: tuple[int, ...], dtype: jax.typing.DTypeLike, window: int,
            num_sinks: int = 0) -> 'Rolling':
    """An empty cache of rows [..., K, H]."""
    def slots(size):
      return KVCache.zeros((*shape[:-1], size, shape[-1]), dtype)
    return cls(slots(window + SLACK), slots(num_sinks) if num_sinks else None, window)

  @property
  def num_sinks(self) -> int:
    """Tokens at the beginning that every query sees."""
    return 0 if self.sinks is None else self.sinks.key.shape[-2]

  @property
  def size(self) -> int:
    """Slots of a row, S."""
    return self.kept.key.shape[-2]


def sink_shift(place: Int[Array, 'B T'], window: int, num_sinks: int) -> Int[Array, 'B T']:
  """By how many places tokens at `place` are nearer to the sinks in the cache than in the text."""
  return jnp.maximum(place - (num_sinks + window - 1), 0)


def attend_rolling(rules: Rules, implementation: Implementation, cache: Rolling, places: Places, *,
                   query: Float[Array, 'B T N H'], key: Float[Array, 'B T K H'],
                   value: Float[Array, 'B T K H'], scale: float | None, softcap: float | None,
                   bias_of: Callable[[Int[Array, 'B T S']], Float[Array, 'B N T S']] | None = None,
                   shift: Rotation | None = None, **terms: jax.Array
                   ) -> tuple[Float[Array, 'B T N H'], Rolling]:
  """Attends from new tokens to the window, themselves and the sinks, and keeps them.

  Args:
    bias_of: what is added to scores of these distances, 0 or more.
    shift: the rotation by `sink_shift` of each query, where positions are rotary.
    terms: of `flash_attention`, the same as `bias_of` in its form.
  """
  T, options = query.shape[1], {'query': query, 'scale': scale, 'softcap': softcap}
  new = caches.entries(cache.kept, key, value)
  if T <= caches.LONGEST_STEP and cache.sinks is None:
    cache = _write(cache, places, new)
    distance_BTS = places.of(T)[..., None] - _held(cache, places, T)[:, None]
    seen_BTS = (distance_BTS >= 0) & (distance_BTS < cache.window)
    bias = jnp.where(seen_BTS[:, None], 0.0 if bias_of is None else bias_of(
        jnp.clip(distance_BTS, 0, cache.window)), MASKED)
    bias = jnp.broadcast_to(bias, (len(query), query.shape[2], T, cache.size))
    # Slots are in no order: all stand before the queries, and the bias hides those not seen.
    lengths = jnp.full_like(places.length, cache.size + T)
    return attend_to_cache(rules, lengths=lengths, bias=bias, **cache.kept._asdict(), **options
                           ), cache
  before = cache.window - 1  # keys of the cache that the first of the queries sees
  old, old_place_BM = _in_order(cache, places, before)
  place_BT = places.of(T)
  first = cache.num_sinks  # those before are no keys of the window
  segments = jnp.concatenate([old_place_BM >= first, place_BT >= first], axis=1).astype(jnp.int32)
  mine = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), new)  # [B, K, T, ...], as it is kept
  key, value = (jnp.swapaxes(jnp.concatenate([x, y], axis=2), 1, 2) for x, y in zip(
      caches.values_of(old, query.dtype), caches.values_of(mine, query.dtype)))
  out = attend(rules, implementation, key=key, value=value, window=cache.window,
               query_offset=before, query_segment_ids=jnp.ones_like(place_BT),
               key_segment_ids=segments, return_lse=cache.sinks is not None, **options, **terms)
  cache = _write(cache, places, new)
  if cache.sinks is not None:
    out = _attend_to_sinks(cache, out, query, place_BT, scale, softcap, bias_of, shift)
  return out, cache


def _write(cache, places, new):
  """The cache with the last of the new tokens, and the sinks among them."""
  T, first = new.key.shape[1], cache.num_sinks
  place_BT, is_real_BT = places.of(T), places.are_real(T)
  rows_BT = jnp.broadcast_to(jnp.arange(len(place_BT))[:, None], place_BT.shape)
  end_B1 = is_real_BT.sum(1, keepdims=True) + places.length[:, None]
  is_kept_BT = is_real_BT & (place_BT >= first) & (place_BT >= end_B1 - cache.size)
  slot_BT = jnp.where(is_kept_BT, (place_BT - first) % cache.size, cache.size)
  sinks = cache.sinks
  if sinks is not None:
    sinks = caches.scatter(sinks, rows_BT, jnp.where(is_real_BT, place_BT, first), new)
  return dataclasses.replace(cache, kept=caches.scatter(cache.kept, rows_BT, slot_BT, new),
                             sinks=sinks)


def _held(cache, places, T):
  """The place of the token that each slot holds after T new ones, [B, S]; where it holds none yet,
  one that nobody sees."""
  last_B1 = places.length[:, None] + places.are_real(T).sum(1, keepdims=True) - 1
  rank_B1 = last_B1 - cache.num_sinks
  rank_BS = rank_B1 - (rank_B1 - jnp.arange(cache.size)) % cache.size
  return jnp.where(rank_BS >= 0, rank_BS + cache.num_sinks, -cache.window - cache.size - T)


def _in_order(cache, places, M):
  """What is kept of the last M tokens, [B, K, M, ...], and their places, [B, M]: negative ones
  before a row's first."""
  place_BM = places.length[:, None] + jnp.arange(-M, 0)
  slot_BM = (place_BM - cache.num_sinks) % cache.size
  take = jax.vmap(lambda x, slots: jnp.take(x, slots, axis=1))
  return jax.tree.map(lambda x: take(x, slot_BM), cache.kept), place_BM


def _attend_to_sinks(cache, out, query, place_BT, scale, softcap, bias_of, shift):
  """The attention `out`, with its log-sum-exp, and to the sinks, by distances within the cache."""
  if shift is not None:  # the query moves, not the keys: it is fewer
    query = rotary(query, Rotation(-shift.sin, shift.cos))
  key, value = (jnp.swapaxes(x, 1, 2) for x in caches.values_of(cache.sinks, query.dtype))
  in_cache_BT = place_BT - sink_shift(place_BT, cache.window, cache.num_sinks)
  distance_BTS = in_cache_BT[..., None] - jnp.arange(cache.num_sinks)
  bias = jnp.where((distance_BTS >= 0)[:, None], 0.0 if bias_of is None else bias_of(
      jnp.maximum(distance_BTS, 0)), MASKED)

  def one(out_TNH, lse_NT, query_TNH, key_SKH, value_SKH, bias_NTS):
    return adapted.attend_also(out_TNH[None], lse_NT[None], query_TNH[None], key_SKH, value_SKH,
                               scale, softcap, bias_NTS[None])[0]
  return jax.vmap(one)(*out, query, key, value, bias)
