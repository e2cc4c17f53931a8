"""What must hold of every encoder; `tests/interop` compares them with the published models."""
import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.errors import UserError
from lm.models.bert import BERTConfig
from pallas_kernels.dropout import Draws

T = 12
TINY = dict(vocab_size=37, max_length=16, d_model=16, num_layers=3, num_heads=4, d_ff=24,
            dtype='float32', init_std=0.2, scan_layers=True)
ROBERTA = dict(norm_epsilon=1e-5, position_offset=2, token_types=1, pooler=False,
               sentence_classes=0)
DISTILBERT = dict(token_types=0, pooler=False, sentence_classes=0)
MODERNBERT = dict(norm_placement='pre', norm_epsilon=1e-5, positions='rotary',
                  attention_pattern='GLL', window=3, rope_theta=160000.0, rope_theta_local=10000.0,
                  activation='geglu_exact', use_bias=False, token_types=0, pooler=False,
                  sentence_classes=0)
FAMILIES = {'bert': {}, 'roberta': ROBERTA, 'distilbert': DISTILBERT, 'modernbert': MODERNBERT}
both = pytest.mark.parametrize('family', ['bert', 'modernbert'])


def tiny(family, **changes):
  return BERTConfig(**{**TINY, **FAMILIES[family], **changes})


def shapes(config):
  module = config.build()
  boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), method='initialize'))
  return nn.meta.unbox(boxed)['params']


@functools.cache
def init(config):
  """Random parameters by numpy (nothing to compile); no bias is 0, where faults would hide."""
  rng = np.random.default_rng(0)
  draw = lambda path, x: rng.normal(path[-1].key == 'scale', 0.2, x.shape).astype(np.float32)
  return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, shapes(config)))


@functools.cache
def jitted(config):
  """(params, tokens, positions, segment_ids, token_types, draws) -> hidden."""
  return jax.jit(lambda params, *args: config.build().apply({'params': params}, *args))


def forward(config, *args):
  return np.asarray(jitted(config)(init(config), *args))


def tokens(config, batch=2, length=T, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(1, config.vocab_size, (batch, length)), jnp.int32)


def sentences(first=5):
  return jnp.repeat(jnp.array([[0] * first + [1] * (T - first)]), 2, 0)


def outputs(config, **batch):
  call = lambda params, batch: config.build().apply({'params': params}, batch, method='outputs')[0]
  return jax.jit(call)(init(config), batch)


def influence(config, segments):
  """How far out[t] moves with the token at s, [T, T]: row s of a batch has another token there."""
  T = len(segments)
  ids = np.array(jnp.repeat(tokens(config, 1, T), T + 1, 0))
  ids[np.arange(T), np.arange(T)] = ids[0] % (config.vocab_size - 1) + 1
  out = forward(config, jnp.asarray(ids), None, jnp.repeat(jnp.array([segments]), T + 1, 0))
  return np.abs(out[:T] - out[T]).max(-1).T


@pytest.mark.supports('models', 'BERT, RoBERTa, DistilBERT and ModernBERT encoders')
@pytest.mark.parametrize('family', FAMILIES)
def test_every_output_depends_on_every_input_of_its_segment_alone(family):
  segments = np.array([1, 1, 1, 1, 1, 2, 2])
  moved = influence(tiny(family), segments)
  same = segments[:, None] == segments
  assert (moved[same] > 1e-3).all() and (moved[~same] < 1e-6).all()


def test_a_local_layer_sees_its_window_and_no_more():
  config = tiny('modernbert', attention_pattern='L', num_layers=1)
  places = np.arange(8)
  seen = np.abs(places[:, None] - places) < 3
  moved = influence(config, np.ones(8, int))
  assert (moved[seen] > 1e-3).all() and (moved[~seen] < 1e-6).all()


def test_the_letters_of_the_pattern_are_repeated_over_the_layers():
  config = tiny('modernbert', num_layers=5)
  assert list(config.local_layers) == [False, True, True, False, True]
  # Each layer follows its own letter: exchanging two that differ is another model.
  ids = tokens(config)
  other = dataclasses.replace(config, attention_pattern='LGL')
  assert np.abs(forward(config, ids) - jitted(other)(init(config), ids)).max() > 1e-2


@both
def test_packed_documents_are_as_if_alone(family):
  config = tiny(family)
  ids = tokens(config, 1)
  segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
  positions = jnp.array([[*range(5), *range(4), 0, 0, 0]])
  packed = forward(config, ids, positions, segments)
  for start, end in ((0, 5), (5, 9)):
    np.testing.assert_allclose(packed[:, start:end], forward(config, ids[:, start:end]), atol=2e-5)
  assert np.isfinite(packed).all()


