"""Where the splits of a set lie, and how they are read.

A source has `splits()` and `records(split)`, which yields (where, record): 'train.tsv:17' and a
dict of the fields as the kind of the task names them; and `digest()` of all that decides on them.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import inspect
import itertools
import json
from pathlib import Path
from typing import Any, Callable, Iterator, Literal, Optional, Tuple, Union

from lm.data.examples import formats
from lm.errors import UserError

TRAIN, VALIDATION, TEST = 'train', 'validation', 'test'
Format = Literal['jsonl', 'json', 'tsv', 'csv', 'conll', 'text', 'whole', 'parquet', 'arrow']
Patterns = Union[str, Tuple[str, ...], None]
Located = Iterator[tuple[str, formats.Record]]


@dataclasses.dataclass(frozen=True)
class Source:
  """What all sources share: from the records of a file to those of a kind.

  Attributes:
    train, validation, test: of which each split is made; None for one that the set does not have.
    fields: (ours, theirs) pairs, where a field of the kind has another name in the file.
    convert: makes records of the kind of one that `fields` cannot rename; see `convert`.
    held_out: share of the training examples that becomes the validation split, chosen by a hash,
      where no `validation` is given.
    held_out_by: field that is hashed, so that examples that share its value stay together; None
      hashes all fields.
    limit: takes so many of the training examples, chosen by a hash: those of a smaller limit are
      among those of a larger one, and the other splits stay whole.
  """

  train: Patterns = None
  validation: Patterns = None
  test: Patterns = None
  fields: Tuple[Tuple[str, str], ...] = ()
  convert: Optional[Callable[[formats.Record], Iterator[formats.Record]]] = None
  held_out: float = 0.0
  held_out_by: Optional[str] = None
  limit: Optional[int] = None

  def __post_init__(self) -> None:
    if self.limit is not None and self.limit < 1:
      raise UserError(f'limit={self.limit} must be at least 1, or None for all examples.')
    if not 0 <= self.held_out < 1:
      raise UserError(f'held_out={self.held_out} must be at least 0 and below 1.')
    if self.held_out and self.validation:
      raise UserError(f'held_out={self.held_out} and validation={self.validation!r} both name the'
                      ' validation split; give one of them.')

  def splits(self) -> list[str]:
    """Returns the splits that there are."""
    given = [name for name in (TRAIN, VALIDATION, TEST) if getattr(self, name)]
    return given + ([VALIDATION] if self.held_out and self.train else [])

  def digest(self) -> str:
    """Returns a digest of the data, of the fields above, and of the code of `convert`."""
    own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
           if field.name not in (TRAIN, VALIDATION, TEST, 'convert')}
    if self.convert is not None:
      code = Path(inspect.getsourcefile(self.convert)).read_bytes()
      own['convert'] = [self.convert.__qualname__, hashlib.sha256(code).hexdigest()]
    parts = [type(self).__name__, own, self._digest()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

  def records(self, split: str) -> Located:
    """Yields (where, record) of a split, in the order of the files.

    Raises:
      UserError: there is no such split, or a file or record of it cannot be read.
    """
    if split not in self.splits():
      raise UserError(f'The task has no split {split!r}; it has {self.splits()}.')
    if split != TRAIN or self.limit is None:
      yield from self._all(split)
      return
    found = list(self._all(TRAIN))  # By another hash than `held_out`, which took the smallest.
    order = sorted(range(len(found)), key=lambda i: _place(found[i][1], 'limit'))
    yield from (found[i] for i in sorted(order[:self.limit]))

  def _all(self, split: str) -> Located:
    if not self.held_out or split == TEST:
      yield from self._converted(split)
      return
    for where, record in self._converted(TRAIN):
      if self.held_out_by is not None and self.held_out_by not in record:
        raise UserError(f'{where} has no field held_out_by={self.held_out_by!r}; it has'
                        f' {sorted(record)}.')
      held = record if self.held_out_by is None else record[self.held_out_by]
      if (_place(held) < self.held_out) == (split == VALIDATION):
        yield where, record

  def hint(self, record: formats.Record) -> str:
    """Returns what may be meant where a record lacks a field that `fields` names, or ''."""
    for ours, theirs in self.fields:
      near = difflib.get_close_matches(theirs, map(str, record), 1)
      if ours not in record and near:
        return f' (fields names {theirs!r} for {ours!r}; did you mean {near[0]!r}?)'
    return ''

  def _converted(self, split: str) -> Located:
    for where, record in self._read(split):
      values = {ours: record.pop(theirs) for ours, theirs in self.fields if theirs in record}
      record |= values
      if self.convert is None:
        yield where, record
        continue
      try:
        yield from ((where, each) for each in self.convert(record))
      except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f'{where} is nothing that {self.convert.__name__} reads'
                        f' ({type(error).__name__}: {error}); bind another convert, or mend it.'
                        ) from error

  def _read(self, split: str) -> Located:
    """Yields (where, record) as the set has them."""
    raise AssertionError(type(self))

  def _digest(self) -> Any:
    """Returns what tells the data from others, JSON-able."""
    raise AssertionError(type(self))


@dataclasses.dataclass(frozen=True)
class Files(Source):
  """Files of examples, a glob pattern or several for each split.

  A pattern holds from the current directory, else from the repository; 'a.zip::*.tsv' are members
  of an archive.

  Attributes:
    format: None takes it from the name, such as .jsonl, .tsv.gz; see `formats`.
    columns: names of the columns of a table without a header line, in order; of CoNLL too.
    encodings: of text; the first that fits a file.
    aligned: (field, old, new): line n of the file beside, whose name has `new` in place of the last
      `old`, is that field of record n.
  """

  format: Optional[Format] = None
  columns: Tuple[str, ...] = ()
  encodings: Tuple[str, ...] = ('utf-8',)
  aligned: Tuple[Tuple[str, str, str], ...] = ()

  def _files(self, split: str) -> list[tuple[Path, str]]:
    patterns = getattr(self, split)
    patterns = (patterns,) if isinstance(patterns, str) else patterns or ()
    return [file for pattern in patterns for file in formats.find(pattern, split)]

  def _digest(self) -> Any:
    found = []
    for split in (TRAIN, VALIDATION, TEST):
      for path, members in self._files(split):
        for each in [path, *self._beside(path).values()]:
          with open(each, 'rb') as file:
            found.append([split, each.name, members, hashlib.file_digest(file, 'sha256').hexdigest()
                          ])
    return found

  def _beside(self, path: Path) -> dict[str, Path]:
    """Returns the files aligned with one, by their fields."""
    found = {}
    for field, old, new in self.aligned:
      found[field] = path.with_name(new.join(path.name.rsplit(old, 1)))
      if old not in path.name or not found[field].exists():
        raise UserError(f'aligned=({field!r}, {old!r}, {new!r}): beside {path} there is no'
                        f' {found[field].name}; check the names.')
    return found

  def _read(self, split: str) -> Located:
    for path, members in self._files(split):
      beside = {field: next(formats.read(other, '', self.encodings)).lines()
                for field, other in self._beside(path).items()}
      for part in formats.read(path, members, self.encodings):
        records = formats.READERS[self.format or formats.of(part.name)](part, self.columns)
        if beside:
          records = _joined(part, records, beside)
        for number, record in records:
          yield f'{part.name}:{number}', record


def _place(value: Any, salt: str = '') -> float:
  """Returns where a JSON-able value stands between 0 and 1, by its hash."""
  text = salt + json.dumps(value, sort_keys=True, default=str)
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big') / 2**64


def _joined(part: formats.Part, records: Iterator[tuple[int, formats.Record]],
            beside: dict[str, list[str]]) -> Iterator[tuple[int, formats.Record]]:
  for numbered, *lines in itertools.zip_longest(records, *beside.values()):
    if numbered is None or None in lines:
      sizes = ', '.join(f'{len(lines)} lines of {field}' for field, lines in beside.items())
      raise UserError(f'{part.name} is not aligned with {sizes}; a line of each is needed for every'
                      ' record.')
    number, record = numbered
    yield number, record | dict(zip(beside, lines))
