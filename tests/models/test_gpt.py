"""What must hold of every GPT, and its equality with the published models."""
import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.models.gpt import GPT, GPTConfig
from pallas_kernels.dropout import Draws

T = 12


def shapes(config):
  module = config.build()
  boxed = jax.eval_shape(functools.partial(module.init, method='initialize'), jax.random.key(0))
  return nn.meta.unbox(boxed)['params']


@functools.cache
def init(config):
  """Random parameters by numpy (nothing to compile); no bias is 0, where faults would hide."""
  rng = np.random.default_rng(0)
  draw = lambda path, x: rng.normal(path[-1].key == 'scale', 0.2, x.shape).astype(np.float32)
  return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, shapes(config)))


@functools.cache
def real_init(config):
  """The module's own parameters; an `rbg` key compiles in a tenth of the time."""
  module = config.build()
  params = lambda rng: nn.meta.unbox(module.init(rng, method='initialize'))['params']
  return jax.jit(params)(jax.random.key(0, impl='rbg'))


@functools.cache
def jitted(config):
  """(params, tokens, positions, segment_ids, cache, draws) -> (logits, cache)."""
  module = config.build()

  def logits(params, tokens, positions=None, segment_ids=None, cache=None, draws=None):
    hidden, cache = module.apply({'params': params}, tokens, positions, segment_ids, cache,
                                 draws)
    return module.apply({'params': params}, hidden, method='logits'), cache

  return jax.jit(logits)


def forward(config, params, *args, **kwargs):
  return jitted(config)(params, *args, **kwargs)[0]


def tokens(config, batch=2, length=T, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(1, config.vocab_size, (batch, length)).astype(np.int32)


def test_no_output_depends_on_a_later_token(tiny_config):
  config = tiny_config()
  # Place t reads a row of its own, so that the gradient of the table tells the places apart.
  params, ids = init(config), jnp.arange(6)[None]

  @jax.jit
  def sensitivity(table):
    """|d out[t] / d in[s]|, [6, 6]."""
    changed = lambda x: {'params': {**params, 'token_embedding': x}}
    outputs = lambda x: config.build().apply(changed(x), ids)[0][0]
    return jnp.abs(jax.jacrev(outputs)(table))[:, :, :6].sum((1, 3))

  moved = np.asarray(sensitivity(params['token_embedding']))
  assert not np.triu(moved, 1).any() and (moved[np.tril_indices(6)] > 1e-3).all()


def test_packed_documents_are_as_if_alone(tiny_config):
  config = tiny_config()
  params, ids = init(config), tokens(config, 1)
  segments = np.array([[1] * 5 + [2] * 4 + [0] * 3], np.int32)
  positions = np.array([[*range(5), *range(4), 0, 0, 0]], np.int32)
  packed = forward(config, params, ids, positions, segments)
  for start, end in ((0, 5), (5, 9)):
    alone = forward(config, params, ids[:, start:end])
    np.testing.assert_allclose(packed[:, start:end], alone, atol=2e-5)
  assert np.isfinite(packed).all()


def test_padding_does_not_change_logits(tiny_config):
  config = tiny_config()
  params, ids = init(config), tokens(config)
  segments = np.repeat([[1] * 7 + [0] * 5], 2, 0).astype(np.int32)
  padded = np.where(segments, ids, 0)
  got, other = (forward(config, params, x, None, segments) for x in (padded, ids))
  np.testing.assert_array_equal(got[:, :7], other[:, :7])
  np.testing.assert_allclose(got[:, :7], forward(config, params, ids[:, :7]), atol=2e-5)


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(config, params, ids):
  module = config.build()
  score = lambda p: (module.apply({'params': p}, ids)[0]**2).sum()
  return jax.value_and_grad(score)(params)


@pytest.mark.supports('layers', 'scan over layers', 'rematerialisation')
@pytest.mark.parametrize('changes', [{'scan_layers': True}, {'remat': 'full'},
                                     {'scan_layers': True, 'remat': 'dots'},
                                     {'scan_layers': True, 'remat': 'qkv+attention+mlp_in@host'}],
                         ids=['scanned', 'rematerialised', 'both', 'named'])
def test_scan_and_remat_change_neither_the_parameters_nor_the_gradients(tiny_configs, changes):
  config = tiny_configs['llama'](scan_layers=False, num_layers=2)
  changed = dataclasses.replace(config, **changes)
  params, ids = init(config), tokens(config)
  assert jax.tree.all(jax.tree.map(np.array_equal, real_init(config), real_init(changed)))
  want, got = value_and_grad(config, params, ids), value_and_grad(changed, params, ids)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())


