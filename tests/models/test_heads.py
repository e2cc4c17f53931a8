"""What must hold of every head, on trunks of each kind."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers import heads as layers
from lm.models.bert import BERTConfig
from lm.models.gpt import GPTConfig
from lm.models.heads import (ClassifierConfig, DualEncoderConfig, EmbedderConfig, SpanConfig,
                             TaggerConfig)
from lm.models.t5 import T5Config
from pallas_kernels.dropout import Draws

B, T, D = 3, 8, 16
TINY = dict(vocab_size=37, max_length=16, d_model=D, num_layers=1, num_heads=4, d_ff=24,
            dtype='float32', scan_layers=True)
BERT = BERTConfig(masked_lm=False, sentence_classes=0, init_std=0.2, **TINY)
TRUNKS = {'bert': BERT, 'gpt': GPTConfig(init_std=0.2, **TINY),
          't5': T5Config(decoder=False, **TINY)}


@functools.cache
def init(config):
  """Random parameters by numpy: nothing to compile."""
  boxed = jax.eval_shape(lambda: config.build().init(jax.random.key(0), method='initialize'))
  rng = np.random.default_rng(0)
  draw = lambda path, x: rng.normal(path[-1].key == 'scale', 0.2, x.shape).astype(np.float32)
  params = jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(boxed)['params'])
  return jax.tree.map(jnp.asarray, params)


@functools.cache
def jitted(config):
  call = lambda params, batch, rng: config.build().apply({'params': params}, batch, rng,
                                                         method='outputs')[0]
  return jax.jit(call)


def outputs(config, batch, rng=None):
  return jax.tree.map(np.asarray, jitted(config)(init(config), batch, rng))


def tokens(rows=B, length=T, seed=0):
  return np.random.default_rng(seed).integers(1, 37, (rows, length)).astype(np.int32)


def padded(ids, length):
  """The first `length` tokens of each row, 0s behind them, and the segments that say so."""
  segments = np.repeat([np.arange(ids.shape[1]) < length], len(ids), 0).astype(np.int32)
  return ids * segments, segments


def normal(*shape):
  return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


@pytest.mark.supports('models', 'classes of sequences and tokens, spans, embeddings on any trunk')
@pytest.mark.parametrize('head, trunk', [(ClassifierConfig, 'bert'), (ClassifierConfig, 'gpt'),
                                         (TaggerConfig, 't5'), (SpanConfig, 'bert')])
def test_padding_does_not_change_what_a_head_says(head, trunk):
  config = head(TRUNKS[trunk], **({'pooling': 'last'} if head is ClassifierConfig else {}))
  ids, segments = padded(tokens(), 5)
  side = 'decoder' if trunk == 'gpt' else 'encoder'
  got = outputs(config, {f'{side}_input_tokens': ids, f'{side}_segment_ids': segments})
  alone = outputs(config, {'encoder_input_tokens': ids[:, :5]})  # a GPT takes these too
  for name, x in got.items():
    real = x if name == 'classes' else x[:, :5]
    assert real.dtype == np.float32 and real.std() > 0.01
    np.testing.assert_allclose(real, alone[name], atol=2e-5)
    if name in ('starts', 'ends'):
      assert (x[:, 5:] == -1e9).all() and (real > -100).all()


def test_pooling_takes_tokens_under_the_mask_alone():
  hidden = normal(2, 4, D)
  mask = jnp.array([[True, True, True, False], [False] * 4])
  np.testing.assert_allclose(layers.pool(hidden, mask, 'mean')[0], hidden[0, :3].mean(0), atol=1e-6)
  assert not layers.pool(hidden, mask, 'mean')[1].any()  # 0 / 1e-9, not NaN
  np.testing.assert_array_equal(layers.pool(hidden, mask, 'last')[0], hidden[0, 2])
  np.testing.assert_array_equal(layers.pool(hidden, mask, 'cls'), hidden[:, 0])


def test_normalised_vectors_have_unit_length_and_0_a_gradient():
  x = normal(3, D).at[1].set(0)
  lengths = np.linalg.norm(layers.normalize(x), axis=-1)
  np.testing.assert_allclose(lengths, [1, 0, 1], atol=1e-6)
  assert np.isfinite(jax.grad(lambda x: layers.normalize(x).sum())(x)).all()


def test_the_poolings_of_a_classifier_are_those_of_their_names():
  names = 'pooler', 'cls', 'mean', 'last'
  configs = [ClassifierConfig(BERT, num_classes=5, pooling=name) for name in names]
  params, ids = init(configs[0]), jnp.asarray(tokens())

  @jax.jit
  def hidden_and_classes(params):
    call = lambda config: config.build().apply({'params': params}, {'encoder_input_tokens': ids},
                                               method='outputs')[0]['classes']
    return BERT.build().apply({'params': params['trunk']}, ids), list(map(call, configs))

  hidden, classes = jax.tree.map(np.asarray, hidden_and_classes(params))
  dense = lambda x, by: x @ by['dense']['kernel'] + by['dense']['bias']
  first = hidden[:, 0]
  pooled = np.tanh(dense(first, params['trunk']['pooler'])), first, hidden.mean(1), hidden[:, -1]
  for got, want in zip(classes, pooled, strict=True):
    np.testing.assert_allclose(got, dense(want, params['head']), atol=2e-5)


def test_dropout_of_a_head_is_a_function_of_its_key():
  config = TaggerConfig(BERT, head_dropout_rate=0.5)
  batch = {'encoder_input_tokens': tokens()}
  draws = lambda seed: Draws.of(jax.random.key(seed), len(tokens()))
  one, same, other = (outputs(config, batch, draws(k))['tags'] for k in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert np.abs(one - other).max() > 0.05 and np.abs(one - outputs(config, batch)['tags']).max() > 0


def pair(**changes):
  query, document = tokens(), tokens(seed=1)
  return {'query_tokens': query, 'document_tokens': document,
          'negative_tokens': tokens(2 * B, seed=2).reshape(B, 2, T), **changes}


@pytest.mark.supports('models', 'dual encoders, shared or not')
def test_joining_the_sides_of_one_encoder_changes_no_vector():
  config = EmbedderConfig(BERT, d_out=6)
  batch = pair()
  joint = outputs(config, batch)['embeddings']
  shorter = pair(query_tokens=padded(batch['query_tokens'], 5)[0][:, :6])  # of another length
  apart = outputs(config, shorter)['embeddings']
  assert joint['negative'].shape == (B, 2, 6)
  for name in ('document', 'negative'):
    np.testing.assert_allclose(joint[name], apart[name], atol=2e-6)
  np.testing.assert_allclose(np.linalg.norm(joint['query'], axis=-1), 1, atol=1e-5)
  again = pair(document_tokens=batch['query_tokens'], query_tokens=batch['document_tokens'],
               negative_tokens=np.stack([batch['document_tokens'], batch['query_tokens']], 1))
  swapped = outputs(config, again)['embeddings']
  for name, want in (('query', joint['document']), ('document', joint['query'])):
    np.testing.assert_allclose(swapped[name], want, atol=2e-6)
  np.testing.assert_allclose(swapped['negative'][:, 0], joint['document'], atol=2e-6)


def test_padding_is_0s_behind_the_text_alone():
  config = EmbedderConfig(BERT)
  params, ids = init(config), tokens()
  ids[:, 0] = 0  # as RoBERTa's token of the beginning

  @jax.jit
  def vectors_and_hidden(padded, text):
    trunk = BERT.build().apply({'params': params['trunk']}, text)
    return config.build().apply({'params': params}, padded), trunk

  vectors, hidden = vectors_and_hidden(padded(ids, 5)[0], ids[:, :5])
  np.testing.assert_allclose(vectors, layers.normalize(hidden.mean(1)), atol=2e-6)


def test_equal_texts_differ_by_dropout():
  config = EmbedderConfig(BERTConfig(masked_lm=False, sentence_classes=0, dropout_rate=0.2, **TINY))
  ids = tokens()
  got = outputs(config, {'query_tokens': ids, 'document_tokens': ids},
                Draws.of(jax.random.key(0), len(ids)))['embeddings']
  cosines = (got['query'] * got['document']).sum(-1)
  assert (cosines > 0.5).all() and (cosines < 0.9999).all()


def test_two_encoders_have_parameters_each_and_one_shares_them():
  embedder = EmbedderConfig(BERT, d_out=6)
  apart = DualEncoderConfig(embedder, EmbedderConfig(TRUNKS['t5'], d_out=6))
  assert set(init(apart)) == {'query', 'document'} and set(init(DualEncoderConfig(embedder))) == {
      'query'}
  batch = pair()
  del batch['negative_tokens']
  got = outputs(apart, batch)
  assert set(got) == {'embeddings'} and set(got['embeddings']) == {'query', 'document'}
  alone = jitted(embedder)(init(apart)['query'], batch, None)['embeddings']
  np.testing.assert_allclose(got['embeddings']['query'], alone['query'], atol=2e-6)
  assert np.abs(got['embeddings']['document'] - alone['document']).max() > 0.1


def test_a_learned_temperature_starts_where_told_and_its_scale_ends_at_100():
  config = DualEncoderConfig(EmbedderConfig(BERT), temperature=0.07)
  module, params = config.build(), init(config)
  start = jax.jit(lambda key: module.init(key, method='initialize')['params']['scale'])
  assert np.exp(-nn.meta.unbox(start(jax.random.key(0)))) == pytest.approx(0.07)
  call = lambda scale: jitted(config)({**params, 'scale': scale}, pair(), None)
  temperature = lambda scale: call(scale)['temperature']
  values = jax.vmap(jax.value_and_grad(temperature))(jnp.log(jnp.array([10.0, 200.0])))
  np.testing.assert_allclose(values[0], [0.1, 0.01], rtol=1e-5)
  np.testing.assert_allclose(values[1], [-0.1, -0.01], rtol=1e-5)  # so that it can come back


def test_a_head_says_of_itself_what_its_trunk_does():
  config = DualEncoderConfig(EmbedderConfig(BERT))
  for name in ('vocab_size', 'max_length', 'd_model', 'num_layers', 'num_heads', 'kv_heads',
               'head_dim', 'd_ff', 'dtype', 'dropout_rate', 'scan_layers', 'remat', 'scanned',
               'attention_dropout_rate', 'attention_implementation'):
    assert getattr(config, name) == getattr(BERT, name)
  assert config.flops_per_token(8) == BERT.flops_per_token(8) and config.init_carry(2) is None


@pytest.mark.parametrize('make, message', [
    (lambda: ClassifierConfig('bert'), "trunk='bert' must be the config of a model"),
    (lambda: TaggerConfig(T5Config(**TINY)), 'trunk.decoder=True, but a head stands'),
    (lambda: SpanConfig(BERT, head_dropout_rate=1.0), r'head_dropout_rate=1.0 must be in \[0, 1\)'),
    (lambda: ClassifierConfig(TRUNKS['gpt'], pooling='pooler'), 'needs a trunk with a pooler'),
    (lambda: DualEncoderConfig(EmbedderConfig(BERT), temperature=0.001), 'temperature=0.001 must'),
    (lambda: DualEncoderConfig(EmbedderConfig(BERT), EmbedderConfig(BERT, d_out=8)),
     'queries have 16 dimensions and documents 8; set the same d_out')])
def test_a_head_that_cannot_be_is_refused_in_one_sentence(make, message):
  with pytest.raises(ValueError, match=message):
    make()
