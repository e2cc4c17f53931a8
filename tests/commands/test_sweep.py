"""`lm sweep`: the study, what it survives, and its page. Most trials here are a formula's."""
import contextlib
import io
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lm import main, run
from lm.commands import sweep_study
from lm.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ('--gin_file=gin/models/gpt_small_cpu.gin', '--gin_file=gin/optim/adamw.gin',
        '--gin_file=gin/objectives/causal_lm.gin', '--gin_file=gin/runs/pretrain.gin',
        "--gin.vocabularies.VocabularyConfig.kind='byte'", '--gin.VOCAB_SIZE=259',
        '--gin.gpt.GPTConfig.d_model=16', '--gin.gpt.GPTConfig.num_layers=1',
        '--gin.gpt.GPTConfig.d_ff=32', '--gin.SEQUENCE_LENGTH=32', '--gin.BATCH_SIZE=4',
        '--gin.NUM_STEPS=64', '--gin.CHECKPOINT_EVERY=8', '--gin.EVAL_EVERY=4',
        '--gin.loop.TrainConfig.eval_batches=1')


def lm(*argv, status=0) -> str:
  """Runs `lm sweep` in this process; returns what it prints, of an error its sentence."""
  with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(
      io.StringIO()) as out:
    assert main.main(['sweep', *map(str, argv)]) == status, err.getvalue()
  assert 'Traceback' not in err.getvalue() or not status
  return err.getvalue().strip().splitlines()[-1] if status else out.getvalue()


def result(directory) -> dict:
  return json.loads((directory / 'sweep.json').read_text())


@pytest.fixture
def formula(monkeypatch):
  """In the place of training: a loss that is least at a rate of 0.01, and falls with the steps.

  Returns the numbers of steps that were made by trial directory.
  """
  steps = {}

  def fit(experiment, run_dir, on_validation):
    rate, train = experiment.optimizer.schedule.learning_rate, experiment.train
    if rate > 0.5:
      raise UserError('the loss of step 3 is nan; lower LEARNING_RATE')
    if rate > 0.4:
      raise MemoryError('out of it')
    with open(pathlib.Path(run_dir) / 'metrics.jsonl', 'a') as file:
      for step in range(train.eval_every, train.num_steps + 1, train.eval_every):
        loss = math.log10(rate / 0.01)**2 + 0.02 * train.batch_size / 4 + 4 / step
        file.write(json.dumps({'step': step, 'split': 'validation', 'loss': loss}) + '\n')
        file.flush()
        steps[pathlib.Path(run_dir).name] = step
        on_validation(step, {'loss': loss})
    return {'stopped_by': None}

  monkeypatch.setattr(run, 'fit', fit)
  return steps


@pytest.mark.supports('evaluation', 'searches by TPE, CMA-ES and grid')
def test_samplers_find_what_random_trials_miss(formula, tmp_path):
  space = '--gin.LEARNING_RATE=log(1e-6, 0.3)', '--gin.WARMUP_STEPS=int(1, 9)'
  off = {}
  for name in ('tpe', 'cmaes', 'random'):
    lm(*TINY, *space, f'--sampler={name}', '--trials=30', f'--run_dir={tmp_path / name}')
    rates = [trial['values']['LEARNING_RATE'] for trial in result(tmp_path / name)['trials']]
    off[name] = np.median(np.abs(np.log10(np.array(rates[-15:]) / 0.01)))
  assert off['tpe'] < 0.5 * off['random'] and off['cmaes'] < 0.5 * off['random']


