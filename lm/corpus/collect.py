"""Sources of raw documents: what they are, how they are cut into blocks, how a block is read.

    for group in collect.groups(sources):           # files, from their names and sizes alone
      for block in collect.split(group, report):    # one process; ~4 MiB of raw input each
        for document in collect.read(block, report):   # any process
          ...

Blocks are the same on every machine and in every run, in order of source, path and position. A run
that goes on remembers by `group.key` how many blocks a group made, and needs not split again a
group whose blocks are all done: only then is a compressed file not inflated again. What is broken
is told to `report(name, reason)` and passed over; `kind(reason)` is the same for faults of a kind.

`documents` is the strict way, for text that is clean already: there the first fault is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import glob
import hashlib
import math
import os
import re
import sys
from typing import Union

from lm.corpus import readers
from lm.corpus.document import Document
from lm.corpus.readers import streams
from lm.corpus.readers.piece import File, Piece, PIECE_BYTES, Report, unreadable
from lm.errors import UserError

Patterns = Union[str, tuple[str, ...]]
_FILE_BYTES = 4096  # What a file costs at least when small ones are put together.


@dataclasses.dataclass(frozen=True)
class Source:
  """Where documents come from: bound by gin, one scope a source.

  Attributes:
    name: in reports, in passports and in front of the documents' names; unique.
    files: glob patterns (`**` goes into subdirectories) or directories, which are read whole, as
      data sets of Hugging Face are laid out; with `tfds` the data_dir.
    format: one of `readers.FORMATS`; '' to go by each file's suffix, before that of a compression
      (.gz .zst .bz2 .xz).
    weight: how often a document of it stands in the output: 2 twice, 0.5 every second one.
    licence: of documents that do not declare their own; an SPDX name or an address.
    language: of documents that do not declare their own, where it is known.
    text_key: names the text in JSON, in columns and in TFDS.
    tfds: 'name:split' or 'name/config:version:split' of a prepared data set of TensorFlow Datasets.
    max_document_bytes: raw or inflated; a larger document is passed over, and never held.
  """

  name: str
  files: Patterns
  format: str = ''
  weight: float = 1.0
  licence: str = ''
  language: str = ''
  text_key: str = 'text'
  tfds: str = ''
  max_document_bytes: int = 16 << 20

  def __post_init__(self) -> None:
    if isinstance(self.files, list):
      object.__setattr__(self, 'files', tuple(self.files))
    if not re.fullmatch(r'[\w.-]+', self.name):
      raise UserError(
          f'Source name={self.name!r} must be letters, digits, dots, dashes or underscores.'
      )
    if self.format and self.format not in readers.FORMATS:
      raise UserError(
          f'Source {self.name!r}: format={self.format!r} is not one of'
          f' {", ".join(sorted(readers.FORMATS))}; leave it out to go by the suffix.'
      )
    if not (self.weight > 0 and math.isfinite(self.weight)):
      raise UserError(f'Source {self.name!r}: weight={self.weight} must be positive and finite.')
    if self.max_document_bytes < 1:
      raise UserError(
          f'Source {self.name!r}: max_document_bytes={self.max_document_bytes} must be positive.'
      )


@dataclasses.dataclass(frozen=True)
class FileGroup:
  """Files that are split together: a large one, or several small ones."""

  source: Source
  files: tuple[File, ...]

  @property
  def key(self) -> str:
    """A digest of the source and of its files' names, sizes and times of change."""
    parts = (self.source, [(file.name, file.size, file.changed) for file in self.files])
    return hashlib.sha256(repr(parts).encode('utf-8', 'backslashreplace')).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Block:
  """A piece of the input, about `PIECE_BYTES` of it, that one worker reads by itself."""

  source: Source
  pieces: tuple[Piece, ...]

  @property
  def name(self) -> str:
    """The file that it is of, or the first of several, for reports."""
    return self.pieces[0].file.name

  @property
  def size(self) -> int:
    """Bytes of raw input."""
    return sum(piece.length for piece in self.pieces)


def kind(reason: str) -> str:
  """Returns what is the same in all reasons of a kind, by which to count them."""
  return re.split(r' \(|: |=| U\+', reason, maxsplit=1)[0]


