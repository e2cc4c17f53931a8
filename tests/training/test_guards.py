"""A run meets data that breaks it, and goes on: it skips a step, or goes back and steps over."""
import dataclasses
import functools
import json
import math

import guarded_runs as runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.errors import UserError
from lm.evaluation import report
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training import guards, precision, state as state_lib, step as step_lib
from lm.training.guards import Guard
from lm.training.losses import Prediction
from lm.training.optimizers import AdamW, Schedule
from lm.training.position import BatchSizes, Position

RULES = Rules().on(MeshConfig(data=1).build(jax.devices()[:1]))


def make_batch(seed=0, rows=4, length=12):
  """One sentence again and again; of another seed, another."""
  ids = np.random.default_rng(seed).integers(1, 37, (1, length + 1)).repeat(rows, 0)
  ids = ids.astype(np.int32)
  return {'decoder_input_tokens': ids[:, :-1], 'decoder_target_tokens': ids[:, 1:],
          'decoder_loss_weights': np.ones((rows, length), np.float32)}


@pytest.fixture(scope='module')
def stepped(tiny_configs):
  """From a guard to a step and a maker of states."""
  @functools.cache
  def make(guard, **changes):
    module = tiny_configs['llama'](num_layers=1, **changes).build(RULES)
    schedule = Schedule(kind='constant', learning_rate=0.02, warmup_steps=1)
    optimizer = precision.prepare(AdamW(schedule, average_decay=0.9).build(40), 'float32',
                                  guard=guard)
    state = lambda: state_lib.init_state(module, optimizer, RULES, seed=1)
    shapes = state_lib.abstract_state(module, optimizer, RULES)
    return step_lib.jit_train_step(module, Prediction(), optimizer, RULES, shapes), state
  return make


def bytes_of(tree):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


SPOILT = {'nan': {'decoder_loss_weights': np.full((4, 12), np.nan, np.float32)},
          'infinite': {'decoder_loss_weights': np.full((4, 12), np.inf, np.float32)},
          'another text': make_batch(seed=7)}


@pytest.mark.parametrize('how', SPOILT)
def test_a_skipped_step_leaves_every_bit_of_parameters_moments_average_and_histories(stepped, how):
  step, new_state = stepped(Guard(memory=5, deviations=3.0), dtype='bfloat16',
                            products='fp8_delayed')
  state = new_state()
  for _ in range(20):
    state, metrics = step(state, make_batch())
    assert metrics['skipped_steps'] == 0
  before = jax.device_get(state)
  state, metrics = step(state, {**make_batch(), **SPOILT[how]})
  assert (metrics['skipped_steps'], metrics['spikes_in_a_row'], state.step) == (1, 1, 21)
  assert bytes_of(state.params) == bytes_of(before.params)
  assert bytes_of(state.opt_state.inner) == bytes_of(before.opt_state.inner)
  state, metrics = step(state, make_batch())
  assert (metrics['skipped_steps'], metrics['spikes_in_a_row']) == (1, 0)
  assert bytes_of(state.params) != bytes_of(before.params) and np.isfinite(metrics['loss'])


def seen_by(guard, values):
  """Which of the values are spikes."""
  def observe(running, value):
    high, running = guards.observe(guard, running, value)
    return running, high
  running = guards.initial(guard, None).running['norm']
  return np.asarray(jax.lax.scan(observe, running, jnp.asarray(values, jnp.float32))[1])


def test_spikes_are_those_of_the_running_statistics_and_a_level_that_stays_is_none_for_long():
  rng = np.random.default_rng(0)
  noise = np.exp(rng.normal(0, 0.3, 3000) + np.linspace(3, -3, 3000))  # falls to a 400th
  assert not seen_by(Guard(), noise).any()
  noise[[1000, 2000, 2001, 2002]] *= 20
  noise[2500] = math.nan
  assert np.flatnonzero(seen_by(Guard(), noise)).tolist() == [1000, 2000, 2001, 2002, 2500]
  steady = np.exp(rng.normal(0, 0.001, 400))
  steady[100], steady[200], steady[300:] = 1.4, 1.6, 2.0
  spikes = np.flatnonzero(seen_by(Guard(), steady)).tolist()
  assert spikes[0] == 200 and spikes[1] == 300 and spikes[-1] < 300 + Guard().limit


@pytest.mark.supports('faults survived', 'NaNs and spikes skipped in the step')
def test_a_run_goes_on_over_batches_that_are_nan_or_noise(folder, tmp_path):
  run = tmp_path / 'run'
  result = runs.train(folder, run, {20: 'nan', 30: 'noise'}, **runs.guard('skip', deviations=4.0))
  assert (result['skipped_steps'], result['rollbacks'], result['steps']) == (2, 0, 40)
  rows = runs.rows(run)
  assert [row['step'] for row in rows if row['spikes_in_a_row']] == [21, 31]
  assert rows[20]['loss'] is None and rows[30]['loss'] > 8
  assert all(row['loss'] < 2 for row in rows[31:]) and result['final_loss'] == rows[-1]['loss']
  # The schedule counts updates, not steps.
  rates = [row['learning_rate'] for row in rows]
  assert rates[20] == rates[19] and rates[30] == rates[29] and rates[31] < rates[30]
  assert 'Skipped steps: 2.' in report.write_report(run).read_text()


GOES_BACK = runs.guard('rollback', deviations=3.0)


@pytest.fixture(scope='module')
def rolled_back(folder, tmp_path_factory):
  """(its result, a run that met a NaN and a spike, and that nothing else disturbed)."""
  run = tmp_path_factory.mktemp('rolled') / 'run'
  return runs.train(folder, run, {20: 'nan', 30: 'noise'}, **GOES_BACK), run


