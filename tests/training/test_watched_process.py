"""What a running process does when it is killed, told to trace, or told to stop."""
import gzip
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import guarded_runs as runs
import numpy as np
import pytest

from lm.training import goodput

ROOT = pathlib.Path(__file__).resolve().parents[2]


def start(folder, run, *flags, **changes):
  """`lm train` in a process of its own."""
  files = [f'--gin_file=gin/{name}.gin' for name in runs.PARTS]
  values = runs.bindings_of(folder, **changes)
  bindings = [f'--gin.{name}={value}' for name, value in values.items()]
  return subprocess.Popen(
      [sys.executable, '-m', 'lm.main', 'train', *files, *bindings, *flags,
       f'--run_dir={run}', f'--json={run.parent / "result.json"}'], cwd=ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, text=True)


def wait_for(condition, child, what):
  """Waits for something that the process does."""
  end = time.monotonic() + 240
  while not condition():
    assert child.poll() is None, child.communicate()[1]
    assert time.monotonic() < end, what
    time.sleep(0.01)


def last_step(run):
  """With a row in metrics.jsonl."""
  path = run / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  return json.loads(lines[-2])['step'] if len(lines) > 1 else 0


# Waits a moment, so that a loop that waited for it would be seen.
ALERT = 'sleep 0.3; cat >> {0}; printf "%s %s %s\\n" "$LM_KIND" "$LM_STEP" "$LM_RUN" >> {0}.env'


@pytest.fixture(scope='module')
def story(folder, tmp_path_factory):
  """A run is killed behind a checkpoint, starts again after three seconds, is told to trace, and to
  stop: what was seen."""
  place = tmp_path_factory.mktemp('story')
  run, told = place / 'run', place / 'told'
  changes = {'NUM_STEPS': 10**6, 'CHECKPOINT_EVERY': 40, 'EVAL_EVERY': 1000,
             'loop__TrainConfig__alert_command': repr(ALERT.format(told)),
             'loop__TrainConfig__profile': '@profiling.Window()',
             'profiling__Window__num_steps': 2, 'profiling__Window__first_step': 5}
  child = start(folder, run, **changes)
  wait_for((run / 'goodput.json').exists, child, 'the account')
  began = time.time()
  wait_for((run / 'checkpoints' / '00000040').exists, child, 'a checkpoint')
  wait_for(lambda: last_step(run) % 40 > 20, child, 'steps behind it')
  child.kill()
  child.communicate()
  killed, at_kill = time.time(), last_step(run)
  time.sleep(3)
  child = start(folder, run, **changes)
  wait_for(lambda: last_step(run) > at_kill, child, 'the restart')
  up, asked = time.time(), last_step(run)
  child.send_signal(signal.SIGUSR1)
  wait_for(lambda: num_whole_traces(run) == 2, child, 'a trace')
  child.send_signal(signal.SIGTERM)
  out, err = child.communicate(timeout=120)
  return {'run': run, 'began': began, 'down': up - killed, 'asked': asked, 'out': out, 'err': err,
          'status': child.returncode,
          'told': [json.loads(line) for line in told.read_text().splitlines()],
          'environment': (place / 'told.env').read_text().splitlines(),
          'result': json.loads((place / 'result.json').read_text())}


def trace_files(run):
  return sorted(run.glob('profile/*/plugins/profile/*/*.trace.json.gz'))


def num_whole_traces(run):
  """Without those that are still being written."""
  try:
    return sum(bool(gzip.decompress(path.read_bytes())) for path in trace_files(run))
  except EOFError:
    return 0


def traces(run):
  """The steps of each trace, in order."""
  files = trace_files(run)
  events = [json.loads(gzip.decompress(path.read_bytes()))['traceEvents'] for path in files]
  assert all(list(path.parent.glob('*.xplane.pb')) for path in files)
  return [[int(e['args']['step_num']) for e in found if e.get('name') == 'train']
          for found in events]


@pytest.mark.supports('watching', 'goodput over kills and restarts')
def test_the_seconds_of_a_killed_run_are_all_accounted_for(story):
  account = goodput.read(story['run'])
  seconds = account['seconds']
  wall = account['until'] - story['began']
  assert sum(seconds.values()) == pytest.approx(wall, abs=0.5)
  assert 3 < seconds['down'] < story['down'] + goodput.SECONDS_BETWEEN_WRITES
  assert 0 < seconds['lost'] < 10
  for name in 'start', 'compile', 'data', 'step', 'checkpoint':
    assert seconds[name] > 0, name
  shares = story['result']['goodput']
  assert sum(shares.values()) == pytest.approx(1) and set(shares) == set(goodput.CATEGORIES)
  assert shares['down'] == pytest.approx(seconds['down'] / sum(seconds.values()), rel=0.05)
  assert 'continues from the checkpoint of step' in story['err']


@pytest.mark.supports('watching', 'traces of steps, by gin or by SIGUSR1')
def test_a_config_and_a_signal_each_leave_a_trace_of_their_steps(story):
  assert story['status'] == 128 + signal.SIGTERM
  asked, signalled = traces(story['run'])
  assert asked == [5, 6]
  assert len(signalled) == 2 and signalled[1] == signalled[0] + 1
  assert signalled[0] >= story['asked']
  assert f'profile/step-{signalled[0]:08d}' in story['err']


@pytest.mark.supports('watching', 'alerts by a command')
def test_a_command_is_told_that_a_signal_stopped_the_run(story):
  steps = story['result']['steps']
  run = str(story['run'])
  assert story['told'] == [{'run': run, 'step': steps, 'kind': 'stopped',
                            'message': f'stopped by SIGTERM after step {steps}'}]
  assert story['environment'] == [f'stopped {steps} {run}']


@pytest.mark.supports('faults survived', 'a rollback of several hosts')
def test_hosts_go_back_together_over_the_windows_that_a_process_alone_steps_over(tmp_path):
  """Some noise in texts that are learnt in a few steps makes the spikes."""
  noise = bytes(np.random.default_rng(0).integers(33, 127, 200).tolist())
  for name in 'ab':
    (tmp_path / f'{name}.txt').write_bytes(b'to be or not to be ' * 150 + noise
                                           + b'to be or not to be ' * 150)
  guard = runs.guard('rollback', deviations=3.0, factor=1.3, batches_over=1, limit=50)
  changes = {'BATCH_SIZE': 4, 'EVAL_EVERY': 100, **guard}
  alone = runs.train(tmp_path, tmp_path / 'alone', **changes)
  with socket.create_server(('localhost', 0)) as server:
    port = server.getsockname()[1]
  hosts = [start(tmp_path, tmp_path / 'run', f'--coordinator=localhost:{port}',
                 '--num_processes=2', f'--process_id={i}', **changes) for i in range(2)]
  for child in hosts:
    _, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
  result = json.loads((tmp_path / 'result.json').read_text())
  assert result['rollbacks'] == alone['rollbacks'] > 0
  windows = [runs.data_of(tmp_path / name, 40) for name in ('run', 'alone')]
  assert windows[0] == windows[1] and windows[0]['stepped_over']
  np.testing.assert_allclose(result['losses'], alone['losses'], rtol=1e-4)
