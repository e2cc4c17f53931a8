"""Answers on disk, batch by batch, until all are there.

    <task>-<split>.jsonl.part   a line with the key of what is asked, then lines of [[item, answer],
                                ...], a line a batch
    <task>-<split>.jsonl, .json the predictions and their header; the header is written last

A kill tears the last line at most, which is asked again. A part or predictions of another key (of
another checkpoint, task or configuration) are not used.
"""
from collections.abc import Iterable, Iterator, Mapping
import contextlib
import json
import os
import pathlib
from typing import Any

from lm.errors import UserError


class Part:
  """The answers so far, of host 0.

  Args:
    path: of the predictions to be.
    key: of what is asked.

  Attributes:
    answers: by item.
  """

  def __init__(self, path: pathlib.Path, key: str):
    self.path = path.with_suffix('.jsonl.part')
    self.answers: dict[int, Any] = {}
    first = json.dumps({'key': key}).encode() + b'\n'
    with writing(self.path):
      self.path.parent.mkdir(exist_ok=True)
      old = self.path.read_bytes() if self.path.exists() else b''
      good = len(first) if old.startswith(first) else 0
      for line in old[good:].splitlines(keepends=True) if good else ():
        if not line.endswith(b'\n'):
          break
        self.answers.update(json.loads(line))
        good += len(line)
      self._file = open(self.path, 'r+b' if good else 'wb')
      self._file.truncate(good)
      self._file.seek(0, os.SEEK_END)
      if not good:
        self._write(first)

  def add(self, answers: Mapping[int, Any]):
    """Keeps the answers of a batch."""
    with writing(self.path):
      self._write(json.dumps(list(answers.items())).encode() + b'\n')
    self.answers.update(answers)

  def _write(self, line: bytes):
    self._file.write(line)
    self._file.flush()

  def close(self):
    """Closes the file, which stays."""
    self._file.close()


def standing(path: pathlib.Path, key: str) -> bool:
  """Whether predictions of this key are on disk."""
  try:
    return json.loads(path.with_suffix('.json').read_text('utf-8')).get('key') == key and (
        path.exists())
  except (OSError, ValueError):
    return False


def write(path: pathlib.Path, header: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]):
  """Replaces predictions and their header by others, whole."""
  with writing(path):
    for suffix in ('.json', '.html'):  # of other rows than those to be
      path.with_suffix(suffix).unlink(missing_ok=True)
    _replace(path, (json.dumps(row, ensure_ascii=False) + '\n' for row in rows))
  write_header(path, header)


def write_header(path: pathlib.Path, header: Mapping[str, Any]):
  """Replaces the header of predictions."""
  with writing(path):
    _replace(path.with_suffix('.json'), [json.dumps(header, indent=1, ensure_ascii=False) + '\n'])


def _replace(path: pathlib.Path, lines: Iterable[str]):
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    with open(temporary, 'w', encoding='utf-8') as file:
      file.writelines(lines)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Makes a sentence of what a disk refuses."""
  try:
    yield
  except OSError as error:
    raise UserError(f'{path} cannot be written ({error.strerror}); free some space or mend the '
                    'directory, then evaluate again') from error
