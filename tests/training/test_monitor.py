"""What a run writes can be read back exactly, after kills and on full disks too."""

from __future__ import annotations

import io
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.errors import UserError
from lm.training import monitor

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def rows_of(run_dir):
  return [json.loads(line, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
          for line in (run_dir / 'metrics.jsonl').read_text().splitlines()]


def write_steps(run_dir, *steps, start_step=0):
  writer = monitor.MetricsWriter(run_dir, start_step)
  for step in steps:
    writer.write(step, 'train', {'loss': step / 3})
  writer.close()


def test_every_float32_reads_back_exactly(tmp_path):
  bits = np.random.default_rng(0).integers(0, 2**31, 300, dtype=np.int64).astype(np.uint32)
  floats = [x for x in bits.view(np.float32) if np.isfinite(x)]
  writer = monitor.MetricsWriter(tmp_path)
  for step, x in enumerate(floats):
    writer.write(step, 'train', {'loss': jnp.float32(x) if step % 50 == 0 else x, 'tokens': 7})
  writer.close()
  rows = rows_of(tmp_path)
  assert [np.float32(row['loss']).tobytes() for row in rows] == [x.tobytes() for x in floats]
  assert rows[3] == {'step': 3, 'split': 'train', 'loss': float(floats[3]), 'tokens': 7}


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_numbers_that_json_lacks_become_null_and_are_marked(tmp_path, value):
  writer = monitor.MetricsWriter(tmp_path)
  writer.write(1, 'validation', {'loss': value, 'accuracy': 0.5})
  writer.close()
  assert rows_of(tmp_path) == [
      {'step': 1, 'split': 'validation', 'loss': None, 'accuracy': 0.5, 'non_finite': True}]


def test_resume_keeps_rows_up_to_its_step_and_drops_later_and_torn_ones(tmp_path):
  write_steps(tmp_path, 1, 2, 3, 4)
  before = (tmp_path / 'metrics.jsonl').read_bytes().splitlines(keepends=True)
  with open(tmp_path / 'metrics.jsonl', 'ab') as file:
    file.write(b'{"step": 2, "spl')
  write_steps(tmp_path, 3, start_step=2)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == b''.join(before[:3])


def test_a_torn_line_alone_is_dropped_and_the_next_row_stands_on_its_own(tmp_path):
  write_steps(tmp_path, 1)
  with open(tmp_path / 'metrics.jsonl', 'ab') as file:
    file.write(b'{"step": 2, "split": "train", "loss": 1.5}')  # Whole but for its line end.
  write_steps(tmp_path, 2, start_step=2)
  assert [row['loss'] for row in rows_of(tmp_path)] == [1 / 3, 2 / 3]


def test_a_start_at_step_zero_drops_every_row(tmp_path):
  write_steps(tmp_path, 0, 1, 2)
  write_steps(tmp_path, 0)
  assert [row['step'] for row in rows_of(tmp_path)] == [0]


def test_rows_are_on_the_disk_before_the_writer_is_closed(tmp_path):
  writer = monitor.MetricsWriter(tmp_path)
  writer.write(1, 'train', {'loss': 2.0})
  assert rows_of(tmp_path)[0]['loss'] == 2.0
  writer.close()


def scalars_of(run_dir):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
  accumulator = EventAccumulator(str(run_dir / 'events'))
  accumulator.Reload()
  return {tag: [(x.step, x.value) for x in accumulator.Scalars(tag)]
          for tag in accumulator.Tags()['scalars']}


def test_tensorboard_reads_the_events_and_forgets_steps_run_again(tmp_path):
  writer = monitor.MetricsWriter(tmp_path)
  for step in 1, 2, 3:
    writer.write(step, 'train', {'loss': 1.0 / step, 'learning_rate': 0.5})
  writer.write(3, 'validation', {'loss': 4.0})
  writer.close()
  resumed = monitor.MetricsWriter(tmp_path, start_step=2)
  resumed.write(3, 'train', {'loss': 9.0, 'learning_rate': 0.25})
  resumed.close()
  scalars = scalars_of(tmp_path)
  assert scalars['train/loss'] == [(1, 1.0), (2, 0.5), (3, 9.0)]
  assert scalars['train/learning_rate'] == [(1, 0.5), (2, 0.5), (3, 0.25)]
  # The checksums are those of the format: a flipped bit is refused.
  path = min((tmp_path / 'events').iterdir())
  spoilt = bytearray(path.read_bytes())
  spoilt[-3] ^= 1
  path.write_bytes(spoilt)
  assert 'validation/loss' not in scalars_of(tmp_path)


CHILD = """
  import sys
  from lm.errors import UserError
  from lm.training import monitor
  writer = monitor.MetricsWriter(sys.argv[1])
  assert not {'tensorflow', 'tqdm', 'orbax'} & set(sys.modules), 'imported at start'
  try:
    if len(sys.argv) > 2:
      import resource
      resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    for step in range(1, 10**5):
      writer.write(step, 'train', {'loss': step / 7})
      if len(sys.argv) == 2 and step == 5:
        break
  except UserError as error:
    print(step, error)
  writer.close()
  assert 'tensorflow' not in sys.modules
"""


def run_child(*arguments):
  return subprocess.run([sys.executable, '-c', textwrap.dedent(CHILD), *map(str, arguments)],
                        env={**os.environ, 'PYTHONPATH': str(REPOSITORY), 'JAX_PLATFORMS': 'cpu'},
                        capture_output=True, text=True, timeout=60)


def test_tensorflow_is_not_imported(tmp_path):
  child = run_child(tmp_path)
  assert (child.returncode, child.stderr) == (0, '') and len(rows_of(tmp_path)) == 5


def test_full_disk_is_one_sentence_and_every_row_before_it_is_whole(tmp_path):
  child = run_child(tmp_path, 5000)
  assert (child.returncode, child.stderr) == (0, ''), child.stderr
  step, message = child.stdout.strip().split(' ', 1)
  assert 'File too large' in message and '\n' not in message
  rows = rows_of(tmp_path)
  assert len(rows) in (int(step) - 1, int(step)) and rows[-1]['loss'] == rows[-1]['step'] / 7


def test_unwritable_run_directory_is_a_users_error(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='Not a directory'):
    monitor.MetricsWriter(tmp_path / 'file' / 'run')


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def test_progress_without_a_terminal_is_a_line_at_most_every_ten_seconds():
  clock, stream = Clock(), io.StringIO()
  bar = monitor.ProgressBar(100, start_step=40, stream=stream, clock=clock)
  for step in range(41, 71):
    clock.now += 1.0
    bar.update(step, loss=3.0, tokens_per_second=1234.5, mfu=0.25)
  bar.note('saved')
  bar.close()
  lines = stream.getvalue().splitlines()
  assert '\r' not in stream.getvalue()
  assert [line.split(',')[0] for line in lines] == [
      'step 41/100', 'step 51/100', 'step 61/100', 'saved', 'step 70/100']
  # One step a second since the restart, whatever was done before it.
  assert lines[-1] == 'step 70/100, loss 3.0000, 1,234 tokens/s, MFU 25.0 %, 00:30 left'


def test_progress_on_a_terminal_is_one_bar_with_loss_speed_and_time_left():
  class Terminal(io.StringIO):
    def isatty(self):
      return True
  stream = Terminal()
  bar = monitor.ProgressBar(10, start_step=4, stream=stream)
  bar.update(10, loss=2.5, tokens_per_second=10.0, mfu=0.5)
  bar.close()
  shown = stream.getvalue().split('\r')[-1]
  for part in '100%', '10/10', 'loss 2.5000', '10 tokens/s', 'MFU 50.0 %', 'left':
    assert part in shown, shown


class Device:
  process_index = 0

  def __init__(self, kind):
    self.device_kind, self.platform = kind, 'tpu'


@pytest.mark.parametrize('kind, dtype, expected', [
    ('TPU v4', 'bfloat16', 275e12), ('TPU v5 lite', 'bfloat16', 197e12),
    ('TPU v5p', 'bfloat16', 459e12), ('TPU v5', 'bfloat16', 459e12),
    ('TPU v6 lite', 'bfloat16', 918e12), ('NVIDIA H100 80GB HBM3', 'bfloat16', 989e12),
    ('NVIDIA A100-SXM4-40GB', 'float32', 156e12)])
def test_known_devices_have_the_peak_of_their_data_sheet(kind, dtype, expected):
  assert monitor.peak_flops(dtype, [Device(kind)] * 4) == 4 * expected


def test_peak_of_a_cpu_is_measured_once_however_many_devices_it_plays():
  assert jax.devices()[0].platform == 'cpu'
  one = monitor.peak_flops(jnp.float32)
  eight = monitor.peak_flops(jnp.float32, jax.devices() * 8)
  assert 1e9 < one < 1e14 and 1 / 6 < eight / one < 6


def test_peak_memory_counts_bytes():
  before = monitor.peak_rss_bytes()
  block = np.ones(2**23)  # 64 MiB, touched.
  after = monitor.peak_rss_bytes()
  assert 2**25 < before <= after < 2**40 and block[0] == 1
