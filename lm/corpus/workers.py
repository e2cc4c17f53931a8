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
import itertools
import multiprocessing
from multiprocessing import connection
import os
import resource
import signal
import time
import traceback
from typing import Any, Protocol

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


@dataclasses.dataclass(frozen=True)
class Processes:
  """The executor of one machine.

  Attributes:
    workers: processes.
    document_seconds: that a document may take in a stage.
    memory: bytes of data that a process may hold.
    progress: shows a bar of the tasks.
  """

  workers: int
  document_seconds: float
  memory: int
  progress: bool

  def run(self, sources: Sequence[Any], name: str) -> None:
    """Does all of `source.tasks()` of all sources, in any order."""
    import tqdm  # Not in every worker.
    tasks = itertools.chain.from_iterable(source.tasks() for source in sources)
    with tqdm.tqdm(desc=name, total=None, unit=' blocks', disable=not self.progress) as bar:
      for _ in done(tasks, self.workers, self.document_seconds, self.memory):
        bar.update()


def done(tasks: Iterator[Task], workers: int, document_seconds: float, memory: int
         ) -> Iterator[Task]:
  """Does all tasks and yields each as it ends, in any order.

  Tasks are drawn one at a time, at most as many ahead as there are workers: their sum may be larger
  than memory.

  Args:
    tasks: may be slow to draw; the workers go on meanwhile.
    workers: processes.
    document_seconds: that a document may take in a stage.
    memory: bytes of data that a process may hold.

  Raises:
    UserError: that a task raised.
    RuntimeError: a task raised something else; its words and its trace are kept.
  """
  pool = [_start(memory) for _ in range(workers)]
  ahead: collections.deque[Task] = collections.deque()
  blamed: dict[int, set[tuple[int, int]]] = {}  # id of a task -> what ended a process once
  exhausted = False
  try:
    while True:
      for worker in pool:
        if worker.task is None and ahead:
          _send(worker, ahead.popleft())
      busy = [worker for worker in pool if worker.task is not None]
      if not busy and not ahead and exhausted:
        return
      hungry = not exhausted and len(ahead) < workers
      ready = set(connection.wait([worker.pipe for worker in busy],
                                  0 if hungry or ahead and len(busy) < workers else _POLL_SECONDS))
      for place, worker in enumerate(pool):
        if worker.pipe in ready:
          try:
            error = worker.pipe.recv()
          except (EOFError, ConnectionResetError):
            pool[place] = _replace(worker, 'crash', blamed, ahead, memory)
            continue
          task, worker.task = worker.task, None
          if error is not None:
            raise error
          blamed.pop(id(task), None)
          yield task
        elif worker.task is not None and 0 < worker.at[2] < time.monotonic() - document_seconds:
          pool[place] = _replace(worker, 'timeout', blamed, ahead, memory)
      if hungry and not ready:
        task = next(tasks, None)
        exhausted = task is None
        ahead.extend([] if task is None else [task])
  finally:
    for worker in pool:
      worker.process.kill()
    for worker in pool:
      worker.process.join()
      worker.pipe.close()


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


def _replace(worker: _Worker, reason: str, blamed: dict[int, set[tuple[int, int]]],
             ahead: collections.deque[Task], memory: int) -> _Worker:
  """Ends a process, puts its task back, and blames the document that it was at."""
  worker.process.kill()
  worker.process.join()
  worker.pipe.close()
  task = worker.task
  if task is not None:
    culprit = int(worker.at[0]), int(worker.at[1])
    seen = blamed.setdefault(id(task), set())
    if culprit in seen:
      task.poison(*culprit, _reason(reason, worker.process.exitcode))
    seen.add(culprit)
    ahead.appendleft(task)
  return _start(memory)


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
