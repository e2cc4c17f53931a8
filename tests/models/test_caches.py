"""What must hold of every kind of cache: decoding with it is the full forward pass."""
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers.rolling import Rolling, SLACK
from lm.models.cache import CacheOptions

B, T = 3, 12
GPTS = {
    'learned, scanned': dict(),
    'learned, unrolled': dict(scan_layers=False),
    'rotary, grouped, local and global': dict(
        positions='rotary', num_kv_heads=2, attention_pattern='LG', window=4, qk_norm=True,
        attention_softcap=5.0, scan_layers=False),
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


def pages(config, num_pages=12, page_size=4):
  """A pool whose every place holds what nobody should read, and rows with pages out of order."""
  pool = config.init_pages(num_pages, page_size)
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


def decoded(config, params, ids, cache, sizes=(7, 1, 1, 3, 1)):
  """The logits of the tokens, in chunks of these sizes and the rest one by one; and the cache."""
  parts, start = [], 0
  for size in (*sizes, *[1] * (ids.shape[1] - sum(sizes))):
    part, cache = jitted(config)(params, ids[:, start:start + size], cache)
    parts.append(part)
    start += size
  return np.concatenate(parts, axis=1), cache


ROTARY = dict(positions='rotary', num_kv_heads=2, window=4, scan_layers=False)
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
