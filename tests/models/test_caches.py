"""What must hold of every kind of cache: decoding with it is the full forward pass."""
import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.inference.decoder import Decoder
from lm.layers import cache as caches
from lm.layers.rolling import Rolling, SLACK
from lm.models.cache import CacheOptions
from lm.models.transformer_xl import TransformerXLConfig

B, T = 3, 12
GPTS = {
    'learned': dict(),
    'rotary, grouped, local and global, unrolled': dict(
        positions='rotary', num_kv_heads=2, attention_pattern='LG', window=4, qk_norm=True,
        attention_softcap=5.0, scan_layers=False, num_layers=2),
    'rotary, local, scanned': dict(positions='rotary', num_kv_heads=1, attention_pattern='LLG',
                                   window=4, rope_theta_local=100.0),
    'alibi, grouped': dict(positions='alibi', num_kv_heads=2),
}


@functools.cache
def init(config):
  """Random parameters by numpy (nothing to compile)."""
  module, rng = config.build(), np.random.default_rng(0)
  boxed = jax.eval_shape(functools.partial(module.init, method='initialize'), jax.random.key(0))
  draw = lambda path, x: jnp.asarray(rng.normal(path[-1].key == 'scale', 0.2, x.shape), x.dtype)
  return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(boxed)['params'])


@functools.cache
def jitted(config):
  """(params, tokens, cache, new_B) -> (logits, cache)."""
  module = config.build()

  def logits(params, tokens, cache=None, new_B=None):
    hidden, cache = module.apply({'params': params}, tokens, cache=cache, new_B=new_B)
    return module.apply({'params': params}, hidden, method='logits'), cache

  return jax.jit(logits)


def tokens(config, batch=B, length=T):
  rng = np.random.default_rng(1)
  return rng.integers(1, config.vocab_size, (batch, length)).astype(np.int32)


def pages(config, num_pages=12, page_size=4, options=CacheOptions()):
  """A pool whose every place holds what nobody should read, and rows with pages out of order."""
  pool = config.init_pages(num_pages, page_size, options)
  layers = jax.tree.map(lambda x: jnp.full_like(x, 7), pool.layers)
  table = np.array([[5, 2, 9], [1, 11, 3], [8, 4, 10]], np.int32)
  return dataclasses.replace(pool, layers=layers, page_table=jnp.asarray(table),
                             length_B=jnp.zeros(B, jnp.int32))


@pytest.mark.supports('decoding', 'paged KV cache')
@pytest.mark.parametrize('name', GPTS)
def test_decoding_in_pages_is_the_full_forward_pass(tiny_configs, name):
  config = tiny_configs['gpt2'](**GPTS[name])
  params, ids = init(config), tokens(config)
  want = jitted(config)(params, ids)[0]
  cache, seen, got = pages(config), np.zeros(B, int), [[] for _ in range(B)]
  # Chunks of one shape and several lengths, a row that waits, then tokens one by one.
  for new in ([9, 4, 0], [1, 5, 9], [1, 1, 1], [1, 1, 1], [0, 1, 1]):
    size = 9 if max(new) > 1 else 1
    chunk = np.full((B, size), 36, np.int32)
    for row, n in enumerate(new):
      chunk[row, :n] = ids[row, seen[row]:seen[row] + n]
    part, cache = jitted(config)(params, chunk, cache, jnp.asarray(new, jnp.int32))
    for row, n in enumerate(new):
      got[row].append(part[row, :n])
    seen += new
    assert cache.length_B.tolist() == seen.tolist()
  for row in range(B):
    np.testing.assert_allclose(np.concatenate(got[row]), want[row, :seen[row]], atol=3e-5)
  assert seen.tolist() == [12, 12, 12]


def test_padding_and_idle_rows_write_nothing(tiny_configs):
  config = tiny_configs['gpt2']()
  before = pages(config)
  _, after = jitted(config)(init(config), tokens(config, B, 6), before,
                            jnp.array([3, 0, 6], jnp.int32))
  changed = np.asarray((after.layers.key != before.layers.key).any((0, 2, 4)))  # [pages, page]
  assert np.argwhere(changed).tolist() == [[4, 0], [4, 1], [5, 0], [5, 1], [5, 2],
                                           *([8, i] for i in range(4))]


def test_decoding_changes_a_pool_where_it_is(tiny_configs):
  """Neither form of the stack copies the pool: what is donated is what is returned."""
  for scan_layers in (True, False):
    config = tiny_configs['gpt2'](scan_layers=scan_layers)
    module, cache = config.build(), pages(config, 4096)
    step = lambda params, cache, ids: module.apply({'params': params}, ids, cache=cache)
    compiled = jax.jit(step, donate_argnums=1).lower(init(config), cache, tokens(config, B, 1))
    memory = compiled.compile().memory_analysis()
    size = sum(x.nbytes for x in jax.tree.leaves(cache.layers))
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 10


