"""Tables with a column of text: Parquet, and Arrow IPC as a file or as a stream.

Rows are read a batch at a time by who splits, and sent on as small Arrow streams, since the parts
of such a file (row groups) may be of any size. Of the columns only text and what is known of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TYPE_CHECKING

from lm.corpus.document import Document
from lm.corpus.readers import fields
from lm.corpus.readers.piece import damaged, File, need, Piece, PIECE_BYTES, Report, too_long

if TYPE_CHECKING:
  from lm.corpus.collect import Source

_MOST_ROWS = 1024  # A batch.


def pieces(file: File, source: Source, report: Report) -> Iterator[Piece]:
  """Takes the rows out; a row is named by its number in the file, counted from 1.

  Raises:
    UserError: pyarrow is not installed.
    OSError: the file cannot be read.
  """
  batches: list[Any] = []
  size, first, following = 0, 1, 1
  with open(file.path, 'rb') as stream:
    for number, batch in _batches(stream, file.name, source.text_key, report):
      if batches and (size >= PIECE_BYTES or number != following):
        yield Piece(file, 0, size, (first,), (_pack(batches),))
        batches, size = [], 0
      first = first if batches else number
      batches.append(batch)
      size, following = size + batch.nbytes, number + batch.num_rows
  if batches:
    yield Piece(file, 0, size, (first,), (_pack(batches),))


def _batches(
    stream: Any, name: str, text_key: str, report: Report
) -> Iterator[tuple[int, Any]]:
  """Streams (number of the first row, rows) of a file, with the columns that we know."""
  arrow, wanted = need('pyarrow'), fields.COLUMNS | {text_key}
  broken = (arrow.ArrowException, OSError, ValueError, KeyError)
  magic = stream.read(6)
  stream.seek(0)
  number = 1
  try:
    parts = (_row_groups if magic[:4] == b'PAR1' else _record_batches)(stream, magic, wanted)
    for rows, part in parts:
      start = number
      number += rows
      try:
        for batch in part:
          if text_key not in batch.schema.names:
            report(name, f'has no column "{text_key}"')
            return
          yield start, batch
          start += batch.num_rows
      except broken as error:
        report(name, damaged(' '.join(str(error).split())))
  except broken as error:
    report(name, damaged(' '.join(str(error).split())))


def _row_groups(stream: Any, magic: bytes, wanted: frozenset) -> Iterator[tuple[int, Iterator]]:
  """Yields (number of rows, batches of them) for each row group of a Parquet file."""
  parquet = need('pyarrow.parquet')
  # A part of a row group at a time, since it may be of any size.
  table = parquet.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
  columns = [name for name in table.schema_arrow.names if name in wanted]
  for index in range(table.num_row_groups):
    group = table.metadata.row_group(index)
    rows = max(1, min(_MOST_ROWS, group.num_rows * PIECE_BYTES // (group.total_byte_size + 1)))
    yield group.num_rows, table.iter_batches(rows, row_groups=[index], columns=columns)


def _record_batches(stream: Any, magic: bytes, wanted: frozenset) -> Iterator[tuple[int, Iterator]]:
  """Yields (number of rows, slices of them) for each record batch of an Arrow file or stream."""
  ipc = need('pyarrow').ipc
  if magic == b'ARROW1':
    reader = ipc.open_file(stream)
    batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
  else:
    batches = iter(ipc.open_stream(stream))
  for whole in batches:
    batch = whole.select([name for name in whole.schema.names if name in wanted])
    rows = max(1, min(_MOST_ROWS, batch.num_rows * PIECE_BYTES // (batch.nbytes + 1)))
    starts = range(0, batch.num_rows, rows)
    yield batch.num_rows, iter([batch.slice(start, rows) for start in starts])


def _pack(batches: list[Any]) -> bytes:
  arrow = need('pyarrow')
  sink = arrow.BufferOutputStream()
  with arrow.ipc.new_stream(sink, batches[0].schema) as writer:
    for batch in batches:
      writer.write_batch(batch)
  return sink.getvalue().to_pybytes()


def documents(piece: Piece, source: Source, report: Report) -> Iterator[Document]:
  """Reads the rows that have text."""
  number, limit = piece.numbers[0], source.max_document_bytes
  for batch in need('pyarrow').ipc.open_stream((piece.records or (b'',))[0]):
    for record in batch.to_pylist():
      name = f'{piece.file.name}:{number}'
      number += 1
      document = fields.document(record, name, report, source.text_key)
      if document is not None and len(document.text) > limit:
        report(name, too_long(limit))
      elif document is not None:
        yield document
