"""What a run writes and shows: metrics, TensorBoard events, a progress bar."""

from __future__ import annotations

import io
import json
import math
import os
import pathlib
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from lm.errors import UserError
from lm.training import integrity, writers
# Those who watch a run need these beside the writers.
from lm.training.meters import StepTimer, peak_flops, peak_rss_bytes

__all__ = ['MetricsWriter', 'ProgressBar', 'Silent', 'StepTimer', 'peak_flops', 'peak_rss_bytes',
           'read_rows']

METRICS, EVENTS = 'metrics.jsonl', 'events'


class MetricsWriter:
  """Appends rows to metrics.jsonl and the same numbers to TensorBoard events and other writers."""

  def __init__(self, run_dir: str | pathlib.Path, start_step: int = 0,
               others: Sequence[writers.Writer] = (), log: Callable[[str], None] = print):
    """Opens the metrics of a run that goes on after `start_step`.

    Rows of later steps are dropped, since these steps are run again; so is a last line that a
    kill tore. With start_step=0 the run begins anew and every row is dropped.

    Args:
      run_dir: the run directory.
      start_step: number of steps that the restored state has behind it.
      others: who get the numbers too, each in a thread of its own.
      log: what is told when one of them fails.

    Raises:
      UserError: the disk is full or not writable.
    """
    self._path = pathlib.Path(run_dir) / METRICS
    events = pathlib.Path(run_dir) / EVENTS
    try:
      events.mkdir(parents=True, exist_ok=True)
      if self._path.exists():
        kept = [json.dumps(row) + '\n' for row in read_rows(self._path)
                if start_step and row['step'] <= start_step]
        integrity.write_atomically(self._path, ''.join(kept))
      # Unbuffered: each row is one write, so a kill loses no row that `write` returned from.
      self._file = open(self._path, 'ab', buffering=0)
      name = f'events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}'
      self._events = open(events / name, 'ab', buffering=0)
      self._start_events(start_step)
    except OSError as error:
      raise self._user_error(error) from error
    self._others = [writers.Aside(writer, pathlib.Path(run_dir), start_step, log)
                    for writer in others]

  def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
    """Appends one row; it is with the operating system when this returns.

    Args:
      step: number of steps done.
      split: 'train' or 'validation'.
      metrics: name -> number, or an array, of layers first, which is a list in the row; a float32
        stands there so that it reads back exactly. NaN and infinities become null, for JSON has
        none, and the row has `"non_finite": true`.

    Raises:
      UserError: the disk is full; the rows before stay whole.
    """
    values = {name: _plain(value) for name, value in metrics.items()}
    row = {'step': int(step), 'split': split}
    row |= {name: _finite(value) for name, value in values.items()}
    if row != {'step': int(step), 'split': split, **values}:
      row['non_finite'] = True
    numbers = flat(values)
    from tensorboard.compat.proto import event_pb2, summary_pb2
    values = [summary_pb2.Summary.Value(tag=f'{split}/{name}', simple_value=x)
              for name, x in numbers.items()]
    event = event_pb2.Event(wall_time=time.time(), step=int(step),
                            summary=summary_pb2.Summary(value=values))
    try:
      _append(self._file, json.dumps(row, allow_nan=False).encode() + b'\n')
      self._add_event(event)
    except OSError as error:
      raise self._user_error(error) from error
    for writer in self._others:
      writer.write(int(step), split, numbers)

  def close(self) -> None:
    """Closes the files, and waits for the other writers."""
    self._file.close()
    self._events.close()
    for writer in self._others:
      writer.close()

  def _start_events(self, start_step: int) -> None:
    from tensorboard.compat.proto import event_pb2
    now = time.time()
    self._add_event(event_pb2.Event(wall_time=now, file_version='brain.Event:2'))
    # Makes TensorBoard forget what the run before the restart wrote of the steps run again.
    self._add_event(event_pb2.Event(
        wall_time=now, step=start_step + 1 if start_step else 0,
        session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START)))

  def _add_event(self, event: Any) -> None:
    # This module of TensorBoard alone frames and checksums a record without TensorFlow.
    from tensorboard.summary.writer.record_writer import RecordWriter
    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    _append(self._events, record.getvalue())

  def _user_error(self, error: OSError) -> UserError:
    return UserError(f'metrics cannot be written to {self._path.parent} ({error.strerror}); free '
                     'some space or mend the directory, then start the same command again')