@both
def test_padding_changes_nothing(family):
  config = tiny(family)
  ids = tokens(config)
  segments = jnp.repeat(jnp.array([[1] * 7 + [0] * 5]), 2, 0)
  got, other = (forward(config, x, None, segments) for x in (ids * segments, ids))
  np.testing.assert_array_equal(got[:, :7], other[:, :7])
  np.testing.assert_allclose(got[:, :7], forward(config, ids[:, :7]), atol=2e-5)


@functools.cache
def value_and_grad(config):
  """Of a score of all heads, by every parameter of `init`."""
  batch = {'encoder_input_tokens': tokens(config), 'class_labels': jnp.zeros(2, jnp.int32),
           'encoder_token_types': sentences(), 'masked_positions': jnp.array([[1, 4], [0, 11]])}

  def score(params):
    outputs, _ = config.build().apply({'params': params}, batch, method='outputs')
    total = (outputs['tokens'].logits()**2).sum()
    return total + (outputs['classes']**2).sum() if 'classes' in outputs else total

  return jax.jit(jax.value_and_grad(score))(init(config))


@pytest.mark.parametrize('family, changes', [
    ('modernbert', {'scan_layers': False, 'remat': 'full'}), ('bert', {'remat': 'dots'})])
def test_scan_and_remat_change_no_gradient(family, changes):
  config = tiny(family)
  want = value_and_grad(config)
  got = value_and_grad(dataclasses.replace(config, **changes))
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 + 1e-4 * np.abs(y).max())


@pytest.mark.parametrize('family, changes', [
    ('roberta', {}), ('modernbert', {'attention_pattern': 'LLG'}), ('modernbert', {})])
def test_a_last_layer_of_masked_places_alone_changes_no_loss_and_no_gradient(family, changes):
  # Scanned layers are all alike; segments and positions are as of packed documents.
  ids, places = tokens(tiny(family)), jnp.array([[1, 4, 0], [10, 11, 6]])
  batch = {'encoder_input_tokens': ids, 'masked_positions': places,
           'encoder_segment_ids': jnp.array([[1] * 5 + [2] * 7] * 2),
           'encoder_positions': jnp.array([[*range(5), *range(7)]] * 2)}

  def value_and_grad(config):
    score = lambda params: (config.build().apply(
        {'params': params}, batch, method='outputs')[0]['tokens'].logits()**2).mean()
    return jax.jit(jax.value_and_grad(score))(init(config))

  config = tiny(family, **changes)
  want, got = (value_and_grad(dataclasses.replace(config, scan_layers=scan))
               for scan in (True, False))
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-6 + 1e-4 * np.abs(y).max())


@both
def test_every_parameter_of_every_layer_is_used(family):
  # But for the keys' bias: it moves all scores of a query alike.
  for path, x in jax.tree_util.tree_leaves_with_path(value_and_grad(tiny(family))[1]):
    layers = x if any(key.key == 'layers' for key in path) else x[None]
    is_used = np.abs(layers).reshape(len(layers), -1).max(1) > 1e-3
    assert is_used.all() or [key.key for key in path[-2:]] == ['key', 'bias'], path


def test_outputs_are_the_logits_of_the_masked_places():
  config = tiny('bert')
  ids, places = tokens(config), np.array([[3, 9, 0], [0, 11, 0]])
  got = outputs(config, encoder_input_tokens=ids, masked_positions=places)
  assert set(got) == {'tokens'} and got['tokens'].hidden.shape == (2, 3, 16)
  logits = jax.jit(lambda params, x: config.build().apply({'params': params}, x, method='logits'))
  want = np.take_along_axis(forward(config, ids), places[..., None], 1)
  np.testing.assert_allclose(got['tokens'].logits(), logits(init(config), want), atol=2e-5)


def test_sentence_classes_stand_on_the_pooled_first_token():
  config = tiny('bert')
  params, ids = init(config), tokens(config)
  got = outputs(config, encoder_input_tokens=ids, encoder_token_types=sentences(),
                class_labels=np.zeros(2, np.int32))
  dense = lambda x, name: x @ params[name]['dense']['kernel'] + params[name]['dense']['bias']
  first = forward(config, ids, None, None, sentences())[:, 0]
  want = dense(np.tanh(dense(first, 'pooler')), 'sentence_head')
  np.testing.assert_allclose(got['classes'], want, atol=1e-5)


@pytest.mark.parametrize('family, differs', [('bert', True), ('roberta', False)])
def test_token_types_tell_sentences_apart_where_there_are_two(family, differs):
  config = tiny(family)
  one, other = (forward(config, tokens(config), None, None, sentences(n)) for n in (5, T))
  assert (np.abs(one - other).max() > 0.1) == differs


