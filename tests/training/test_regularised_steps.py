"""Mixout and adversarial training are the equations of their papers, on any mesh, in any parts."""
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regularised_steps as steps

from lm.models.bert import BERTConfig
from lm.models.gpt import GPTConfig
from lm.models.heads import ClassifierConfig
from lm.models.t5 import T5Config
from lm.training import adversarial
from lm.training.losses import Prediction
from lm.training.optimizers import AdamW, mixout
from lm.training.step import jit_train_step
from pallas_kernels.dropout import Draws


def close(ours, theirs, atol=2e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), ours, theirs)


@pytest.mark.supports('fine-tuning', 'adversarial FGM')
def test_the_adversarial_loss_is_at_embeddings_moved_along_their_gradient():
  """arXiv:1605.07725, equations 7 and 8, of each example by itself."""
  rules, module, state = steps.start({'data': 1}, steps.KEEP_GRADIENT)
  del rules
  params, batch = state.params, jax.tree.map(jnp.asarray, steps.batch())
  draws = Draws.of(jax.random.fold_in(jax.random.wrap_key_data(state.rng), 0), 16)

  def loss(params, noise):
    outputs, _ = module.apply({'params': params}, batch | {'encoder_embedding_noise': noise},
                              draws, method='outputs')
    logs = jax.nn.log_softmax(outputs['classes'])
    return -jnp.take_along_axis(logs, batch['class_labels'][:, None], 1).mean()

  zeros = jnp.zeros((16, 12, 16))
  value, slope = jax.value_and_grad(loss, 1)(params, zeros)
  norms = np.sqrt(np.square(slope).sum((1, 2), keepdims=True))
  moved, more = jax.value_and_grad(loss)(params, jnp.asarray(steps.EPSILON * slope / norms))
  want = jax.tree.map(jnp.add, jax.grad(loss)(params, zeros), more)
  grads, metrics = steps.adversarial()
  close(grads, want)
  assert float(metrics['adversarial']) == pytest.approx(float(moved), rel=1e-5)
  assert float(metrics['loss']) == pytest.approx(float(value + moved), rel=1e-5)
  assert float(moved) > float(value) + 0.01


