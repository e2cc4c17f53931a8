"""Mixup of pooled examples: its paper's equation, a function of each row alone, free when off."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.errors import UserError
from lm.layers import heads
from lm.models.bert import BERTConfig
from lm.models.heads import ClassifierConfig
from lm.training.losses import Prediction
from lm.training.state import TrainState
from lm.training.step import train_step
from pallas_kernels.dropout import Draws

B, K, T, ROWS = 4, 5, 12, 800
COUNTS = np.array([5, 3, 1, 2])
MIXUP = jax.jit(heads.mixup, static_argnums=2)


def draws(seed=0, rows=B):
  return Draws.of(jax.random.key(seed), rows)


def there(counts=COUNTS):
  return jnp.arange(K) < jnp.asarray(counts)[:, None]


def pooled():
  return jax.random.normal(jax.random.key(9), (ROWS, K, 3))


def test_vectors_are_mixed_as_their_shares_say():
  x = pooled()
  mixed, (partner, share) = jax.device_get(
      MIXUP(x, there(np.tile(COUNTS, ROWS // B)), 1.0, draws(0, ROWS)))
  for b, count in enumerate(COUNTS):
    assert sorted(partner[b, :count].tolist()) == list(range(count))  # each is a partner once
    assert partner[b, count:].tolist() == list(range(count, K))
    assert count == 1 or (partner[b, :count] != np.arange(count)).all()
    for k in range(count):
      expected = share[b, k] * x[b, k] + (1 - share[b, k]) * x[b, partner[b, k]]
      np.testing.assert_allclose(mixed[b, k], expected, rtol=1e-6)
  np.testing.assert_allclose(mixed[2, 0], x[2, 0], rtol=1e-6)  # alone in its row


@pytest.mark.parametrize('alpha', [0.2, 1.0, 4.0])
def test_shares_are_of_a_beta_distribution(alpha):
  _, (partner, share) = jax.device_get(
      MIXUP(pooled(), jnp.ones((ROWS, K), bool), alpha, draws(1, ROWS)))
  variance = 1 / (4 * (2 * alpha + 1))
  assert abs(share.mean() - 0.5) < 4 * (variance / share.size)**0.5
  assert abs(share.var() / variance - 1) < 0.1
  steps = np.bincount(partner[:, 0], minlength=K)[1:] / ROWS
  assert np.abs(steps - 1 / (K - 1)).max() < 0.06
  assert abs(np.corrcoef(share[:, 0], share[:, 1])[0, 1]) < 0.15


def test_a_row_is_mixed_alike_wherever_it_stands():
  x, is_there, of = pooled(), there(np.tile(COUNTS, ROWS // B)), draws(0, ROWS)
  whole = MIXUP(x, is_there, 1.0, of)[0]
  turned = MIXUP(x[::-1], is_there[::-1], 1.0, Draws(of.rows[::-1], of.batch))[0]
  np.testing.assert_array_equal(whole, turned[::-1])


def test_the_loss_is_that_of_soft_targets():
  is_there = there(np.tile(COUNTS, ROWS // B))
  logits = jax.random.normal(jax.random.key(2), (ROWS, K, 7))
  labels = jax.random.randint(jax.random.key(3), (ROWS, K), 0, 7)
  batch = {'class_labels': labels, 'class_weights': is_there.astype(jnp.float32)}
  _, (partner, share) = MIXUP(pooled(), is_there, 1.0, draws(0, ROWS))
  one_hot = jax.nn.one_hot(labels, 7)
  soft = share[..., None] * one_hot + (1 - share[..., None]) * jnp.take_along_axis(
      one_hot, partner[..., None], 1)
  expected = -(soft * jax.nn.log_softmax(logits)).sum(-1) * is_there
  sums = Prediction()({'classes': logits, 'mixed': (partner, share)}, batch)
  np.testing.assert_allclose(sums['classes'], expected.sum(), rtol=1e-5)
  with pytest.raises(UserError, match='r_drop=1.0 compares'):
    Prediction(r_drop=1.0)({'classes': logits, 'mixed': (partner, share)}, batch)


TRUNK = BERTConfig(vocab_size=31, max_length=T, d_model=8, num_layers=1, num_heads=2, d_ff=8,
                   masked_lm=False, sentence_classes=0, dtype='float32', init_std=0.3)


def batch_of(counts=COUNTS):
  rng = np.random.default_rng(0)
  segments = np.stack([np.minimum(np.arange(T) // (T // count) + 1, count) for count in counts])
  return {'encoder_input_tokens': rng.integers(1, 31, (B, T)).astype(np.int32),
          'encoder_segment_ids': segments.astype(np.int32),
          'class_labels': rng.integers(0, 3, (B, K)).astype(np.int32),
          'class_weights': np.asarray(there(counts), np.float32)}


def stepped(num_microbatches, **changes):
  module = ClassifierConfig(TRUNK, 3, **changes).build()
  variables = module.init(jax.random.key(0), method='initialize')['params']
  params = jax.tree.map(lambda x: x.value, variables, is_leaf=lambda x: hasattr(x, 'names'))
  optimizer = optax.sgd(1.0)
  state = TrainState(jnp.int32(0), params, optimizer.init(params),
                     jax.random.key_data(jax.random.key(5)))
  step = jax.jit(lambda s, b: train_step(module, Prediction(), optimizer, num_microbatches, s, b))
  state, metrics = step(state, batch_of())
  return state.params, metrics['loss']


def test_microbatches_are_mixed_as_the_whole_batch():
  whole, loss = stepped(1, mixup_alpha=1.0, head_dropout_rate=0.2)
  parts, other = stepped(2, mixup_alpha=1.0, head_dropout_rate=0.2)
  np.testing.assert_allclose(loss, other, rtol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), whole, parts)


def test_evaluation_is_not_mixed_and_no_mixup_is_no_change():
  def program(alpha, is_training):
    module = ClassifierConfig(TRUNK, 3, mixup_alpha=alpha).build()
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), method='initialize'))
    of = draws if is_training else lambda: None
    run = lambda params, batch: module.apply(params, batch, of(), method='outputs')[0]
    lowered = jax.jit(run).lower(params, batch_of())
    return lowered.as_text(), set(lowered.out_info)
  assert program(1.0, False) == program(0.0, False)
  assert program(0.0, True)[1] == {'classes'}
  assert program(1.0, True)[1] == {'classes', 'mixed'}


def test_rows_of_one_example_are_refused():
  config = ClassifierConfig(TRUNK, 3, mixup_alpha=0.4)
  module, batch = config.build(), batch_of()
  params = module.init(jax.random.key(0), method='initialize')
  for name in ('class_labels', 'class_weights'):
    batch[name] = batch[name][:, :1]
  with pytest.raises(UserError, match='mixup_alpha=0.4 mixes the examples of a row'):
    jax.jit(lambda x: module.apply(params, x, draws(), method='outputs'))(batch)
  with pytest.raises(ValueError, match='mixup_alpha=-1'):
    dataclasses.replace(config, mixup_alpha=-1.0)
