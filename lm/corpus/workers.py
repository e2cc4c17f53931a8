"""Processes that do a corpus' tasks, watched: one that hangs or dies on a document is replaced.

The C libraries that parse hostile input can run for hours, crash or take all memory. No exception
tells of it. So each process says in shared memory which document it is at and since when, and is
killed when that takes too long; the task starts again, and the second time the same document ends
it, the document is named as poison and the task goes on without it.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
import ctypes
import dataclasses
import multiprocessing
from multiprocessing import connection
import os
import resource
import signal
import time
import traceback
from typing import Any, Protocol, Self

from lm.errors import UserError

_CONTEXT = multiprocessing.get_context('spawn')
_POLL_SECONDS = 0.2
_IDLE = -1.0


class Task(Protocol):
  """Something to be done once, whole: it leaves its product by a rename."""

  def run(self, watch: Callable[[int, int], None]) -> None:
    """Does it.

    Calls `watch(stage, document)` before each document, from when its time counts, and
    `watch(stage, -1)` before what may take longer.
    """

  def poison(self, place: int, index: int, reason: str) -> None:
    """Remembers, on disk too, that this document (or, by -1, none of them) ended a process, and
    why. Raises RuntimeError where the task cannot be done without it."""


@dataclasses.dataclass
class _Worker:
  process: Any
  pipe: connection.Connection
  at: Any  # [stage, document, monotonic seconds when that began or _IDLE]
  task: Task | None = None


class Processes:
  """The executor of one machine: `with Processes(2, 60, 4 << 30) as executor: ...`."""

  def __init__(self, workers: int, document_seconds: float, memory: int, progress: bool = False):
    """Starts no process yet.

    Args:
      workers: processes.
      document_seconds: that a document may take in a stage.
      memory: bytes of data that a process may hold.
      progress: shows a bar of the tasks.
    """
    self.workers = workers
    self._seconds, self._memory, self._progress = document_seconds, memory, progress
    self._pool: list[_Worker] = []
    self._ahead: collections.deque[Task] = collections.deque()
    self._blamed: dict[int, set[tuple[int, int]]] = {}  # id of a task -> what ended a process once

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    for worker in self._pool:
      worker.process.kill()
    for worker in self._pool:
      worker.process.join()
      worker.pipe.close()
    self._pool = []

  def run(self, sources: Sequence[Any], name: str) -> None:
    """Does all of `source.tasks()` of all sources, in any order, once.

    Tasks are drawn one at a time, at most as many ahead as there are workers: their sum may be
    larger than memory, and to draw one may be slow: the workers go on meanwhile.

    Args:
      sources: of tasks.
      name: for the bar.

    Raises:
      UserError: that a task raised.
      RuntimeError: a task raised something else; its words and its trace are kept.
    """
    import tqdm  # Not in every worker.
    if not sources:
      return
    while len(self._pool) < self.workers:
      self._pool.append(_start(self._memory))
    with tqdm.tqdm(desc=name, total=len(sources), disable=not self._progress) as bar:
      tasks, left, done = _drawn(sources, bar), True, 0
      while left or self._ahead or any(worker.task for worker in self._pool):
        left, ended = self._turn(tasks, left)
        done += ended
        if ended and len(sources) < done:  # The sources are files, cut into blocks.
          bar.set_postfix_str(f'{done} blocks')

  def _turn(self, tasks: Iterator[Task], left: bool) -> tuple[bool, int]:
    """Hands out tasks, collects what is done, draws a task where there is time for it; returns
    whether any may be left to draw and how many were done."""
    for worker in self._pool:
      if worker.task is None and self._ahead:
        _send(worker, self._ahead.popleft())
    busy = [worker for worker in self._pool if worker.task is not None]
    hungry = left and len(self._ahead) < self.workers
    ready = set(connection.wait([worker.pipe for worker in busy], 0 if hungry else _POLL_SECONDS))
    count = 0
    for place, worker in enumerate(self._pool):
      if worker.pipe in ready:
        count += self._receive(place, worker)
      elif worker.task is not None and 0 < worker.at[2] < time.monotonic() - self._seconds:
        self._replace(place, worker, 'timeout')
    if hungry and not ready:
      task = next(tasks, None)
      left = task is not None
      self._ahead.extend([task] if task is not None else [])
    return left, count

  def _receive(self, place: int, worker: _Worker) -> int:
    try:
      error = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
      self._replace(place, worker, 'crash')
      return 0
    self._blamed.pop(id(worker.task), None)
    worker.task = None
    if error is not None:
      raise error
    return 1

  def _replace(self, place: int, worker: _Worker, reason: str) -> None:
    """Ends a process, puts its task back, and blames the document that it was at."""
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()
    task = worker.task
    assert task is not None
    culprit = int(worker.at[0]), int(worker.at[1])
    seen = self._blamed.setdefault(id(task), set())
    if culprit in seen:
      task.poison(*culprit, _reason(reason, worker.process.exitcode))
    seen.add(culprit)
    self._ahead.appendleft(task)
    self._pool[place] = _start(self._memory)


def _drawn(sources: Sequence[Any], bar: Any) -> Iterator[Task]:
  for source in sources:
    yield from source.tasks()
    bar.update()


def _start(memory: int) -> _Worker:
  ours, theirs = _CONTEXT.Pipe()
  at = _CONTEXT.Array(ctypes.c_double, [-1, -1, _IDLE], lock=False)
  process = _CONTEXT.Process(target=_serve, args=(theirs, at, memory, os.getpid()), daemon=True)
  process.start()
  theirs.close()
  return _Worker(process, ours, at)


def _send(worker: _Worker, task: Task) -> None:
  worker.at[0], worker.at[1], worker.at[2] = -1, -1, _IDLE
  worker.task = task
  try:
    worker.pipe.send(task)
  except (BrokenPipeError, ConnectionResetError):
    pass  # It is dead: the next `wait` says so.


def _reason(reason: str, status: int | None) -> str:
  if reason == 'timeout':
    return 'timeout: it took longer than document_seconds, twice'
  name = signal.Signals(-status).name if status is not None and status < 0 else f'status {status}'
  return f'crash: it ended the process by {name}, twice'


def _serve(pipe: connection.Connection, at: Any, memory: int, parent: int) -> None:
  """The life of a worker process."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which kills this one.
  _end_with(parent)
  os.environ.setdefault('OMP_NUM_THREADS', '1')
  resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))

  def watch(place: int, index: int) -> None:
    at[0], at[1], at[2] = place, index, time.monotonic() if index >= 0 else _IDLE

  while True:
    try:
      task = pipe.recv()
    except EOFError:
      return
    watch(-1, -1)
    try:
      task.run(watch)
      failed = None
    except UserError as error:
      failed = error
    except Exception:  # pylint: disable=broad-except  # Told to the parent, which raises it.
      failed = RuntimeError(traceback.format_exc())
    at[2] = _IDLE
    pipe.send(failed)


def _end_with(parent: int) -> None:
  """Lets the system kill this process when its parent is killed (Linux; elsewhere it ends at the
  next task)."""
  if not os.path.exists('/proc'):
    return
  ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
  if os.getppid() != parent:
    os._exit(1)