@pytest.mark.parametrize('shape', [(5, 2, 4, 3), (5, 2, 4)])
def test_a_tpus_way_to_write_is_that_of_others(shape):
  """Also of what has no such row or no such place: it is dropped."""
  rows, places = np.array([[0, 4], [5, 2], [3, 1]]), np.array([[3, 0], [1, 4], [2, 3]])
  old = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.bfloat16)
  new = jnp.arange(12 * math.prod(shape[3:]), dtype=jnp.bfloat16).reshape(3, 2, 2, *shape[3:])
  want = old.at[rows, :, places].set(new, mode='drop')
  got = caches._put_one_by_one(jnp.asarray(rows.ravel()), jnp.asarray(places.ravel()), old, new)
  assert np.array_equal(got, want) and (got != old).any((1, *range(3, len(shape)))).sum() == 4


def decoded(config, params, ids, cache, sizes=(9, 1, 1, 3)):
  """The logits of the tokens, in chunks of these sizes and the rest one by one; and the cache."""
  parts, start = [], 0
  for size in (*sizes, *[1] * (ids.shape[1] - sum(sizes))):
    part, cache = jitted(config)(params, ids[:, start:start + size], cache)
    parts.append(part)
    start += size
  return np.concatenate(parts, axis=1), cache


ROTARY = dict(positions='rotary', num_kv_heads=2, window=4, scan_layers=False, num_layers=2)
ALIBI = dict(positions='alibi', attention_pattern='L', window=4)


@pytest.mark.supports('decoding', 'sliding-window cache')
@pytest.mark.parametrize('changes', [ROTARY | dict(attention_pattern='LG', attention_softcap=5.0),
                                     ALIBI], ids=['some layers', 'all layers'])
def test_a_cache_of_the_window_is_as_the_whole_one(tiny_configs, changes):
  config = tiny_configs['gpt2'](**changes, max_length=64)
  params, ids = init(config), tokens(config, 2, 60)
  want = jitted(config)(params, ids)[0]
  cache = config.init_cache(2, 60, CacheOptions(rolling=True))
  got, cache = decoded(config, params, ids, cache, (45, 1, 3, 1))
  np.testing.assert_allclose(got, want, atol=3e-5)
  local = cache.kinds[0]
  assert isinstance(local, Rolling) and local.kept.key.shape[-2] == 4 + SLACK


@pytest.mark.parametrize('changes', [ROTARY | dict(window=None), dict(positions='alibi')],
                         ids=['rotary', 'alibi'])
@pytest.mark.supports('decoding', 'attention sinks (StreamingLLM)')
def test_a_text_goes_on_from_its_first_tokens_and_the_last(tiny_configs, changes):
  """By section 3.2 of the paper: a token sees them at the places that they have in the cache."""
  config = tiny_configs['gpt2'](**changes | dict(num_layers=1), max_length=16)
  params, ids = init(config), tokens(config, 2, 50)
  options = CacheOptions(window=6, num_sinks=2)
  got, cache = decoded(config, params, ids, config.init_cache(2, 1000, options), (9, 1, 20))
  whole = jitted(config)(params, ids[:, :8])[0]
  np.testing.assert_allclose(got[:, :8], whole, atol=3e-5)
  for end in (9, 20, 35, 50):
    seen = np.concatenate([ids[:, :2], ids[:, end - 6:end]], axis=1)
    np.testing.assert_allclose(got[:, end - 1], jitted(config)(params, seen)[0][:, -1], atol=3e-5)
  assert cache.kinds[0].kept.key.shape[-2] == 6 + SLACK


def test_a_window_is_kept_to_in_short_texts_too(tiny_configs):
  config = tiny_configs['gpt2'](**ROTARY | dict(window=None))
  params, ids = init(config), tokens(config, 2, 30)
  options = CacheOptions(window=6, num_sinks=2)
  short, long = (decoded(config, params, ids, config.init_cache(2, places, options))[0]
                 for places in (30, 1000))
  np.testing.assert_allclose(short, long, atol=3e-5)


def test_chunks_of_a_stream_are_as_its_tokens_one_by_one(tiny_configs):
  config = tiny_configs['gpt2'](**ROTARY | dict(window=None))
  params, ids = init(config), tokens(config, 2, 50)
  options = CacheOptions(window=6, num_sinks=2, dtype='int8')
  empty = config.init_cache(2, 1000, options)
  one, _ = decoded(config, params, ids, empty, (1,))
  chunks, _ = decoded(config, params, ids, empty, (9, 20, 20))
  np.testing.assert_allclose(chunks, one, atol=3e-5)


XL = TransformerXLConfig(vocab_size=37, max_length=16, memory_length=6, d_model=16, num_layers=3,
                         num_heads=4, d_ff=24, dtype='float32', init_std=0.2, scan_layers=True)


@pytest.mark.supports('decoding', 'Transformer-XL decoding')
@pytest.mark.parametrize('changes', [
    {}, dict(same_length=True, scan_layers=False, untie_biases=True),
    dict(clamp_length=3, cutoffs=(10, 20), div_val=2)], ids=['plain', 'same length', 'adaptive'])
