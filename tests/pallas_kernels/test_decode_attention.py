"""Decoding over a cache, dense or paged, of any dtype, is float64's attention of what stands."""
import functools
import pathlib

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention, quantize, tpu
from pallas_kernels.decode_attention.block_sizes import Blocks
from pallas_kernels.decode_attention.reference import Cache, Options

HERE = pathlib.Path(__file__).parent
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}
FAST = {'xla_backend_optimization_level': 0}


def exact(x):
  return None if x is None else np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)


def float64(query, key, value, lengths, *, bias=None, sinks=None, window=None, scale=None,
            softcap=None):
  """Softmax attention of a dense cache in float64, one query and head at a time."""
  query, key, value, bias, sinks = map(exact, (query, key, value, bias, sinks))
  B, T, N, H = query.shape
  out = np.zeros(query.shape)
  for b, t, n in np.ndindex(B, T, N):
    end = int(lengths[b]) - T + 1 + t
    seen = slice(0 if window is None else max(end - window, 0), max(end, 0))
    scores = key[b, n * key.shape[1] // N, seen] @ query[b, t, n] * (scale or H**-0.5)
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias[b % len(bias), n, t, seen]
    sink = -np.inf if sinks is None else sinks[n]
    largest = np.max(np.append(scores, sink), initial=-1e300)
    probs = np.exp(scores - largest)
    total = probs.sum() + np.exp(sink - largest)
    out[b, t, n] = probs @ value[b, n * key.shape[1] // N, seen] / (total or 1)
  return out


def error(got, want):
  return np.linalg.norm(exact(got) - want) / np.linalg.norm(want)


def random(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def paged(x_BKSH, page, table, spare):
  """The pool of `page` tokens a page in which row b's are where `table` says; others are NaN."""
  B, K, S = x_BKSH.shape[:3]
  pages = jnp.swapaxes(x_BKSH.reshape(B, K, S // page, page, *x_BKSH.shape[3:]), 1, 2)
  kind = jnp.zeros((), x_BKSH.dtype) if x_BKSH.dtype == jnp.int8 else jnp.nan
  pool = jnp.full((B * (S // page) + spare, *pages.shape[2:]), kind, x_BKSH.dtype)
  return pool.at[table.reshape(-1)].set(pages.reshape(-1, *pages.shape[2:]))


def poisoned(x_BKSH, lengths, window, T):
  """NaN where no query sees; int8 has none, and keeps its values."""
  if x_BKSH.dtype == jnp.int8:
    return x_BKSH
  at, lengths = jnp.arange(x_BKSH.shape[2]), jnp.asarray(lengths)[:, None]
  stands = (at < lengths) & (at >= (0 if window is None else lengths - T + 1 - window))
  stands = stands.reshape(len(stands), 1, -1, *[1] * (x_BKSH.ndim - 3))
  return jnp.where(stands, x_BKSH, jnp.asarray(jnp.nan, x_BKSH.dtype))


def call(B, T, N, K, H, S, lengths, dtype=jnp.float32, cached=None, page=None, **options):
  """Arguments of decode_attention, with NaN in all that no query sees, and float64's result."""
  query, key, value = (random(i, *shape).astype(dtype) for i, shape in enumerate(
      ((B, T, N, H), (B, K, S, H), (B, K, S, H))))
  arrays = {'key': key, 'value': value}
  if cached is not None:
    (key, key_scale), (value, value_scale) = (quantize(x, cached) for x in (key, value))
    arrays = {'key': key, 'value': value, 'key_scale': key_scale, 'value_scale': value_scale}
    key, value = (exact(x) * exact(scale)[..., None]
                  for x, scale in ((key, key_scale), (value, value_scale)))
  want = float64(query, key, value, lengths, **options)
  arrays = {name: poisoned(x, lengths, options.get('window'), T) for name, x in arrays.items()}
  if page is not None:
    spare, count = 3, B * S // page
    table = np.random.default_rng(S).permutation(count + spare)[:count].reshape(B, -1)
    arrays = {name: paged(x, page, table, spare) for name, x in arrays.items()}
    stands = np.arange(S // page) * page < np.asarray(lengths)[:, None]
    arrays['page_table'] = jnp.asarray(np.where(stands, table, 2**30), jnp.int32)
  return {'query': query, 'lengths': jnp.asarray(lengths, jnp.int32), **arrays}, options, want


INT8, FLOAT8 = jnp.int8, jnp.float8_e4m3fn
CASES = {
    'groups': ((2, 1, 8, 2, 128, 384, (384, 7), jnp.bfloat16), {}),
    'heads of 64': ((2, 1, 8, 8, 64, 128, (100, 128), jnp.bfloat16), {}),
    'heads of 80, capped': ((2, 1, 6, 3, 80, 256, (200, 129)), {'softcap': 2.0, 'scale': 0.3}),
    'heads of 256, none stands': ((2, 1, 16, 1, 256, 256, (200, 0)), {}),
    'window': ((3, 1, 4, 2, 128, 512, (400, 30, 512), jnp.bfloat16), {'window': 200}),
    'drafts, sinks': ((2, 3, 4, 2, 128, 256, (5, 256)), {'sinks': random(9, 4) + 1, 'page': 8}),
    'int8 in float32': ((3, 1, 4, 4, 96, 384, (128, 300, 1), jnp.float32, INT8), {'page': 128}),
    'float8': ((2, 2, 2, 1, 64, 256, (250, 40), jnp.bfloat16, FLOAT8), {'page': 128, 'window': 9}),
}


@functools.lru_cache
def run(implementation, static):
  return jax.jit(functools.partial(decode_attention, implementation=implementation, **dict(static)),
                 compiler_options=FAST if implementation == 'tpu' else None)


def attend(implementation, arrays, options):
  """decode_attention of what `call` gives."""
  static = tuple(x for x in options.items() if x[0] not in ('sinks', 'bias'))
  return run(implementation, static)(**arrays, **{k: options[k] for k in options
                                                  if k in ('sinks', 'bias')})


@pytest.mark.supports('kernels', 'decoding over a cache', 'ragged lengths', 'paged cache',
                      'int8 and float8 cache', 'drafted tokens', 'attention sinks')
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('implementation', ['tpu', 'cpu'])
def test_the_kernel_is_float64s_attention_of_what_stands(implementation, case):
  shape, options = CASES[case]
  arrays, options, want = call(*shape, **options)
  if (implementation, case) == ('cpu', 'float8'):
    with pytest.raises(NotImplementedError, match='cpu takes no float8_e4m3fn of the cache'):
      attend(implementation, arrays, options)
    return
  out = attend(implementation, arrays, options)
  assert out.dtype == arrays['query'].dtype
  assert error(out, want) <= TOLERANCE[out.dtype.type]


@pytest.mark.parametrize('implementation', ['tpu', 'cpu'])
@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 256), min_size=3, max_size=3), st.permutations(range(15)))
def test_any_lengths_and_any_pages_give_the_same(implementation, lengths, order):
  """One program serves all: pages of 64, in the middle of which a row may end."""
  query, key, value = random(0, 3, 1, 4, 128), random(1, 3, 2, 256, 128), random(2, 3, 2, 256, 128)
  table = jnp.asarray(order[:12]).reshape(3, 4)
  pools = [paged(poisoned(x, lengths, None, 1), 64, table, 3) for x in (key, value)]
  out = run(implementation, ())(query, *pools, jnp.asarray(lengths), page_table=table)
  want = float64(query, key, value, lengths)
  assert np.linalg.norm(exact(out) - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize('case', ['groups', 'window', 'drafts, sinks', 'int8 in float32', 'float8'])
def test_the_form_of_xla_is_float64s_attention(case):
  """A dense cache must be finite behind its rows here: what has no weight is not left out."""
  shape, options = CASES[case]
  arrays, options, want = call(*shape, **options)
  if 'page_table' not in arrays:
    arrays = {name: x if x.dtype == jnp.int8 else jnp.nan_to_num(x) for name, x in arrays.items()}
  out = attend('reference', arrays, options)
  assert error(out, want) <= TOLERANCE[out.dtype.type]


@pytest.mark.parametrize('implementation', ['reference', 'cpu'])
@pytest.mark.parametrize('rows', [1, 3])
def test_decoding_takes_a_bias(rows, implementation):
  lengths, bias = jnp.array([1, 8, 40]), random(5, rows, 4, 2, 40)
  query, key, value = random(0, 3, 2, 4, 8), random(1, 3, 2, 40, 8), random(2, 3, 2, 40, 8)
  options = {'window': 3, 'scale': 0.9, 'softcap': 1.5, 'bias': bias}
  out = decode_attention(query, key, value, lengths, implementation=implementation, **options)
  assert error(out, float64(query, key, value, lengths, **options)) <= 1e-5


@pytest.mark.parametrize('implementation', ['cpu', 'tpu'])
def test_the_gradient_is_that_of_the_form_of_xla(implementation):
  lengths = jnp.array([130, 7])
  arrays = {'query': random(0, 2, 2, 4, 64), 'key': random(1, 2, 2, 256, 64),
            'value': random(2, 2, 2, 256, 64)}
  weights = random(3, 2, 2, 4, 64)
  of = lambda which: jax.grad(lambda arrays: (weights * decode_attention(
      **arrays, lengths=lengths, implementation=which)).sum())(arrays)
  for got, want in zip(*map(jax.tree.leaves, (of(implementation), of('reference')))):
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def test_nothing_is_read_that_is_not_seen_or_not_there():
  """In a simulated memory whose unwritten places are NaN and whose copies take their time; pages
  that hold nothing of a row are none of the pool, and the simulation raises on reading them."""
  arrays, _, want = call(3, 1, 2, 1, 128, 384, (17, 384, 129), cached=INT8, page=128, window=140)
  cache = Cache(**{name: arrays[name] for name in Cache._fields})
  out = tpu.decode_attention(
      Options(140, 128**-0.5, None), arrays['query'], cache, arrays['lengths'], None, None,
      chip='v5e', blocks=Blocks(256, 128, 2**20), interpret=pltpu.InterpretParams(
          detect_races=True, uninitialized_memory='nan', out_of_bounds_reads='raise'))
  assert error(out, want) <= 1e-5
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call
  assert not interpret_pallas_call.races.races_found


def test_a_long_cache_is_read_to_its_end():
  arrays, options, want = call(2, 1, 4, 1, 128, 2**15, (2**15, 2**15 - 100), jnp.bfloat16)
  assert error(attend('tpu', arrays, options), want) <= 1e-2


def test_two_cores_share_all_blocks_evenly():
  lengths, keys = jnp.array([1, 4096, 700, 0, 9000]), 512
  layout = tpu.Layout(Options(1000, 1.0, None), 1, 1, 1, 128, 2**14, 1, 1, Blocks(keys, 128))
  begins, ends = map(np.asarray, tpu.parts(layout, lengths, 2))
  visits = [[(b, i) for b in range(5) for i in range(begins[c, b], ends[c, b])] for c in range(2)]
  want = [(b, i) for b, n in enumerate(np.asarray(lengths))
          for i in range(max(n - 1000, 0) // keys, max(-(-n // keys), 1))]
  assert visits[0] + visits[1] == want and abs(len(visits[0]) - len(visits[1])) <= 1


@pytest.mark.parametrize('dtype', [INT8, FLOAT8])
def test_quantised_keys_are_within_half_a_step(dtype):
  x = random(0, 7, 5, 64).at[3, 2].set(0)
  values, scale = quantize(x, dtype)
  assert values.dtype == dtype and scale.shape == (7, 5) and scale.dtype == jnp.float32
  with pytest.raises(ValueError, match='int4 must be int8 or float8_e4m3fn'):
    quantize(x, jnp.int4)
  x, values, scale = exact(x), exact(values), exact(scale)[..., None]
  step = scale / 2 if dtype == INT8 else np.maximum(abs(x) / 16, scale / 1024)
  assert (abs(values * scale - x) <= 1.001 * step).all() and not values[3, 2].any()


def test_what_does_not_fit_is_named():
  arrays, _, _ = call(2, 1, 4, 2, 128, 256, (1, 2), cached=INT8, page=128)
  for changes, message in (
      ({'query': random(0, 2, 1, 3, 128)}, '3 query heads do not divide into 2 key-value heads'),
      ({'page_table': None}, r'must be \[B, T, N, H\]'),
      ({'key_scale': None}, 'int8: int8 and float8_e4m3fn need key_scale and value_scale'),
      ({'lengths': jnp.ones((3,), int)}, r'lengths has shape \(3,\), it must be \(2,\)'),
      ({'bias': jnp.ones((2, 4, 1, 3))}, r'bias has shape .* must be \(2, 4, 1, 256\) or'),
      ({'window': 0}, 'window=0 must be at least 1'), ({'softcap': 0.0}, 'must be positive')):
    with pytest.raises(ValueError, match=message):
      decode_attention(**arrays | changes)


def test_what_the_kernel_refuses_is_named():
  shape = jax.ShapeDtypeStruct
  query = shape((2, 1, 4, 64), jnp.bfloat16)
  cache = lambda S, K=2, H=64, dtype=jnp.bfloat16: Cache(*(shape((2, K, S, H), dtype),) * 2)
  assert tpu.refusal(query, cache(256)) is None
  assert 'takes no bias' in tpu.refusal(query, cache(256), shape((1, 4, 1, 256), jnp.float32))
  assert '200 keys of a row are no multiple of 128' in tpu.refusal(query, cache(200))
  wide = shape((2, 1, 4, 320), jnp.bfloat16)
  assert 'heads of at most 256' in tpu.refusal(wide, cache(16, 2, 320))
  many = shape((2, 1, 256, 256), jnp.float32), cache(2**12, 256, 256, jnp.float32)
  assert 'MiB of VMEM; a core of v4 has 16' in tpu.refusal(*many, chip='v4')
  with pytest.raises(NotImplementedError, match='no multiple of 128'):
    decode_attention(random(0, 1, 1, 1, 64), *[random(1, 1, 1, 8, 64)] * 2, jnp.array([8]),
                     implementation='tpu')


@pytest.mark.supports('kernels', 'decoding cut over rows and heads')
def test_decoding_cut_over_rows_and_heads_is_that_of_one_device(child_with_devices):
  result = child_with_devices(HERE / 'sharded_decode_attention.py', devices=4)
  assert result['devices'] == 4 and result['error'] <= 1e-6
