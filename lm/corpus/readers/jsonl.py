"""JSON Lines: an object a line, its text under one key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import io
import json
from typing import TYPE_CHECKING

from lm.corpus.document import Document
from lm.corpus.readers import fields
from lm.corpus.readers import streams
from lm.corpus.readers.piece import damaged, File, Piece, PIECE_BYTES, Report, too_long

if TYPE_CHECKING:
  from lm.corpus.collect import Source

_SCAN_BYTES = 1 << 20


def pieces(file: File, source: Source, report: Report) -> Iterator[Piece]:
  """Cuts a file at line ends; of one that is compressed, takes the lines out.

  Raises:
    OSError: the file cannot be read.
  """
  if streams.stem(file.path) != file.path:
    yield from _inflated(file, source.max_document_bytes, report)
    return
  start = position = 0
  first = number = 1
  with open(file.path, 'rb') as stream:
    while data := stream.read(_SCAN_BYTES):
      cut = data.rfind(b'\n') + 1
      number += data.count(b'\n')
      if cut and position + cut - start >= PIECE_BYTES:
        yield Piece(file, start, position + cut - start, (first,))
        start, first = position + cut, number
      position += len(data)
  if position > start:
    yield Piece(file, start, position - start, (first,))


def _inflated(file: File, limit: int, report: Report) -> Iterator[Piece]:
  held, offset, first = bytearray(), 0, 1
  for chunk in _clipped(streams.chunks(file.path), limit):
    if isinstance(chunk, streams.Gap):
      report(file.name, damaged(chunk.reason))
      del held[held.rfind(b'\n') + 1 :]  # The line that it cuts.
      continue
    held += chunk
    if len(held) >= PIECE_BYTES and (cut := held.rfind(b'\n') + 1):
      yield Piece(file, offset, cut, (first,), (bytes(held[:cut]),))
      offset, first = offset + cut, first + held.count(b'\n', 0, cut)
      del held[:cut]
  if held:
    yield Piece(file, offset, len(held), (first,), (bytes(held),))


def _clipped(
    chunks: Iterable[bytes | streams.Gap], limit: int
) -> Iterator[bytes | streams.Gap]:
  """Passes chunks on, less most of what a line holds beyond the limit."""
  length = 0
  for chunk in chunks:
    if isinstance(chunk, streams.Gap):
      length = 0
      yield chunk
      continue
    if length > limit:
      at = chunk.find(b'\n')
      if at < 0:
        continue
      chunk, length = chunk[at:], 0
    yield chunk
    end = chunk.rfind(b'\n')
    length = len(chunk) - end - 1 if end >= 0 else length + len(chunk)


def documents(piece: Piece, source: Source, report: Report) -> Iterator[Document]:
  """Reads the lines of a piece that hold text.

  Raises:
    OSError: the file cannot be read.
  """
  number, limit = piece.numbers[0], source.max_document_bytes
  for offset, line in _lines(piece, limit):
    where = f'{piece.file.name}:{number}'
    number += 1
    if len(line) > limit:
      report(where, too_long(limit))
    elif not line.isspace():
      document = _parse(line, where, offset, source, report)
      if document is not None:
        yield document


def _lines(piece: Piece, limit: int) -> Iterator[tuple[int, bytes]]:
  """Yields (offset, line), of a line beyond the limit only its beginning."""
  with open(piece.file.path, 'rb') if piece.records is None else io.BytesIO(
      piece.records[0]) as stream:  # fmt: skip
    if piece.records is None:
      stream.seek(piece.offset)
    left = piece.length
    most = min(limit, 1 << 62) + 1
    while left > 0 and (line := stream.readline(min(left, most))):
      offset = piece.offset + piece.length - left
      left -= len(line)
      yield offset, line
      while len(line) == most and not line.endswith(b'\n') and left > 0:
        line = stream.readline(min(left, most))
        left -= len(line)
        if not line:
          return


def _parse(
    line: bytes, where: str, offset: int, source: Source, report: Report
) -> Document | None:
  try:
    record = json.loads(line.decode('utf-8'))
  except UnicodeDecodeError as error:
    byte = line[error.start]
    report(where, f'is not UTF-8: byte 0x{byte:02x} at offset {offset + error.start}')
  except json.JSONDecodeError as error:
    report(where, f'is not JSON ({error.msg} at column {error.colno})')
  except (ValueError, RecursionError) as error:  # Numbers of 4300 digits, objects 1000 deep.
    report(where, f'is not JSON ({error})')
  else:
    return fields.document(record, where, report, source.text_key)
  return None