def test_transformer_xl_decodes_as_it_is_evaluated_token_by_token(changes):
  config = dataclasses.replace(XL, **changes)
  params, ids = init(config), tokens(config, 2, 60)
  window = dataclasses.replace(config, same_length=True, memory_length=config.window)
  want = jitted(window)(params, ids)[0]
  got, cache = decoded(config, params, ids, config.init_cache(2, 60), (30, 3))
  np.testing.assert_allclose(got, want, atol=5e-5)
  module, memory = config.build(), config.init_carry(2)
  step = jax.jit(lambda memory, ids: module.apply({'params': params}, ids, memory))
  for t in range(20):  # as published: the memory of hidden states, segments of one token
    hidden, memory = step(memory, ids[:, t:t + 1])
  logits = module.apply({'params': params}, hidden, method='logits')
  np.testing.assert_allclose(got[:, 19:20], logits, atol=5e-5)
  moved = cache.take(jnp.array([1, 0]))
  swapped = jitted(config)(params, ids[::-1, :1], moved)[0]
  np.testing.assert_allclose(swapped[::-1], jitted(config)(params, ids[:, :1], cache)[0], atol=5e-5)


@pytest.mark.parametrize('kind, dtype, bound', [
    ('rows', 'int8', 0.02), ('pages', 'float8_e4m3fn', 0.08), ('window', 'float8_e4m3fn', 0.08),
    ('transformer_xl', 'int8', 0.02)])
@pytest.mark.supports('decoding', 'int8 and float8 KV caches')
def test_a_cache_of_8_bits_is_near_the_exact_one(tiny_configs, kind, dtype, bound):
  config = XL if kind == 'transformer_xl' else tiny_configs['gpt2'](
      **ROTARY | dict(attention_pattern='LG', max_length=64))
  params, ids = init(config), tokens(config, B, 12)

  def run(options):
    cache = (pages(config, options=options) if kind == 'pages' else
             config.init_cache(B, 64, options))
    return decoded(config, params, ids, cache, (9,))
  options = CacheOptions(rolling=kind == 'window')
  (want, exact), (got, small) = run(options), run(dataclasses.replace(options, dtype=dtype))
  size = lambda cache: sum(x.nbytes for x in jax.tree.leaves(cache.layers))
  assert 1e-5 < np.std(got - want) / np.std(want) < bound
  assert size(small) < size(exact) * (0.9 if kind == 'transformer_xl' else 0.55)


@pytest.mark.parametrize('kind', ['rows', 'window', 'transformer_xl'])
def test_drafts_that_are_taken_back_leave_no_trace(tiny_configs, kind):
  config = XL if kind == 'transformer_xl' else tiny_configs['gpt2'](
      **ROTARY | dict(attention_pattern='LG', max_length=64))
  params, ids = init(config), tokens(config, 2, 60)
  cache = config.init_cache(2, 60, CacheOptions(rolling=kind == 'window'))
  want, _ = decoded(config, params, ids, cache, (45,))
  _, cache = decoded(config, params, ids[:, :45], cache, (45,))
  drafts = np.full((2, 8), 5, np.int32)
  for _ in range(3):
    _, cache = jitted(config)(params, drafts, cache)
  cache = dataclasses.replace(cache, length_B=jnp.array([45, 45], jnp.int32))
  got, _ = decoded(config, params, ids[:, 45:], cache, (1,))
  np.testing.assert_allclose(got, want[:, 45:], atol=5e-5)


@pytest.mark.parametrize('kind', ['rows', 'window', 'transformer_xl'])
def test_neither_padding_nor_neighbours_change_what_a_row_reads(tiny_configs, kind):
  config = XL if kind == 'transformer_xl' else tiny_configs['gpt2'](
      **ROTARY | dict(attention_pattern='LG', max_length=64))
  decoder = Decoder(config.build(), cache=CacheOptions(rolling=kind == 'window'))
  params, ids = init(config), tokens(config, 3, 60)
  lengths = np.array([2, 45, 50], np.int32)

  @jax.jit
  def run(params, ids, lengths, new):
    logits, cache = decoder.start(params, ids, lengths, 64)
    return logits, decoder.extend(params, new, cache)[0]

  new = np.full((3, 2), 3, np.int32)
  junk = np.where(np.arange(60) < lengths[:, None], ids, 36)
  want = run(params, ids, lengths, new)
  order = np.array([2, 0, 1])
  got = run(params, junk[order], lengths[order], new)
  for x, y in zip(want, got):
    np.testing.assert_allclose(y, x[order], atol=1e-5)
  alone = jitted(config)(params, np.concatenate([ids[:1, :2], new[:1]], axis=1))[0]
  np.testing.assert_allclose(want[0][0], alone[0, 1], atol=3e-5)
  np.testing.assert_allclose(want[1][0], alone[0, 2:], atol=3e-5)
