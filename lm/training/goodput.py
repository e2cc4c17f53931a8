"""Where the time of a run goes, from its first start to its end, over all restarts.

Every second counts once, so the shares sum to 1:

  start       starting: data, parameters or the checkpoint, the report
  compile     XLA
  data        waiting for the next batch
  step        training
  checkpoint  copying the state for a save, and waiting for one
  evaluation  validation losses, samples, the held-out text
  lost        steps (with their data, evaluations and checkpoints) that were done again
  down        between a process that ended before the run did, and the next

The categories are those of Google's goodput (github.com/AI-Hypercomputer/ml-goodput-measurement).
"""
import contextlib
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lm.training import integrity

FILE = 'goodput.json'
CATEGORIES = 'start', 'compile', 'data', 'step', 'checkpoint', 'evaluation', 'lost', 'down'
LOSABLE = 'data', 'step', 'checkpoint', 'evaluation'
SECONDS_BETWEEN_WRITES = 5.0
MARKS = 100  # that are kept; far more than there are checkpoints


class Goodput:
  """The seconds of a run by category; of one process, added to those before it.

  Args:
    run_dir: keeps them in `goodput.json`; None keeps them in memory.
    clock: gives seconds; `wall` those since 1970.
  """

  def __init__(self, run_dir: pathlib.Path | None = None,
               clock: Callable[[], float] = time.perf_counter,
               wall: Callable[[], float] = time.time):
    self._path = run_dir and run_dir / FILE
    self._clock, self._wall, self._thread = clock, wall, threading.get_ident()
    self._seconds = dict.fromkeys(CATEGORIES, 0.0)
    self._marks: dict[int, dict[str, float]] = {}
    before = read(run_dir) if run_dir else None
    if before:
      self._seconds |= before['seconds']
      self._marks = {int(step): seconds for step, seconds in before['marks'].items()}
      if not before['finished']:
        self._seconds['down'] += max(0.0, wall() - before['until'])
    self._current, self._since = 'start', clock()
    self._write(finished=False)
    jax.monitoring.register_event_duration_secs_listener(self._on_duration)
    self._listens = True

  @contextlib.contextmanager
  def spent(self, category: str) -> Iterator[None]:
    """Counts the time inside as this category, and no longer as the one around it."""
    before = self._switch(category)
    try:
      yield
    finally:
      self._switch(before)

  def seconds(self) -> dict[str, float]:
    """By category, up to now."""
    self._switch(self._current)
    return dict(self._seconds)

  def shares(self) -> dict[str, float]:
    """By category, of all the time since the first start but what lay behind the end of a run."""
    return shares(self.seconds())

  def mark(self, step: int):
    """Says that a checkpoint of this step is on its way: what was spent until now is safe."""
    seconds = self.seconds()
    self._marks[step] = {name: seconds[name] for name in LOSABLE}
    self._marks = dict(sorted(self._marks.items())[-MARKS:])
    self._write(finished=False)

  def back_to(self, step: int):
    """Says that training goes on behind this step: what was spent since its mark is lost."""
    seconds = self.seconds()
    safe = self._marks.get(step) or dict.fromkeys(LOSABLE, 0.0)
    for name in LOSABLE:
      self._seconds['lost'] += seconds[name] - safe[name]
      self._seconds[name] = safe[name]
    self._marks = {at: mark for at, mark in self._marks.items() if at <= step}
    self._write(finished=False)

  def tick(self):
    """Keeps the numbers if they were not kept for a while; to be called at every step."""
    if self._clock() - self._written > SECONDS_BETWEEN_WRITES:
      self._write(finished=False)

  def close(self, finished: bool):
    """Keeps the numbers; the time to the next start counts unless the run is finished."""
    if self._listens:
      jax.monitoring.unregister_event_duration_listener(self._on_duration)
    self._listens = False
    self._write(finished)

  def _switch(self, category: str) -> str:
    now, before = self._clock(), self._current
    self._seconds[before] += now - self._since
    self._current, self._since = category, now
    return before

  def _on_duration(self, event: str, seconds: float, **_: Any):
    """What JAX compiles inside of a category."""
    if (event == '/jax/core/compile/backend_compile_duration'
        and threading.get_ident() == self._thread):
      self._seconds[self._current] -= seconds
      self._seconds['compile'] += seconds

  def _write(self, finished: bool):
    self._written = self._clock()
    if self._path is None:
      return
    content = {'until': self._wall(), 'finished': finished, 'seconds': self.seconds(),
               'marks': self._marks}
    with contextlib.suppress(OSError):  # an account is no reason to stop a run
      integrity.write_atomically(self._path, json.dumps(content, indent=1))


def read(run_dir: pathlib.Path) -> dict[str, Any] | None:
  """What a run directory keeps: `seconds` by category and more; None where there is nothing."""
  try:
    return json.loads((run_dir / FILE).read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return None


def shares(seconds: dict[str, float]) -> dict[str, float]:
  """Of the sum."""
  total = sum(seconds.values())
  return {name: value / total if total else 0.0 for name, value in seconds.items()}
