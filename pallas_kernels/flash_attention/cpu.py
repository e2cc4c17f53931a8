"""Attention for XLA:CPU: blocks of queries against only the keys that they can see.

Heads are made row-major, so that every product reaches the CPU's matrix unit (see
`matmul/cpu.py`), and the scores of one block (16 MB at 64 heads, 128 queries, 512 keys) stay in
its caches.
"""
import jax.numpy as jnp

from pallas_kernels import dropout
from pallas_kernels.flash_attention.cpu_positions import ByDistance, sum_of_rows
from pallas_kernels.flash_attention.reference import (MASKED, NO_KEY, Terms, places,
                                                      sinks_gradient, softcapped, visible)
from pallas_kernels.matmul.cpu import dot, dot_t, row_major, transpose, transpose_apart

MAX_BLOCKS = 8      # blocks are unrolled: more of them cost compile time for little
MIN_BLOCK = 128     # queries; smaller products leave the matrix unit idle


def _blocks(options, T, S, masking):
  """(first query, end of queries, first visible key, end of visible keys) of each block."""
  size = max(MIN_BLOCK, -(-T // MAX_BLOCKS))
  for start in range(0, T, size):
    end, first, last = min(start + size, T), 0, S
    place, end_place = start + options.query_offset, end + options.query_offset
    if masking.query_offset is None:
      if options.window is not None:
        first, last = place - options.window + 1, end_place + options.window - 1
      if options.chunk is not None:
        first = max(first, place // options.chunk * options.chunk)
        last = min(last, -(-end_place // options.chunk) * options.chunk)
      if options.causal and masking.prefix is None:
        last = min(last, end_place)
    # A block that sees no key still visits one, which its mask hides.
    first = min(max(first, 0), S - 1)
    yield start, end, first, max(min(last, S), first + 1)


def _heads(x, K):
  """[B, T, N, H] -> row-major [B * K, G, T, H]."""
  B, T, N, H = x.shape
  x = x.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  return row_major(x).reshape(B * K, N // K, T, H)


def _tokens(x, B):
  """[B * K, G, T, H] -> [B, T, N, H], the inverse of `_heads`."""
  K, G, T, H = x.shape[0] // B, *x.shape[1:]
  return x.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _scores(options, query_XGTH, key_XSH, terms, mask_BTS):
  """Masked scores, float32 [X, G * T, S], and the slope that takes their gradient to that of
  query . key; X = B * K, and `terms` [1 or B, N, T, S] each, or None, are added."""
  X, G, T, H = query_XGTH.shape
  S, slope = key_XSH.shape[1], options.scale
  scores = dot_t(query_XGTH.reshape(X, G * T, H), key_XSH) * options.scale
  if options.softcap is not None:
    scores = softcapped(scores, options.softcap)
    slope *= 1 - jnp.square(scores / options.softcap)
  for term_BNTS in terms:
    if term_BNTS is not None:
      split = scores.reshape(-1, term_BNTS.shape[1], T, S)
      scores = (split + term_BNTS.astype(jnp.float32)).reshape(scores.shape)
  if mask_BTS is not None:
    B = mask_BTS.shape[0]
    split = scores.reshape(B, X // B * G, T, S) if B > 1 else scores.reshape(1, X * G, T, S)
    scores = jnp.where(mask_BTS[:, None], split, MASKED).reshape(scores.shape)
  return scores, slope


def _cut(x_BTS, start, end, first, last):
  """The block of a mask or bias [..., T, S], if there is one."""
  return None if x_BTS is None else x_BTS[..., start:end, first:last]


def _factors(options, masking, scores, T, start, end, first, last):
  """What dropout multiplies the probabilities of a block of `scores` by."""
  if not options.dropout_rate:
    return 1.0
  return dropout.factors(options.dropout_rate, masking.dropout_seeds,
                         places(options, T, masking)[:, start:end],
                         jnp.arange(first, last)).reshape(scores.shape)


def forward(options, query, key, value, terms, masking):
  """`reference.forward`."""
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  query_XGTH = _heads(query, K)
  key_XSH, value_XSH = _heads(key, K)[:, 0], _heads(value, K)[:, 0]
  mask = visible(options, T, S, masking)
  by_distance = ByDistance(options, terms, T, S, masking.query_offset)
  sinks = None if terms.sinks is None else terms.sinks.astype(jnp.float32)[:, None]
  outs, lses = [], []
  for block in _blocks(options, T, S, masking):
    start, end, first, last = block
    scores, _ = _scores(options, query_XGTH[:, :, start:end], key_XSH[:, first:last],
                        (_cut(terms.bias, *block), by_distance.scores(block)),
                        _cut(mask, *block))
    largest = jnp.maximum(scores.max(-1, keepdims=True), NO_KEY)
    if sinks is not None:
      sinks_XT1 = jnp.broadcast_to(sinks, (B, N, end - start)).reshape(largest.shape)
      largest = jnp.maximum(largest, sinks_XT1)
    exps = jnp.exp(scores - largest).astype(query.dtype)
    sums = exps.sum(-1, keepdims=True, dtype=jnp.float32)
    if sinks is not None:
      sums += jnp.exp(sinks_XT1 - largest)
    sums = jnp.maximum(sums, 1e-30)  # 0 where no key is visible
    weights = (exps * _factors(options, masking, scores, T, *block)).astype(query.dtype)
    out = dot(weights, value_XSH[:, first:last]) / sums
    outs.append(out.astype(query.dtype).reshape(B * K, N // K, end - start, H))
    lses.append((largest + jnp.log(sums)).reshape(B, K, N // K, end - start))
  return _tokens(jnp.concatenate(outs, 2), B), jnp.concatenate(lses, 3)


def _bias_gradient(dscores, bias, first, last):
  """The rows of the gradient of bias that one block of `dscores` gives, [1 or B, N, T, S]."""
  dbias = sum_of_rows(dscores) if bias.shape[0] == 1 else dscores
  return jnp.pad(dbias.astype(bias.dtype), ((0, 0),) * 3 + ((first, bias.shape[3] - last),))


def backward(options, query, key, value, terms, masking, out, lse, g, dlse):
  """`reference.backward` by recomputed blocks (arXiv:2205.14135, algorithm 4)."""
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  G, X, dtype = N // K, B * K, query.dtype
  query_XGTH, g_XGTH = _heads(query, K), _heads(g, K)
  key_XSH, value_XSH = _heads(key, K)[:, 0], _heads(value, K)[:, 0]
  delta_BTN = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
  delta_XGT = delta_BTN.transpose(0, 2, 1).reshape(X, G, T) - dlse.reshape(X, G, T)
  lse_XGT = lse.reshape(X, G, T)
  mask = visible(options, T, S, masking)
  by_distance = ByDistance(options, terms, T, S, masking.query_offset)
  dquery, dbias, dkey_XHS, dvalue_XHS = [], [], *jnp.zeros((2, X, H, S), jnp.float32)
  for block in _blocks(options, T, S, masking):
    start, end, first, last = block
    rows = (X, G * (end - start), -1)
    q, dout = query_XGTH[:, :, start:end].reshape(rows), g_XGTH[:, :, start:end].reshape(rows)
    scores, slope = _scores(options, query_XGTH[:, :, start:end], key_XSH[:, first:last],
                            (_cut(terms.bias, *block), by_distance.scores(block)),
                            _cut(mask, *block))
    probs = jnp.exp(scores - lse_XGT[:, :, start:end].reshape(rows))
    factors = _factors(options, masking, scores, T, *block)
    dprobs = dot_t(dout, value_XSH[:, first:last]) * factors
    dscores = probs * (dprobs - delta_XGT[:, :, start:end].reshape(rows))
    split = dscores.reshape(B, N, end - start, last - first)
    if terms.bias is not None:
      dbias.append(_bias_gradient(split, terms.bias, first, last))
    by_distance.add_gradients(block, split)
    dscores = row_major((dscores * slope).astype(dtype))
    dquery.append(dot(dscores, key_XSH[:, first:last]).astype(dtype).reshape(X, G, end - start, H))
    # Transposed sums: q^T dscores moves [rows, H] elements into place, not [rows, S].
    dkey_XHS = dkey_XHS.at[:, :, first:last].add(dot(transpose(q), dscores))
    dvalue_XHS = dvalue_XHS.at[:, :, first:last].add(
        dot(transpose(dout), (probs * factors).astype(dtype)))
  dsinks = None if terms.sinks is None else sinks_gradient(
      terms.sinks, lse.reshape(B, N, T), delta_XGT.reshape(B, N, T))
  # First each head's matrix, then the heads: at once it takes twice as long.
  one_head = lambda x_XHS: _tokens(transpose_apart(x_XHS.astype(dtype))[:, None], B)
  return (_tokens(jnp.concatenate(dquery, 2), B), one_head(dkey_XHS), one_head(dvalue_XHS),
          Terms(jnp.concatenate(dbias, 2) if dbias else None, dsinks, *by_distance.of_terms()))
