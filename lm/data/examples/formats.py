"""Formats of files of examples: what stands in a file, as records with named fields.

A reader takes a `Part` and the names of columns, and yields (number, record), numbers counted from
1: of lines where the format has lines.

    jsonl            an object a line
    json             a list of objects, or one object, which is one record
    csv, tsv         a table with a header line, or with `columns`; tsv knows no quotes
    conll            a word a line, sentences between empty lines; CoNLL-U and IOB2 too
    text             a line a record: {'text', 'file'}
    whole            a file a record: {'text', 'file'}
    parquet, arrow   as Hugging Face's `datasets` writes them
"""

from __future__ import annotations

import csv
import fnmatch
import glob
import gzip
import io
import json
import os
from pathlib import Path
import tarfile
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Tuple
import zipfile
import zlib

from lm.errors import UserError

Record = dict[str, Any]
Columns = Tuple[str, ...]
_ROOT = Path(__file__).resolve().parents[3]  # Of the repository, whose gin files name files.
_INSIDE = '::'


class Part(NamedTuple):
  """A file, or a member of an archive: its name in messages, and how its bytes are read.

  Attributes:
    name: 'train.csv.gz', or 'archive.zip::member.csv'.
    data: its bytes, inflated.
    encodings: of text; the first that fits.
  """

  name: str
  data: bytes
  encodings: Tuple[str, ...]

  @property
  def text(self) -> str:
    """The file as text.

    Raises:
      UserError: no encoding fits.
    """
    for encoding in self.encodings:
      try:
        return self.data.decode(encoding).removeprefix('\ufeff')
      except UnicodeDecodeError as error:
        problem = error
    raise UserError(f'{self.name} is not in encodings={self.encodings!r} ({problem}); bind the one'
                    " it has, such as ('latin-1',).")

  def lines(self) -> list[str]:
    """The lines of the file, which end at \\n or \\r\\n alone."""
    lines = self.text.split('\n')
    return [line.removesuffix('\r') for line in (lines if lines[-1] else lines[:-1])]


def find(pattern: str, what: str) -> list[tuple[Path, str]]:
  """Returns (file, pattern of its members, '' where it is no archive) of a glob pattern.

  Args:
    pattern: from the current directory, else from the repository; 'a.zip::*.csv' for members of an
      archive (.zip, .tar, .tar.gz).
    what: names it in errors.

  Raises:
    UserError: nothing matches.
  """
  files, _, members = pattern.partition(_INSIDE)
  files = os.path.expanduser(files)
  found = sorted(glob.glob(files, recursive=True)) or sorted(
      glob.glob(str(_ROOT / files), recursive=True))
  if not found:
    raise UserError(f'No file matches {what}={pattern!r}; check the path.')
  return [(Path(path), members) for path in found]