def test_a_grid_is_tried_once_and_reported(formula, tmp_path):
  out = lm(*TINY, '--gin.LEARNING_RATE=choice(1e-3, 1e-2, 1e-1)', '--gin.BATCH_SIZE=choice(4, 8)',
           '--sampler=grid', f'--run_dir={tmp_path}', f'--json={tmp_path / "out.json"}')
  found = json.loads((tmp_path / 'out.json').read_text())
  tried = [tuple(trial['values'].values()) for trial in found['trials']]
  assert tried == [(r, b) for r in ('1e-3', '1e-2', '1e-1') for b in ('4', '8')]
  assert found['best']['values'] == {'LEARNING_RATE': '1e-2', 'BATCH_SIZE': '4'}
  assert found['best']['loss'] == pytest.approx(0.02 + 4 / 64)
  assert found['importances']['LEARNING_RATE'] > found['importances']['BATCH_SIZE']
  assert 'best validation loss 0.0825, of LEARNING_RATE=1e-2, BATCH_SIZE=4' in out
  page = (tmp_path / 'sweep.html').read_text()
  for part in ('Importance', 'Slices', 'Parallel coordinates', 'Validation loss by step'):
    assert f'>{part}<' in page
  assert page.count('<circle') > 6 and '<script' not in page and 'src=' not in page
  assert len(re.findall('<path class="curve c[01]( faint)?" d="[^"]*"><title>trial', page)) == 6
  assert not re.search(r'\b(nan|inf)\b', re.sub('<style>.*</style>', '', page, flags=re.DOTALL))


