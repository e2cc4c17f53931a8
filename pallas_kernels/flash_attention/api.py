"""The attention that every model uses."""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.flash_attention import cpu, reference


def flash_attention(query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool = True,
                    query_offset: jax.Array | None = None,
                    query_segment_ids: jax.Array | None = None,
                    key_segment_ids: jax.Array | None = None,
                    implementation: str | None = None) -> jax.Array:
  """Attends: out[t] = sum_s p[t, s] value[s], with p[t] = softmax_s(query[t] . key[s] / sqrt(H)).

  Query t sees key s when t + query_offset >= s (`causal`) and their segment ids are equal (where
  given); one that sees none gives zeros. Each group of N / K query heads shares one key-value head
  (grouped queries, arXiv:2305.13245). Scores and softmax are float32. Neither pass keeps the T x S
  probabilities: the backward pass recomputes them from the row-wise log-sum-exp (FlashAttention,
  arXiv:2205.14135, algorithm 4).

  Args:
    query: [B, T, N, H], bfloat16 or float32.
    key: [B, S, K, H], the dtype of `query`; K divides N.
    value: [B, S, K, H].
    causal: whether a query sees only keys at or before its own place.
    query_offset: int32 [B], the place of query 0 among the keys (a cache's length); None is 0.
    query_segment_ids: int32 [B, T] of packed sequences; None with `key_segment_ids` None.
    key_segment_ids: int32 [B, S].
    implementation: None, 'reference' or 'cpu' (blocks of queries against the keys that they see, on
      the CPU's matrix unit).

  Returns:
    [B, T, N, H] in the dtype of `query`.

  Raises:
    ValueError: shapes that do not fit, or only one of the two segment ids.
  """
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  if key.shape != (B, S, K, H) or value.shape != key.shape:
    raise ValueError(f'query {query.shape}, key {key.shape} and value {value.shape} must be '
                     '[B, T, N, H], [B, S, K, H] and [B, S, K, H]')
  if N % K:
    raise ValueError(f'{N} query heads do not divide into {K} key-value heads')
  if (query_segment_ids is None) != (key_segment_ids is None):
    raise ValueError('segment ids are needed for both query and key, or for neither')
  for name, ids, shape in (('query_offset', query_offset, (B,)),
                           ('query_segment_ids', query_segment_ids, (B, T)),
                           ('key_segment_ids', key_segment_ids, (B, S))):
    if ids is not None and ids.shape != shape:
      raise ValueError(f'{name} has shape {ids.shape}, it must be {shape} for query {query.shape} '
                       f'and key {key.shape}')
  if implementation not in (None, 'reference', 'cpu'):
    raise ValueError(f"implementation={implementation!r} must be None, 'reference' or 'cpu'")
  masking = (query_offset, query_segment_ids, key_segment_ids)
  return _attend(causal, implementation, query, key, value, masking)


def decode_attention(query: jax.Array, key: jax.Array, value: jax.Array,
                     lengths: jax.Array) -> jax.Array:
  """`flash_attention` of one query a row over a cache; not to be differentiated.

  Args:
    query: [B, 1, N, H].
    key: [B, K, S, H], heads first, so that no token moves the cache.
    value: [B, K, S, H].
    lengths: int32 [B], at least 1: the keys of each row that stand; the others are not seen.

  Returns:
    [B, 1, N, H] in the dtype of `query`.
  """
  B, _, N, H = query.shape
  K, S = key.shape[1:3]
  query_BKGH = query.reshape(B, K, N // K, H)
  scores_BKGS = jnp.einsum('bkgh,bksh->bkgs', query_BKGH, key, preferred_element_type=jnp.float32)
  seen_BS = jnp.arange(S) < lengths[:, None]
  scores_BKGS = jnp.where(seen_BS[:, None, None], scores_BKGS * H**-0.5, reference.MASKED)
  probs_BKGS = jax.nn.softmax(scores_BKGS).astype(query.dtype)
  out_BKGH = jnp.einsum('bkgs,bksh->bkgh', probs_BKGS, value, preferred_element_type=jnp.float32)
  return out_BKGH.astype(query.dtype).reshape(B, 1, N, H)


def _choose(implementation, name, causal, *args):
  on_cpu = functools.partial(getattr(cpu, name), causal)
  elsewhere = functools.partial(getattr(reference, name), causal)
  if implementation is None:
    return platform.by_platform(on_cpu, elsewhere, *args)
  return (on_cpu if implementation == 'cpu' else elsewhere)(*args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(causal, implementation, query, key, value, masking):
  return _choose(implementation, 'forward', causal, query, key, value, masking)[0]


def _forward(causal, implementation, query, key, value, masking):
  out, lse = _choose(implementation, 'forward', causal, query, key, value, masking)
  return out, (query, key, value, masking, out, lse)


def _backward(causal, implementation, residuals, g):
  grads = _choose(implementation, 'backward', causal, *residuals, g)
  return *grads, jax.tree.map(lambda x: jnp.zeros(x.shape, jax.dtypes.float0), residuals[3])


_attend.defvjp(_forward, _backward)
