"""Several processes on one machine, over `jax.distributed`: they compute what one computes, stop
together whatever happens to one of them, and continue bit for bit, in any number."""
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lm import main
from lm.training import checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = 'models/gpt_small_cpu', 'optim/adamw', 'objectives/causal_lm', 'runs/pretrain', 'mesh/fsdp'
TINY = (*(f'--gin_file={ROOT}/gin/{name}.gin' for name in FILES),
        "--gin.vocabularies.VocabularyConfig.kind='byte'", '--gin.VOCAB_SIZE=260',
        '--gin.gpt.GPTConfig.d_model=32', '--gin.gpt.GPTConfig.num_layers=1',
        '--gin.gpt.GPTConfig.d_ff=48', '--gin.gpt.GPTConfig.dropout_rate=0.1',
        "--gin.gpt.GPTConfig.dtype='float32'", '--gin.SEQUENCE_LENGTH=32', '--gin.BATCH_SIZE=16',
        '--gin.NUM_STEPS=12', '--gin.CHECKPOINT_EVERY=4', '--gin.EVAL_EVERY=12',
        '--gin.loop.TrainConfig.eval_batches=1', '--gin.loop.TrainConfig.keep_checkpoints=3')


def environment(devices: int) -> dict[str, str]:
  """Of a process with so many devices."""
  return {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS':
          f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'}


class Processes:
  """`lm train` in several processes at once, in one run directory."""

  def __init__(self, flags, run, count, devices):
    """`devices`: of each process."""
    with socket.create_server(('localhost', 0)) as server:
      port = server.getsockname()[1]
    where = [[f'--coordinator=localhost:{port}', f'--num_processes={count}', f'--process_id={i}']
             if count > 1 else [] for i in range(count)]
    self.run = run
    self.all = [subprocess.Popen(
        [sys.executable, '-m', 'lm.main', 'train', *flags, f'--run_dir={run}', *more], cwd=ROOT,
        env=os.environ | environment(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True) for more in where]

  def after(self, step: int, number: int, victim: int = 0):
    """Sends a signal to one process after a step."""
    path, end = self.run / 'metrics.jsonl', time.monotonic() + 400
    while not (path.exists() and f'"step": {step},' in path.read_text()):
      for child in self.all:
        assert child.poll() is None, child.communicate()[1]
      assert time.monotonic() < end
      time.sleep(0.005)
    self.all[victim].send_signal(number)

  def end(self, timeout: float = 400) -> list[tuple[int, str]]:
    """(status, standard error) of each."""
    try:
      errors = [child.communicate(timeout=timeout)[1] for child in self.all]
    finally:
      for child in self.all:
        child.kill()
    return [(child.returncode, error) for child, error in zip(self.all, errors)]

  def succeed(self):
    """Waits for the end of all, which must be a good one."""
    for status, error in self.end():
      assert status == 0, error


def losses(run: pathlib.Path, split='train') -> dict[int, float]:
  """Loss by step."""
  rows = map(json.loads, (run / 'metrics.jsonl').read_text().splitlines())
  return {row['step']: row['loss'] for row in rows if row['split'] == split}


def leaves(run: pathlib.Path, step: int) -> list[np.ndarray]:
  """The parameters of a run after a step."""
  return jax.tree.leaves(checkpoint.restore_params(run / 'checkpoints', step=step)[1])


@pytest.fixture(scope='session')
def flags(tmp_path_factory) -> list[str]:
  """What every process here is started with."""
  folder, rng = tmp_path_factory.mktemp('files'), random.Random(0)
  for i in range(12):
    words = rng.choices('the of and to in a is that for it as was with be by on'.split(), k=200)
    (folder / f'{i:02}.txt').write_text(' '.join(words) + '\n')
  cache = tmp_path_factory.mktemp('cache')
  made = [*TINY, f"--gin.FILES='{folder}/*.txt'", f"--gin.CACHE_DIR='{cache}'"]
  assert main.main(['cache', *made]) == 0
  return made


@pytest.fixture(scope='session')
def one(flags, tmp_path_factory) -> pathlib.Path:
  """A run of one process with eight devices."""
  run = tmp_path_factory.mktemp('one') / 'run'
  Processes(flags, run, 1, 8).succeed()
  return run


# A Slurm of one machine: as many tasks as it is told, each with its number.
SRUN = r"""#!/usr/bin/env bash
output="${1#--output=}"; shift
export SLURM_STEP_NODELIST=localhost
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" > "${output/\%t/$i}" 2>&1 & tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit "${status:-0}"
"""


@pytest.fixture(scope='session')
def two(flags, one, tmp_path_factory) -> pathlib.Path:
  """The same of two processes with four devices each, which a Slurm job starts."""
  folder = tmp_path_factory.mktemp('two')
  for name, text in {'srun': SRUN, 'lm': f'#!/bin/sh\nexec {sys.executable} -m lm.main "$@"\n'
                     }.items():
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
  slurm = {'SLURM_JOB_ID': str(random.Random().randrange(1 << 20)), 'SLURM_NTASKS': '2',
           'SLURM_SUBMIT_DIR': str(folder), 'PYTHONPATH': str(ROOT), 'RESTARTS': '0',
           'PATH': f'{folder}:{os.environ["PATH"]}'}
  job = subprocess.run(
      ['bash', ROOT / 'scripts' / 'launch_slurm.sh', *flags, f'--run_dir={folder / "run"}'],
      env=os.environ | environment(4) | slurm, timeout=400, check=False)
  logs = {path.name: path.read_text() for path in folder.glob('logs/*/0/*.log')}
  assert job.returncode == 0, logs
  assert set(logs) == {'process-0.log', 'process-1.log'}
  assert 'trained 12 steps' in logs['process-0.log'] and 'trained' not in logs['process-1.log']
  return folder / 'run'


def same_losses(run: pathlib.Path, reference: pathlib.Path):
  """Equal but for the order in which sums are taken."""
  for split in ('train', 'validation'):
    ours, theirs = losses(run, split), losses(reference, split)
    assert list(ours) == list(theirs)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=2e-6)


@pytest.mark.supports('precision and parallelism', 'several hosts, found by Slurm or by address')
def test_two_processes_train_as_one_process_with_their_devices(one, two):
  same_losses(two, one)
  assert len(losses(two)) == 12 and (two / 'report.html').exists()
  ours, theirs = ([row for row in map(json.loads, (run / 'metrics.jsonl').read_text().splitlines())
                   if row['split'] == 'probe'] for run in (two, one))
  for found, wanted in zip(ours, theirs, strict=True):
    assert found.keys() == wanted.keys() and 'entropy/attention' in found
    for name in set(found) - {'split'}:
      np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5)
  ours, theirs = (json.loads((run / 'evaluation.json').read_text()) for run in (two, one))
  assert ours['step'] == 12 and ours['tokens'] == theirs['tokens']
  for found, wanted in ((ours, theirs), *zip(ours['files'], theirs['files'], strict=True)):
    assert found['bits_per_byte'] == pytest.approx(wanted['bits_per_byte'], rel=2e-6)