@pytest.mark.supports('evaluation', 'ASHA pruning')
def test_asha_gives_up_three_of_four_where_they_meet(formula, tmp_path):
  rates = [10**-(1 + i % 8 / 2) for i in range(24)]
  values = ', '.join(f'{rate * (1 + i / 1e3):.6g}' for i, rate in enumerate(rates))
  lm(*TINY, f'--gin.LEARNING_RATE=choice({values})', '--sampler=grid', '--pruner=asha',
     f'--run_dir={tmp_path}')
  trials = result(tmp_path)['trials']
  rungs = {4: [], 16: [], 64: []}
  for trial in trials:  # Li et al., algorithm 2: who is in the best quarter of a rung goes on
    curve = dict(trial['curve'])
    for step, seen in rungs.items():
      seen.append(curve[step])
      if curve[step] > sorted(seen)[max(len(seen) // 4, 1) - 1] and step < 64:
        break
    assert max(curve) == step == formula[f'trial_{trial["number"]:04}']
    assert trial['state'] == ('complete' if step == 64 else 'pruned')
  assert result(tmp_path)['importances'] == {'LEARNING_RATE': 1.0}  # also of those given up
  assert (tmp_path / 'sweep.html').read_text().count('"dot c0 faint"') > 14
  assert abs(math.log10(float(result(tmp_path)['best']['values']['LEARNING_RATE']) / 0.01)) < 0.1
  assert sum(formula.values()) < 0.5 * 64 * len(trials)


def test_failed_trials_are_recorded_and_the_study_goes_on(formula, tmp_path):
  out = lm(*TINY, '--gin.LEARNING_RATE=choice(0.6, 0.01, 0.45)', '--sampler=grid',
           f'--run_dir={tmp_path}')
  trials = result(tmp_path)['trials']
  assert [trial['state'] for trial in trials] == ['fail', 'complete', 'fail']
  assert trials[0]['error'] == 'the loss of step 3 is nan; lower LEARNING_RATE'
  assert trials[2]['error'] == 'MemoryError: out of it'
  assert '1 complete, 2 failed' in out and 'out of it' in (tmp_path / 'sweep.html').read_text()
  error = lm(*TINY, '--gin.LEARNING_RATE=choice(0.6, 0.7)', '--sampler=grid',
             f'--run_dir={tmp_path / "none"}', status=2)
  assert 'no trial' in error and 'nan' in error


def test_a_full_disk_ends_the_process_and_not_the_trial(formula, tmp_path, monkeypatch):
  flags = *TINY, '--gin.LEARNING_RATE=choice(0.01, 0.1)', '--sampler=grid', f'--run_dir={tmp_path}'

  def full(*_, **__):
    raise UserError('the disk is full') from OSError(28, 'No space left on device')

  with monkeypatch.context() as context:
    context.setattr(run, 'fit', full)
    assert lm(*flags, status=2) == 'error: the disk is full'
  lm(*flags)
  assert [trial['state'] for trial in result(tmp_path)['trials']] == ['complete'] * 2


def test_a_study_goes_on_and_is_not_taken_for_another(formula, tmp_path):
  rate = '--gin.LEARNING_RATE=log(1e-5, 0.1)'
  lm(*TINY, rate, '--trials=3', f'--run_dir={tmp_path}')
  first = result(tmp_path)['trials']
  lm(f'--run_dir={tmp_path}', '--trials=6')
  both = result(tmp_path)['trials']
  assert both[:3] == first and len(both) == 6
  lm(*TINY, rate, f'--run_dir={tmp_path}')  # has its six already
  assert result(tmp_path)['trials'] == both
  for flag, other in (('--gin.LEARNING_RATE=log(1e-5, 0.2)', 'space'),
                      ('--gin.NUM_STEPS=128', 'config'), ('--sampler=random', 'sampler')):
    assert f'another {other}' in lm(*TINY, rate, flag, f'--run_dir={tmp_path}', status=2)
  lm(*TINY, rate, '--trials=6', f'--run_dir={tmp_path / "again"}')
  assert [t['values'] for t in result(tmp_path / 'again')['trials']] == [t['values'] for t in both]


def test_a_trial_that_kills_its_process_fails_at_last(formula, tmp_path, monkeypatch):
  flags = *TINY, '--gin.LEARNING_RATE=choice(0.01, 0.1)', '--sampler=grid', f'--run_dir={tmp_path}'

  def killed(*_, **__):
    raise KeyboardInterrupt  # passes what catches a trial's errors, as a kill would

  with monkeypatch.context() as context:
    context.setattr(run, 'fit', killed)
    for _ in range(sweep_study.MOST_STARTS):
      with pytest.raises(KeyboardInterrupt), contextlib.redirect_stderr(io.StringIO()):
        main.main(['sweep', *map(str, flags)])
  lm(*flags)
  trials = result(tmp_path)['trials']
  assert [trial['state'] for trial in trials] == ['fail', 'complete']
  assert 'died 3 times' in trials[0]['error']


def test_a_torn_journal_is_mended(formula, tmp_path):
  flags = *TINY, '--gin.LEARNING_RATE=log(1e-5, 0.1)', f'--run_dir={tmp_path}'
  lm(*flags, '--trials=2')
  with open(tmp_path / 'study.journal', 'a') as file:
    file.write('{"op_code":4,"work')  # as of a kill in the middle of a write
  lm(*flags, '--trials=4')
  assert [trial['state'] for trial in result(tmp_path)['trials']] == ['complete'] * 4


def test_a_signal_leaves_the_trial_to_the_next_process(formula, tmp_path, monkeypatch):
  flags = *TINY, '--gin.LEARNING_RATE=choice(0.01, 0.1)', '--sampler=grid', f'--run_dir={tmp_path}'
  with monkeypatch.context() as context:
    context.setattr(run, 'fit', lambda *_, **__: {'stopped_by': 'SIGTERM'})
    assert main.main(['sweep', *map(str, flags)]) == 128 + signal.SIGTERM
  assert [trial['state'] for trial in result(tmp_path)['trials']] == ['running']
  lm(*flags)
  assert [trial['state'] for trial in result(tmp_path)['trials']] == ['complete'] * 2


def start(log, *argv) -> subprocess.Popen:
  """Starts `lm sweep` in a process of its own; what it says goes to a file."""
  with open(log, 'w') as file:
    return subprocess.Popen(
        [sys.executable, '-m', 'lm.main', 'sweep', *map(str, argv)], cwd=ROOT, stdout=file,
        stderr=file, env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)})


def wait_for(condition, child, log):
  """Waits until this holds while the child runs."""
  for _ in range(12000):
    if condition():
      return
    assert child.poll() is None, log.read_text()[-3000:]
    time.sleep(0.02)
  raise AssertionError(f'waited for four minutes: {log.read_text()[-3000:]}')


