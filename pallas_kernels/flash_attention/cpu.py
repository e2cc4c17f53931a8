"""Attention for XLA:CPU: blocks of queries against only the keys that they can see.

Heads are made row-major, so that every product reaches the CPU's matrix unit (see
`matmul/cpu.py`), and the scores of one block (16 MB at 64 heads, 128 queries, 512 keys) stay in
its caches.
"""
import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.reference import MASKED, NO_KEY, visible
from pallas_kernels.matmul.cpu import dot, dot_t, row_major, transpose

MAX_BLOCKS = 8      # blocks are unrolled: more of them cost compile time for little
MIN_BLOCK = 128     # queries; smaller products leave the matrix unit idle


def _blocks(causal, T, S, query_offset):
  """(first query, end of queries, end of visible keys) of each block."""
  size = max(MIN_BLOCK, -(-T // MAX_BLOCKS))
  skip = causal and query_offset is None and T == S
  return [(t, min(t + size, T), min(t + size, S) if skip else S) for t in range(0, T, size)]


def _heads(x, K):
  """[B, T, N, H] -> row-major [B * K, G, T, H]."""
  B, T, N, H = x.shape
  x = x.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  return row_major(x).reshape(B * K, N // K, T, H)


def _tokens(x, B):
  """[B * K, G, T, H] -> [B, T, N, H], the inverse of `_heads`."""
  K, G, T, H = x.shape[0] // B, *x.shape[1:]
  return x.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _scores(query_XGTH, key_XSH, mask_BTS):
  """Masked scores, float32 [X, G * T, S]; X = B * K."""
  X, G, T, H = query_XGTH.shape
  scores = dot_t(query_XGTH.reshape(X, G * T, H), key_XSH) * H**-0.5
  if mask_BTS is None:
    return scores
  B, S = mask_BTS.shape[0], key_XSH.shape[1]
  split = scores.reshape(B, X // B * G, T, S) if B > 1 else scores.reshape(1, X * G, T, S)
  return jnp.where(mask_BTS[:, None], split, MASKED).reshape(scores.shape)


def forward(causal, query, key, value, masking):
  """`reference.forward`."""
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  query_XGTH = _heads(query, K)
  key_XSH, value_XSH = _heads(key, K)[:, 0], _heads(value, K)[:, 0]
  mask = visible(causal, T, S, masking)
  outs, lses = [], []
  for start, end, seen in _blocks(causal, T, S, masking[0]):
    block = None if mask is None else mask[:, start:end, :seen]
    scores = _scores(query_XGTH[:, :, start:end], key_XSH[:, :seen], block)
    largest = jnp.maximum(scores.max(-1, keepdims=True), NO_KEY)
    exps = jnp.exp(scores - largest).astype(query.dtype)
    sums = exps.sum(-1, keepdims=True, dtype=jnp.float32)
    sums = jnp.maximum(sums, 1e-30)  # 0 where no key is visible
    out = dot(exps, value_XSH[:, :seen]) / sums
    outs.append(out.astype(query.dtype).reshape(B * K, N // K, end - start, H))
    lses.append((largest + jnp.log(sums)).reshape(B, K, N // K, end - start))
  return _tokens(jnp.concatenate(outs, 2), B), jnp.concatenate(lses, 3)


def backward(causal, query, key, value, masking, out, lse, g):
  """`reference.backward` by recomputed blocks (arXiv:2205.14135, algorithm 4)."""
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  G, X, dtype = N // K, B * K, query.dtype
  query_XGTH, g_XGTH = _heads(query, K), _heads(g, K)
  key_XSH, value_XSH = _heads(key, K)[:, 0], _heads(value, K)[:, 0]
  delta_BTN = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
  delta_XGT = delta_BTN.reshape(B, T, K, G).transpose(0, 2, 3, 1).reshape(X, G, T)
  lse_XGT = lse.reshape(X, G, T)
  mask = visible(causal, T, S, masking)
  dquery, dkey_XHS, dvalue_XHS = [], *jnp.zeros((2, X, H, S), jnp.float32)
  for start, end, seen in _blocks(causal, T, S, masking[0]):
    rows = (X, G * (end - start), -1)
    q, dout = query_XGTH[:, :, start:end].reshape(rows), g_XGTH[:, :, start:end].reshape(rows)
    block = None if mask is None else mask[:, start:end, :seen]
    scores = _scores(query_XGTH[:, :, start:end], key_XSH[:, :seen], block)
    probs = jnp.exp(scores - lse_XGT[:, :, start:end].reshape(rows))
    dprobs = dot_t(dout, value_XSH[:, :seen])
    dscores = probs * (dprobs - delta_XGT[:, :, start:end].reshape(rows)) * H**-0.5
    dscores = row_major(dscores.astype(dtype))
    dquery.append(dot(dscores, key_XSH[:, :seen]).astype(dtype).reshape(X, G, end - start, H))
    # Transposed sums: q^T dscores moves [rows, H] elements into place, not [rows, S].
    dkey_XHS = dkey_XHS.at[:, :, :seen].add(dot(transpose(q), dscores))
    dvalue_XHS = dvalue_XHS.at[:, :, :seen].add(dot(transpose(dout), probs.astype(dtype)))
  one_head = lambda x: jax.lax.optimization_barrier(x.astype(dtype)).reshape(B, K, H, S)
  return (_tokens(jnp.concatenate(dquery, 2), B), one_head(dkey_XHS).transpose(0, 3, 1, 2),
          one_head(dvalue_XHS).transpose(0, 3, 1, 2))
