"""What the readers of all formats share: files, pieces of them, and how a fault is told."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, Callable, NamedTuple

from lm.errors import UserError

# (name, reason): what was passed over, and a predicate without a full stop: 'is not JSON (...)'.
Report = Callable[[str, str], None]

PIECE_BYTES = 4 << 20  # Of raw input: large against what a task costs, small against a corpus.


class File(NamedTuple):
  """A file of a source: where it lies, its name in reports, its size in bytes, when it changed."""

  path: str
  name: str
  size: int
  changed: int


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a file that is read by itself.

  Either where it stands in the file, or what the splitter took out of a stream that cannot be
  entered in the middle.

  Attributes:
    file: that it is of.
    offset: of its first byte in the file, or in what the file inflates to.
    length: bytes; of a piece without records they are read from the file.
    numbers: of the records, by which their documents are named; of a piece without records the
      number of the first.
    records: raw, one for each number; None where they are in the file.
  """

  file: File
  offset: int
  length: int
  numbers: tuple[int, ...] = ()
  records: tuple[bytes, ...] | None = None


class Packer:
  """Gathers the records of a stream into pieces of about `PIECE_BYTES`."""

  def __init__(self, file: File) -> None:
    self._file, self._size = file, 0
    self._numbers: list[int] = []
    self._records: list[bytes] = []

  def add(self, number: int, record: bytes) -> Piece | None:
    """Takes a record in and returns a piece once there is enough of them."""
    self._numbers.append(number)
    self._records.append(record)
    self._size += len(record)
    return self.flush() if self._size >= PIECE_BYTES else None

  def flush(self) -> Piece | None:
    """Returns what is left as a piece, None if there is nothing."""
    if not self._records:
      return None
    piece = Piece(self._file, 0, self._size, tuple(self._numbers), tuple(self._records))
    self._numbers, self._records, self._size = [], [], 0
    return piece


def too_long(limit: int) -> str:
  """Says that something is longer than the largest document."""
  return f'is longer than max_document_bytes={limit}'


def damaged(why: object) -> str:
  """Says that an archive is broken."""
  return f'is truncated or damaged ({why})'


def unreadable(error: OSError) -> str:
  """Says that the operating system does not let it be read."""
  return f'cannot be read ({error.strerror or error})'


def need(module: str) -> Any:
  """Imports a module of the extra [corpus].

  Raises:
    UserError: its package is not installed.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    package = module.partition('.')[0]
    raise UserError(f"{package} is not installed ({error}): pip install 'lm[corpus]'.") from error