def groups(sources: Sequence[Source]) -> list[FileGroup]:
  """Returns the files of all sources in their order, by looking at names and sizes alone.

  Raises:
    UserError: a pattern matches nothing, or two sources have one name.
  """
  names_ = [source.name for source in sources]
  if len(set(names_)) < len(names_):
    raise UserError(f'The sources {names_} need different names.')
  result: list[FileGroup] = []
  for source in sources:
    gathered: list[File] = []
    for file in _files(source):
      if gathered and _cost(gathered) + _cost([file]) > PIECE_BYTES:
        result.append(FileGroup(source, tuple(gathered)))
        gathered = []
      gathered.append(file)
    result.append(FileGroup(source, tuple(gathered)))
  return result


def _cost(files: list[File]) -> int:
  return sum(_FILE_BYTES + file.size for file in files)


def _files(source: Source) -> Iterator[File]:
  if source.tfds:
    (directory,) = (source.files,) if isinstance(source.files, str) else source.files
    yield File(os.path.expanduser(directory), f'{source.name}/{source.tfds}', 0, 0)
    return
  found: dict[str, str] = {}  # real path -> the path that was given, whose suffix says more
  for pattern in (source.files,) if isinstance(source.files, str) else source.files:
    matches = _matches(os.path.expanduser(pattern))
    if not matches:
      raise UserError(
          f'Source {source.name!r}: files pattern {pattern!r} matches no file (looked from'
          f" {os.getcwd()}); give a path, a directory or a glob such as 'crawl/*.warc.gz'."
      )
    for path in matches:
      found.setdefault(os.path.realpath(path), os.path.abspath(path))
  if not found:
    raise UserError(f'Source {source.name!r}: files=() names no file; give a path or a glob.')
  listed = sorted(found.values())
  for path, name in zip(listed, names(listed)):
    readable = os.fsencode(name).decode('utf-8', 'backslashreplace')
    try:
      stat = os.stat(path)
      size, changed = stat.st_size, stat.st_mtime_ns
    except OSError:  # It is told when the file is split.
      size, changed = 0, 0
    yield File(path, f'{source.name}/{readable}', size, changed)


def _matches(pattern: str) -> list[str]:
  """Returns the files that a pattern matches, broken links too; of a directory, those in it."""
  if os.path.isdir(pattern):
    inside = glob.glob(os.path.join(glob.escape(pattern), '**', '*'), recursive=True)
    return [path for path in inside if not os.path.isdir(path) and readers.is_data(path)]
  return [path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path)]


def split(group: FileGroup, report: Report) -> Iterator[Block]:
  """Cuts the files of a group into blocks, in order, always in the same way.

  Raises:
    UserError: a package that the format needs is missing.
  """
  pieces: list[Piece] = []
  for file in group.files:
    reader = readers.FORMATS[_format(group.source, file.path)]
    if not group.source.tfds and os.path.exists(file.path) and not os.path.isfile(file.path):
      report(file.name, 'is a pipe, a socket or a device')
      continue
    try:
      for piece in reader.pieces(file, group.source, report):
        if pieces and sum(p.length for p in pieces) + piece.length > PIECE_BYTES:
          yield Block(group.source, tuple(pieces))
          pieces = []
        pieces.append(piece)
    except OSError as error:
      report(file.name, unreadable(error))
  if pieces:
    yield Block(group.source, tuple(pieces))


def read(block: Block, report: Report) -> Iterator[Document]:
  """Reads the documents of a block, in order, always the same; those without any text are reported.

  A document has its text, or `raw` bytes of a media type from which `extract` makes it.

  Raises:
    UserError: a package that the format needs is missing.
  """
  source = block.source
  for piece in block.pieces:
    format_ = _format(source, piece.file.path)
    try:
      for document in readers.FORMATS[format_].documents(piece, source, report):
        document.source = source.name
        document.licence = document.licence or source.licence
        document.language = document.language or source.language
        if document.raw is not None and format_ in readers.MEDIA_TYPES:
          document.media_type = readers.MEDIA_TYPES[format_]
        if not (document.text if document.raw is None else document.raw).strip():
          report(document.name, 'is empty')
        else:
          yield document
    except OSError as error:
      report(piece.file.name, unreadable(error))


