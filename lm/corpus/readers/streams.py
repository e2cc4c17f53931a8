"""Compressed files as streams of bytes that go on behind what is damaged.

A gzip, zstd, bzip2 or xz file is a row of members (frames, streams), each compressed by itself: a
WARC.gz has one a record, `pigz` and dumps of Wikipedia have many. Where a member is broken, the
stream says so by a `Gap` and goes on with the next that can be found. Nothing is inflated by more
than some MiB at a time.
"""

from __future__ import annotations

import bz2
from collections.abc import Iterator
import lzma
import os
import re
from typing import Any, BinaryIO, NamedTuple
import zlib

from lm.corpus.readers.piece import damaged, File, Report

_READ_BYTES = 1 << 16  # Of a compressed file at a time.
_OUT_BYTES = 1 << 18  # Inflated at a time, where the library lets itself be told.
_ZSTD_FEED = 1 << 10  # It does not: 1 KiB can be 32 MiB (RLE blocks of 128 KiB in 4 bytes).
_LAG = 1 << 16  # Bytes that may pass before an inflater notices that it reads no member any more.
# Text inflates 3 to 30 times, logs 100 times; gzip cannot do more than 1032 times.
_MOST_TIMES, _HARMLESS = 256, 64 << 20
_BROKEN = (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError)

# How a member begins. gzip: method 8, no reserved flags. bzip2: level and the block's magic.
_MAGIC = {
    '.gz': re.compile(rb'\x1f\x8b\x08[\x00-\x1f]'),
    '.zst': re.compile(rb'\x28\xb5\x2f\xfd'),
    '.bz2': re.compile(rb'BZh[1-9](?:1AY&SY|\x17rE8P\x90)'),
    '.xz': re.compile(rb'\xfd7zXZ\x00'),
}
SUFFIXES = tuple(_MAGIC)


class Gap(NamedTuple):
  """Here bytes of the stream are missing; what follows is the beginning of a member."""

  reason: str


def stem(path: str) -> str:
  """Returns the path without the suffix of its compression."""
  root, suffix = os.path.splitext(path)
  return root if suffix in SUFFIXES else path


def chunks(path: str) -> Iterator[bytes | Gap]:
  """Streams a file, inflated if its suffix says so.

  Raises:
    OSError: it cannot be opened or read.
  """
  suffix = os.path.splitext(path)[1]
  with open(path, 'rb') as file:
    if suffix in _MAGIC:
      yield from _Members(file, suffix).chunks()
    else:
      while data := file.read(_READ_BYTES * 4):
        yield data


class Buffer:
  """What a file inflates to, as a buffer that is filled from behind and eaten from the front."""

  def __init__(self, file: File, report: Report) -> None:
    self._chunks, self._name, self._report = chunks(file.path), file.name, report
    self.data = bytearray()
    self.at_gap = self.at_end = False  # What stands behind the data.

  def fill(self, size: int) -> bool:
    """Reads until the buffer holds `size` bytes; False if the end or a gap comes before that."""
    while len(self.data) < size and not self.at_gap and not self.at_end:
      chunk = next(self._chunks, None)
      if chunk is None:
        self.at_end = True
      elif isinstance(chunk, Gap):
        self.at_gap = True
        self.report_damage(chunk.reason)
      else:
        self.data += chunk
    return len(self.data) >= size

  def skip(self, size: int) -> bool:
    """Eats `size` bytes without holding them; False if there are fewer."""
    while size > len(self.data):
      size -= len(self.data)
      self.data.clear()
      if not self.fill(1):
        return False
    del self.data[:size]
    return True

  def report_damage(self, why: str) -> None:
    """Reports that the file is damaged where no gap says so."""
    self._report(self._name, damaged(why))

  def pass_gap(self) -> None:
    """Drops what stands before a gap, of which no record is whole."""
    self.data.clear()
    self.at_gap = False


