"""The server's side of workers: processes that are started, replaced when they die, and changed for
newer checkpoints while requests go on."""
import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
import contextlib
import itertools
import json
import logging
import sys
from typing import Any

from lm.serving import protocol
from lm.serving.protocol import Event, Job

log = logging.getLogger('lm.serving')
LONGEST_PAUSE = 30.0  # seconds between starts of a worker that does not come up


class WorkerLost(Exception):
  """The worker that held a job is gone."""


class Worker:
  """A process that computes, and the jobs that it holds.

  Attributes:
    facts: what it said when it was ready.
    num_held: jobs that it has not ended.
  """

  def __init__(self, command: Sequence[str]):
    self._command, self.facts = command, {}
    self._events: dict[int, asyncio.Queue[Event | None]] = {}
    self._process: asyncio.subprocess.Process | None = None
    self.gone = asyncio.Event()

  @property
  def num_held(self) -> int:
    return len(self._events)

  @property
  def pid(self) -> int:
    assert self._process is not None, 'not started'
    return self._process.pid

  async def start(self):
    """Starts it, and waits until it is ready.

    Raises:
      WorkerLost: it ended before.
    """
    self._process = await asyncio.create_subprocess_exec(
        *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        limit=protocol.LONGEST_LINE, start_new_session=True)
    try:
      line = await self._process.stdout.readline()
    except BaseException:
      self.kill()
      raise
    if not line:
      code = await self._process.wait()
      self.gone.set()
      raise WorkerLost(f'a worker ended with status {code} before it was ready')
    self.facts = json.loads(line)['ready']
    self._reader = asyncio.create_task(self._read())

  async def _read(self):
    async for line in self._process.stdout:
      event = json.loads(line)
      if event['id'] in self._events:
        self._events[event['id']].put_nowait(event)
    await self._process.wait()
    self.gone.set()
    for events in self._events.values():
      events.put_nowait(None)

  async def run(self, job: Job) -> AsyncIterator[Event]:
    """Yields the events of a job; one that is left before its end is cancelled.

    Raises:
      WorkerLost: the process died.
    """
    number, events = job['id'], asyncio.Queue()
    if self.gone.is_set():
      raise WorkerLost
    self._events[number] = events
    try:
      self._send(job)
      while True:
        event = await events.get()
        if event is None:
          raise WorkerLost
        if 'done' in event or 'error' in event:
          number = None
        yield event
        if number is None:
          return
    finally:
      del self._events[job['id']]
      if number is not None:
        self._send({'op': 'cancel', 'id': number})

  def _send(self, job):
    with contextlib.suppress(ConnectionError, RuntimeError):  # `_read` tells of its end.
      self._process.stdin.write(protocol.dump(job))

  def stop(self):
    """Lets it end when its jobs are done."""
    self._send({'op': 'stop'})

  def kill(self):
    """Ends it at once."""
    with contextlib.suppress(ProcessLookupError):
      self._process.kill()


class Served:
  """A model under its name: a worker that is there, or one that is being started.

  Attributes:
    name: of requests.
    restarts: workers that died and were replaced.
  """

  def __init__(self, name: str, command: Sequence[str], told: Callable[[], None] = lambda: None):
    """told: called when a worker has died."""
    self.name, self.restarts = name, 0
    self._command, self._told = command, told
    self._worker: Worker | None = None
    self._ready, self._numbers = asyncio.Event(), itertools.count()
    self._old: set[Worker] = set()
    self._keeper: asyncio.Task[None] | None = None

  @property
  def is_ready(self) -> bool:
    return self._ready.is_set()

  @property
  def facts(self) -> dict[str, Any]:
    return self._worker.facts if self._worker else {}

  @property
  def pid(self) -> int | None:
    return self._worker.pid if self._worker else None

  async def start(self):
    """Starts the first worker.

    Raises:
      WorkerLost: it did not come up.
    """
    self._worker = Worker(self._command)
    await self._worker.start()
    self._ready.set()
    self._keeper = asyncio.create_task(self._keep())

  async def _keep(self):
    """Replaces the worker whenever it dies."""
    pause = 0.5
    while True:
      worker = self._worker
      await worker.gone.wait()
      if worker is not self._worker:  # it was changed
        continue
      self._ready.clear()
      self.restarts += 1
      self._told()
      log.error('the worker of %s died; another is started', self.name)
      while True:
        fresh = Worker(self._command)
        try:
          await fresh.start()
          break
        except WorkerLost as error:
          log.error('%s: %s; the next try is in %.1f s', self.name, error, pause)
          await asyncio.sleep(pause)
          pause = min(2 * pause, LONGEST_PAUSE)
      self._worker, pause = fresh, 0.5
      self._ready.set()

  async def swap(self):
    """Changes the worker for a new one, of what the run's directory then holds; jobs of the old one
    go on there to their end.

    Raises:
      WorkerLost: the new one does not come up; the old one stays.
    """
    fresh = Worker(self._command)
    await fresh.start()
    old, self._worker = self._worker, fresh
    self._ready.set()
    if self._keeper is not None:
      self._keeper.cancel()
    self._keeper = asyncio.create_task(self._keep())
    self._old.add(old)
    old.stop()
    asyncio.create_task(self._forget(old)).add_done_callback(lambda _: None)

  async def _forget(self, old):
    await old.gone.wait()
    self._old.discard(old)

  async def run(self, job: Job) -> AsyncIterator[Event]:
    """Yields the events of a job. A job of which nothing has been told yet when its worker dies is
    given to the next.

    Raises:
      WorkerLost: the worker died in the middle of the answer, or twice.
    """
    for last in (False, True):
      await self._ready.wait()
      told = False
      try:
        async with contextlib.aclosing(self._worker.run({**job, 'id': next(self._numbers)})) as run:
          async for event in run:
            told = True
            yield event
        return
      except WorkerLost:
        if told or last:
          raise
        await asyncio.sleep(0)  # for `_keep` to see it

  async def close(self, seconds: float):
    """Ends the workers, when their jobs are done or after so many seconds."""
    if self._keeper is not None:
      self._keeper.cancel()
    workers = [*self._old, *([self._worker] if self._worker else [])]
    for worker in workers:
      worker.stop()
    gone = [asyncio.create_task(worker.gone.wait()) for worker in workers]
    if gone:
      await asyncio.wait(gone, timeout=seconds)
    for worker in workers:
      worker.kill()


def command_of(spec: dict[str, Any], module: str = 'serve_worker') -> list[str]:
  """What starts a worker: a module of `lm.commands` with what it shall load."""
  return [sys.executable, '-m', f'lm.commands.{module}', json.dumps(spec)]
