"""Processes that hang, crash or take all memory on a document lose that document and no other."""
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lm.corpus import stage
from lm.corpus import steps
from lm.corpus import workers
from lm.corpus.document import Document
from lm.errors import UserError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Hostile(stage.Stage):
  """Does to the process what the document says."""

  def apply(self, document):
    if document.text == 'hang':
      time.sleep(60)
    elif document.text == 'slow':
      time.sleep(0.1)
    elif document.text == 'crash':
      os.kill(os.getpid(), signal.SIGSEGV)
    elif document.text == 'memory':
      document.verdicts['sum'] = int(np.ones(2 * GIB, np.uint8).sum())
    elif document.text == 'raise':
      raise ValueError('not so')
    document.verdicts['seen'] = True


@dataclasses.dataclass(frozen=True)
class Block:
  """A task like those of a corpus, on documents that it holds."""
  directory: pathlib.Path
  texts: tuple[str, ...]

  def tasks(self):
    yield self

  def poison(self, place, index, reason):
    with open(self.directory / 'poison', 'a') as file:
      file.write(f'{place} {index} {reason}\n')

  def run(self, watch):
    path = self.directory / 'poison'
    lines = path.read_text().splitlines() if path.exists() else []
    poisoned = [line.split(' ', 2) for line in lines]
    documents = [Document(f'd{index}', text, address=index)
                 for index, text in enumerate(self.texts)]
    segment = steps.Segment(0, None, (Hostile(),), None)
    advanced = steps.advance(segment, documents, None,
                             [(int(p), int(i), reason) for p, i, reason in poisoned], watch)
    (self.directory / 'kept').write_text(' '.join(d.name for d in advanced.kept))
    (self.directory / 'faults').write_text(
        '\n'.join(f'{name}: {reason}' for name, reason in advanced.faults))


def outcome(path, texts, seconds=0.5, memory=GIB):
  with workers.Processes(1, seconds, memory) as executor:
    executor.run([Block(path, texts)], 'blocks')
  return (path / 'kept').read_text().split(), (path / 'faults').read_text()


@pytest.mark.supports('faults survived', 'documents that hang, crash or exhaust a parser')
@pytest.mark.parametrize('hostile, reason', [
    ('hang', 'timeout: it took longer than document_seconds, twice'),
    ('crash', 'crash: it ended the process by SIGSEGV, twice'),
    ('memory', 'MemoryError'), ('raise', 'ValueError: not so')])
def test_a_hostile_document_is_named_and_the_others_go_on(tmp_path, hostile, reason):
  kept, faults = outcome(tmp_path, ('a', 'b', hostile, 'c', hostile, 'd'))
  assert kept == ['d0', 'd1', 'd3', 'd5']
  assert [line.partition(': ')[0] for line in faults.splitlines()] == ['d2', 'd4']
  assert all(reason in line for line in faults.splitlines())


def test_a_slow_block_of_quick_documents_is_not_ended(tmp_path):
  kept, faults = outcome(tmp_path, ('slow',) * 12, seconds=0.5)
  assert len(kept) == 12 and not faults


@dataclasses.dataclass(frozen=True)
class Square:
  """A task with a number."""
  path: pathlib.Path
  number: int

  def tasks(self):
    yield self

  def run(self, watch):
    if self.number < 0:
      raise UserError(f'number={self.number} must not be below 0')
    (self.path / str(self.number)).write_text(str(self.number**2))


@dataclasses.dataclass
class Squares:
  """A source of tasks that counts how far it is ahead of what is done."""
  path: pathlib.Path
  count: int
  most_ahead: int = 0

  def tasks(self):
    for number in range(self.count):
      self.most_ahead = max(self.most_ahead, number - len(list(self.path.iterdir())))
      yield Square(self.path, number)


def test_all_tasks_are_done_and_few_are_drawn_ahead(tmp_path):
  source = Squares(tmp_path, 60)
  with workers.Processes(2, 10, GIB) as executor:
    executor.run([source], 'first')
    assert {path.name: int(path.read_text()) for path in tmp_path.iterdir()} == {
        str(number): number**2 for number in range(60)}
    assert source.most_ahead <= 4  # In work, and waiting.
    executor.run([Squares(tmp_path, 61)], 'again, in the same processes')
  assert len(list(tmp_path.iterdir())) == 61


def test_what_a_task_raises_is_raised(tmp_path):
  with pytest.raises(UserError, match='number=-1 must not'):
    with workers.Processes(2, 10, GIB) as executor:
      executor.run([Square(tmp_path, -1)], 'fails')
  with pytest.raises(RuntimeError, match='TypeError: unsupported operand'):
    with workers.Processes(1, 10, GIB) as executor:
      executor.run([Square(None, 1)], 'fails')


def test_workers_end_with_who_started_them(tmp_path):
  code = f'''
import sys, pathlib
sys.path.insert(0, {os.path.dirname(__file__)!r})
if __name__ == '__main__':
  import test_workers
  from lm.corpus import workers
  path = pathlib.Path({str(tmp_path)!r})
  with workers.Processes(1, 100, 1 << 30) as executor:
    executor.run([test_workers.Block(path, ('hang',))], 'blocks')
'''
  script = tmp_path / 'script.py'
  script.write_text(code)
  process = subprocess.Popen([sys.executable, str(script)])
  deadline = time.monotonic() + 30
  children = pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children')
  while not (pids := children.read_text().split()) and time.monotonic() < deadline:
    time.sleep(0.05)
  time.sleep(0.5)
  pids = children.read_text().split()
  assert pids
  process.kill()
  process.wait()
  alive = lambda pid: pathlib.Path(f'/proc/{pid}').exists() and (
      'zombie' not in pathlib.Path(f'/proc/{pid}/status').read_text())
  while any(map(alive, pids)) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(map(alive, pids))
