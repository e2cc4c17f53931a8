"""Keeps report.html true while a run trains."""
from collections.abc import Mapping
import json
import pathlib
import time
from typing import Any

from lm.evaluation import report

SECONDS = 30.0  # between two pages, where nothing but steps is new
COST = 50  # a page waits this many times as long as the last one took: 2 % of one thread at most
MOST_ROWS = 4000  # that are kept of a split, or half of it; fewer are drawn


class LiveReport:
  """A writer (`lm/training/writers.py`) that writes the report anew at every evaluation, and every
  half minute between them.

  Args:
    total_steps: of the whole run.
  """

  def __init__(self, total_steps: int):
    self._total = total_steps

  def open(self, run_dir: pathlib.Path, start_step: int):
    """Writes a page that says that the run is on its way."""
    self._run_dir, self._start, self._step = run_dir, start_step, start_step
    self._splits: dict[str, _Thinned] = {}
    self._read, self._began, self._cost = 0, time.monotonic(), 0.0
    self._update('live')

  def write(self, step: int, split: str, row: Mapping[str, float]):
    """Writes the page if it is due; the row itself stands in metrics.jsonl."""
    del row
    self._step = step
    passed = time.monotonic() - self._written
    if passed >= max(SECONDS if split == 'train' else 0, COST * self._cost):
      self._update('live')

  def close(self):
    """Says that no more steps come."""
    self._update('ended' if self._step >= self._total else 'stopped')

  def _update(self, state):
    start = time.monotonic()
    self._take_rows()
    done = self._step - self._start
    left = (start - self._began) / done * (self._total - self._step) if done else None
    status = report.Status(self._step, self._total, state, left if state == 'live' else None)
    rows = [row for split in self._splits.values() for row in split.rows()]
    report.write_report(self._run_dir, status, rows)
    self._written = time.monotonic()
    self._cost = self._written - start

  def _take_rows(self):
    """Reads what was added to metrics.jsonl since the last page."""
    with open(self._run_dir / 'metrics.jsonl', 'rb') as file:
      file.seek(self._read)
      lines = file.readlines()
    for line in lines:
      if not line.endswith(b'\n'):
        break  # being written at this moment
      self._read += len(line)
      row = json.loads(line)
      self._splits.setdefault(row['split'], _Thinned()).add(row)


class _Thinned:
  """The rows of a split or, of a long run, of every so many rows the two of least and largest loss:
  no spike disappears, and a mean stays where it was."""

  def __init__(self):
    self._kept: list[dict[str, Any]] = []
    self._next: list[dict[str, Any]] = []
    self._size = 2

  def add(self, row: dict[str, Any]):
    self._next.append(row)
    if len(self._next) == self._size:
      self._kept += _extremes(self._next)
      self._next = []
    if len(self._kept) >= MOST_ROWS:
      self._kept = [row for i in range(0, len(self._kept), 4)
                    for row in _extremes(self._kept[i:i + 4])]
      self._size *= 2

  def rows(self) -> list[dict[str, Any]]:
    return self._kept + self._next


def _extremes(rows):
  """Two of them, in their order."""
  order = sorted(range(len(rows)), key=lambda i: rows[i].get('loss') or 0.0)
  return [rows[i] for i in sorted((order[0], order[-1]))]