def test_examples_of_a_row_have_norms_of_their_own():
  slopes = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
  segments = np.int32([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
  slopes[0, 5] = 0  # padding
  unit = np.asarray(adversarial._unit(jnp.asarray(slopes), jnp.asarray(segments)))
  for row, segment in ((0, 1), (0, 2), (1, 1)):
    own = slopes[row, segments[row] == segment]
    np.testing.assert_allclose(unit[row, segments[row] == segment], own / np.linalg.norm(own),
                               rtol=1e-5)
  assert not unit[0, 5].any()


TINY = dict(vocab_size=30, max_length=12, d_model=16, num_layers=1, num_heads=4, d_ff=24,
            dtype='float32')


@pytest.mark.parametrize('config, prefix', [
    (BERTConfig(sentence_classes=0, **TINY), 'encoder'), (GPTConfig(**TINY), 'decoder'),
    (ClassifierConfig(GPTConfig(**TINY)), 'decoder'), (T5Config(**TINY), 'encoder')])
def test_every_family_adds_the_noise_to_the_embeddings_of_its_tokens(config, prefix):
  """Noise that is another token's embedding less the own makes it that token."""
  rng, module = np.random.default_rng(0), config.build()
  params = jax.jit(lambda: module.init(jax.random.key(0), method='initialize'))()['params']
  ids, others = rng.integers(1, 30, (2, 2, 6)).astype(np.int32)
  batch = {f'{side}_input_tokens': ids for side in ('encoder', 'decoder')
           if side == prefix or isinstance(config, T5Config)}
  batch['masked_positions'] = np.broadcast_to(np.int32([0, 2]), (2, 2))

  @jax.jit
  def hidden(batch):
    found = module.apply({'params': params}, batch, method='outputs')[0]
    return found['tokens'].hidden if 'tokens' in found else found['classes']

  trunk = jax.tree.map(lambda x: getattr(x, 'value', x), params.get('trunk', params),
                       is_leaf=lambda x: hasattr(x, 'value'))
  table = trunk['token_embedding']
  want = hidden(batch | {f'{prefix}_input_tokens': others})
  noise = table[others] - table[ids]
  np.testing.assert_allclose(hidden(batch | {f'{prefix}_embedding_noise': noise}), want, atol=2e-5)
  assert np.abs(hidden(batch) - want).max() > 1e-3


def mixed_by_hand(w, u, mask, rate):
  return (mask * w + (1 - mask) * u - rate * u) / (1 - rate)


@pytest.mark.supports('fine-tuning', 'mixout')
def test_mixout_computes_with_what_its_paper_says_and_steps_along_its_gradient():
  """arXiv:1909.11299, equation 1 of section 3, of every kernel but the head's."""
  rng, key = np.random.default_rng(0), jax.random.key(5)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
  make = lambda: {'trunk': {'blocks': {'layers': {'wi': {'kernel': draw(3, 40, 50),
                                                         'bias': draw(3, 50)}}},
                            'token_embedding': draw(7, 4)}, 'head': {'kernel': draw(4, 2)}}
  before, now = make(), make()
  kept = mixout.mixout(0.7).init(before)
  place = lambda tree: tree['trunk']['blocks']['layers']['wi']['kernel']
  assert jax.tree.structure(kept.initial) == jax.tree.structure(
      {'trunk': {'blocks': {'layers': {'wi': {'kernel': 0}}}}})
  mixed = mixout.mix(kept, now, key)
  ones = jax.tree.map(jnp.ones_like, now)
  slope = place(mixout.unmix(kept, ones, key))
  mask = np.asarray(slope) != 0
  np.testing.assert_allclose(slope[mask], 1 / 0.3, rtol=1e-6)
  np.testing.assert_allclose(place(mixed), mixed_by_hand(
      np.asarray(place(now)), np.asarray(place(before)), mask, 0.7), atol=2e-6)
  # As many as the rate says, in every layer, row and column, and others at another step.
  assert abs(mask.mean() - 0.3) < 4 * np.sqrt(0.21 / mask.size)
  for axes in (1, 2), (0, 2), (0, 1):
    spread = mask.mean(axes)
    assert np.abs(spread - 0.3).max() < 5 * np.sqrt(0.21 * len(spread) / mask.size)
  other = np.asarray(place(mixout.unmix(kept, ones, jax.random.key(6)))) != 0
  assert abs((other & mask).mean() - 0.09) < 0.01
  assert all(abs((mask[0] & mask[i]).mean() - 0.09) < 0.03 for i in (1, 2))
  for rest in (lambda tree: tree['head']['kernel'], lambda tree: tree['trunk']['token_embedding']):
    np.testing.assert_array_equal(rest(mixed), rest(now))
  exact = jax.grad(lambda w: (place(mixout.mix(kept, w, key)) ** 2).sum())(now)
  ours = mixout.unmix(kept, jax.tree.map(lambda x: 2 * x, mixed), key)
  np.testing.assert_allclose(place(ours), place(exact), rtol=1e-5, atol=1e-6)


def test_a_mean_of_mixed_parameters_is_the_parameters():
  now, before = {'a': {'kernel': jnp.full((4, 5), 3.0)}}, {'a': {'kernel': jnp.ones((4, 5))}}
  kept = mixout.mixout(0.5).init(before)
  keys = jax.random.split(jax.random.key(0), 4000)
  many = jax.vmap(lambda key: mixout.mix(kept, now, key)['a']['kernel'])(keys)
  np.testing.assert_allclose(many.mean(0), now['a']['kernel'], atol=5 * 2 / np.sqrt(4000))


def test_devices_and_microbatches_change_nothing(child_with_devices):
  want = steps.trained({'data': 1})
  for found in child_with_devices(pathlib.Path(steps.__file__)):
    for ours, theirs in zip(found, want, strict=True):
      np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_what_is_off_costs_nothing():
  def products(loss):
    rules, module, state = steps.start({'data': 1}, steps.KEEP_GRADIENT)
    lowered = jit_train_step(module, loss, steps.KEEP_GRADIENT, rules, state).lower(
        state, steps.batch())
    return lowered.as_text().count('dot_general')

  assert products(Prediction(adversarial=0.1)) >= 2 * products(Prediction()) > 0
  off, on = (steps.start({'data': 1}, AdamW(mixout=rate).build(10))[2] for rate in (0.0, 0.5))
  assert mixout.find(off.opt_state) is None and mixout.find(on.opt_state).rate == 0.5
  kept = sum(x.size for x in jax.tree.leaves(on)) - sum(x.size for x in jax.tree.leaves(off))
  kernels = [x.size for path, x in jax.tree_util.tree_leaves_with_path(off.params['trunk'])
             if path[-1].key == 'kernel']
  assert kept == sum(kernels)


def test_shares_and_lengths_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match=r'mixout=1.5 must be in \[0, 1\)'):
    AdamW(mixout=1.5)
  with pytest.raises(ValueError, match='adversarial=-1.0 must be at least 0'):
    Prediction(adversarial=-1.0)
