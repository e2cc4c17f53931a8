"""The specification of `flash_attention`, in plain jnp with the whole T x S matrix of scores."""
import functools
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from pallas_kernels import dropout
from pallas_kernels.flash_attention import positions

MASKED = -1e30  # finite, so that no row of scores gives NaN
NO_KEY = MASKED / 2  # the least log-sum-exp: a row with no visible key has exp(MASKED - NO_KEY) = 0


class Options(NamedTuple):
  """What a program is compiled for: `flash_attention`'s arguments of these names."""
  causal: bool
  window: int | None
  scale: float
  softcap: float | None
  chunk: int | None = None
  query_offset: int = 0  # on top of which comes that of `Masking`
  dropout_rate: float = 0.0


class Terms(NamedTuple):
  """The arrays beside query, key and value that have a gradient: `flash_attention`'s arguments of
  these names."""
  bias: jax.Array | None = None
  sinks: jax.Array | None = None
  distance_bias: jax.Array | None = None
  relative_query: jax.Array | None = None
  relative_key: jax.Array | None = None


class Masking(NamedTuple):
  """The arrays that say who sees whom, and what is dropped: `flash_attention`'s arguments of these
  names."""
  query_offset: jax.Array | None = None
  query_segment_ids: jax.Array | None = None
  key_segment_ids: jax.Array | None = None
  prefix: jax.Array | None = None
  dropout_seeds: jax.Array | None = None


def places(options: Options, T: int, masking: Masking) -> jax.Array:
  """The place of each query among the keys, int32 [B or 1, T]."""
  first_B1 = 0 if masking.query_offset is None else masking.query_offset[:, None]
  return first_B1 + options.query_offset + jnp.arange(T)[None]


def visible(options: Options, T: int, S: int, masking: Masking) -> jax.Array | None:
  """Boolean [B or 1, T, S], True where query t sees key s; None where every query sees every
  key."""
  place_BT1, key_S, masks = places(options, T, masking)[..., None], jnp.arange(S), []
  if options.causal:
    masks.append(place_BT1 >= key_S)
    if masking.prefix is not None:
      masks[0] |= masking.prefix[:, None]
  if options.window is not None:
    masks.append(jnp.abs(place_BT1 - key_S) < options.window)
  if options.chunk is not None:
    masks.append(place_BT1 // options.chunk == key_S // options.chunk)
  if masking.query_segment_ids is not None:
    masks.append(masking.query_segment_ids[:, :, None] == masking.key_segment_ids[:, None, :])
  return functools.reduce(jnp.logical_and, masks) if masks else None


def softcapped(scores: jax.Array, softcap: float | None) -> jax.Array:
  """Bends scores smoothly into (-softcap, softcap); None leaves them."""
  return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _of_distance(options, terms, T, S, offset):
  """The terms of the scores by distance, float32 [1 or B, N, T, S] each."""
  if terms.distance_bias is not None:
    at_zero = terms.distance_bias.shape[1] // 2 - options.query_offset
    yield positions.toeplitz(positions.diagonals(terms.distance_bias, at_zero, T, S, offset), T)
  if terms.relative_key is not None:
    key_XNH = jnp.flip(terms.relative_key, 0)  # by the distance of the key, not of the query
    at_zero = key_XNH.shape[0] - 1 - options.query_offset
    key_BXNH = positions.diagonals(key_XNH, at_zero, T, S, offset, 0)
    key_BXNH = jnp.broadcast_to(key_BXNH, (terms.relative_query.shape[0], *key_BXNH.shape[1:]))
    products = jnp.einsum('btnh,bxnh->bntx', terms.relative_query, key_BXNH,
                          preferred_element_type=jnp.float32)
    yield positions.skewed(products) * options.scale


def forward(options, query, key, value, terms, masking):
  """Returns out [B, T, N, H] and the log-sum-exp of the scores, float32 [B, K, G, T]."""
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  query_BTKGH = query.reshape(B, T, K, N // K, H)
  scores_BKGTS = jnp.einsum('btkgh,bskh->bkgts', query_BTKGH, key,
                            preferred_element_type=jnp.float32) * options.scale
  scores_BKGTS = softcapped(scores_BKGTS, options.softcap)
  if terms.bias is not None:
    scores_BKGTS += terms.bias.astype(jnp.float32).reshape(-1, K, N // K, T, S)
  for term in _of_distance(options, terms, T, S, masking.query_offset):
    scores_BKGTS += term.astype(jnp.float32).reshape(-1, K, N // K, T, S)
  mask = visible(options, T, S, masking)
  if mask is not None:
    scores_BKGTS = jnp.where(mask[:, None, None], scores_BKGTS, MASKED)
  lse_BKGT = jax.nn.logsumexp(scores_BKGTS, axis=-1)
  if terms.sinks is not None:
    lse_BKGT = jnp.logaddexp(lse_BKGT, terms.sinks.astype(jnp.float32).reshape(K, N // K, 1))
  lse_BKGT = jnp.maximum(lse_BKGT, NO_KEY)
  probs_BKGTS = jnp.exp(scores_BKGTS - lse_BKGT[..., None])
  probs_BKGTS = checkpoint_name(probs_BKGTS, 'probabilities')  # for who looks at them
  if options.dropout_rate:
    factors = dropout.factors(options.dropout_rate, masking.dropout_seeds,
                              places(options, T, masking), jnp.arange(S))
    probs_BKGTS *= factors.reshape(probs_BKGTS.shape)
  out = jnp.einsum('bkgts,bskh->btkgh', probs_BKGTS.astype(query.dtype), value,
                   preferred_element_type=jnp.float32)
  return out.reshape(B, T, N, H).astype(query.dtype), lse_BKGT


def backward(options, query, key, value, terms, masking, out, lse, g, dlse):
  """Gradients of query, key, value and terms for the cotangents g of out and dlse of the
  log-sum-exp, by autodiff of `forward`.

  out and lse are those of these keys or of more (`whole` of `flash_attention`), of whose
  probabilities these have the share exp(their own log-sum-exp - lse).
  """
  attend = lambda *inputs: forward(options, *inputs, masking)
  (own_out, own_lse), vjp = jax.vjp(attend, query, key, value, terms)
  share_BKGT = jnp.exp(own_lse - lse)
  rest_BTN = jnp.einsum('btnh,btnh->btn', g, own_out - out, preferred_element_type=jnp.float32)
  rest_BKGT = rest_BTN.swapaxes(1, 2).reshape(lse.shape)
  share_BTN = share_BKGT.reshape(*rest_BTN.swapaxes(1, 2).shape).swapaxes(1, 2)
  return vjp(((share_BTN[..., None] * g).astype(g.dtype), share_BKGT * (rest_BKGT + dlse)))


def sinks_gradient(sinks: jax.Array, lse_BNT: jax.Array, delta_BNT: jax.Array) -> jax.Array:
  """The gradient of sinks without the scores: delta is g . out - dlse, of which each score's
  gradient is probability * (g . value - delta), and a sink has no value."""
  probs_BNT = jnp.exp(sinks.astype(jnp.float32)[:, None] - lse_BNT)
  return -(probs_BNT * delta_BNT).sum((0, 2)).astype(sinks.dtype)
