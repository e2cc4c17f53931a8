"""`lm sweep --scaling_law`: runs of equal budgets, the law in them, and a prediction that is kept.
What is trained here is a formula; gin/experiments/scaling_law.gin says what came of real runs."""
import contextlib
import io
import json
import pathlib

import pytest

from lm import main, run
from lm.commands import sweep_scaling
from lm.evaluation.scaling_law import Law

LAW = Law(1.0, 30.0, 300.0, 0.35, 0.38)
FLAGS = ('--gin_file=gin/experiments/scaling_law.gin', '--scaling_law',
         '--size=scaling.scaled.d_model', '--flops=2e11,6e11,2e12', '--ratios=5,20,60')


@pytest.fixture
def lawful(monkeypatch):
  """In the place of training: the loss of LAW, and more where a budget is larger than 1e13."""
  def fit(experiment, run_dir, on_validation):
    train = experiment.train
    params = experiment.model.flops_per_token(train.sequence_length) / 6
    tokens = train.num_steps * train.batch_size * train.sequence_length
    loss = LAW.loss(params, tokens) + 0.1 * (6 * params * tokens > 1e13)
    row = {'step': train.num_steps, 'split': 'validation', 'loss': loss}
    (pathlib.Path(run_dir) / 'metrics.jsonl').write_text(json.dumps(row) + '\n')
    on_validation(train.num_steps, row)
    return {'stopped_by': None}
  monkeypatch.setattr(run, 'fit', fit)


def lm(*argv, status=0) -> str:
  with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(
      io.StringIO()) as out:
    assert main.main(['sweep', *map(str, argv)]) == status, err.getvalue()
  return err.getvalue().strip().splitlines()[-1] if status else out.getvalue()


@pytest.mark.supports('evaluation', 'larger models predicted by IsoFLOP runs and then trained')
def test_a_law_is_found_and_predicts_a_larger_model(lawful, tmp_path):
  out = lm(*FLAGS, f'--run_dir={tmp_path}')
  result = json.loads((tmp_path / 'sweep.json').read_text())
  assert len(result['trials']) == 9 and 'predicted' not in out
  for trial in result['trials']:
    step = 16 * 128
    assert trial['tokens'] % step == 0
    assert trial['tokens'] * trial['params'] * 6 == pytest.approx(trial['flops'], rel=0.01)
  by_budget = [[t['params'] for t in result['trials'] if t['flops'] == flops]
               for flops in (2e11, 6e11, 2e12)]
  assert all(sizes == sorted(sizes, reverse=True) for sizes in by_budget)
  assert by_budget[0] < by_budget[1] < by_budget[2]
  for name in ('E', 'A', 'B', 'alpha', 'beta'):
    assert result['law']['law'][name] == pytest.approx(getattr(LAW, name), rel=1e-4)
  assert result['law']['exponent'] == pytest.approx(LAW.exponent, rel=1e-4)
  assert result['law']['parabolas']['exponent'] == pytest.approx(LAW.exponent, abs=0.06)

  out = lm(f'--run_dir={tmp_path}', '--target_flops=2e13')  # the study goes on
  result = json.loads((tmp_path / 'sweep.json').read_text())
  *runs, target = result['trials']
  assert len(runs) == 9 and target['target'] == 2e13
  best, _ = LAW.optimum(2e13)
  assert target['params'] == pytest.approx(best, rel=0.1)  # whole heads
  assert target['predicted']['optimum']['params'] == pytest.approx(best, rel=1e-3)
  assert target['predicted']['loss'] == pytest.approx(target['loss'] - 0.1, abs=1e-5)
  assert result['law']['law']['E'] == pytest.approx(LAW.E, rel=1e-4)  # by the nine alone
  assert f'measured {target["loss"]:.4f} (+0.1000, outside' in out and 'N_opt ~ C^0.521' in out
  page = (tmp_path / 'sweep.html').read_text()
  for part in ('IsoFLOP curves', 'Frontier', 'Loss at the frontier', 'Fit'):
    assert f'>{part}<' in page
  assert 'predicted before it was trained' in page and '<script' not in page
  lm(f'--run_dir={tmp_path}')  # nothing is left to do
  assert len(json.loads((tmp_path / 'sweep.json').read_text())['trials']) == 10


def test_the_target_waits_for_all_runs(lawful):
  class Frozen:
    def __init__(self, state, **notes):
      self.state, self.user_attrs = state, notes
  class State:
    def __init__(self, name):
      self.name = name
    def is_finished(self):
      return self.name != 'RUNNING'
  settings = {'points': [{'n': 0}, {'n': 1}], 'target_flops': 1e13}
  after = sweep_scaling.following(settings)
  assert after([]) == ({}, {'n': 0}) and after([Frozen(State('RUNNING'))]) == ({}, {'n': 1})
  assert after([Frozen(State('RUNNING')), Frozen(State('COMPLETE'))]) is None


def test_budgets_and_configurations_that_cannot_be_are_refused(tmp_path):
  assert 'is less than a step' in lm(*FLAGS, '--flops=1e5', f'--run_dir={tmp_path / "a"}', status=2)
  few = '--flops=1e12', '--ratios=5,20'
  assert 'give 2 runs' in lm(*FLAGS, *few, f'--run_dir={tmp_path / "c"}', status=2)
  assert 'd_modl' in lm(*FLAGS, '--size=scaling.scaled.d_modl', f'--run_dir={tmp_path / "b"}',
                        status=2)
