"""Where the splits of a set lie, and how they are read.

A source has `splits()` and `records(split)`, which yields (where, record): 'train.tsv:17' and a
dict of the fields as the kind of the task names them.
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Iterator, Literal, Mapping, Optional, Tuple, Union

from lm.errors import UserError

TRAIN, VALIDATION, TEST = 'train', 'validation', 'test'
Format = Literal['jsonl', 'json', 'tsv', 'csv', 'conll']
Patterns = Union[str, Tuple[str, ...], None]


@dataclasses.dataclass(frozen=True)
class Files:
  """Files of examples, a pattern or several for each split.

  Attributes:
    train, validation, test: glob patterns; None for a split that the set does not have.
    format: None takes it from the name: .jsonl .json .tsv .csv .conll, each also .gz.
    columns: names of the columns of a table without a header line, in order; of CoNLL too.
    fields: (ours, theirs) pairs, where a field of the kind has another name in the file.
    held_out: share of the training examples that becomes the validation split, chosen by the
      hash of their text, where no `validation` is given.
  """

  train: Patterns = None
  validation: Patterns = None
  test: Patterns = None
  format: Optional[Format] = None
  columns: Tuple[str, ...] = ()
  fields: Tuple[Tuple[str, str], ...] = ()
  held_out: float = 0.0

  def __post_init__(self) -> None:
    if not 0 <= self.held_out < 1:
      raise UserError(f'held_out={self.held_out} must be at least 0 and below 1.')
    if self.held_out and self.validation:
      raise UserError(f'held_out={self.held_out} and validation={self.validation!r} both name the'
                      ' validation split; give one of them.')

  def splits(self) -> list[str]:
    """Returns the splits that there are."""
    given = [name for name in (TRAIN, VALIDATION, TEST) if getattr(self, name)]
    return given + ([VALIDATION] if self.held_out else [])

  def digest(self) -> str:
    """Returns a digest of all bytes of all files."""
    found = hashlib.sha256()
    for split in (TRAIN, VALIDATION, TEST):
      for path in self._paths(split) if getattr(self, split) else ():
        found.update(f'{split} {path.name}'.encode())
        with open(path, 'rb') as file:
          found.update(hashlib.file_digest(file, 'sha256').digest())
    return found.hexdigest()[:16]

  def records(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, record) of a split, in the order of the files."""
    if not self.held_out or split == TEST:
      yield from self._read(split)
      return
    for where, record in self._read(TRAIN):
      text = json.dumps(record, sort_keys=True, default=str).encode()
      place = int.from_bytes(hashlib.sha256(text).digest()[:8], 'big') / 2**64
      if (place < self.held_out) == (split == VALIDATION):
        yield where, record

  def _paths(self, split: str) -> list[Path]:
    patterns = getattr(self, split)
    patterns = (patterns,) if isinstance(patterns, str) else patterns or ()
    if not patterns:
      raise UserError(f'The task has no split {split!r}; it has {self.splits()}.')
    paths: list[Path] = []
    for pattern in patterns:
      found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
      if not found:
        raise UserError(f'No file matches {split}={pattern!r}; check the path.')
      paths += map(Path, found)
    return paths

  def _read(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    theirs = dict(self.fields)
    for path in self._paths(split):
      for number, record in _READERS[self._format_of(path)](path, self.columns):
        for ours, name in theirs.items():
          if name in record:
            record[ours] = record.pop(name)
        yield f'{path}:{number}', record

  def _format_of(self, path: Path) -> str:
    if self.format:
      return self.format
    suffix = Path(path.name.removesuffix('.gz')).suffix[1:]
    if suffix not in _READERS:
      raise UserError(f'{path} has a name from which its format does not follow; bind format to one'
                      f' of {sorted(_READERS)}.')
    return suffix


def _open(path: Path) -> Any:
  opener = gzip.open if path.suffix == '.gz' else open
  return opener(path, 'rt', encoding='utf-8', newline='')


def _jsonl(path: Path, columns: Tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
  del columns
  with _open(path) as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        yield number, _object(path, number, line)


def _object(path: Path, number: int, text: str) -> dict[str, Any]:
  try:
    value = json.loads(text)
  except ValueError as error:
    raise UserError(f'{path}:{number} is no JSON ({error}); mend or remove the line.') from error
  if not isinstance(value, Mapping):
    raise UserError(f'{path}:{number} is no JSON object; one with named fields is needed.')
  return dict(value)


def _json(path: Path, columns: Tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
  del columns
  with _open(path) as file:
    try:
      values = json.load(file)
    except ValueError as error:
      raise UserError(f'{path} is no JSON ({error}); mend it.') from error
  if not isinstance(values, list):
    raise UserError(f'{path} holds no list of examples; name the format that it has.')
  yield from enumerate(map(dict, values), 1)


def _table(path: Path, columns: Tuple[str, ...], **dialect: Any
           ) -> Iterator[tuple[int, dict[str, Any]]]:
  with _open(path) as file:
    reader = csv.reader(file, **dialect)
    names = list(columns) or next(reader, [])
    for row in reader:
      if not row:
        continue
      if len(row) < len(names):
        raise UserError(f'{path}:{reader.line_num} has {len(row)} columns and {len(names)} are'
                        f' named ({", ".join(names)}); mend the line, or bind columns.')
      yield reader.line_num, dict(zip(names, row))


def _tsv(path: Path, columns: Tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
  return _table(path, columns, delimiter='\t', quoting=csv.QUOTE_NONE)


def _csv(path: Path, columns: Tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
  return _table(path, columns)


def _conll(path: Path, columns: Tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
  """Words a line, sentences between empty lines; 'words' and 'tags' must be among the columns."""
  places = {name: columns.index(name) for name in ('words', 'tags') if name in columns}
  if len(places) != 2:
    raise UserError(f'columns={columns!r} must name words and tags; bind them in the order of the'
                    " file's columns.")
  first, rows = 1, []
  with _open(path) as file:
    for number, line in enumerate([*file, ''], 1):
      cells = line.rstrip('\r\n').split('\t' if '\t' in line else None)
      if line.strip() and not line.startswith('# '):
        # A range of tokens (3-4) and an empty node (3.1) of CoNLL-U are no words.
        if columns[0] == 'id' and not cells[0].isdigit():
          continue
        if len(cells) <= max(places.values()):
          raise UserError(f'{path}:{number} has {len(cells)} columns and {len(columns)} are named'
                          f' ({", ".join(columns)}); mend the line, or bind columns.')
        first = first if rows else number
        rows.append(cells)
      elif rows and not line.strip():
        yield first, {name: [row[place] for row in rows] for name, place in places.items()}
        rows = []


_READERS = {'jsonl': _jsonl, 'json': _json, 'tsv': _tsv, 'csv': _csv, 'conll': _conll}
