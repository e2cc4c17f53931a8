"""AdamW by hand, and the schedules by value."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.training.optimizers import AdamW, Muon, Schedule

PARAMS = {'blocks': {'wi': {'kernel': np.array([[[1.0, -2.0], [0.5, 3.0]]]),
                            'bias': np.array([[1.0, 2.0]])},
                     'norm': {'scale': np.array([[1.0, 1.5]]), 'bias': np.array([[0.5, -0.5]])}},
          'token_embedding': np.array([[2.0, -1.0], [0.3, 0.7]])}
DECAYED = {'blocks': {'wi': {'kernel': True, 'bias': False},
                      'norm': {'scale': False, 'bias': False}},
           'token_embedding': True}


@pytest.mark.supports('optimisers', 'AdamW')
@pytest.mark.parametrize('clip_norm', [1.0, 1e6, None])
def test_adamw_is_the_papers_by_hand(clip_norm):
  config = AdamW(Schedule(kind='constant', learning_rate=0.1, warmup_steps=0), b1=0.8, b2=0.9,
                 epsilon=1e-3, weight_decay=0.3, clip_norm=clip_norm)
  optimizer = config.build(10)
  params = jax.tree.map(jnp.float32, PARAMS)
  state = optimizer.init(params)
  by_hand, mu, nu = PARAMS, *(jax.tree.map(np.zeros_like, PARAMS) for _ in range(2))
  for t in (1, 2, 3):
    grads = jax.tree.map(lambda p: np.sin(t * p) * 2, PARAMS)
    updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, params)
    params = optax.apply_updates(params, updates)

    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    assert norm > 1  # else clipping to 1 is not tested
    shrink = 1 if clip_norm is None else min(1, clip_norm / norm)
    mu = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g * shrink, mu, grads)
    nu = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * (g * shrink)**2, nu, grads)
    by_hand = jax.tree.map(
        lambda p, m, v, is_decayed: p - 0.1 * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
                                               + 0.3 * is_decayed * p), by_hand, mu, nu, DECAYED)
  for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(by_hand)):
    np.testing.assert_allclose(x, y, rtol=2e-5)


def values(num_steps=100, **fields):
  schedule = Schedule(learning_rate=1.0, **{'warmup_steps': 10, **fields}).build(num_steps)
  return [float(schedule(step)) for step in range(num_steps + 1)]


@pytest.mark.parametrize('kind', ['cosine', 'linear', 'rsqrt', 'wsd', 'constant'])
def test_warm_up_rises_from_above_zero_to_the_peak(kind):
  rates = values(kind=kind)
  np.testing.assert_allclose(rates[:11], np.arange(1, 12) / 11, rtol=1e-5)
  assert max(rates) == pytest.approx(1)


@pytest.mark.supports('optimisers', 'cosine, linear, rsqrt and WSD schedules')
@pytest.mark.parametrize('kind, step, value', [
    ('cosine', 55, 0.55), ('cosine', 100, 0.1),
    ('cosine', 32, 0.1 + 0.9 * (1 + np.cos(np.pi * 22 / 90)) / 2),
    ('linear', 55, 0.55), ('linear', 100, 0.1), ('linear', 19, 0.91),
    ('rsqrt', 40, 0.5), ('rsqrt', 90, 1 / 3),
    ('wsd', 10, 1), ('wsd', 45, 1), ('wsd', 80, 1), ('wsd', 90, 0.55), ('wsd', 100, 0.1),
    ('constant', 100, 1)])
def test_decay_has_the_value_of_its_formula(kind, step, value):
  assert values(kind=kind)[step] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize('kind', ['cosine', 'linear', 'wsd'])
@pytest.mark.parametrize('warmup_steps, num_steps', [(0, 10), (9, 10), (90, 100)])
def test_decay_ends_at_its_end_however_long_the_warm_up(kind, warmup_steps, num_steps):
  rates = values(num_steps, kind=kind, warmup_steps=warmup_steps)
  assert rates[-1] == pytest.approx(0.1, rel=1e-4) and min(rates[:-1]) > 0


@pytest.mark.parametrize('kind', ['cosine', 'linear', 'rsqrt', 'wsd', 'constant'])
@pytest.mark.parametrize('warmup_steps, num_steps', [(0, 1), (5, 1), (1, 1)])
def test_the_shortest_runs_have_finite_rates(kind, warmup_steps, num_steps):
  assert all(0 < rate <= 1 for rate in values(num_steps, kind=kind, warmup_steps=warmup_steps))


@pytest.mark.parametrize('fields, message', [
    ({'learning_rate': 0}, 'learning_rate=0 must be greater than 0'),
    ({'warmup_steps': -1}, 'warmup_steps=-1 must not be negative'),
    ({'end_factor': 1.5}, r'end_factor=1.5 must be in \[0, 1\]'),
    ({'decay_fraction': 0}, r'decay_fraction=0 must be in \(0, 1\]')])
def test_a_schedule_that_cannot_be_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Schedule(**fields)


@pytest.mark.parametrize('optimizer', [AdamW, Muon])
@pytest.mark.parametrize('fields, message', [
    ({'b1': 1.0}, r'b1=1.0 must be in \[0, 1\)'),
    ({'b2': -0.1}, r'b2=-0.1 must be in \[0, 1\)'),
    ({'weight_decay': -1}, 'weight_decay=-1 must not be negative'),
    ({'clip_norm': 0.0}, 'clip_norm=0.0 must be greater than 0')])
def test_an_optimizer_that_cannot_be_is_refused(optimizer, fields, message):
  with pytest.raises(ValueError, match=message):
    optimizer(**fields)