def flat(row: Mapping[str, Any]) -> dict[str, float]:
  """The numbers of a row, and those of its vectors as name/00, name/01, ...; matrices, which would
  be thousands of curves, stay in metrics.jsonl."""
  numbers = {}
  for name, value in row.items():
    if not isinstance(value, list):
      numbers[name] = value
    elif value and not isinstance(value[0], list):
      numbers |= {f'{name}/{i:02}': x for i, x in enumerate(value)}
  return numbers


def _plain(value: Any) -> Any:
  """An int, a float, or nested lists of floats, each as short as reads back as its float32."""
  if isinstance(value, int):
    return value
  if not getattr(value, 'ndim', 0):
    return float(value)
  return [_plain(x) if x.ndim else float(str(x)) for x in np.asarray(value, np.float32)]


def _finite(value: Any) -> Any:
  """The same, with None for what is not finite."""
  if isinstance(value, list):
    return [_finite(x) for x in value]
  return value if math.isfinite(value) else None


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the rows of a metrics.jsonl up to the first torn line."""
  rows = []
  for line in path.read_text(encoding='utf-8', errors='replace').splitlines(keepends=True):
    try:
      row = json.loads(line)
    except ValueError:
      break
    if not line.endswith('\n') or not isinstance(row, dict) or 'step' not in row:
      break
    rows.append(row)
  return rows


def _append(file: Any, line: bytes) -> None:
  """Appends all of the bytes, or none of them when the disk is full."""
  size = os.fstat(file.fileno()).st_size
  written = 0
  try:
    while written < len(line):
      written += file.write(line[written:])
  except OSError:
    os.ftruncate(file.fileno(), size)
    raise


class ProgressBar:
  """Shows step, loss, tokens/s, MFU and time left: a bar on a terminal, plain lines elsewhere."""

  def __init__(self, total_steps: int, start_step: int = 0, stream: TextIO | None = None,
               seconds_between_lines: float = 10.0, clock: Callable[[], float] = time.monotonic):
    """Starts at `start_step` of `total_steps`, on `stream` (standard error by default).

    Args:
      total_steps: steps of the whole run.
      start_step: steps done before this start.
      stream: where to show.
      seconds_between_lines: least time between two lines where the stream is no terminal.
      clock: gives seconds; for tests.
    """
    self._total, self._start, self._step = total_steps, start_step, start_step
    self._stream, self._between, self._clock = stream or sys.stderr, seconds_between_lines, clock
    self._began, self._last_line, self._line = clock(), -math.inf, ''
    self._bar = None
    if self._stream.isatty():
      import tqdm
      self._bar = tqdm.tqdm(
          total=total_steps, initial=start_step, file=self._stream, dynamic_ncols=True,
          desc='train',
          bar_format='{desc} {percentage:3.0f}% |{bar}| {n}/{total}{postfix} [{remaining} left]')

  def update(self, step: int, loss: float, tokens_per_second: float | None = None,
             mfu: float | None = None) -> None:
    """Shows the state after `step` steps; `mfu` is a share of 1."""
    parts = [f'loss {loss:.4f}']
    if tokens_per_second is not None:
      parts.append(f'{tokens_per_second:,.0f} tokens/s')
    if mfu is not None:
      parts.append(f'MFU {100 * mfu:.1f} %')
    text = ', '.join(parts)
    advance, self._step = step - self._step, step
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(advance)
      return
    now = self._clock()
    done = step - self._start
    left = (now - self._began) / done * (self._total - step) if done > 0 else math.nan
    self._line = f'step {step}/{self._total}, {text}, {_duration(left)} left'
    if now - self._last_line >= self._between:
      self._show()

  def _show(self) -> None:
    if self._line:
      print(self._line, file=self._stream, flush=True)
    self._line, self._last_line = '', self._clock()

  def note(self, message: str) -> None:
    """Shows a line of its own, above the bar."""
    if self._bar is not None:
      self._bar.write(message, file=self._stream)
    else:
      print(message, file=self._stream, flush=True)

  def close(self) -> None:
    """Shows the last state and ends the bar."""
    if self._bar is not None:
      self._bar.close()
    else:
      self._show()


class Silent:
  """Takes all that a `MetricsWriter` and a `ProgressBar` take; of hosts that do not show it."""

  def _ignore(self, *_: Any, **__: Any) -> None:
    pass

  write = update = note = close = _ignore


def _duration(seconds: float) -> str:
  if not math.isfinite(seconds):
    return '?'
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes:02}:{seconds:02}'