@pytest.mark.parametrize('positions', ['learned', 'rotary', 'alibi'])
def test_cached_decoding_is_the_full_forward_pass(tiny_configs, positions):
  config = tiny_configs['gpt2'](positions=positions, num_kv_heads=2)
  params, ids = init(config), tokens(config)
  want = forward(config, params, ids)
  cache, parts = config.init_cache(2, T + 3), []
  for start, end in ((0, 5), (5, 10), (10, 11), (11, 12)):  # chunks of a prompt, then one by one
    part, cache = jitted(config)(params, ids[:, start:end], cache=cache)
    parts.append(part)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), want, atol=3e-5)
  assert list(cache.length_B) == [T, T]


def test_a_cache_takes_no_packed_documents(tiny_configs):
  config = tiny_configs['gpt2']()
  ids = jnp.asarray(tokens(config))
  with pytest.raises(ValueError, match='each row is one document'):
    config.build().apply({'params': init(config)}, ids, segment_ids=jnp.ones_like(ids),
                         cache=config.init_cache(2, T))


def test_prompts_of_ragged_lengths_continue_as_if_alone(tiny_config):
  config = tiny_config()
  params, ids = init(config), tokens(config)
  lengths = np.array([3, 7], np.int32)
  prompts = np.where(np.arange(7) < lengths[:, None], ids[:, :7], 0)
  first, cache = jitted(config)(params, prompts, cache=config.init_cache(2, T))
  cache = dataclasses.replace(cache, length_B=jnp.asarray(lengths))
  then = np.stack([row[n:n + 2] for row, n in zip(ids, lengths)])
  second = jitted(config)(params, then, cache=cache)[0]
  for row, n in enumerate(lengths):
    alone = forward(config, params, ids[row:row + 1, :n + 2])[0]
    np.testing.assert_allclose(first[row, :n], alone[:n], atol=3e-5)
    np.testing.assert_allclose(second[row], alone[n:], atol=3e-5)


def test_rotary_scores_depend_on_distance_only(tiny_configs):
  config = tiny_configs['llama']()
  params, ids = init(config), tokens(config)
  moved = np.broadcast_to(np.arange(T, dtype=np.int32) + 17, ids.shape)
  np.testing.assert_allclose(forward(config, params, ids, moved), forward(config, params, ids),
                             atol=5e-5)


@pytest.mark.supports('layers', 'ALiBi')
def test_alibi_knows_the_distance_of_tokens_and_no_position(tiny_configs):
  config = tiny_configs['gpt2'](positions='alibi', max_length=4, num_layers=1)
  params, ids = init(config), tokens(config)
  turned = np.roll(ids, 1, axis=1)
  segments = np.broadcast_to(np.arange(T, dtype=np.int32) > 0, ids.shape).astype(np.int32)
  got = forward(config, params, turned, segment_ids=segments)[:, 1:]
  np.testing.assert_allclose(got, forward(config, params, ids)[:, :-1], atol=3e-5)
  swapped = np.concatenate([ids[:, 1::-1], ids[:, 2:]], 1)  # whose order one layer would not know
  assert np.abs(forward(config, params, swapped) - forward(config, params, ids))[:, -1].max() > 1e-3


@pytest.mark.parametrize('changes, present, absent', [
    ({}, {'token_embedding', 'position_embedding', 'kernel', 'bias'}, {'output_embedding'}),
    ({'tie_embeddings': False, 'use_bias': False, 'positions': 'rotary'},
     {'token_embedding', 'output_embedding'}, {'bias', 'position_embedding'})])
def test_parameters_are_those_of_the_config(tiny_configs, changes, present, absent):
  paths = jax.tree_util.tree_flatten_with_path(shapes(tiny_configs['gpt2'](**changes)))[0]
  names = {key.key for path, _ in paths for key in path}
  assert present <= names and not absent & names


def test_the_head_of_tied_embeddings_is_the_embedding(tiny_configs):
  config = tiny_configs['gpt2']()
  head = config.build().apply({'params': init(config)}, method='head')
  assert head is init(config)['token_embedding']


