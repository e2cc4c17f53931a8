"""Shards of clean text, in a form that others read without our code.

    array_record   records of JSON, read at random: by Grain, or TFDS' readers
    parquet        a column a field: by pandas, DuckDB, Hugging Face datasets
    jsonl          an object a line, compressed: by everything

In each, a record has the same fields, `FIELDS`, and no others; '' is what is unknown. By having all
of them a record is known as one of a corpus, and its document has its own name wherever the shard
lies (`document`). So `lm train` reads a shard as it reads any text, and a document that is written
twice is held out, or trained on, both times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

from lm.corpus import files
from lm.corpus.document import Document
from lm.errors import UserError

FIELDS = ('name', 'text', 'source', 'language', 'licence', 'url', 'date')
SUFFIXES = {'array_record': '.array_record', 'parquet': '.parquet', 'jsonl': '.jsonl.zst'}
_GROUP_BYTES = 16 << 20  # Of text in a row group of Parquet: what a reader holds at a time.
_READ_BYTES = 1 << 16  # Of a compressed file at a time.
_ARRAY_RECORD = 'group_size:16,zstd:3'  # One record costs the reading of sixteen.


@dataclasses.dataclass(frozen=True)
class Shard:
  """What was written: for corpus.json.

  Attributes:
    file: its name, without the directory.
    documents: records in it.
    text_bytes: of their text in UTF-8.
    file_bytes: on disk.
    sha256: of the file, in hex.
  """

  file: str
  documents: int
  text_bytes: int
  file_bytes: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class Writer:
  """How shards are written; gin binds it.

  Attributes:
    format: 'array_record', 'parquet' or 'jsonl' (compressed by Zstandard).
    shard_bytes: of text, about which a shard has.
  """

  format: str = 'parquet'
  shard_bytes: int = 256 << 20

  def __post_init__(self) -> None:
    if self.format not in SUFFIXES:
      raise UserError(f'format={self.format!r} is none of {", ".join(SUFFIXES)}; choose one.')
    if self.shard_bytes < 1:
      raise UserError(f'shard_bytes={self.shard_bytes} must be at least 1.')

  def plan(self, block_bytes: Sequence[int]) -> list[range]:
    """Returns the blocks of each shard: neighbours, together about `shard_bytes`.

    Args:
      block_bytes: text that each block has to be written, in the order of the blocks.

    Returns:
      At least one shard, even of nothing.
    """
    shards, first, size = [], 0, 0
    for block, more in enumerate(block_bytes):
      if size and size + more / 2 > self.shard_bytes:
        shards.append(range(first, block))
        first, size = block, 0
      size += more
    return [*shards, range(first, len(block_bytes))]

  def write(self, stem: str | os.PathLike[str], documents: Iterable[Document]) -> Shard:
    """Writes a shard, whole or not at all; the same documents give the same bytes.

    Args:
      stem: its path without the suffix, as of `stem(directory, name, 0, 12)`.
      documents: taken one by one; memory holds some megabytes of them.

    Raises:
      UserError: the disk is full, the directory cannot be written, or a package is missing.
    """
    path = Path(f'{os.fspath(stem)}{SUFFIXES[self.format]}')
    count = text_bytes = 0

    def records() -> Iterator[dict[str, str]]:
      nonlocal count, text_bytes
      for document in documents:
        fields = {name: well_formed(getattr(document, name)) for name in FIELDS}
        count, text_bytes = count + 1, text_bytes + len(fields['text'].encode('utf-8'))
        yield fields

    with files.whole(path) as temporary:
      _WRITE[self.format](temporary, records())
    with open(path, 'rb') as file:
      digest = hashlib.file_digest(file, 'sha256').hexdigest()
    return Shard(path.name, count, text_bytes, path.stat().st_size, digest)


def stem(directory: str | os.PathLike[str], name: str, index: int, count: int) -> str:
  """Returns the path of shard `index` of `count`, without a suffix: 'R/data/web-00000-of-00012'."""
  return os.path.join(directory, f'{name}-{index:05d}-of-{count:05d}')


def copies(name: str, weight: float) -> int:
  """Returns how often a document is written if its source has this weight.

  Its whole part, and once more for the share of the documents that the rest names. They are chosen
  by a hash of the name, independently of which are held out.
  """
  digest = hashlib.blake2b(name.encode('utf-8', 'surrogatepass'), digest_size=8,
                           person=b'lm.copies')
  return math.floor(weight) + (int.from_bytes(digest.digest(), 'big') < weight % 1 * 2.0**64)


def well_formed(text: str) -> str:
  """Returns the text with U+FFFD for each lone surrogate, which UTF-8 cannot say."""
  try:
    text.encode('utf-8')
  except UnicodeEncodeError:
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
  return text


def document(record: Mapping[str, Any]) -> Document | None:
  """Returns the document of a record of a corpus; None if the record is somebody else's."""
  if not set(FIELDS) <= record.keys():
    return None
  return Document(**{name: str(record[name] or '') for name in FIELDS})


