"""Records that are read at random or by a library: ArrayRecord, TensorFlow Datasets."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import glob
import json
import os
from typing import Any, TYPE_CHECKING

from lm.corpus.document import Document
from lm.corpus.readers import fields
from lm.corpus.readers.piece import damaged, File, need, Packer, Piece, PIECE_BYTES, Report
from lm.corpus.readers.piece import too_long
from lm.errors import UserError

if TYPE_CHECKING:
  from lm.corpus.collect import Source

_AT_ONCE = 64  # Records of an ArrayRecord that are read together.
_BROKEN = (RuntimeError, ValueError, IndexError)  # What its reader raises.


def pieces(file: File, source: Source, report: Report) -> Iterator[Piece]:
  """Cuts an ArrayRecord into ranges of records, or takes the examples out of a data set of TFDS.

  Records are named by their number, counted from 1.

  Raises:
    UserError: there is no such data set or split, or a package is not installed.
    OSError: the file cannot be read.
  """
  if source.tfds:
    yield from _examples(file, source, report)
    return
  open(file.path, 'rb').close()  # For the right error.
  try:
    reader = _open(file.path)
    count = reader.num_records()
    reader.close()
  except _BROKEN as error:
    report(file.name, damaged(' '.join(str(error).split())))
    return
  size = os.path.getsize(file.path)
  rows = max(1, count * PIECE_BYTES // (3 * size + 1))  # zstd makes a third of text.
  for start in range(0, count, rows):
    stop = min(start + rows, count)
    yield Piece(file, start, size * (stop - start) // count, (start + 1, stop + 1))


def _open(path: str) -> Any:
  return need('array_record.python.array_record_module').ArrayRecordReader(path)


def _examples(file: File, source: Source, report: Report) -> Iterator[Piece]:
  datasets = need('tensorflow_datasets')
  name, _, split = source.tfds.rpartition(':')
  directory = _directory(file.path, name, source)
  builder = datasets.builder_from_directory(directory)
  if split not in builder.info.splits:
    raise UserError(
        f'Source {source.name!r}: tfds={source.tfds!r} has the splits'
        f' {", ".join(builder.info.splits)}; name one of them after the colon.'
    )
  packer = Packer(file)
  wanted = fields.COLUMNS | {source.text_key}
  config = datasets.ReadConfig(interleave_cycle_length=1, try_autocache=False)
  data = builder.as_dataset(split=split, shuffle_files=False, read_config=config)
  number, rows = 0, iter(datasets.as_numpy(data))
  try:
    for number, row in enumerate(rows, start=1):
      known = {key: _plain(value) for key, value in row.items() if key in wanted}
      if piece := packer.add(number, json.dumps(known).encode('utf-8')):
        yield piece
  except need('tensorflow').errors.OpError as error:
    report(f'{file.name}:{number + 1}', damaged(error.message))
  if piece := packer.flush():
    yield piece


def _plain(value: Any) -> Any:
  value = value.item() if hasattr(value, 'item') and getattr(value, 'ndim', 1) == 0 else value
  if isinstance(value, bytes):
    return value.decode('utf-8', 'replace')
  return value if isinstance(value, (str, int, float)) else None


def _directory(data_dir: str, name: str, source: Source) -> str:
  """Returns where a prepared data set lies: the only version below `data_dir/name`."""
  pattern = os.path.join(glob.escape(os.path.join(data_dir, name)), '**', 'dataset_info.json')
  found = sorted(os.path.dirname(path) for path in glob.glob(pattern, recursive=True))
  if len(found) != 1:
    inside = ', '.join(os.path.relpath(path, data_dir) for path in found[:9]) or 'none'
    raise UserError(
        f'Source {source.name!r}: tfds={source.tfds!r} must name one data set that lies prepared in'
        f' {data_dir} (found: {inside}); write name/config/version:split.'
    )
  return found[0]


def documents(piece: Piece, source: Source, report: Report) -> Iterator[Document]:
  """Reads records that are JSON objects with text.

  Raises:
    UserError: a package is not installed.
  """
  for number, record in _records(piece, report):
    name = f'{piece.file.name}:{number}'
    if len(record) > source.max_document_bytes:
      report(name, too_long(source.max_document_bytes))
      continue
    try:
      value = json.loads(record)
    except (ValueError, RecursionError) as error:
      report(name, f'is not JSON ({error})')
      continue
    document = fields.document(value, name, report, source.text_key)
    if document is not None:
      yield document


def _records(piece: Piece, report: Report) -> Iterator[tuple[int, bytes]]:
  if piece.records is not None:
    yield from zip(piece.numbers, piece.records)
    return
  first, end = piece.numbers
  reader = _open(piece.file.path)
  try:
    for start in range(first - 1, end - 1, _AT_ONCE):
      indices = list(range(start, min(start + _AT_ONCE, end - 1)))
      try:
        yield from zip((index + 1 for index in indices), reader.read(indices))
      except _BROKEN:  # One of them.
        for index in indices:
          try:
            yield index + 1, reader.read([index])[0]
          except _BROKEN as error:
            report(f'{piece.file.name}:{index + 1}', damaged(' '.join(str(error).split())))
  finally:
    with contextlib.suppress(*_BROKEN):  # It says again that the file is damaged.
      reader.close()
