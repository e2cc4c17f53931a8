"""Attention in float64, and calls of it that hypothesis draws."""
import functools
from typing import Any, NamedTuple

from hypothesis import assume, strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from gpu_cases import INTERPRET
from pallas_kernels import dropout
from pallas_kernels.flash_attention import gpu, tpu
from pallas_kernels.flash_attention.reference import (MASKED, NO_KEY, Masking, Options, Terms,
                                                      places, visible)

einsum = functools.partial(np.einsum, optimize=True)
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}


class Call(NamedTuple):
  """The arguments of both passes; blocks are for a Pallas kernel."""
  options: Options
  query: jax.Array
  key: jax.Array
  value: jax.Array
  terms: Terms
  masking: Masking
  g: jax.Array
  dlse: jax.Array
  blocks: Any = None


def exact(x):
  return None if x is None else np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)


def random(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def float64(call: Call):
  """out, lse [B, K, G, T] and the gradients of query, key, value and terms, in numpy."""
  options, *arrays, terms, masking, g, dlse, _ = call
  query, key, value, g, dlse = map(exact, (*arrays, g, dlse))
  (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
  wide = lambda x: np.repeat(x, N // K, axis=2)
  narrow = lambda x: x.reshape(B, S, K, N // K, H).sum(3)
  scores = einsum('btnh,bsnh->bnts', query, wide(key)) * options.scale
  slope = np.full(scores.shape, options.scale)
  if options.softcap is not None:
    bent = np.tanh(scores / options.softcap)
    scores, slope = options.softcap * bent, slope * (1 - bent**2)
  scores = scores if terms.bias is None else scores + exact(terms.bias)
  mask = visible(options, T, S, masking)
  scores = scores if mask is None else np.where(np.asarray(mask)[:, None], scores, MASKED)
  sinks = np.full((N, 1, 1), 2 * NO_KEY if terms.sinks is None else 0.0)
  sinks = sinks if terms.sinks is None else sinks + exact(terms.sinks)[:, None, None]
  largest = np.maximum(np.maximum(scores.max(-1, keepdims=True), sinks), NO_KEY)
  total = np.exp(scores - largest).sum(-1, keepdims=True) + np.exp(sinks - largest)
  lse = np.maximum(largest + np.log(total + 1e-300), NO_KEY)
  probs, factors = np.exp(scores - lse), 1.0
  if options.dropout_rate:
    factors = exact(dropout.factors(options.dropout_rate, masking.dropout_seeds,
                                    places(options, T, masking), jnp.arange(S)))
  out = einsum('bnts,bsnh->btnh', probs * factors, wide(value))
  dprobs = einsum('btnh,bsnh->bnts', g, wide(value)) * factors
  delta = einsum('btnh,btnh->bnt', g, out)[..., None] - dlse.reshape(B, N, T, 1)
  dscores = probs * (dprobs - delta)
  dbias = None
  if terms.bias is not None:
    dbias = dscores if terms.bias.shape[0] == B else dscores.sum(0, keepdims=True)
  dsinks = None if terms.sinks is None else -(np.exp(sinks - lse) * delta).sum((0, 2, 3))
  dquery = einsum('bnts,bsnh->btnh', dscores * slope, wide(key))
  dkey = narrow(einsum('bnts,btnh->bsnh', dscores * slope, query))
  dvalue = narrow(einsum('bnts,btnh->bsnh', probs * factors, g))
  return out, lse.reshape(B, K, N // K, T), dquery, dkey, dvalue, Terms(dbias, dsinks)


@functools.partial(jax.jit, static_argnums=(0, 1, 2),
                   compiler_options={'xla_backend_optimization_level': 0})
def _results(module, options, static, args, g, dlse):
  out, lse = module.forward(options, *args, **dict(static))
  return out, lse, *module.backward(options, *args, out, lse, g, dlse, **dict(static))


def results(module, call: Call):
  """What `float64` returns, of an implementation."""
  static = {}
  if module in (tpu, gpu):
    static = {'interpret': INTERPRET or module is tpu, 'blocks': call.blocks}
  return _results(module, call.options, tuple(static.items()), call[1:6], call.g, call.dlse)


def check(call: Call, got):
  """Asserts that results are float64's."""
  want = float64(call)
  unseen = want[1] <= NO_KEY
  np.testing.assert_array_equal(np.asarray(got[1]) <= 0.6 * NO_KEY, unseen)
  B, T, N, _ = call.query.shape
  assert not exact(got[0])[unseen.reshape(B, N, T).swapaxes(1, 2)].any()
  got, want = ((x[0], np.where(unseen, 0, x[1]), *x[2:]) for x in (got, want))
  errors = [np.linalg.norm(exact(x) - y) / np.linalg.norm(y)
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]
  assert np.max(errors) <= TOLERANCE.get(call.query.dtype.type, 1e-2), errors


def packed(seed, B, T):
  """Segment ids 0 to 2 in order, int32 [B, T]."""
  ids = np.random.default_rng(seed).integers(0, 3, (B, T))
  return jnp.asarray(np.sort(ids, axis=1), jnp.int32)


@st.composite
def calls(draw, lengths, heads, blocks=(None,)):
  """Calls of every option, with `heads` of (key-value heads, head dim). Of their queries most see
  several keys: else gradients are rounding."""
  pick = lambda *values: draw(st.sampled_from(values))
  B, (K, H), G, T, S = pick(1, 2), pick(*heads), pick(1, 2), pick(*lengths), pick(*lengths)
  dtype, seed, N = pick(jnp.float32, jnp.bfloat16), draw(st.integers(0, 99)), K * G
  offset = pick(0, max(0, S - T), -40, 'of each row')
  rate = pick(0.0, 0.3)
  options = Options(pick(True, False), pick(None, 60), pick(H**-0.5, 0.2), pick(None, 2.0),
                    pick(None, 90), 0 if isinstance(offset, str) else offset, rate)
  rows = jnp.asarray(np.random.default_rng(seed).integers(0, max(1, S - T + 1), B), jnp.int32)
  ids = [packed(seed + i, B, length) for i, length in enumerate((T, S))]
  masking = Masking(rows if isinstance(offset, str) else None,
                    *(ids if draw(st.booleans()) else (None, None)),
                    pick(None, jnp.arange(S) < jnp.array([[9], [90]])[:B]),
                    jax.random.bits(jax.random.key(seed), (B, N)) if rate else None)
  mask = visible(options, T, S, masking)
  assume(mask is None or np.median(np.asarray(mask).sum(-1)) >= 8)
  terms = Terms(pick(None, random(seed, 1, N, T, S), random(seed, B, N, T, S)),
                pick(None, random(seed, N)))
  query, key, value, g = (random(seed + i, *shape).astype(dtype) for i, shape in enumerate(
      ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))))
  return Call(options, query, key, value, terms, masking, g, random(seed, B, K, G, T),
              pick(*blocks))
