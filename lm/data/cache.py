"""The cache: tokenised documents in ArrayRecord files, read at random without TensorFlow.

    <cache_dir>/<task>-<digest>/
      info.json                  provenance; written last, so a cache that has it is whole
      train.lengths.npy          int64 [documents]: tokens of each document, its end included
      train-00000.array_record   the documents' records, in order; the first also holds its name
      validation...              the same; the first also holds its text
      vocabulary/                the vocabulary that made the ids

A document is stored as ceil(length / RECORD_TOKENS) records, so that a sequence cut from a long
book reads what it needs and not the book; which records are whose follows from the lengths. A
record is a header of four little-endian uint32 (bytes an id, bytes of ids, of name, of text) and
then these three.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
from pathlib import Path
import struct
import threading
from typing import Any, Iterable, Iterator

import numpy as np

from lm.errors import UserError

RECORD_TOKENS = 4096
FORMAT = 2  # Part of every cache's digest: raise it when the bytes of a record change.
_NAME = ('utf-8', 'surrogateescape')  # A file's name may be any bytes.
_HEADER = struct.Struct('<4I')
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def encode_record(tokens: np.ndarray, name: str = '', text: str = '') -> bytes:
  """Returns the bytes of a record; ids below 65536 take two bytes each."""
  tokens = np.asarray(tokens)
  dtype = np.dtype('<u2') if tokens.size == 0 or tokens.max() < 2**16 else np.dtype('<u4')
  ids, name_, text_ = tokens.astype(dtype).tobytes(), name.encode(*_NAME), text.encode('utf-8')
  return _HEADER.pack(dtype.itemsize, len(ids), len(name_), len(text_)) + ids + name_ + text_


def decode_record(record: bytes) -> tuple[np.ndarray, str, str]:
  """Returns (int32 ids, name, text)."""
  width, ids, name, text = _HEADER.unpack_from(record)
  start = _HEADER.size
  tokens = np.frombuffer(record, f'<u{width}', count=ids // width, offset=start).astype(np.int32)
  name_end = start + ids + name
  return (
      tokens,
      record[start + ids : name_end].decode(*_NAME),
      record[name_end : name_end + text].decode('utf-8'),
  )


def split_records(tokens: np.ndarray, name: str, text: str) -> Iterator[bytes]:
  """Yields the records of one document."""
  yield encode_record(tokens[:RECORD_TOKENS], name, text)
  for start in range(RECORD_TOKENS, len(tokens), RECORD_TOKENS):
    yield encode_record(tokens[start : start + RECORD_TOKENS])


def write_array_record(path: Path, records: Iterable[bytes]) -> int:
  """Writes records to `path`, whole or not at all, and returns their number.

  Raises:
    UserError: the disk is full or the directory cannot be written.
  """
  from array_record.python import array_record_module

  temporary = path.with_name(f'{path.name}.{os.getpid()}.part')
  count = 0
  with writing(path):
    try:
      temporary.touch()  # Says what is wrong with the directory; the writer below does not.
      writer = array_record_module.ArrayRecordWriter(str(temporary), 'group_size:1,uncompressed')
      for record in records:
        writer.write(record)
        count += 1
      writer.close()
      if num_records(temporary) != count:
        raise OSError(errno.ENOSPC, 'the file is shorter than what was written')
      os.replace(temporary, path)
    except (RuntimeError, ValueError) as error:  # What the writer raises when the disk fails it.
      raise OSError(errno.ENOSPC, str(error)) from error
    finally:
      temporary.unlink(missing_ok=True)
  return count


def num_records(path: Path) -> int:
  """Returns the number of records of an ArrayRecord file; 0 if it is broken."""
  from array_record.python import array_record_module

  try:
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
      return int(reader.num_records()) if reader.ok() else 0
    finally:
      reader.close()
  except (RuntimeError, ValueError, IndexError, OSError):
    return 0


def write_whole(path: Path, data: bytes) -> None:
  """Writes a file whole or not at all.

  Raises:
    UserError: the disk is full or the directory cannot be written.
  """
  temporary = path.with_name(f'{path.name}.{os.getpid()}.part')
  with writing(path):
    try:
      with open(temporary, 'wb') as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)


def write_array(path: Path, array: np.ndarray) -> None:
  """Writes a .npy file whole or not at all."""
  buffer = io.BytesIO()
  np.save(buffer, array)
  write_whole(path, buffer.getvalue())


def count_records(lengths: np.ndarray) -> int:
  """Returns how many records documents of these lengths take."""
  return int(np.maximum(-(-lengths // RECORD_TOKENS), 1).sum())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
  """Turns a failed write below into one sentence for the user."""
  try:
    yield
  except OSError as error:
    if error.errno in _FULL:
      raise UserError(
          f'{path} cannot be written: the disk is full (or a quota is spent); free space or bind'
          ' CACHE_DIR to another disk. What is finished is kept.'
      ) from error
    why = error.strerror or error
    raise UserError(
        f'{path} cannot be written ({why}); bind CACHE_DIR to a directory that can.'
    ) from error


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
  """Holds an exclusive lock on `path`; the system frees it however the process ends."""
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, 'ab')
  try:
    try:
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # A file system without locks: renames alone keep the cache whole there.
      pass
    yield
  finally:
    file.close()


class TokenCache:
  """One split of a cache: `cache[i]` is a document, `cache.slice(i, start, stop)` a part of its
  ids.

  Safe to share between threads and to pickle to other processes.

  Args:
    directory: a cache, as `TextTask.prepare()` returns it.
    split: 'train' or 'validation'.

  Attributes:
    lengths: int64 [documents], tokens a document.
    info: provenance of the cache.

  Raises:
    UserError: there is no whole cache in `directory`.
  """

  def __init__(self, directory: str | os.PathLike[str], split: str):
    self.directory, self.split = Path(directory), split
    try:
      self.info: dict[str, Any] = json.loads((self.directory / 'info.json').read_text('utf-8'))
      self.lengths = np.load(self.directory / f'{split}.lengths.npy')
      shards = self.info['splits'][split]['shards']
    except (OSError, ValueError, KeyError) as error:
      raise UserError(
          f'{directory} holds no whole cache of split {split!r} ({error}); run the command again to'
          ' build it.'
      ) from error
    records = -(-self.lengths // RECORD_TOKENS)
    self._first = np.concatenate([[0], np.cumsum(np.maximum(records, 1))])
    self._paths = [str(self.directory / shard['file']) for shard in shards]
    self._shard_start = np.concatenate([[0], np.cumsum([shard['records'] for shard in shards])])
    self._open()

  def _open(self) -> None:
    self._readers: list[Any] = [None] * len(self._paths)
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    hidden = ('_readers', '_lock')
    return {key: value for key, value in self.__dict__.items() if key not in hidden}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()

  def __len__(self) -> int:
    return len(self.lengths)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns {'tokens': int32 [length], 'name': of the document}, and 'text' where it was kept."""
    index = range(len(self))[index]
    parts = [decode_record(r) for r in self._read(self._first[index], self._first[index + 1])]
    tokens = np.concatenate([tokens for tokens, _, _ in parts])
    document: dict[str, Any] = {'tokens': tokens, 'name': parts[0][1]}
    if self.split != 'train' or parts[0][2]:
      document['text'] = parts[0][2]
    return document

  def slice(self, index: int, start: int, stop: int) -> np.ndarray:
    """Returns ids [stop - start] int32 of document `index`, reading no more records than needed."""
    first = self._first[index] + start // RECORD_TOKENS
    last = self._first[index] + -(-stop // RECORD_TOKENS)
    tokens = [decode_record(record)[0] for record in self._read(first, max(last, first + 1))]
    joined = tokens[0] if len(tokens) == 1 else np.concatenate(tokens)
    skipped = start - start % RECORD_TOKENS
    return joined[start - skipped : stop - skipped]

  def _read(self, start: int, stop: int) -> list[bytes]:
    records: list[bytes] = []
    while start < stop:
      shard = int(np.searchsorted(self._shard_start, start, side='right')) - 1
      offset, end = self._shard_start[shard], min(stop, self._shard_start[shard + 1])
      records += self._reader(shard).read(list(range(int(start - offset), int(end - offset))))
      start = end
    return records

  def _reader(self, shard: int) -> Any:
    if self._readers[shard] is None:
      from array_record.python import array_record_module

      with self._lock:
        if self._readers[shard] is None:
          self._readers[shard] = array_record_module.ArrayRecordReader(
              self._paths[shard], 'readahead_buffer_size:0,max_parallelism:0'
          )
    return self._readers[shard]
