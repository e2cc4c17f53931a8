"""The TPU's flash attention is float64's attention and gradient, visits only what is seen, and
compiles for every TPU."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import measure, tpu_compiler
from pallas_kernels.flash_attention import dropout, flash_attention, tpu, tpu_blocks
from pallas_kernels.flash_attention.reference import (MASKED, NO_KEY, Masking, Options, Terms,
                                                      places, visible)

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}


def exact(x):
  return None if x is None else np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)


def float64(options, query, key, value, bias, masking, g):
  """out, lse [B, K, G, T] and the gradients of query, key, value and bias, in numpy."""
  query, key, value, bias, g = map(exact, (query, key, value, bias, g))
  (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
  wide = lambda x: np.repeat(x, N // K, axis=2)
  narrow = lambda x: x.reshape(B, S, K, N // K, H).sum(3)
  scores = np.einsum('btnh,bsnh->bnts', query, wide(key)) * options.scale
  slope = np.full(scores.shape, options.scale)
  if options.softcap is not None:
    bent = np.tanh(scores / options.softcap)
    scores, slope = options.softcap * bent, slope * (1 - bent**2)
  scores = scores if bias is None else scores + bias
  mask = visible(options, T, S, masking)
  scores = scores if mask is None else np.where(np.asarray(mask)[:, None], scores, MASKED)
  largest = np.maximum(scores.max(-1, keepdims=True), NO_KEY)
  lse = np.maximum(largest + np.log(np.exp(scores - largest).sum(-1, keepdims=True) + 1e-300),
                   NO_KEY)
  probs = np.exp(scores - lse)
  factors = 1.0
  if options.dropout_rate:
    factors = exact(dropout.factors(options.dropout_rate, masking.dropout_seeds,
                                    places(options, T, masking), jnp.arange(S)))
  out = np.einsum('bnts,bsnh->btnh', probs * factors, wide(value))
  dprobs = np.einsum('btnh,bsnh->bnts', g, wide(value)) * factors
  dscores = probs * (dprobs - np.einsum('btnh,btnh->bnt', g, out)[..., None])
  dbias = None if bias is None else dscores if bias.shape[0] == B else dscores.sum(0, keepdims=True)
  dquery = np.einsum('bnts,bsnh->btnh', dscores * slope, wide(key))
  dkey = narrow(np.einsum('bnts,btnh->bsnh', dscores * slope, query))
  dvalue = narrow(np.einsum('bnts,btnh->bsnh', probs * factors, g))
  return out, lse.reshape(B, K, N // K, T), dquery, dkey, dvalue, dbias


def relative_error(got, want):
  return np.linalg.norm(exact(got) - want) / np.linalg.norm(want)


def random(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


IDS = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (2, 300)), axis=1), jnp.int32)
# name: (B, T, S, N, K, H), dtype, options, masking, the bias's shape
CASES = {
    'causal, groups': ((1, 300, 300, 4, 2, 64), jnp.bfloat16, {}, Masking(), None),
    'wide heads, window': ((1, 700, 700, 2, 1, 256), jnp.bfloat16, {'window': 40}, Masking(), None),
    'both sides, fewer keys': (
        (1, 700, 300, 2, 1, 80), jnp.float32, {'causal': False, 'window': 90}, Masking(), None),
    'packed prefix': ((2, 300, 300, 2, 2, 64), jnp.float32, {'window': 100}, Masking(
        None, IDS, IDS, jnp.arange(300) < jnp.array([[9], [90]])), None),
    'cached': ((3, 5, 140, 4, 2, 96), jnp.float32, {}, Masking(jnp.array([0, 7, 135])), None),
    'dropout, chunks': ((2, 140, 300, 4, 2, 64), jnp.float32, {
        'dropout_rate': 0.3, 'chunk': 90, 'query_offset': 150},
        Masking(dropout_seeds=jax.random.bits(jax.random.key(0), (2, 4))), None),
    'bias, capped': ((2, 140, 150, 4, 2, 32), jnp.float32, {'softcap': 2.0, 'scale': 0.4},
                     Masking(), (2, 4, 140, 150)),
    'shared bias': ((2, 600, 600, 1, 1, 128), jnp.bfloat16, {}, Masking(), (1, 1, 600, 600)),
}


@functools.partial(jax.jit, static_argnums=0,
                   compiler_options={'xla_backend_optimization_level': 0})
def interpreted(options, query, key, value, terms, masking, g):
  args = options, query, key, value, terms, masking
  out, lse = tpu.forward(*args, interpret=True)
  return out, lse, *tpu.backward(*args, out, lse, g, interpret=True)


@pytest.mark.supports('kernels', 'flash attention on TPU', 'its log-sum-exp', 'causal',
                      'bidirectional', 'sliding window', 'prefix', 'segment ids', 'query offset',
                      'grouped queries', 'soft cap', 'bias and its gradient',
                      'head dims 32 to 256', 'any length')
@pytest.mark.parametrize('case', CASES)
def test_the_kernel_is_float64s_attention_and_gradient(case):
  (B, T, S, N, K, H), dtype, named, masking, bias_shape = CASES[case]
  options = Options(**{'causal': True, 'window': None, 'scale': H**-0.5, 'softcap': None} | named)
  query, key, value, g = (random(i, *shape).astype(dtype) for i, shape in enumerate(
      ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))))
  bias = None if bias_shape is None else random(4, *bias_shape)
  *got, dterms = interpreted(options, query, key, value, Terms(bias), masking, g)
  got += dterms
  want = float64(options, query, key, value, bias, masking, g)
  unseen = want[1] <= NO_KEY
  np.testing.assert_array_equal(np.asarray(got[1]) <= 0.6 * NO_KEY, unseen)
  assert not exact(got[0])[unseen.reshape(B, N, T).swapaxes(1, 2)].any()
  pairs = [(got[0], want[0]), (np.where(unseen, 0, got[1]), np.where(unseen, 0, want[1])),
           *zip(got[2:], want[2:])]
  errors = [relative_error(*pair) for pair in pairs if pair[1] is not None]
  assert np.max(errors) <= TOLERANCE[dtype], errors


def test_the_public_function_differentiates_through_the_kernel():
  query, key, value, g = (random(i, 1, 130, 2, 64) for i in range(4))

  @functools.partial(jax.jit, static_argnums=0,
                     compiler_options={'xla_backend_optimization_level': 0})
  def gradients(implementation, *qkv):
    return jax.vjp(functools.partial(flash_attention, implementation=implementation), *qkv)[1](g)

  for got, want in zip(gradients('tpu', query, key, value), gradients('reference', query, key,
                                                                      value)):
    np.testing.assert_allclose(got, want, atol=1e-5)


OPTIONS = [Options(True, None, 1.0, None), Options(True, 70, 1.0, None),
           Options(False, 70, 1.0, None), Options(False, None, 1.0, None),
           Options(True, 1, 1.0, None), Options(True, None, 1.0, None, chunk=150),
           Options(False, 70, 1.0, None, chunk=100, query_offset=-90),
           Options(True, None, 1.0, None, query_offset=200),
           Options(True, 90, 1.0, None, query_offset=-400)]


@pytest.mark.supports('kernels', 'blocks that the mask empties are never visited',
                      'attention in chunks', 'static query offsets')
@pytest.mark.parametrize('lengths', [(512, 512), (300, 700), (700, 300)])
@pytest.mark.parametrize('options', OPTIONS)
def test_blocks_that_the_mask_empties_are_never_visited(options, lengths):
  mask = visible(options, *lengths, Masking())
  mask = np.ones(lengths, bool) if mask is None else np.asarray(mask[0])
  seen = {(q, k) for q in range(-(-lengths[0] // 64)) for k in range(-(-lengths[1] // 128))
          if mask[q * 64:(q + 1) * 64, k * 128:(k + 1) * 128].any()}
  visited = tpu_blocks.visited_blocks(options, *lengths, 64, 128)
  assert len(visited) == len(set(visited)) and set(visited) == seen


@pytest.mark.parametrize('by_key', [False, True])
def test_every_result_is_written_and_sums_begin_once(by_key):
  layout = tpu_blocks.Layout(Options(True, 10, 1.0, None), 700, 300, 128, 1, 128, 128, 1, 1, 1)
  queries, keys, first_q, first_k = np.asarray(tpu_blocks.visits(layout, Masking(), by_key))
  assert set(queries) == set(range(6)) and (not by_key or set(keys) == set(range(3)))
  assert first_q.sum() == 6 and first_k.sum() == len(set(keys))
  order = keys if by_key else queries
  assert (np.diff(order) >= 0).all()


@pytest.mark.parametrize('shape, dtype, words', [
    ((1, 8, 2, 64), jnp.float16, 'float16'), ((1, 8, 2, 512), jnp.float32, '512 are wider'),
    ((1, 2**17, 1, 128), jnp.bfloat16, '131072')])
def test_what_the_kernel_does_not_take_is_refused_in_a_sentence(shape, dtype, words):
  x = jax.ShapeDtypeStruct(shape, dtype)
  with pytest.raises(NotImplementedError, match=words):
    jax.eval_shape(functools.partial(flash_attention, implementation='tpu'), x, x, x)


@pytest.mark.supports('kernels', 'flash attention compiled for v4, v5e, v5p, v6e and tpu7x')
@pytest.mark.parametrize('chip', sorted(tpu_compiler.TOPOLOGIES))
def test_every_tpu_takes_the_kernels(chip):
  pytest.importorskip('libtpu', reason='the tpu extra is not installed')
  report, = measure.reports('flash_attention', chip, ['bert_base|both']).values()
  assert not report.refusal and len([name for name in report.kernels if 'flash' in name]) == 2


@pytest.mark.supports('kernels', 'flash attention at 70 % of a v5e by the schedule')
def test_the_schedule_meets_its_goal():
  pytest.importorskip('libtpu', reason='the tpu extra is not installed')
  report, = measure.reports('flash_attention', 'v5e', ['llama2_7b|forward']).values()
  assert report.cycles <= 410_000
