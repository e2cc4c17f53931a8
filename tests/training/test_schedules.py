"""Schedules by value."""
import typing

import numpy as np
import pytest

from lm.training.optimizers import Schedule

KINDS = typing.get_args(typing.get_type_hints(Schedule)['kind'])


def values(num_steps=100, **fields):
  schedule = Schedule(learning_rate=1.0, **{'warmup_steps': 10, **fields}).build(num_steps)
  return [float(schedule(step)) for step in range(num_steps + 1)]


@pytest.mark.parametrize('kind', KINDS)
def test_warm_up_rises_from_above_zero_to_the_peak(kind):
  rates = values(kind=kind)
  np.testing.assert_allclose(rates[:11], np.arange(1, 12) / 11, rtol=1e-5)
  assert max(rates) == pytest.approx(1)


@pytest.mark.supports(
    'optimisers', 'constant, linear, cosine, cyclic, polynomial, rsqrt and WSD schedules')
@pytest.mark.parametrize('kind, step, value', [
    ('cosine', 55, 0.55), ('cosine', 100, 0.1),
    ('cosine', 32, 0.1 + 0.9 * (1 + np.cos(np.pi * 22 / 90)) / 2),
    ('linear', 55, 0.55), ('linear', 100, 0.1), ('linear', 19, 0.91),
    ('rsqrt', 40, 0.5), ('rsqrt', 90, 1 / 3),
    ('wsd', 10, 1), ('wsd', 45, 1), ('wsd', 80, 1), ('wsd', 90, 0.55), ('wsd', 100, 0.1),
    ('constant', 100, 1),
    ('polynomial', 55, 0.1 + 0.9 * 0.25), ('polynomial', 100, 0.1),
    # Four cosines over 90 steps: from 10, 32, 55 and 77 to 100.
    ('cyclic', 10, 1), ('cyclic', 32, 1), ('cyclic', 21, 0.1 + 0.9 * (1 + np.cos(np.pi / 2)) / 2),
    ('cyclic', 31, 0.1 + 0.9 * (1 + np.cos(np.pi * 21 / 22)) / 2), ('cyclic', 100, 0.1)])
def test_decay_has_the_value_of_its_formula(kind, step, value):
  assert values(kind=kind)[step] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize('kind', ['cosine', 'cyclic', 'linear', 'polynomial', 'wsd'])
@pytest.mark.parametrize('warmup_steps, num_steps', [(0, 10), (9, 10), (90, 100)])
def test_decay_ends_at_its_end_however_long_the_warm_up(kind, warmup_steps, num_steps):
  rates = values(num_steps, kind=kind, warmup_steps=warmup_steps)
  assert rates[-1] == pytest.approx(0.1, rel=1e-4) and min(rates[:-1]) > 0


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('warmup_steps, num_steps', [(0, 1), (5, 1), (1, 1)])
def test_the_shortest_runs_have_finite_rates(kind, warmup_steps, num_steps):
  assert all(0 < rate <= 1 for rate in values(num_steps, kind=kind, warmup_steps=warmup_steps))


@pytest.mark.parametrize('fields, message', [
    ({'learning_rate': 0}, 'learning_rate=0 must be greater than 0'),
    ({'warmup_steps': -1}, 'warmup_steps=-1 must not be negative'),
    ({'end_factor': 1.5}, r'end_factor=1.5 must be in \[0, 1\]'),
    ({'decay_fraction': 0}, r'decay_fraction=0 must be in \(0, 1\]'),
    ({'power': 0}, 'power=0 must be greater than 0'),
    ({'num_cycles': 0}, 'num_cycles=0 must be at least 1'),
    ({'kind': 'cosine', 'cooldown_from': 5}, 'cooldown_from=5 ends a schedule .* cosine has one')])
def test_a_schedule_that_cannot_be_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Schedule(**fields)


@pytest.mark.supports('optimisers', 'cool-down from any checkpoint')
@pytest.mark.parametrize('kind', ['constant', 'rsqrt', 'wsd'])
def test_a_cool_down_leaves_what_was_before_it_and_ends_at_the_last_step(kind):
  until = values(1000, kind='constant' if kind == 'wsd' else kind)
  rates = values(60, kind=kind, cooldown_from=40)
  np.testing.assert_allclose(rates[:41], until[:41])
  np.testing.assert_allclose(rates[40:], until[40] * np.linspace(1, 0.1, 21), rtol=1e-5)


@pytest.mark.parametrize('start', [5, 60])
def test_a_cool_down_that_has_no_steps_is_refused(start):
  with pytest.raises(ValueError, match=f'cooldown_from={start} must be a step from .* 10, .* 59'):
    values(60, kind='constant', cooldown_from=start)
