"""The specification of `flash_attention`, in plain jnp with the whole T x S matrix of scores."""
import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that no row of scores gives NaN
NO_KEY = MASKED / 2  # the least log-sum-exp: a row with no visible key has exp(MASKED - NO_KEY) = 0


def visible(causal: bool, T: int, S: int, masking) -> jax.Array | None:
  """Boolean [B or 1, T, S], True where query t sees key s; None where every query sees every
  key."""
  query_offset, query_segment_ids, key_segment_ids = masking
  mask = None
  if causal:
    first = jnp.zeros((1,), jnp.int32) if query_offset is None else query_offset
    mask = first[:, None, None] + jnp.arange(T)[:, None] >= jnp.arange(S)
  if query_segment_ids is not None:
    same = query_segment_ids[:, :, None] == key_segment_ids[:, None, :]
    mask = same if mask is None else mask & same
  return mask


def forward(causal, query, key, value, masking):
  """Returns out [B, T, N, H] and the log-sum-exp of the scores, float32 [B, K, G, T]."""
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  query_BTKGH = query.reshape(B, T, K, N // K, H)
  scores_BKGTS = jnp.einsum('btkgh,bskh->bkgts', query_BTKGH, key,
                            preferred_element_type=jnp.float32) * H**-0.5
  mask = visible(causal, T, S, masking)
  if mask is not None:
    scores_BKGTS = jnp.where(mask[:, None, None], scores_BKGTS, MASKED)
  lse_BKGT = jnp.maximum(jax.nn.logsumexp(scores_BKGTS, axis=-1), NO_KEY)
  probs_BKGTS = jnp.exp(scores_BKGTS - lse_BKGT[..., None]).astype(query.dtype)
  out = jnp.einsum('bkgts,bskh->btkgh', probs_BKGTS, value, preferred_element_type=jnp.float32)
  return out.reshape(B, T, N, H).astype(query.dtype), lse_BKGT


def backward(causal, query, key, value, masking, out, lse, g):
  """Gradients of query, key and value for the cotangent g of out, by autodiff of `forward`."""
  del out, lse
  _, vjp = jax.vjp(lambda q, k, v: forward(causal, q, k, v, masking)[0], query, key, value)
  return vjp(g)