def stopped_after(run: pathlib.Path, step: int, copy: pathlib.Path) -> pathlib.Path:
  """A copy of a run as it was when it had saved a step."""
  shutil.copytree(run, copy)
  for later in checkpoint.list_steps(copy / 'checkpoints'):
    if later > step:
      shutil.rmtree(copy / 'checkpoints' / f'{later:08d}')
  rows = (copy / 'metrics.jsonl').read_text().splitlines(keepends=True)
  kept = ''.join(row for row in rows if json.loads(row)['step'] <= step)
  (copy / 'metrics.jsonl').write_text(kept)
  return copy


@pytest.mark.supports('faults survived', 'kill -9 of a host')
def test_a_killed_host_is_named_and_the_restart_is_bit_for_bit(flags, two, tmp_path):
  run = stopped_after(two, 4, tmp_path / 'run')
  for victim, step in ((1, 6), (0, 10)):
    processes = Processes(flags, run, 2, 4)
    processes.after(step, signal.SIGKILL, victim)
    killed = time.monotonic()
    status, error = processes.end()[1 - victim]
    assert time.monotonic() - killed < 60
    last = error.strip().splitlines()[-1]
    assert status == 75 and last.startswith(f'error: host {victim} (') and 'is gone' in last
    assert 'Traceback' not in error and 'stack trace' not in error
  Processes(flags, run, 2, 4).succeed()
  assert losses(run) == losses(two)
  for ours, theirs in zip(leaves(run, 12), leaves(two, 12), strict=True):
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.supports('faults survived', 'another number of hosts')
def test_a_run_of_eight_devices_goes_on_with_four_processes_and_then_sixteen(flags, one, tmp_path):
  run = stopped_after(one, 4, tmp_path / 'run')
  processes = Processes([*flags, '--gin.mesh.MeshConfig.tensor=2'], run, 4, 1)
  processes.after(6, signal.SIGTERM, victim=2)
  for status, error in processes.end():  # of one, all stop after the same step
    assert status == 128 + signal.SIGTERM, error
  saved = checkpoint.list_steps(run / 'checkpoints')[-1]
  assert 6 <= saved < 12 and saved == max(losses(run))
  Processes([*flags, '--gin.mesh.MeshConfig.tensor=4'], run, 1, 16).succeed()
  same_losses(run, one)
