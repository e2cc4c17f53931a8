"""Files that are one document each: plain text, Markdown, HTML."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lm.corpus.document import Document
from lm.corpus.readers import streams
from lm.corpus.readers.piece import damaged, File, Piece, Report, too_long

if TYPE_CHECKING:
  from lm.corpus.collect import Source


def pieces(file: File, source: Source, report: Report) -> Iterator[Piece]:
  """Returns the file as it is: it is opened by who reads it."""
  limit = source.max_document_bytes
  if file.size > limit and streams.stem(file.path) == file.path:
    report(file.name, too_long(limit))
  else:
    yield Piece(file, 0, file.size, (0,))


def documents(piece: Piece, source: Source, report: Report) -> Iterator[Document]:
  """Reads the file, inflated.

  Raises:
    OSError: the file cannot be read.
  """
  parts, size, limit = [], 0, source.max_document_bytes
  for chunk in streams.chunks(piece.file.path):
    if isinstance(chunk, streams.Gap):
      report(piece.file.name, damaged(chunk.reason))
      return
    parts.append(chunk)
    size += len(chunk)
    if size > limit:
      report(piece.file.name, too_long(limit))
      return
  yield Document(piece.file.name, '', raw=b''.join(parts))