def read(path: str | os.PathLike[str]) -> Iterator[Mapping[str, Any]]:
  """Streams the records of a shard of any of the formats.

  Raises:
    UserError: the suffix is of no format, or the file is truncated or damaged.
  """
  for form, suffix in SUFFIXES.items():
    if os.fspath(path).endswith(suffix):
      yield from _READ[form](os.fspath(path))
      return
  raise UserError(f'{path} ends in none of {", ".join(SUFFIXES.values())}, so it is no shard.')


def record(path: str | os.PathLike[str], index: int) -> Mapping[str, Any] | None:
  """Returns record `index` of a shard, reading all before it; None if there are fewer."""
  return next(itertools.islice(read(path), index, None), None)


def _write_array_record(path: Path, records: Iterable[Mapping[str, str]]) -> None:
  from array_record.python import array_record_module

  try:
    writer = array_record_module.ArrayRecordWriter(str(path), _ARRAY_RECORD)
    count = 0
    for count, record in enumerate(records, start=1):
      writer.write(_json(record))
    writer.close()
    reader = array_record_module.ArrayRecordReader(str(path))
    written = reader.num_records()
    reader.close()
    if written != count:  # The disk was full and the writer did not say so.
      raise OSError(errno.ENOSPC, f'{written} of {count} records')
  except (RuntimeError, ValueError) as error:  # What the writer raises when the disk fails it.
    raise OSError(errno.ENOSPC, str(error)) from error


def _read_array_record(path: str) -> Iterator[Mapping[str, Any]]:
  from array_record.python import array_record_module

  try:
    reader = array_record_module.ArrayRecordReader(path)
    try:
      for _ in range(reader.num_records()):
        yield json.loads(reader.read())
    finally:
      reader.close()
  except (RuntimeError, ValueError, IndexError) as error:
    raise _damaged(path, error) from error


def _write_parquet(path: Path, records: Iterable[Mapping[str, str]]) -> None:
  arrow, parquet = arrow_and_parquet()
  schema = arrow.schema([(name, arrow.large_string() if name == 'text' else arrow.string())
                         for name in FIELDS])
  with parquet.ParquetWriter(path, schema, compression='zstd',
                             use_dictionary=['source', 'language', 'licence']) as writer:
    group: list[Mapping[str, str]] = []
    size = 0
    for record in records:
      group.append(record)
      size += len(record['text'])
      if size >= _GROUP_BYTES:
        writer.write_table(arrow.Table.from_pylist(group, schema))
        group, size = [], 0
    if group:
      writer.write_table(arrow.Table.from_pylist(group, schema))


def _read_parquet(path: str) -> Iterator[Mapping[str, Any]]:
  arrow, parquet = arrow_and_parquet()
  try:
    with parquet.ParquetFile(path) as file:
      for batch in file.iter_batches(batch_size=256):
        yield from batch.to_pylist()
  except arrow.ArrowException as error:
    raise _damaged(path, error) from error


def _write_jsonl(path: Path, records: Iterable[Mapping[str, str]]) -> None:
  import zstandard

  with open(path, 'wb') as file, zstandard.ZstdCompressor(3).stream_writer(file) as compressed:
    for record in records:
      compressed.write(_json(record) + b'\n')


def _read_jsonl(path: str) -> Iterator[Mapping[str, Any]]:
  import zstandard

  frame, tail = zstandard.ZstdDecompressor().decompressobj(), b''
  try:
    with open(path, 'rb') as file:
      while data := file.read(_READ_BYTES):
        *lines, tail = (tail + frame.decompress(data)).split(b'\n')
        yield from map(json.loads, lines)
  except zstandard.ZstdError as error:
    raise _damaged(path, error) from error
  if not frame.eof:  # Which the library does not say by itself.
    raise _damaged(path, 'it ends in the middle')


def _json(record: Mapping[str, str]) -> bytes:
  return json.dumps(record, ensure_ascii=False).encode('utf-8')


def _damaged(path: str, why: object) -> UserError:
  return UserError(f'{path} is truncated or damaged ({why}); copy or make it again.')


def arrow_and_parquet() -> tuple[Any, Any]:
  """Returns PyArrow's two modules.

  Raises:
    UserError: it is not installed.
  """
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as error:
    raise UserError("Parquet needs PyArrow, which is not installed: pip install 'lm[corpus]', or"
                    " choose format='jsonl'.") from error
  return pyarrow, parquet


_WRITE = {'array_record': _write_array_record, 'parquet': _write_parquet, 'jsonl': _write_jsonl}
_READ = {'array_record': _read_array_record, 'parquet': _read_parquet, 'jsonl': _read_jsonl}