class _Members:
  """The members of one file, in order."""

  def __init__(self, file: BinaryIO, suffix: str) -> None:
    self._file, self._suffix = file, suffix
    self._data, self._end = b'', 0  # Read and not yet inflated; offset behind it.
    self._dictionary: Any = None

  def chunks(self) -> Iterator[bytes | Gap]:
    if self._suffix == '.zst':
      self._dictionary = self._read_dictionary()
    read = 0
    while True:
      start = self._next_member()
      if start is None:
        return
      try:
        inflated = 0
        for chunk in self._inflate():
          inflated += len(chunk)
          spent = self._end - len(self._data) - start
          if inflated > _HARMLESS and inflated > _MOST_TIMES * max(spent, 1):
            raise ValueError(f'inflates more than {_MOST_TIMES} times')
          if chunk:
            yield chunk
        read += 1
      except _BROKEN as error:
        yield Gap(str(error) or type(error).__name__)
        self._find(max(start + 1, self._end - len(self._data) - _LAG))

  def _next_member(self) -> int | None:
    """Returns the offset at which a member begins, None at the end (zeros may fill it up)."""
    while True:
      if self._suffix != '.zst':
        self._data = self._data.lstrip(b'\0')
      if self._data or not self._more():
        return self._end - len(self._data) if self._data else None

  def _more(self) -> bool:
    data = self._file.read(_READ_BYTES)
    self._data, self._end = self._data + data, self._end + len(data)
    return bool(data)

  def _inflate(self) -> Iterator[bytes]:
    """Inflates the member at the beginning of the data; raises one of `_BROKEN`."""
    inflater = _INFLATERS[self._suffix](self._dictionary)
    while not inflater.eof:
      if not self._data and not self._more():
        raise EOFError('it ends in the middle of a member')
      data, self._data = self._data, b''
      yield from inflater.feed(data)
      self._data = inflater.unused
    self._data = inflater.unused

  def _find(self, offset: int) -> None:
    """Goes to the first place at or behind `offset` where a member begins that can be inflated."""
    magic, overlap = _MAGIC[self._suffix], 16
    self._file.seek(offset)
    self._data, self._end = b'', offset
    while True:
      if len(self._data) < _LAG and self._more():
        continue
      match = magic.search(self._data)
      if match and self._inflates(self._data[match.start() : match.start() + _LAG]):
        self._data = self._data[match.start() :]
        return
      if match:
        self._data = self._data[match.start() + 1 :]
      elif self._more():
        self._data = self._data[-_READ_BYTES - overlap :]
      else:
        self._data = b''
        return

  def _inflates(self, data: bytes) -> bool:
    inflater = _INFLATERS[self._suffix](self._dictionary)
    try:
      return any(inflater.feed(data)) or inflater.eof
    except _BROKEN:
      return False

  def _read_dictionary(self) -> Any:
    """Reads the dictionary that a `.warc.zst` begins with (a skippable frame), if there is one."""
    import zstandard

    self._more()
    if self._data[:4] != b'\x5d\x2a\x4d\x18':
      return None
    size = int.from_bytes(self._data[4:8], 'little')
    while len(self._data) < 8 + size <= 64 << 20 and self._more():
      pass
    content, self._data = self._data[8 : 8 + size], self._data[8 + size :]
    if content[:4] == b'\x28\xb5\x2f\xfd':
      content = zstandard.ZstdDecompressor().decompress(content, max_output_size=64 << 20)
    return zstandard.ZstdCompressionDict(content)


class _Gzip:
  """One gzip member."""

  def __init__(self, _: Any) -> None:
    self._inflater = zlib.decompressobj(wbits=31)

  def feed(self, data: bytes) -> Iterator[bytes]:
    while not self._inflater.eof:
      chunk = self._inflater.decompress(data, _OUT_BYTES)
      yield chunk
      data = self._inflater.unconsumed_tail
      if not data and len(chunk) < _OUT_BYTES:  # Else it may hold more back.
        return

  @property
  def eof(self) -> bool:
    return self._inflater.eof

  @property
  def unused(self) -> bytes:
    return self._inflater.unused_data


class _Standard(_Gzip):
  """One bzip2 or xz stream; both have the same interface."""

  def feed(self, data: bytes) -> Iterator[bytes]:
    yield self._inflater.decompress(data, _OUT_BYTES)
    while not self._inflater.needs_input and not self._inflater.eof:
      yield self._inflater.decompress(b'', _OUT_BYTES)


class _Bzip2(_Standard):

  def __init__(self, _: Any) -> None:
    self._inflater = bz2.BZ2Decompressor()


class _Xz(_Standard):

  def __init__(self, _: Any) -> None:
    self._inflater = lzma.LZMADecompressor(memlimit=1 << 30)


class _Zstd(_Gzip):
  """One zstd frame, fed by small bits since its output has no bound."""

  def __init__(self, dictionary: Any) -> None:
    import zstandard

    self._error = zstandard.ZstdError
    self._inflater = zstandard.ZstdDecompressor(
        dict_data=dictionary, max_window_size=1 << 27
    ).decompressobj()
    self._rest = b''

  def feed(self, data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), _ZSTD_FEED):
      try:
        yield self._inflater.decompress(data[at : at + _ZSTD_FEED])
      except self._error as error:
        raise ValueError(str(error)) from error
      if self._inflater.eof:
        self._rest = self._inflater.unused_data + data[at + _ZSTD_FEED :]
        return

  @property
  def unused(self) -> bytes:
    return self._rest


_INFLATERS = {'.gz': _Gzip, '.zst': _Zstd, '.bz2': _Bzip2, '.xz': _Xz}