def _format(source: Source, path: str) -> str:
  return 'tfds' if source.tfds else source.format or readers.format_of(path)


def paths(patterns: Patterns) -> list[str]:
  """Returns the files that the glob patterns match, sorted, each once (`**` goes into
  subdirectories).

  Raises:
    UserError: a pattern matches no file.
  """
  found: set[str] = set()
  for pattern in (patterns,) if isinstance(patterns, str) else tuple(patterns):
    matches = [
        os.path.realpath(path)
        for path in glob.glob(os.path.expanduser(pattern), recursive=True)
        if os.path.isfile(path)
    ]
    if not matches:
      raise UserError(
          f'FILES pattern {pattern!r} matches no file (looked from {os.getcwd()}); give a path or a'
          " glob such as 'books/*.txt'."
      )
    found.update(matches)
  if not found:
    raise UserError("FILES=() names no file; give a path or a glob such as 'books/*.txt'.")
  return sorted(found)


def names(files: list[str]) -> list[str]:
  """Returns short names, relative to the files' common directory.

  So the same files give the same names, hence the same held-out split, wherever they lie.
  """
  root = os.path.commonpath([os.path.dirname(path) for path in files])
  return [os.path.relpath(path, root).replace(os.sep, '/') for path in files]


def documents(patterns: Patterns) -> Iterator[Document]:
  """Streams the non-empty documents of all matching files of text, in the order of their paths.

  A line of .jsonl is one, a row of .parquet, .arrow or .array_record, and every other file, in
  UTF-8. Documents of a corpus that `lm corpus` wrote keep their names, wherever the shard lies.

  Args:
    patterns: one glob pattern or a tuple of them.

  Yields:
    Documents with name and text; the name of a `.jsonl` document is `file:line`, counted from 1.

  Raises:
    UserError: no match, not UTF-8, a broken line of JSON, a truncated archive, or nothing but empty
      documents.
  """
  listed = paths(patterns)
  count = 0
  for path, name in zip(listed, names(listed)):
    for document in _strictly(path, name):
      if document.text.strip():
        count += 1
        yield document
  if not count:
    raise UserError(
        f'The corpus is empty: no document with text in {len(listed)} file(s) matching'
        f' {patterns!r}; name files that hold text.'
    )


# What to do about a fault, by its kind.
_FIXES = {
    'cannot be read': 'mend its permissions',
    'is truncated or damaged': 'copy or download it again',
    'is not UTF-8': 'convert it, for example with `iconv -f LATIN1 -t UTF-8 {path}`',
    'is not JSON': 'each line must be an object such as {{"text": "..."}}',
    'has no string under the key "text"': 'each line must be an object such as {{"text": "..."}}',
    'holds a lone surrogate': 'remove it',
}


def _strictly(path: str, name: str) -> Iterator[Document]:
  """Reads one file of text; the first fault is an error."""

  def report(where: str, reason: str) -> None:
    if reason != 'is empty':
      fix = _FIXES.get(kind(reason), 'mend it or leave it out').format(path=path)
      raise UserError(f'{path}{where.removeprefix(name)} {reason}; {fix}.')

  format_ = readers.format_of(path)
  if format_ in ('warc', 'epub'):
    raise UserError(f'{path} is raw; make text of it by `lm corpus` and train on that.')
  records = format_ in ('parquet', 'array_record', 'arrow') or streams.stem(path).endswith('.jsonl')
  source = Source('strict', path, format_ if records else 'text', max_document_bytes=sys.maxsize)
  group = FileGroup(source, (File(path, name, 0, 0),))
  for block in split(group, report):
    for document in read(block, report):
      if document.raw is not None:
        try:
          document.text, document.raw = document.raw.decode('utf-8'), None
        except UnicodeDecodeError as error:
          byte = document.raw[error.start]
          report(name, f'is not UTF-8: byte 0x{byte:02x} at offset {error.start}')
      document.source = ''
      yield document