@pytest.mark.supports('faults survived', 'kill -9 of processes that share a study')
def test_processes_share_a_study_and_survive_a_kill(tmp_path):
  (tmp_path / 'text').mkdir()
  for i in range(4):
    (tmp_path / 'text' / f'{i}.txt').write_text('to be or not to be that is the question ' * 40)
  study = tmp_path / 'study'
  flags = [*TINY, f"--gin.FILES='{tmp_path}/text/*.txt'", f"--gin.CACHE_DIR='{tmp_path}/cache'"]
  assert main.main(['cache', *flags]) == 0
  flags = [*flags, '--gin.NUM_STEPS=240', '--gin.EVAL_EVERY=80', '--gin.CHECKPOINT_EVERY=60',
           '--gin.LEARNING_RATE=choice(0.01, 0.003, 0.001)', '--sampler=grid']

  def has_checkpoint(number):
    return any((study / f'trial_{number:04}' / 'checkpoints').glob('0*'))

  logs = [tmp_path / f'{i}.log' for i in range(3)]
  first = start(logs[0], *flags, f'--run_dir={study}')
  wait_for(lambda: has_checkpoint(0), first, logs[0])
  first.kill()
  first.wait()
  second = start(logs[1], f'--run_dir={study}')
  wait_for(lambda: 'trial 0: ' in logs[1].read_text(), second, logs[1])  # of the dead
  third = start(logs[2], f'--run_dir={study}')
  wait_for(lambda: has_checkpoint(1), third, logs[2])
  assert 'trial 1: ' in logs[2].read_text()
  third.kill()
  third.wait()
  assert second.wait(timeout=240) == 0, logs[1].read_text()
  assert '3 complete' in logs[1].read_text()
  trials = result(study)['trials']
  for trial in trials:
    metrics = (pathlib.Path(trial['run_dir']) / 'metrics.jsonl').read_text()
    rows = [json.loads(line) for line in metrics.splitlines()]
    assert [row['step'] for row in rows if row['split'] == 'train'] == list(range(1, 241))
    assert trial['curve'] == [[row['step'], row['loss']] for row in rows
                              if row['split'] == 'validation']
  starts = [trial['starts'] for trial in trials]
  assert all(len(of) == 2 and of[0] == 0 < of[1] for of in starts[:2]) and starts[2] == [0]


@pytest.mark.parametrize('flags, why', [
    ((), 'there is nothing to search'),
    (('--gin.LERNING_RATE=log(1e-4, 1)',), 'did you mean LEARNING_RATE'),
    (('--gin.BATCH_SIZE=choice(4, 0)',), 'batch_size=0 must be at least 1'),
    (('--gin.BATCH_SIZE=choice(4, x)',), 'must be a Python literal'),
    (('--gin.BATCH_SIZE=uniform(4, 8)',), 'batch_size'),
    (('--gin.LEARNING_RATE=log(1e-4, 1)', '--sampler=grid'), 'write choice'),
    (('--gin.LEARNING_RATE=log(1e-4, 1)', '--sampler=cmaes'), 'take tpe'),
    (('--gin.BATCH_SIZE=choice(4, 8)', '--pruner=asha', '--gin.EVAL_EVERY=64'), 'lower EVAL_EVERY'),
    (('--scaling_law',), 'belong together'), (('--flops=1e9',), 'belong together'),
    (('--target_flops=1e9',), 'belong together'), (('--trials=-1',), 'must be above 0'),
    (('--scaling_law', '--flops=1e9,-1'), 'must be above 0'),
    (('--scaling_law', '--flops=1e9', '--gin.BATCH_SIZE=choice(4, 8)'), 'give it one value')])
def test_what_is_wrong_is_said_before_any_work(tmp_path, flags, why):
  assert why in lm(*TINY, *flags, f'--run_dir={tmp_path / "new"}', status=2)
  assert not (tmp_path / 'new').exists()


def test_directories_that_hold_no_study_are_refused(tmp_path):
  assert 'needs --run_dir' in lm(*TINY, status=2)
  assert 'holds no study' in lm(f'--run_dir={tmp_path}', status=2)
  (tmp_path / 'checkpoints').mkdir()
  assert 'directory of a run' in lm(*TINY, f'--run_dir={tmp_path}', status=2)


def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'optuna', None)
  assert 'pip install "lm[search]"' in lm(*TINY, f'--run_dir={tmp_path}', status=2)
