"""The specification of `decode_attention`, in plain jnp."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.reference import MASKED, NO_KEY, softcapped
from pallas_kernels.matmul import dot

LEAST_SUM = 1e-30  # of a query that sees no key


class Options(NamedTuple):
  """What a program is compiled for: `decode_attention`'s arguments of these names."""
  window: int | None
  scale: float
  softcap: float | None


class Cache(NamedTuple):
  """The keys and values that stand: `decode_attention`'s arguments of these names."""
  key: jax.Array
  value: jax.Array
  key_scale: jax.Array | None = None
  value_scale: jax.Array | None = None
  page_table: jax.Array | None = None

  @property
  def capacity(self) -> int:
    """Keys that a row can have."""
    pages = 1 if self.page_table is None else self.page_table.shape[1]
    return pages * self.key.shape[2]


def visible(options: Options, T: int, S: int, lengths: jax.Array) -> jax.Array:
  """Boolean [B, T, S], True where query t, the key of place lengths - T + t, sees key s."""
  end_BT1 = (lengths[:, None] - T + 1 + jnp.arange(T))[..., None]
  mask = jnp.arange(S) < end_BT1
  return mask if options.window is None else mask & (jnp.arange(S) >= end_BT1 - options.window)


def gathered(cache: Cache) -> Cache:
  """The pages of each row side by side, as a cache without a page table."""
  K = cache.key.shape[1]
  # Heads of pages in the order of the result: XLA:CPU takes a fifth of the time of a transposition.
  index_BKP = cache.page_table[:, None] * K + jnp.arange(K)[:, None]

  def rows(pages):
    if pages is None:
      return None
    x = pages.reshape(-1, *pages.shape[2:])[index_BKP]
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])

  return Cache(*map(rows, cache[:4]))


def decode_attention(options: Options, query, cache: Cache, lengths, bias, sinks):
  """[B, T, N, H] as `api.decode_attention` says it."""
  B, T, N, H = query.shape
  S, K = cache.capacity, cache.key.shape[1]
  seen_BTS = visible(options, T, S, lengths)
  if cache.page_table is not None:
    cache = gathered(cache)
    stands_BS = seen_BTS.any(1)  # another row's page, or nobody's, may hold anything
    cache = cache._replace(value=jnp.where(stands_BS[:, None, :, None], cache.value, 0))
    if cache.value_scale is not None:
      cache = cache._replace(value_scale=jnp.where(stands_BS[:, None], cache.value_scale, 0))
  rows = lambda x: jnp.swapaxes(x.reshape(-1, T, K, N // K, x.shape[-1]), 1, 2).reshape(
      -1, K, T * N // K, x.shape[-1])  # [B, T, N, ...] -> [B, K, M, ...]
  scores_BKMS = dot(rows(query), cache.key.astype(query.dtype), transpose_b=True)
  if cache.key_scale is not None:
    scores_BKMS *= cache.key_scale[:, :, None]
  scores_BKMS = softcapped(scores_BKMS * options.scale, options.softcap)
  if bias is not None:
    scores_BKMS += rows(jnp.swapaxes(bias.astype(jnp.float32), 1, 2))
  seen_BMS = jnp.repeat(seen_BTS, N // K, axis=1) if T > 1 else seen_BTS
  scores_BKMS = jnp.where(seen_BMS[:, None], scores_BKMS, MASKED)
  largest = jnp.maximum(scores_BKMS.max(-1, keepdims=True), NO_KEY)
  if sinks is not None:
    sinks = rows(jnp.broadcast_to(sinks.astype(jnp.float32)[:, None], (1, T, N, 1)))
    largest = jnp.maximum(largest, sinks)
  exps = jnp.exp(scores_BKMS - largest)
  total = exps.sum(-1, keepdims=True)
  total = jnp.maximum(total if sinks is None else total + jnp.exp(sinks - largest), LEAST_SUM)
  probs_BKMS = exps / total
  if cache.value_scale is not None:
    probs_BKMS *= cache.value_scale[:, :, None]
  out = dot(probs_BKMS.astype(query.dtype), cache.value.astype(query.dtype))
  out = jnp.swapaxes(out.astype(query.dtype).reshape(B, K, T, N // K, H), 1, 2)
  return out.reshape(B, T, N, H)


def joined(outs: jax.Array, lses: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
  """The result over all keys from those over parts of them, [parts, ..., H], and their log-sum-exp,
  [parts, ..., 1]; sinks [..., 1] are a part more, if there are any."""
  if len(outs) > 1:
    out, lse = (outs * jax.nn.softmax(lses, axis=0)).sum(0), jax.nn.logsumexp(lses, axis=0)
  else:
    out, lse = outs[0], lses[0]
  return out if sinks is None else out * jax.nn.sigmoid(lse - sinks)


def quantize(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
  """Returns the values and scales of `api.quantize`."""
  x = x.astype(jnp.float32)
  is_integer = jnp.issubdtype(dtype, jnp.integer)
  largest = float(jnp.iinfo(dtype).max if is_integer else jnp.finfo(dtype).max)
  scale = jnp.abs(x).max(-1) / largest
  values = x / jnp.where(scale > 0, scale, 1)[..., None]
  return (jnp.round(values) if is_integer else values).astype(dtype), scale
