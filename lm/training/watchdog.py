"""Watches that training goes on: a step that is stuck is reported, with what every thread does.

  stacks/step-00000012.host-00001.txt    the Python stacks of all threads of host 1
"""
import faulthandler
import pathlib
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from lm.parallel.distributed import Hosts

STACKS = 'stacks'


class Watchdog:
  """A thread that reports when `beat` is not called for too long, once for each silence.

  Args:
    run_dir: where the stacks go.
    hosts: who train together; each watches itself, and host 0 also says who has not come.
    seconds: of silence.
    stream: where to report (standard error by default).
    alert: takes the step and a sentence.
  """

  def __init__(self, run_dir: pathlib.Path, hosts: Hosts, seconds: float,
               stream: TextIO | None = None, alert: Callable[[int, str], None] | None = None):
    self._directory, self._hosts, self._seconds = run_dir / STACKS, hosts, seconds
    self._stream, self._alert = stream or sys.stderr, alert
    self._step, self._last, self._told = 0, time.monotonic(), False
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

  def __enter__(self) -> 'Watchdog':
    self._last = time.monotonic()
    self._thread.start()
    return self

  def __exit__(self, *_: object):
    self._ended.set()
    self._thread.join()

  def beat(self, step: int):
    """Says that training goes on, in `step`."""
    self._step, self._last, self._told = step, time.monotonic(), False

  def _watch(self):
    while not self._ended.wait(min(1.0, self._seconds / 4)):
      if not self._told and time.monotonic() - self._last > self._seconds:
        self._told = True
        self._report(self._step)

  def _report(self, step: int):
    path = self._directory / f'step-{step:08d}.host-{self._hosts.index:05d}.txt'
    try:
      path.parent.mkdir(exist_ok=True)
      with open(path, 'w', encoding='utf-8') as file:
        faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:  # a full disk is no reason to hide that the step is stuck
      path = pathlib.Path(f'nowhere ({error.strerror})')
    line = self._hosts.line
    absent = line.missing(step_key(step)) if line is not None else []
    who = f'not begun by {", ".join(absent)}; ' if absent else ''
    text = (f'host {self._hosts.index} has been in step {step} for {self._seconds:.0f} s; {who}'
            f'what its threads do stands in {path}')
    print(f'warning: {text}', file=self._stream, flush=True)
    if self._alert is not None:
      self._alert(step, text)


def step_key(step: int) -> str:
  """The key under which every host says that it has begun a step."""
  return f'step {step}'
