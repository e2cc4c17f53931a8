"""Losses of several parts, and losses that compare all rows: against direct formulas."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.layers.heads import Scores
from lm.models.bert import BERTConfig
from lm.models.heads import DualEncoderConfig, EmbedderConfig
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training.losses import Contrastive, CosineSimilarity, Prediction
from lm.training.state import TrainState, init_state
from lm.training.step import jit_train_step, train_step

RNG = np.random.default_rng(0)
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: params,
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads))


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def put(tree):
  """The same on the device: what a loss is given."""
  return jax.tree.map(jnp.asarray, tree)


def softmax_nats(logits, labels):
  logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return -np.take_along_axis(logs, labels[..., None], -1)[..., 0]


@pytest.fixture(scope='module')
def masked_batch():
  """Two rows of 5 masked places (the last of each is filled up) and a class a row."""
  return {'masked_target_tokens': RNG.integers(0, 11, (2, 5)).astype(np.int32),
          'masked_loss_weights': np.float32([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
          'class_labels': np.int32([1, 0])}


def test_each_part_is_the_mean_of_its_own_places(masked_batch):
  hidden, embedding, bias, classes = normal(2, 5, 4), normal(11, 4), normal(11), normal(2, 2)
  loss = Prediction(class_weight=0.5)
  batch = put(masked_batch)
  sums = loss(put({'tokens': Scores(hidden, embedding, bias), 'classes': classes}), batch)
  weights = loss.weights(batch)
  nats = softmax_nats(hidden @ embedding.T + bias, masked_batch['masked_target_tokens'])
  want = (nats * masked_batch['masked_loss_weights']).sum() / 6
  assert float(sums['tokens'] / weights['tokens']) == pytest.approx(want, rel=1e-5)
  want = 0.5 * softmax_nats(classes, masked_batch['class_labels']).mean()
  assert float(sums['classes'] / weights['classes']) == pytest.approx(want, rel=1e-5)


def test_metrics_are_of_the_plain_loss_and_count_what_is_right(masked_batch):
  hidden, embedding = normal(2, 5, 4), normal(11, 4)
  best = (hidden @ embedding.T).argmax(-1).astype(np.int32)
  best[0, 0] = (best[0, 0] + 1) % 11
  batch = put({**masked_batch, 'masked_target_tokens': best})
  outputs = put({'tokens': Scores(hidden, embedding), 'classes': np.float32([[0, 1], [0, 1]])})
  plain, other = (loss.metrics(outputs, batch) for loss in
                  (Prediction(), Prediction(label_smoothing=0.3, z_loss=0.1)))
  assert tuple(map(float, plain['accuracy'])) == (5, 6)
  assert tuple(map(float, plain['classes_accuracy'])) == (1, 2)
  assert float(plain['loss'][0]) == float(other['loss'][0])


@pytest.mark.parametrize('name, shape, labels', [('tags', (2, 3), 'tag_labels'),
                                                 ('starts', (2,), 'start_positions')])
def test_tokens_and_places_are_classes_too(name, shape, labels):
  logits, want = normal(*shape, 5), RNG.integers(0, 5, shape).astype(np.int32)
  batch = {labels: want} | ({'tag_weights': np.float32([[1, 1, 0], [1, 0, 0]])}
                            if name == 'tags' else {})
  total = Prediction()(put({name: logits}), put(batch))[name]
  weights = batch.get('tag_weights', np.ones(shape))
  np.testing.assert_allclose(total, (softmax_nats(logits, want) * weights).sum(), rtol=1e-5)


def test_a_span_counts_when_all_of_its_tokens_are_right():
  spans = np.int32([[0, 1, 1, 0, 2, 0], [0, 1, 0, 2, 2, 2]])
  embedding = np.eye(4, dtype=np.float32)
  targets = RNG.integers(0, 4, spans.shape).astype(np.int32)
  guesses = targets.copy()
  guesses[0, 2] = (guesses[0, 2] + 1) % 4  # one of two tokens
  guesses[1, 0] = (guesses[1, 0] + 1) % 4  # of no span
  batch = {'decoder_target_tokens': targets, 'decoder_span_ids': spans,
           'decoder_loss_weights': np.ones(spans.shape, np.float32)}
  metrics = Prediction().metrics(put({'tokens': Scores(embedding[guesses], embedding)}), put(batch))
  assert tuple(map(float, metrics['span_exact_match'])) == (3, 4)


def test_r_drop_is_half_of_the_papers_loss(masked_batch):
  """arXiv:2106.14448, equations 1, 2 and 4, of both passes of each row."""
  hidden, embedding, classes = normal(4, 5, 4), normal(11, 4), normal(4, 3)
  batch = {name: np.concatenate([x, x]) for name, x in masked_batch.items()}
  loss = Prediction(r_drop=0.7)
  sums = loss(put({'tokens': Scores(hidden, embedding), 'classes': classes}), put(batch))
  weights = loss.weights(put(batch))
  got = sum(float(sums[name] / weights[name]) for name in sums)

  def paper(logits, labels, weights):
    logs = np.float64(logits) - np.log(np.exp(np.float64(logits)).sum(-1, keepdims=True))
    p, q = np.split(logs, 2)
    nll = sum(-np.take_along_axis(x, labels[..., None], -1)[..., 0] for x in (p, q))
    apart = ((np.exp(p) * (p - q)).sum(-1) + (np.exp(q) * (q - p)).sum(-1)) / 2
    return ((nll + 0.7 * apart) * weights).sum() / weights.sum()

  want = paper(hidden @ embedding.T, masked_batch['masked_target_tokens'],
               masked_batch['masked_loss_weights'])
  want += paper(classes, masked_batch['class_labels'], np.ones(2))
  assert got == pytest.approx(want / 2, rel=1e-5)


@pytest.mark.supports('objectives', 'R-Drop')
def test_a_step_with_r_drop_computes_each_row_twice_with_dropout_of_its_own():
  config = BERTConfig(vocab_size=19, max_length=8, d_model=16, num_layers=1, num_heads=2, d_ff=24,
                      dtype='float32', token_types=0, pooler=False, sentence_classes=0)
  tokens = RNG.integers(1, 19, (4, 6)).astype(np.int32)
  batch = {'encoder_input_tokens': tokens, 'masked_target_tokens': tokens,
           'masked_positions': np.broadcast_to(np.arange(6, dtype=np.int32), (4, 6)),
           'masked_loss_weights': RNG.integers(0, 2, (4, 6)).astype(np.float32)}
  rules = Rules().on(MeshConfig().build(jax.devices()[:1]))

  def gradients(rate, r_drop, num_microbatches=1):
    module = dataclasses.replace(config, dropout_rate=rate).build(rules)
    state = init_state(module, KEEP_GRADIENT, rules, seed=0)
    step = jax.jit(functools.partial(train_step, module, Prediction(r_drop=r_drop), KEEP_GRADIENT,
                                     num_microbatches))
    state, metrics = step(state, batch)
    return jax.device_get((state.opt_state, metrics))

  (plain, _), (twice, metrics) = gradients(0.0, 0.0), gradients(0.0, 1.0)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), plain, twice)
  assert abs(metrics['tokens_divergence']) < 1e-6
  (whole, metrics), (parts, _) = gradients(0.2, 1.0), gradients(0.2, 1.0, num_microbatches=2)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), whole, parts)
  assert metrics['tokens_divergence'] > 1e-4


def test_the_penalty_is_of_matrices_alone():
  params = {'a': {'kernel': np.float32([[1, -2]]), 'bias': np.float32([7])},
            'norm': {'scale': np.float32([9])}, 'token_embedding': np.float32([[3]])}
  assert float(Prediction(l1=0.1, l2=0.01).penalty(params)) == pytest.approx(0.6 + 0.14)


def test_a_step_adds_the_slope_of_the_penalty_to_the_gradient():
  """A model whose parameters are its head."""
  class Head:
    def apply(self, variables, batch, rng, carry, method):
      return {'tokens': Scores(hidden, variables['params']['head'])}, carry

  hidden, params = jnp.asarray(normal(2, 3, 4)), {'head': jnp.asarray(normal(5, 4))}
  batch = put({'decoder_target_tokens': np.int32([[1, 2, 3], [4, 0, 1]]),
               'decoder_loss_weights': np.ones((2, 3), np.float32)})
  state = TrainState(jnp.int32(0), params, params, jax.random.key_data(jax.random.key(0)))
  step = lambda loss: train_step(Head(), loss, KEEP_GRADIENT, 1, state, batch)
  (plain, before), (with_l2, after) = step(Prediction()), step(Prediction(l2=0.1))
  np.testing.assert_allclose(with_l2.opt_state['head'] - plain.opt_state['head'],
                             0.2 * params['head'], atol=1e-6)
  penalty = 0.1 * float((params['head']**2).sum())
  assert float(after['loss'] - before['loss']) == pytest.approx(penalty, rel=1e-4)


def embeddings(B=6, D=8, negatives=2):
  return {'query': normal(B, D), 'document': normal(B, D), 'negative': normal(B, negatives, D)}


def info_nce(queries, documents, temperature):
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  logits = unit(queries) @ unit(documents).T / temperature
  return softmax_nats(logits, np.arange(len(queries)))


@pytest.mark.parametrize('changes', [{}, {'symmetric': True}, {'matryoshka_dims': (2, 4)}],
                         ids=['plain', 'symmetric', 'matryoshka'])
def test_a_contrastive_loss_is_info_nce_over_documents_and_hard_negatives(changes):
  sides = embeddings()
  documents = np.concatenate([sides['document'], sides['negative'].reshape(-1, 8)])
  losses = [info_nce(sides['query'][:, :d], documents[:, :d], 0.1).sum()
            for d in (*changes.get('matryoshka_dims', ()), 8)]
  want = np.mean(losses)
  if changes.get('symmetric'):
    want = (want + info_nce(sides['document'], sides['query'], 0.1).sum()) / 2
  got = Contrastive(temperature=0.1, **changes)(put({'embeddings': sides}), {})['contrastive']
  assert float(got) == pytest.approx(float(want), rel=1e-5)


def test_a_learned_temperature_takes_the_place_of_the_fixed_one():
  sides = put(embeddings())
  fixed = Contrastive(temperature=0.3)({'embeddings': sides}, {})['contrastive']
  learned = Contrastive()({'embeddings': sides, 'temperature': jnp.float32(0.3)}, {})['contrastive']
  assert float(fixed) == pytest.approx(float(learned), rel=1e-6)


def test_retrieval_at_1_counts_queries_nearest_to_their_own_document():
  sides = {'query': np.eye(3, dtype=np.float32), 'document': np.eye(3, dtype=np.float32)[[0, 2, 1]]}
  batch = put({'query_tokens': np.zeros((3, 1), np.int32)})
  right, count = Contrastive().metrics(put({'embeddings': sides}), batch)['retrieval_at_1']
  assert (float(right), float(count)) == (1, 3)


@pytest.mark.parametrize('make, message', [
    (lambda: Prediction(label_smoothing=1.0), r'label_smoothing=1.0 must be in \[0, 1\)'),
    (lambda: Prediction(z_loss=-1.0), 'z_loss=-1.0 must be at least 0'),
    (lambda: Contrastive(temperature=0.0), 'temperature=0.0 must be positive')])
def test_a_loss_that_cannot_be_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


TRUNK = BERTConfig(vocab_size=40, max_length=8, d_model=16, num_layers=2, num_heads=2, d_ff=24,
                   pooler=False, sentence_classes=0, masked_lm=False, dtype='float32', init_std=0.2,
                   scan_layers=True)


@functools.cache
def contrastive_gradient(num_microbatches, dropout_rate=0.0):
  """Loss and gradients of the train step on 8 pairs."""
  rules = Rules().on(MeshConfig(data=1).build(jax.devices()[:1]))
  trunk = dataclasses.replace(TRUNK, dropout_rate=dropout_rate)
  module = DualEncoderConfig(EmbedderConfig(trunk), temperature=0.1).build(rules)
  tokens = np.random.default_rng(1).integers(1, 40, (2, 8, 8)).astype(np.int32)
  batch = {'query_tokens': tokens[0], 'document_tokens': tokens[1]}
  with jax.default_prng_impl('rbg'):
    state = init_state(module, KEEP_GRADIENT, rules, seed=0)
    step = jit_train_step(module, Contrastive(), KEEP_GRADIENT, rules, state, num_microbatches)
    state, metrics = step(state, batch)
  return jax.device_get((metrics['loss'], state.opt_state))


@pytest.mark.supports('objectives', 'InfoNCE with gradient caching')
def test_the_gradient_of_all_pairs_is_the_same_in_small_parts():
  (loss, grads), (small_loss, small_grads) = map(contrastive_gradient, (1, 4))
  assert float(loss) > 1 and float(small_loss) == pytest.approx(float(loss), rel=1e-5)
  assert abs(grads['scale']) > 1e-3  # of the temperature
  for x, y in zip(jax.tree.leaves(small_grads), jax.tree.leaves(grads)):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5 * max(np.abs(y).max(), 1e-2))


def test_cosine_similarity_is_the_mean_squared_error_of_cosines():
  rng = np.random.default_rng(0)
  query, document = rng.normal(size=(2, 6, 5))
  values = rng.uniform(size=6).astype(np.float32)
  cosines = (query * document).sum(1) / np.linalg.norm(query, axis=1) / np.linalg.norm(
      document, axis=1)
  outputs = {'embeddings': {'query': jnp.asarray(query), 'document': jnp.asarray(document)}}
  batch, loss = {'pair_values': jnp.asarray(values)}, CosineSimilarity()
  total, weight = loss.metrics(outputs, batch)['loss']
  np.testing.assert_allclose(total / weight, np.mean((cosines - values)**2), rtol=1e-5)
  some = loss.of_rows(batch, jnp.arange(6) < 4)
  np.testing.assert_allclose(loss(outputs, some)['similarity'],
                             np.sum((cosines - values)[:4]**2), rtol=1e-5)
  assert loss.weights(some)['similarity'] == 4