def test_positions_begin_behind_the_offset():
  config = tiny('roberta')
  params, ids = init(config), tokens(config)
  assert params['position_embedding'].shape == (18, 16)
  moved = []
  for row in range(4):
    table = params['position_embedding'].at[row].add(1 + np.arange(16) % 3)
    changed = jitted(config)({**params, 'position_embedding': table}, ids)
    moved.append(np.abs(changed - forward(config, ids)).max() > 1e-3)
  assert moved == [False, False, True, True]


@pytest.mark.parametrize('where', ['dropout_rate', 'attention_dropout_rate'])
def test_dropout_is_a_function_of_its_key_and_off_without_one(where):
  config = tiny('modernbert', **{where: 0.3})
  ids = tokens(config)
  draws = lambda seed: Draws.of(jax.random.key(seed), len(ids))
  off = forward(config, ids)
  one, same, other = (forward(config, ids, None, None, None, draws(k)) for k in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert np.abs(one - other).max() > 0.1 and np.abs(one - off).max() > 0.1


@both
def test_without_its_layers_a_model_is_its_embedding(family):
  config = tiny(family, layer_drop_rate=1 - 1e-7)
  ids = tokens(config)
  got = forward(config, ids, None, None, None, Draws.of(jax.random.key(0), len(ids)))
  want = config.build().apply({'params': init(config)}, ids, None, None, None, method='_embed')
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_first_loss_is_that_of_guessing():
  config = tiny('bert', init_std=0.02, vocab_size=512, num_layers=1)
  module, ids = config.build(), tokens(config, 4)

  @jax.jit
  def logits(rng):
    params = nn.meta.unbox(module.init(rng, method='initialize'))
    return module.apply(params, module.apply(params, ids), method='logits')

  logs = jax.nn.log_softmax(logits(jax.random.key(0, impl='rbg')))
  loss = -np.take_along_axis(np.asarray(logs), np.asarray(ids)[..., None], -1).mean()
  assert abs(loss - math.log(512)) < 0.1


def test_flops_a_token_are_those_of_the_matrices_and_the_scores_that_are_seen():
  config = BERTConfig(vocab_size=50368, num_layers=22, d_ff=1152, masked_lm=False, **MODERNBERT)
  leaves = jax.tree_util.tree_leaves_with_path(shapes(config))
  assert config.flops_per_token(0) == 6 * sum(x.size for p, x in leaves if p[-1].key == 'kernel')
  scores = config.flops_per_token(1024) - config.flops_per_token(0)
  assert scores == 12 * 768 * (8 * 1024 + 14 * 5)  # 14 layers of 22 see 2 x 3 - 1 places
  with_head = dataclasses.replace(config, masked_lm=True)
  assert (with_head.flops_per_token(64, masked_share=0.5) - config.flops_per_token(64)
          == 3 * 768 * (768 + 50368))


@pytest.mark.parametrize('changes, message', [
    ({'d_model': 770}, 'd_model=770 is not divisible by num_heads=12; set d_head explicitly'),
    ({'positions': 'rotary', 'd_head': 7}, 'd_head=7 is odd'),
    ({'dropout_rate': 1.0}, r'dropout_rate=1.0 must be in \[0, 1\)'),
    ({'token_types': -1}, 'token_types=-1 must be at least 0'),
    ({'attention_pattern': 'GGX'}, "attention_pattern='GGX' must be letters G"),
    ({'attention_pattern': 'GLL'}, "attention_pattern='GLL' and window=None disagree"),
    ({'window': 8}, "attention_pattern='G' and window=8 disagree"),
    ({'pooler': False}, 'sentence_classes=2 stand on the pooler')])
def test_a_config_that_cannot_be_is_refused_in_one_sentence(changes, message):
  with pytest.raises(ValueError, match=message):
    BERTConfig(**changes)


@pytest.mark.parametrize('batch, message', [
    ({'decoder_input_tokens': 0}, 'a BERT reads encoder_input_tokens, and this batch has decoder_'),
    ({'encoder_input_tokens': 0}, 'it needs masked_positions or class_labels, and the head')])
def test_a_batch_of_another_objective_is_refused_in_one_sentence(batch, message):
  config = tiny('roberta')
  batch = {name: jnp.ones((1, 4), jnp.int32) for name in batch}
  with pytest.raises(UserError, match=message):
    config.build().apply({'params': init(config)}, batch, method='outputs')


def test_more_tokens_than_learned_positions_are_refused():
  config = tiny('bert')
  with pytest.raises(ValueError, match='17 tokens are longer than max_length=16'):
    config.build().apply({'params': init(config)}, jnp.ones((1, 17), jnp.int32))
