"""A run ends where validation no longer improves, keeps its best checkpoint, and stays ended."""
import json
import math

import guarded_runs as runs
import pytest

from lm.errors import UserError
from lm.training import checkpoint, samples
from lm.training.stopping import EarlyStopping, score


@pytest.mark.parametrize('losses, is_over', [
    ([], False), ([3, 2, 1], False), ([3, 2, 2.5, 2.1], False), ([3, 2, 2.5, 2.1, 2], True),
    ([3, 2, 2.5, 2.1, 1.9], False), ([3, math.nan, math.nan, math.nan], True),
    ([math.nan] * 3, True), ([3, 2, math.inf, 2.5, 2.4], True)])
def test_patience_counts_evaluations_without_a_new_best(losses, is_over):
  assert EarlyStopping(patience=3).is_over(losses) == is_over


def test_an_improvement_below_the_least_one_is_none():
  losses = [3.0, 2.95, 2.92, 2.9]
  assert EarlyStopping(patience=3, min_delta=0.1).is_over(losses)
  assert not EarlyStopping(patience=3, min_delta=0.08).is_over(losses)


@pytest.mark.parametrize('changes', [{'patience': 0}, {'min_delta': -0.1}])
def test_early_stopping_refuses_what_makes_no_sense(changes):
  with pytest.raises(ValueError, match=next(iter(changes))):
    EarlyStopping(**changes)


def test_accuracy_is_better_higher_and_a_metric_that_is_none_is_named():
  assert score('accuracy', {'loss': 2.0, 'accuracy': 0.9}) < score('accuracy', {'accuracy': 0.8})
  assert score('tags_loss', {'tags_loss': 1.0}) < score('tags_loss', {'tags_loss': 2.0})
  assert math.isnan(score('loss', {'loss': None}))
  early = EarlyStopping(patience=2, metric='accuracy')
  assert not early.is_over([-0.1, -0.3, -0.2, -0.4]) and early.is_over([-0.1, -0.3, -0.2, -0.3])
  with pytest.raises(UserError, match="metric='acc' is no metric of validation; .*loss, accuracy"):
    score('acc', {'step': 1, 'split': 'validation', 'loss': 2.0, 'accuracy': 0.9})


EARLY = {'NUM_STEPS': 60, 'EVAL_EVERY': 4, 'CHECKPOINT_EVERY': 100,
         'loop__TrainConfig__early_stopping': '@stopping.EarlyStopping()',
         'stopping__EarlyStopping__patience': 3, 'loop__TrainConfig__sample_every': 8,
         'run__Experiment__prompts': "('to be', 'or not')"}
NOISE = dict.fromkeys(range(14, 60), 'noise')  # what is learnt from it makes validation worse


@pytest.fixture(scope='module')
def stopped(folder, tmp_path_factory):
  """(the result of a run that stops early, its directory)."""
  run = tmp_path_factory.mktemp('early') / 'run'
  return runs.train(folder, run, NOISE, whole=True, **EARLY), run


def validation(run):
  return {row['step']: row['loss'] for row in runs.rows(run, 'validation')}


@pytest.mark.supports('watching', 'early stopping, with the best checkpoint')
def test_a_run_stops_three_evaluations_behind_its_best_and_evaluates_that(stopped):
  result, run = stopped
  losses = validation(run)
  best = min(losses, key=losses.get)
  assert 4 < best < 40 and best % 100
  assert result['stopped_early'] and result['stopped_by'] is None
  assert result['steps'] == max(losses) == best + 12 < 60
  steps = checkpoint.list_steps(run / 'checkpoints')
  assert best in steps and result['steps'] in steps
  assert checkpoint.best_step(run / 'checkpoints') == best
  evaluation = json.loads((run / 'evaluation.json').read_text())
  assert evaluation['step'] == best


@pytest.mark.supports('watching', 'samples while training')
def test_prompts_are_completed_on_the_way(stopped):
  result, run = stopped
  rows = samples.read(run)
  steps = sorted({row['step'] for row in rows})
  assert steps == sorted({*range(8, result['steps'] + 1, 8), result['steps']})
  assert [row['prompt'] for row in rows] == ['to be', 'or not'] * len(steps)
  assert all(row['text'] and row['tokens'] for row in rows)


def test_a_run_that_stopped_early_stays_stopped_until_it_is_given_more_patience(stopped, folder):
  result, run = stopped
  before = (run / 'metrics.jsonl').read_text(), (run / 'evaluation.json').stat().st_mtime_ns
  again = runs.train(folder, run, NOISE, whole=True, **EARLY)
  assert again['stopped_early'] and again['steps'] == result['steps']
  assert again['final_loss'] == result['final_loss'] and again['losses'] == result['losses']
  assert before == ((run / 'metrics.jsonl').read_text(),
                    (run / 'evaluation.json').stat().st_mtime_ns)
  more = runs.train(folder, run, NOISE, **EARLY | {'stopping__EarlyStopping__patience': 5})
  assert more['stopped_early'] and more['steps'] == result['steps'] + 8


def test_patience_survives_a_kill(folder, stopped, tmp_path):
  result, run = stopped
  losses = validation(run)
  with runs.killed():  # two evaluations behind the best, which is the last that was saved
    runs.train(folder, tmp_path / 'run', NOISE, kill_at=(result['steps'] - 1, 1), **EARLY)
  ours = runs.train(folder, tmp_path / 'run', NOISE, **EARLY)
  assert ours['stopped_early'] and ours['steps'] == result['steps']
  assert validation(tmp_path / 'run') == {step: losses[step] for step in losses
                                          if step <= result['steps']}


@pytest.mark.supports('fine-tuning', 'early stopping on any metric')
def test_the_best_checkpoint_is_that_of_the_watched_metric(folder, tmp_path):
  # Accuracy ties at its best after some steps, where the loss still falls.
  changes = {'NUM_STEPS': 40, 'stopping__EarlyStopping__metric': "'accuracy'",
             'stopping__EarlyStopping__patience': 2}
  result = runs.train(folder, tmp_path / 'run', **EARLY | changes)
  found = {row['step']: row['accuracy'] for row in runs.rows(tmp_path / 'run', 'validation')}
  best = max(found, key=found.get)
  assert checkpoint.best_step(tmp_path / 'run' / 'checkpoints') == best
  assert result['stopped_early'] and result['steps'] == best + 8


def test_samples_of_steps_that_are_run_again_replace_the_old_ones(tmp_path):
  for step in 10, 20, 30:
    samples.write(tmp_path, step, [{'prompt': 'a', 'text': f'old {step}'}])
  samples.write(tmp_path, 20, [{'prompt': 'a', 'text': 'new\n\u2028ü'}])
  with open(tmp_path / samples.FILE, 'a', encoding='utf-8') as file:
    file.write('{"step": 3')
  assert [(row['step'], row['text']) for row in samples.read(tmp_path)] == [
      (10, 'old 10'), (20, 'new\n\u2028ü')]