@pytest.mark.supports('faults survived', 'NaNs and spikes by a rollback over their data')
def test_a_rollback_steps_over_the_data_and_says_so(rolled_back):
  result, run = rolled_back
  assert (result['skipped_steps'], result['rollbacks'], result['steps']) == (0, 2, 40)
  rows = runs.rows(run)
  assert [row['step'] for row in rows] == list(range(1, 41))
  assert all(row['loss'] < 2 for row in rows[15:])
  # The NaN of step 21 is in batch 20: from step 15 on it steps over 4 batches at least, and to 20;
  # so step 25 reads batch 30.
  first, second = runs.rows(run, 'rollback')
  assert (first['step'], first['from_step'], first['loss']) == (16, 21, None)
  assert (second['step'], second['from_step']) == (21, 25) and second['loss'] > 8
  windows = [[row['first_sequence'], row['end_sequence']] for row in (first, second)]
  assert windows == [[15 * runs.BATCH, 21 * runs.BATCH], [26 * runs.BATCH, 31 * runs.BATCH]]
  position = runs.data_of(run, 40)
  assert position['stepped_over'] == windows and position['rollbacks'] == 2
  assert position['sequences'] == (40 + 6 + 5) * runs.BATCH
  page = report.write_report(run).read_text()
  assert 'Rolled back from step 21 (loss not finite) to step 15, over sequences 30 to 42.' in page


def test_a_run_killed_before_and_after_its_rollbacks_repeats_itself_bit_for_bit(
    folder, rolled_back, tmp_path):
  run = tmp_path / 'run'
  spoilt, guard = {20: 'nan', 30: 'noise'}, GOES_BACK
  with runs.killed():  # the step that is gone back to is done, and not saved with what followed
    runs.train(folder, run, spoilt, kill_at=(16, 2), **guard)
  assert not runs.rows(run, 'rollback') or runs.rows(run)[-1]['step'] == 15
  with runs.killed():  # behind the first rollback
    runs.train(folder, run, spoilt, kill_at=(18, 2), **guard)
  assert runs.data_of(run, 16)['rollbacks'] == 1
  with runs.killed():  # behind the second
    runs.train(folder, run, spoilt, kill_at=(33, 1), **guard)
  result = runs.train(folder, run, spoilt, **guard)
  assert result['rollbacks'] == 2
  ours, theirs = (([row['loss'] for row in runs.rows(run)], runs.rows(run, 'rollback'),
                   runs.rows(run, 'validation'), runs.data_of(run, 40))
                  for run in (run, rolled_back[1]))
  assert ours == theirs
  ours, theirs = (runs.arrays_of(run, 40) for run in (run, rolled_back[1]))
  assert list(ours) == list(theirs)
  for name, x in ours.items():
    np.testing.assert_array_equal(x, theirs[name], err_msg=name)


def test_a_run_without_a_guard_stops_and_goes_on_under_one(folder, tmp_path):
  run, spoilt = tmp_path / 'run', {12: 'nan'}
  with pytest.raises(UserError, match=r'loss of step 13 is nan .* checkpoint of step 10 stands'):
    runs.train(folder, run, spoilt, NUM_STEPS=16)
  assert runs.rows(run)[-1]['step'] == 12
  result = runs.train(folder, run, spoilt, NUM_STEPS=16, **runs.guard('skip'))
  assert (result['steps'], result['skipped_steps']) == (16, 1)
  # What watches the norm does not watch the loss: its statistics begin anew, the counts go on.
  result = runs.train(folder, run, {19: 'nan'}, NUM_STEPS=20, **runs.guard('rollback'))
  assert (result['steps'], result['skipped_steps'], result['rollbacks']) == (20, 1, 1)


def test_rollbacks_are_bounded_and_the_checkpoint_stands(folder, tmp_path):
  spoilt = dict.fromkeys(range(7, 60), 'nan')
  with pytest.raises(UserError, match='after 2 rollbacks; training stops and the checkpoint of'):
    runs.train(folder, tmp_path / 'run', spoilt, **runs.guard('rollback', limit=2))
  with pytest.raises(UserError, match='3 steps in a row were skipped; training stops and'):
    runs.train(folder, tmp_path / 'other', spoilt, **runs.guard('skip', limit=3))


def test_a_rollback_behind_an_earlier_one_steps_over_its_window_too():
  sizes = BatchSizes(4)
  start = Position(sizes)
  first = start.after_spike(step=10, end=80, batches_over=5, rollbacks=1)
  assert first.stepped_over == ((40, 80),) and first.sequences(10) == 80
  assert first.sequences(12) == 88 and start.sequences(12) == 48
  # From step 12 back to step 8, whose checkpoint knows of no rollback.
  second = start.after_spike(step=8, end=first.sequences(12), batches_over=5, rollbacks=2)
  assert second.stepped_over == ((32, 88),) and second.rollbacks == 2
  assert Position.described(sizes, json.loads(json.dumps(second.describe(9)))) == second
  for position in (start, first, second):  # where a step read, also long after it
    assert all(position.first_of(step) == position.sequences(step - 1) for step in range(11, 20))
  assert [first.first_of(step) for step in (9, 10, 11)] == [32, 36, 80]
  assert [second.first_of(step) for step in (8, 9)] == [28, 88]
  assert second.describe(9)['sequences'] == 92 and start.describe(9) == {'sequences': 36}


@pytest.mark.parametrize('changes, message', [
    ({'deviations': 0.0}, 'deviations=0.0'), ({'factor': 1.0}, 'factor=1.0'),
    ({'memory': 1}, 'memory=1 must be at least 2'), ({'limit': 0}, 'limit=0'),
    ({'steps_back': 0}, 'steps_back=0'), ({'batches_over': 0}, 'batches_over=0')])
def test_guards_refuse_what_makes_no_sense(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(Guard(), **changes)
