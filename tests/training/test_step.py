"""What must hold of a train step, on one device."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training import state as state_lib
from lm.training import step as step_lib
from lm.training.losses import Prediction
from lm.training.optimizers import AdamW, Schedule

RULES = Rules().on(MeshConfig(data=1).build(jax.devices()[:1]))
OPTIMIZER = AdamW(Schedule(kind='constant', learning_rate=0.02, warmup_steps=3)).build(100)


@pytest.fixture(scope='module', autouse=True)
def quick_keys():
  """Keys whose bits compile in a tenth of the time of threefry's."""
  with jax.default_prng_impl('rbg'):
    yield


def make_batch(weights, length=10):
  """Random tokens, one document a row; `weights` [B, 1] or [B, length]."""
  rng = np.random.default_rng(0)
  shape = len(weights), length
  ids = rng.integers(1, 37, (shape[0], length + 1)).astype(np.int32)
  return {'decoder_input_tokens': ids[:, :-1], 'decoder_target_tokens': ids[:, 1:],
          'decoder_loss_weights': np.broadcast_to(np.float32(weights), shape),
          'decoder_segment_ids': np.ones(shape, np.int32),
          'decoder_positions': np.broadcast_to(np.arange(length, dtype=np.int32), shape)}


@pytest.fixture(scope='module')
def module(tiny_configs):
  return tiny_configs['llama'](num_layers=2).build(RULES)


@pytest.fixture(scope='module')
def make_state(module):
  """Makes a new state each time: a step donates its own."""
  made = jax.device_get(state_lib.init_state(module, OPTIMIZER, RULES, seed=1))
  shapes = state_lib.abstract_state(module, OPTIMIZER, RULES)
  return lambda: jax.tree.map(lambda x, s: jax.device_put(np.array(x), s.sharding), made, shapes)


@pytest.fixture(scope='module')
def steps(module):
  """{microbatches: the jitted step}."""
  shapes = state_lib.abstract_state(module, OPTIMIZER, RULES)
  jitted = lambda n: step_lib.jit_train_step(module, Prediction(), OPTIMIZER, RULES, shapes, n)
  return {n: jitted(n) for n in (1, 4)}


@pytest.mark.supports('precision and parallelism', 'gradient accumulation')
def test_accumulated_is_the_whole_batch_though_microbatches_weigh_differently(steps, make_state):
  batch = make_batch(np.array([[1], [0], [1], [0.1], [1], [0], [0], [0]]))
  (whole, metrics), (parts, other) = (steps[n](make_state(), batch) for n in (1, 4))
  assert metrics['weight'] == pytest.approx(31) and metrics['loss'] > 1
  by_group = other.pop('norms'), metrics.pop('norms')
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), *by_group)
  for name in metrics:
    np.testing.assert_allclose(other[name], metrics[name], rtol=1e-5)
  for x, y in zip(jax.tree.leaves(parts.opt_state), jax.tree.leaves(whole.opt_state)):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6 * np.abs(y).max())


def test_the_state_is_donated_and_its_step_counted(steps, make_state):
  state = make_state()
  rng = np.array(state.rng)
  after, _ = steps[1](state, make_batch(np.ones((8, 1))))
  assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
  assert int(after.step) == 1
  np.testing.assert_array_equal(after.rng, rng)


def test_a_small_batch_is_learnt_by_heart(steps, make_state):
  state, batch, losses = make_state(), make_batch(np.ones((8, 1))), []
  for _ in range(150):
    state, metrics = steps[1](state, batch)
    losses.append(float(metrics['loss']))
  assert losses[0] > 3 and losses[-1] < 0.1 and np.isfinite(losses).all()


def test_metrics_are_the_mean_loss_and_the_norm_of_its_gradient(module, steps, make_state):
  batch = make_batch(np.array([[1], [0.5], [1], [1], [0], [1], [1], [1]]))

  @jax.jit
  def mean(params):
    hidden = module.apply({'params': params}, jnp.asarray(batch['decoder_input_tokens']))[0]
    logits = jax.nn.log_softmax(module.apply({'params': params}, hidden, method='logits'))
    scores = jnp.take_along_axis(logits, batch['decoder_target_tokens'][..., None], -1)[..., 0]
    return -(scores * batch['decoder_loss_weights']).sum() / batch['decoder_loss_weights'].sum()

  loss, grads = jax.jit(jax.value_and_grad(mean))(make_state().params)
  metrics = steps[1](make_state(), batch)[1]
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-4)


def test_a_batch_in_which_no_token_counts_spoils_nothing(steps, make_state):
  after, metrics = steps[1](make_state(), make_batch(np.zeros((8, 1))))
  assert metrics['weight'] == 0 and metrics['loss'] == 0 and metrics['grad_norm'] == 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))


def test_tokens_of_weight_zero_teach_nothing(steps, make_state):
  """The last target of a row is seen by no other token."""
  weights = np.ones((8, 10))
  weights[:, -1] = 0
  batch = make_batch(weights)
  other = {**batch, 'decoder_target_tokens': np.where(weights, batch['decoder_target_tokens'], 3)}
  left, right = (steps[1](make_state(), {**b, 'decoder_target_tokens': np.int32(
      b['decoder_target_tokens'])})[0] for b in (batch, other))
  for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
    np.testing.assert_array_equal(x, y)


def test_dropout_depends_on_the_run_and_the_step_alone(tiny_configs):
  module = tiny_configs['gpt2'](num_layers=1, dropout_rate=0.5).build(RULES)
  optimizer = AdamW(Schedule(learning_rate=1e-9, warmup_steps=0), weight_decay=0).build(10)
  state = state_lib.init_state(module, optimizer, RULES, seed=1)
  step = jax.jit(functools.partial(step_lib.train_step, module, Prediction(), optimizer, 1))
  batch = make_batch(np.ones((8, 1)))
  again = state_lib.TrainState(jnp.int32(5), state.params, state.opt_state, state.rng)
  losses = [float(step(s, batch)[1]['loss']) for s in (state, state, again)]
  assert losses[0] == losses[1] and abs(losses[0] - losses[2]) > 1e-3