def read(path: Path, members: str, encodings: Tuple[str, ...]) -> Iterator[Part]:
  """Yields a file, or those members of an archive that match, by name.

  Raises:
    UserError: it cannot be read, or no member matches.
  """
  try:
    if not members:
      data = path.read_bytes()
      yield Part(str(path), gzip.decompress(data) if path.suffix == '.gz' else data, encodings)
      return
    known, extract = _archive(path)
    chosen = sorted(fnmatch.filter(known, members))
    if not chosen:
      raise UserError(f'No member of {path} matches {members!r}; it has {", ".join(known[:5])}'
                      f'{" ..." if len(known) > 5 else ""}.')
    for name in chosen:
      data = extract(name)
      yield Part(f'{path}{_INSIDE}{name}', gzip.decompress(data) if name.endswith('.gz') else data,
                 encodings)
  except (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
    raise UserError(f'{path} cannot be read ({error}); fetch it again.') from error


def _archive(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
  if path.suffix == '.zip':
    archive = zipfile.ZipFile(path)
    return [name for name in archive.namelist() if not name.endswith('/')], archive.read
  tar = tarfile.open(path)
  return [m.name for m in tar.getmembers() if m.isfile()], lambda name: tar.extractfile(name).read()


def of(name: str) -> str:
  """Returns the format that a name tells.

  Raises:
    UserError: it tells none.
  """
  suffix = Path(name.removesuffix('.gz')).suffix[1:]
  suffix = _SUFFIXES.get(suffix, suffix)
  if suffix not in READERS:
    raise UserError(f'{name} has a name from which its format does not follow; bind format to one'
                    f' of {", ".join(sorted(READERS))}.')
  return suffix


def _jsonl(part: Part, columns: Columns) -> Iterator[tuple[int, Record]]:
  del columns
  for number, line in enumerate(part.lines(), 1):
    if line.strip():
      try:
        value = json.loads(line)
      except ValueError as error:
        raise UserError(f'{part.name}:{number} is no JSON ({error}); mend or remove the line.'
                        ) from error
      yield number, _object(part, number, value)


def _object(part: Part, number: int, value: Any) -> Record:
  if not isinstance(value, dict):
    raise UserError(f'{part.name}:{number} is no JSON object; one with named fields is needed.')
  return value


def _json(part: Part, columns: Columns) -> Iterator[tuple[int, Record]]:
  del columns
  try:
    values = json.loads(part.text)
  except ValueError as error:
    raise UserError(f'{part.name} is no JSON ({error}); mend it.') from error
  for number, value in enumerate(values if isinstance(values, list) else [values], 1):
    yield number, _object(part, number, value)


def _table(part: Part, columns: Columns, **dialect: Any) -> Iterator[tuple[int, Record]]:
  reader = csv.reader(io.StringIO(part.text, newline=''), **dialect)
  names = list(columns) or next(reader, [])
  for row in reader:
    if not row:
      continue
    if len(row) < len(names):
      raise UserError(f'{part.name}:{reader.line_num} has {len(row)} columns and {len(names)} are'
                      f' named ({", ".join(names)}); mend the line, or bind columns.')
    yield reader.line_num, dict(zip(names, row))


def _tsv(part: Part, columns: Columns) -> Iterator[tuple[int, Record]]:
  return _table(part, columns, delimiter='\t', quoting=csv.QUOTE_NONE)


def _csv(part: Part, columns: Columns) -> Iterator[tuple[int, Record]]:
  return _table(part, columns)


def _conll(part: Part, columns: Columns) -> Iterator[tuple[int, Record]]:
  places = {name: columns.index(name) for name in ('words', 'tags') if name in columns}
  if len(places) != 2:
    raise UserError(f'columns={columns!r} must name words and tags; bind them in the order of the'
                    " file's columns.")
  first, rows = 1, []
  for number, line in enumerate([*part.lines(), ''], 1):
    cells = line.split('\t' if '\t' in line else None)
    if line.strip() and not line.startswith(('# ', '-DOCSTART-')):
      # A range of tokens (3-4) and an empty node (3.1) of CoNLL-U are no words.
      if columns[0] == 'id' and not cells[0].isdigit():
        continue
      if len(cells) <= max(places.values()):
        raise UserError(f'{part.name}:{number} has {len(cells)} columns and {len(columns)} are'
                        f' named ({", ".join(columns)}); mend the line, or bind columns.')
      first = first if rows else number
      rows.append(cells)
    elif rows and not line.strip():
      yield first, {name: [row[place] for row in rows] for name, place in places.items()}
      rows = []


def _text(part: Part, columns: Columns) -> Iterator[tuple[int, Record]]:
  del columns
  for number, line in enumerate(part.lines(), 1):
    yield number, {'text': line, 'file': Path(part.name.rpartition(_INSIDE)[2]).name}


def _whole(part: Part, columns: Columns) -> Iterator[tuple[int, Record]]:
  del columns
  yield 1, {'text': part.text, 'file': Path(part.name.rpartition(_INSIDE)[2]).name}


def _parquet(part: Part, columns: Columns) -> Iterator[tuple[int, Record]]:
  del columns
  parquet = _need('pyarrow.parquet')
  return _rows(part, lambda file: parquet.ParquetFile(file).iter_batches())


def _arrow(part: Part, columns: Columns) -> Iterator[tuple[int, Record]]:
  """Streams, as `datasets` writes them, and files."""
  del columns
  ipc = _need('pyarrow.ipc')
  opened = ipc.open_file if part.data.startswith(b'ARROW1') else ipc.open_stream
  return _rows(part, lambda file: opened(file).read_all().to_batches())


def _rows(part: Part, batches: Callable[[Any], Iterable[Any]]) -> Iterator[tuple[int, Record]]:
  arrow, number = _need('pyarrow'), 0
  try:
    for batch in batches(arrow.BufferReader(part.data)):
      for number, row in enumerate(batch.to_pylist(), number + 1):
        yield number, row
  except arrow.ArrowException as error:
    raise UserError(f'{part.name} cannot be read ({error}); fetch it again.') from error


def _need(module: str) -> Any:
  import importlib

  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise UserError("Files of Parquet and Arrow need pyarrow: pip install 'lm[corpus]'.") from error


READERS: dict[str, Callable[[Part, Columns], Iterator[tuple[int, Record]]]] = {
    'jsonl': _jsonl, 'json': _json, 'tsv': _tsv, 'csv': _csv, 'conll': _conll, 'text': _text,
    'whole': _whole, 'parquet': _parquet, 'arrow': _arrow}
_SUFFIXES = {'txt': 'text', 'conllu': 'conll', 'iob2': 'conll', 'ndjson': 'jsonl', 'tab': 'tsv'}
