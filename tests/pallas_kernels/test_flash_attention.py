"""Every implementation of `flash_attention` is softmax attention in float64, whatever is masked."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dropout
from pallas_kernels.flash_attention import flash_attention

IMPLEMENTATIONS = ['reference', 'cpu']


def exact(x):
  return np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)


def naive(query, key, value, bias=None, *, causal=True, window=None, chunk=None, scale=None,
          softcap=None, prefix=None, query_offset=0, query_segment_ids=None, key_segment_ids=None,
          dropout_rate=0.0, dropout_seeds=None):
  """Softmax attention, one query and head at a time; a query that sees no key gets zeros."""
  query, key, value = exact(query), exact(key), exact(value)
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  bias = np.broadcast_to(np.zeros(()) if bias is None else exact(bias), (B, N, T, S))
  out, factors = np.zeros(query.shape), np.ones((B, N, T, S))
  if dropout_rate:
    places = np.broadcast_to(query_offset, B)[:, None] + np.arange(T)
    factors = exact(dropout.factors(dropout_rate, dropout_seeds, jnp.asarray(places),
                                    jnp.arange(S)))
  for b, t, n in np.ndindex(B, T, N):
    place = t + int(np.broadcast_to(query_offset, B)[b])
    distance = place - np.arange(S)
    sees = distance >= 0 if causal else np.ones(S, bool)
    if prefix is not None:
      sees |= np.asarray(prefix)[b]
    if window is not None:
      sees &= abs(distance) < window
    if chunk is not None:
      sees &= place // chunk == np.arange(S) // chunk
    if query_segment_ids is not None:
      sees &= np.asarray(query_segment_ids)[b, t] == np.asarray(key_segment_ids)[b]
    if sees.any():
      scores = key[b, sees, n // (N // K)] @ query[b, t, n] * (H**-0.5 if scale is None else scale)
      scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
      scores = scores + bias[b, n, t, sees]
      probs = np.exp(scores - scores.max())
      probs = probs / probs.sum() * factors[b, n, t, sees]
      out[b, t, n] = probs @ value[b, sees, n // (N // K)]
  return out


def operands(B, T, S, N, K, H, dtype=jnp.float32):
  rng = np.random.default_rng(T + S + N)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype) for shape in shapes]


def packed(B, T, documents):
  """Segment ids 1, 2, ... of `documents` documents of unequal length, then padding (0)."""
  ends = np.sort(np.random.default_rng(T).integers(0, T, (B, documents)), axis=1)
  ids = 1 + (np.arange(T) >= ends[:, :, None]).sum(1)
  return jnp.asarray(np.where(ids > documents, 0, ids), jnp.int32)


def random_bias(*shape):
  return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def out_and_gradients(query, key, value, g, bias=None, **kwargs):
  arrays = {name: x for name, x in kwargs.items() if isinstance(x, jax.Array)}
  static = {name: x for name, x in kwargs.items() if name not in arrays}
  return _out_and_gradients(tuple(static.items()), (query, key, value, bias), g, arrays)


@functools.partial(jax.jit, static_argnums=0)
def _out_and_gradients(static, inputs, g, arrays):
  def attend(query, key, value, bias):
    return flash_attention(query, key, value, bias=bias, **dict(static), **arrays)

  out, vjp = jax.vjp(attend, *inputs)
  return out, *(x for x in vjp(g) if x is not None)


# name: (B, T, S, N, K, H), arguments. T and S are odd, or span one, two or eight blocks.
CASES = {
    'causal': ((2, 33, 33, 2, 2, 8), {}),
    'multi_query': ((1, 17, 17, 4, 1, 4), {'causal': False}),
    'cross': ((2, 5, 40, 6, 2, 8), {'causal': False}),
    'packed': ((2, 150, 150, 4, 2, 8), {'query_segment_ids': packed(2, 150, 3),
                                        'key_segment_ids': packed(2, 150, 3)}),
    'cached': ((3, 5, 40, 4, 2, 8), {'query_offset': jnp.array([0, 7, 35])}),
    'one_query': ((3, 1, 40, 4, 2, 8), {'query_offset': jnp.array([0, 7, 39])}),
    'fewer_keys': ((1, 140, 20, 2, 2, 4), {}),
    'long': ((1, 1027, 1027, 1, 1, 4), {}),
    'window': ((1, 300, 300, 2, 1, 4), {'window': 40}),
    'window_on_both_sides': ((1, 300, 290, 1, 1, 4), {'causal': False, 'window': 50}),
    'window_beyond_the_keys': ((1, 300, 150, 1, 1, 4), {'window': 20}),
    'cached_window': ((2, 5, 40, 2, 1, 4), {'query_offset': jnp.array([0, 30]), 'window': 4}),
    'chunks': ((1, 300, 300, 2, 1, 4), {'chunk': 70}),
    'chunks_behind_a_memory': ((1, 140, 290, 1, 1, 4), {'chunk': 64, 'query_offset': 150,
                                                        'causal': False, 'window': 40}),
    'keys_after_the_queries': ((1, 300, 150, 2, 1, 4), {'query_offset': -160}),
    'cached_chunks': ((2, 5, 40, 2, 1, 4), {'query_offset': jnp.array([0, 30]), 'chunk': 16}),
    'prefix': ((2, 150, 150, 2, 2, 4), {'prefix': jnp.arange(150) < jnp.array([[0], [140]])}),
    'packed_prefix': ((2, 150, 150, 2, 1, 4), {
        'prefix': jnp.arange(150) % 40 < 20 + jnp.array([[0], [9]]), 'window': 30,
        'query_segment_ids': packed(2, 150, 3), 'key_segment_ids': packed(2, 150, 3)}),
    'softcap': ((1, 33, 33, 2, 1, 8), {'scale': 1.0, 'softcap': 2.0}),
    'shared_bias': ((3, 140, 33, 4, 2, 4), {'causal': False, 'scale': 0.7,
                                            'bias': random_bias(1, 4, 140, 33)}),
    'dropout': ((2, 150, 140, 4, 2, 8), {
        'dropout_rate': 0.3, 'dropout_seeds': jax.random.bits(jax.random.key(0), (2, 4)),
        'query_offset': 20}),
    'all': ((2, 150, 150, 4, 2, 8), {
        'window': 60, 'scale': 0.5, 'softcap': 3.0, 'bias': random_bias(2, 4, 150, 150),
        'prefix': jnp.arange(150) < jnp.array([[9], [90]]),
        'query_segment_ids': packed(2, 150, 3), 'key_segment_ids': packed(2, 150, 3)}),
}


@pytest.mark.supports('layers', 'sliding-window and local attention', 'additive attention bias',
                      'soft-capped attention scores', 'prefix attention')
@pytest.mark.supports('layers', 'grouped and multi-query attention')
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('case', CASES)
def test_attention_is_float64s_softmax_attention(case, implementation):
  shape, kwargs = CASES[case]
  query, key, value, g = operands(*shape)
  out = out_and_gradients(query, key, value, g, implementation=implementation, **kwargs)[0]
  np.testing.assert_allclose(exact(out), naive(query, key, value, **kwargs), atol=2e-5)


@pytest.mark.parametrize('case', CASES)
def test_gradients_of_the_blocks_are_the_references(case):
  shape, kwargs = CASES[case]
  args = operands(*shape)
  blocks, reference = (out_and_gradients(*args, implementation=name, **kwargs)[1:]
                       for name in ('cpu', 'reference'))
  for got, want in zip(blocks, reference):
    np.testing.assert_allclose(got, want, atol=3e-6 * shape[2]**0.5)


@pytest.mark.parametrize('kwargs', [
    {}, {'softcap': 1.5, 'scale': 1.2, 'window': 3},
    {'dropout_rate': 0.4, 'dropout_seeds': jnp.array([[1, 2], [3, 4]], jnp.uint32)}],
                         ids=['plain', 'capped', 'dropped'])
def test_the_references_gradient_is_float64s_by_finite_differences(kwargs):
  shape = 2, 5, 5, 2, 1, 4
  ids = jnp.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]])
  kwargs = {'query_segment_ids': ids, 'key_segment_ids': ids, **kwargs}
  *inputs, g = operands(*shape)
  inputs.append(random_bias(1, 2, 5, 5))
  _, *gradients = out_and_gradients(*inputs[:3], g, inputs[3], implementation='reference', **kwargs)
  assert len(gradients) == 4
  for place, gradient in enumerate(gradients):
    direction = np.random.default_rng(place).normal(size=gradient.shape)

    def moved(step):
      changed = [exact(x) for x in inputs]
      changed[place] += step * direction
      # float64 inside: `naive` reads these arrays without rounding them.
      return (naive_float64(*changed, **kwargs) * exact(g)).sum()

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    np.testing.assert_allclose((exact(gradient) * direction).sum(), slope, atol=1e-5)


def naive_float64(*arrays, **kwargs):
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(globals(), 'exact', np.asarray)
    return naive(*arrays, **kwargs)


@pytest.mark.supports('precision and parallelism', 'bfloat16 attention')
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('case', ['packed', 'all'])
def test_bfloat16_differs_by_its_rounding_only(case, implementation):
  shape, kwargs = CASES[case]
  args = operands(*shape, jnp.bfloat16)
  got = out_and_gradients(*args, implementation=implementation, **kwargs)
  args = [x.astype(jnp.float32) for x in args]
  want = out_and_gradients(*args, implementation='reference', **kwargs)
  for x, y in zip(got[:4], want):
    assert x.dtype == jnp.bfloat16
    # Each row of gradients sums up to S products, of which each factor was rounded once.
    tolerance = float(jnp.finfo(jnp.bfloat16).eps) * shape[2]**0.5 / 4
    assert np.abs(exact(x) - exact(y)).max() < tolerance
  for dbias, want_dbias in zip(got[4:], want[4:]):
    assert dbias.dtype == jnp.float32
    np.testing.assert_allclose(dbias, want_dbias, atol=float(jnp.finfo(jnp.bfloat16).eps) * 4)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_a_bias_in_bfloat16_has_its_gradient_in_bfloat16(implementation):
  *inputs, g = operands(2, 9, 9, 2, 1, 4)
  bias = random_bias(1, 2, 9, 9).astype(jnp.bfloat16)
  *got, dbias = out_and_gradients(*inputs, g, bias, implementation=implementation)
  *want, exact_dbias = out_and_gradients(*inputs, g, bias.astype(jnp.float32),
                                         implementation='reference')
  assert dbias.dtype == jnp.bfloat16
  for x, y in zip(got, want):
    np.testing.assert_allclose(x, y, atol=1e-5)
  np.testing.assert_allclose(exact(dbias), exact_dbias, atol=1e-5, rtol=1 / 128)


@pytest.mark.parametrize('options, keys', [({'window': 64}, 191), ({}, 512),
                                           ({'window': 64, 'causal': False}, 254),
                                           ({'chunk': 100}, 212), ({'query_offset': -128}, 384)])
def test_a_block_of_queries_multiplies_only_the_keys_that_it_sees(options, keys):
  query, key, value, _ = operands(1, 512, 512, 1, 1, 8)
  attend = functools.partial(flash_attention, implementation='cpu', **options)
  dots = re.findall(r'dot_general.*-> tensor<1x128x(\d+)xf32>',
                    jax.jit(attend).lower(query, key, value).as_text())
  assert max(int(n) for n in dots) == keys


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_a_query_that_sees_no_key_gives_zeros_and_takes_no_gradient(implementation):
  query, key, value, g = operands(1, 4, 6, 2, 1, 8)
  ids = {'query_segment_ids': jnp.array([[1, 1, 5, 2]]),
         'key_segment_ids': jnp.array([[1, 2, 2, 2, 3, 0]])}
  out, dquery, dkey, dvalue = out_and_gradients(query, key, value, g, causal=False,
                                                implementation=implementation, **ids)
  np.testing.assert_allclose(exact(out), naive(query, key, value, causal=False, **ids), atol=1e-6)
  assert not np.any(out[:, 2]) and not np.any(dquery[:, 2])
  assert not np.any(dkey[:, 4:]) and not np.any(dvalue[:, 4:])
  assert all(np.isfinite(x).all() for x in (dquery, dkey, dvalue))


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_huge_scores_and_garbage_behind_a_cache_stay_out(implementation):
  query, key, value, _ = operands(1, 3, 9, 2, 2, 8)
  offset = jnp.array([2])
  dirty_key, dirty_value = key.at[:, 5:].set(1e30), value.at[:, 5:].set(1e30)
  attend = jax.jit(functools.partial(flash_attention, query_offset=offset,
                                     implementation=implementation))
  np.testing.assert_array_equal(attend(query, dirty_key, dirty_value), attend(query, key, value))
  assert np.isfinite(attend(query * 1e4, key * 1e4, value)).all()


@pytest.mark.parametrize('implementation', [None, 'cpu'])
def test_vmap_and_a_gradient_through_scan_agree_with_a_loop(implementation):
  query, key, value, _ = operands(3, 6, 6, 2, 2, 4)
  attend = functools.partial(flash_attention, implementation=implementation)
  stacked = [x[:, None] for x in (query, key, value)]
  np.testing.assert_allclose(jax.jit(jax.vmap(attend))(*stacked)[:, 0],
                             jax.jit(attend)(query, key, value), atol=1e-6)

  def looped(query, scan):
    step = lambda carry, _: (attend(carry, key, value), None)
    if scan:
      return jax.lax.scan(step, query, length=2)[0].sum()
    return step(step(query, 0)[0], 0)[0].sum()

  scanned, unrolled = (jax.jit(jax.grad(looped), static_argnums=1)(query, scan)
                       for scan in (True, False))
  np.testing.assert_allclose(scanned, unrolled, atol=1e-5)


def test_neither_pass_keeps_the_probabilities():
  T = 512
  query, key, value, g = operands(1, T, T, 4, 4, 8)

  def residuals(*qkv):
    return jax.vjp(lambda *a: flash_attention(*a, implementation='cpu'), *qkv)[1]

  kept = jax.tree.leaves(jax.eval_shape(residuals, query, key, value))
  assert max(x.size for x in kept) < T * T


def test_wrong_arguments_are_named():
  query, key, value, _ = operands(1, 4, 4, 3, 2, 4)
  ids = jnp.ones((1, 4), jnp.int32)
  with pytest.raises(ValueError, match='3 query heads do not divide into 2 key-value heads'):
    flash_attention(query, key, value)
  with pytest.raises(ValueError, match=r'key \(1, 4, 2, 4\) and value \(1, 3, 2, 4\)'):
    flash_attention(query, key, value[:, :3])
  with pytest.raises(ValueError, match='for both query and key'):
    flash_attention(query[:, :, :2], key, value, query_segment_ids=ids)
  with pytest.raises(ValueError, match="implementation='cuda'"):
    flash_attention(query[:, :, :2], key, value, implementation='cuda')


@pytest.mark.parametrize('changes, named', [
    ({'query_offset': jnp.array([1])}, 'query_offset'),
    ({'query_segment_ids': jnp.ones((2, 4), int), 'key_segment_ids': jnp.ones((2, 5), int)},
     'query_segment_ids'),
    ({'query_segment_ids': jnp.ones((2, 5), int), 'key_segment_ids': jnp.ones((2, 4), int)},
     'key_segment_ids'),
    ({'prefix': jnp.ones((2, 4), bool)}, r'prefix has shape \(2, 4\), it must be \(2, 5\)'),
    ({'prefix': jnp.ones((2, 5), int)}, 'prefix is int32, it must be boolean'),
    ({'bias': jnp.ones((2, 5, 5))}, r'bias has shape \(2, 5, 5\), it must be \(2, 2, 5, 5\)'),
    ({'bias': jnp.ones((2, 1, 5, 5))}, r'or \(1, 2, 5, 5\)'),
    ({'chunk': 0}, 'chunk=0 must be at least 1'),
    ({'window': 0}, 'window=0 must be at least 1'),
    ({'softcap': 0.0}, 'softcap=0.0 must be positive')])
def test_options_that_do_not_fit_are_named(changes, named):
  query, key, value, _ = operands(2, 5, 5, 2, 2, 4)
  with pytest.raises(ValueError, match=named):
    flash_attention(query, key, value, **changes)