@pytest.mark.parametrize('where', ['dropout_rate', 'attention_dropout_rate'])
def test_dropout_is_a_function_of_its_key_and_off_without_one(tiny_configs, where):
  config = tiny_configs['gpt2'](**{where: 0.3})
  params, ids = init(config), tokens(config)
  off = forward(config, params, ids)
  draws = lambda seed: Draws.of(jax.random.key(seed), len(ids))
  one, same, other = (forward(config, params, ids, draws=draws(k)) for k in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert np.abs(one - other).max() > 0.1 and np.abs(one - off).max() > 0.1
  np.testing.assert_allclose(off, forward(tiny_configs['gpt2'](), params, ids), atol=1e-5)


def test_a_dropped_layer_is_left_out_and_only_where_a_key_is_given(tiny_configs):
  config = tiny_configs['gpt2'](layer_drop_rate=0.99999)
  params, ids = init(config), tokens(config)
  nothing = {**params, 'blocks': jax.tree.map(jnp.zeros_like, params['blocks'])}
  dropped = forward(config, params, ids, draws=Draws.of(jax.random.key(1), len(ids)))
  whole, none = forward(config, params, ids), forward(config, nothing, ids)
  np.testing.assert_allclose(dropped, none, atol=1e-5)
  assert np.abs(whole - none).max() > 0.1


def test_dropout_differs_between_layers_and_keeps_the_mean(tiny_configs):
  from lm.layers.linear import dropout
  x, draws = jnp.ones((200, 100)), Draws.of(jax.random.key(0), 200)
  dropped = dropout(x, 0.25, draws)
  assert set(np.unique(dropped).round(5)) == {0, np.float32(1 / 0.75).round(5)}
  assert abs(dropped.mean() - 1) < 0.02
  np.testing.assert_array_equal(dropout(x, 0.25, None), x)


def test_the_first_loss_is_that_of_guessing(tiny_config):
  config = tiny_config(init_std=0.02, vocab_size=512)
  ids = tokens(config, 4)
  logs = jax.nn.log_softmax(forward(config, real_init(config), ids[:, :-1]))
  loss = -np.take_along_axis(np.asarray(logs), ids[:, 1:, None], -1).mean()
  assert abs(loss - math.log(512)) < 0.05


def test_residual_projections_start_smaller():
  config = GPTConfig(vocab_size=8, max_length=8, d_model=64, num_layers=8, num_heads=2, d_ff=128,
                     scan_layers=True)
  layers = real_init(config)['blocks']['layers']
  for part, name in (('attention', 'out'), ('mlp', 'wo')):
    assert np.std(layers[part][name]['kernel']) == pytest.approx(0.02 / 4, rel=0.02)
  assert np.std(layers['mlp']['wi']['kernel']) == pytest.approx(0.02, rel=0.02)


def test_flops_a_token_are_those_of_the_matrices_and_scores():
  config = GPTConfig()
  kernels = [leaf.size for path, leaf in jax.tree_util.tree_flatten_with_path(shapes(config))[0]
             if path[-1].key == 'kernel']
  matrices = sum(kernels) + config.vocab_size * config.d_model
  assert config.flops_per_token(0) == 6 * matrices
  assert config.flops_per_token(1024) - config.flops_per_token(0) == 12 * 12 * 768 * 1024


@pytest.mark.parametrize('changes, message', [
    ({'d_model': 770}, 'd_model=770 is not divisible by num_heads=12; set d_head explicitly'),
    ({'num_kv_heads': 5}, 'num_heads=12 is not divisible by num_kv_heads=5'),
    ({'positions': 'rotary', 'd_head': 7}, 'd_head=7 is odd'),
    ({'dropout_rate': 1.0}, r'dropout_rate=1.0 must be in \[0, 1\)'),
    ({'num_layers': 0}, 'num_layers=0 must be at least 1'),
    ({'vocab_size': -1}, 'vocab_size=-1 must be at least 1')])
def test_a_config_that_cannot_be_is_refused_in_one_sentence(changes, message):
  with pytest.raises(ValueError, match=message):
    GPTConfig(**changes)


def test_the_module_is_its_config_and_rules_alone(tiny_configs):
  config = tiny_configs['gpt2']()
  assert isinstance(config.build(), GPT) and config.build() == config.build()
