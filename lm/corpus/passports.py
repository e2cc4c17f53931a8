"""A passport for every document, kept or removed: where it comes from and what each rule said.

Tables of Parquet, a row a document. Row i of `kept-00003-of-00012.parquet` is record i of shard 3.
`verdicts` is a map of strings, since every run has its own rules:

    pandas   pandas.read_parquet('R/passports').verdicts.map(dict)
    DuckDB   SELECT name, verdicts['gopher.word_count']::INT FROM 'R/passports/*.parquet'
             WHERE removed_by = 'gopher.word_count'

    write(path, documents)          those of a block
    merge(paths, out, shard)        the blocks of a shard
    find(directory, name)           that of a document
    clusters(directory, most)       who stands for how many
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from lm.corpus import files
from lm.corpus.document import Document
from lm.corpus.write import arrow_and_parquet
from lm.corpus.write import well_formed

_STRINGS = ('name', 'source', 'url', 'licence', 'date', 'language', 'title')
_GROUP_ROWS = 1 << 15
# Columns that repeat themselves; names, hashes and addresses do not.
_REPETITIVE = ['source', 'licence', 'language', 'removed_by', 'shard',
               'verdicts.key_value.key', 'verdicts.key_value.value']  # fmt: skip


def schema() -> Any:
  """Returns the columns.

    name, source, url, licence, date, language, title: as `Document` has them; '' if unknown
    bytes, sha256: of the text in UTF-8, as it was written or stood when the document was removed
    address: place in the input    cluster: address of who stands for its duplicates; -1 without any
    removed_by: a rule; '' for what is kept    verdicts: rule -> what it measured or did
    shard, index: file and record of what is kept; '' and -1 otherwise
  """
  arrow, _ = arrow_and_parquet()
  return arrow.schema([
      *((name, arrow.string()) for name in _STRINGS),
      ('bytes', arrow.int64()), ('sha256', arrow.string()), ('address', arrow.int64()),
      ('cluster', arrow.int64()), ('removed_by', arrow.string()),
      ('verdicts', arrow.map_(arrow.string(), arrow.string())),
      ('shard', arrow.string()), ('index', arrow.int64()),
  ])  # fmt: skip


def table(documents: Iterable[Document]) -> Any:
  """Returns the passports of documents, which no shard is known of yet."""
  arrow, _ = arrow_and_parquet()
  return arrow.Table.from_pylist([_row(document) for document in documents], schema())


def _row(document: Document) -> dict[str, Any]:
  data = well_formed(document.text).encode('utf-8')
  return {
      **{name: well_formed(getattr(document, name)) for name in _STRINGS},
      'bytes': len(data),
      'sha256': hashlib.sha256(data).hexdigest(),
      'address': document.address,
      'cluster': document.cluster,
      'removed_by': document.removed_by,
      'verdicts': [(well_formed(rule), spell(value)) for rule, value in document.verdicts.items()],
      'shard': '',
      'index': -1,
  }


def spell(value: Any) -> str:
  """Returns a verdict as text: a string as it is, anything else as JSON."""
  if isinstance(value, str):
    return well_formed(value)
  value = value.item() if hasattr(value, 'item') else value
  if isinstance(value, float):
    return f'{value:.6g}'
  return json.dumps(value, ensure_ascii=False, default=str)


def write(path: str | os.PathLike[str], documents: Iterable[Document]) -> int:
  """Writes the passports of a block's documents, whole or not at all; returns how many.

  Raises:
    UserError: the disk is full, the directory cannot be written, or PyArrow is missing.
  """
  return _save(Path(path), [table(documents)])


def merge(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], shard: str = ''
          ) -> int:
  """Lays files of passports end to end, whole or not at all; returns the number of rows.

  Args:
    paths: in the order of the blocks.
    out: becomes their concatenation.
    shard: file that holds their documents in this order, for the columns shard and index; '' of
      those that are removed.

  Raises:
    UserError: the disk is full, the directory cannot be written, or PyArrow is missing.
  """
  arrow, parquet = arrow_and_parquet()

  def tables() -> Iterator[Any]:
    waiting, count, done = [schema().empty_table()], 0, 0
    for path in [*paths, None]:
      if path is not None:
        waiting.append(parquet.read_table(path, schema=schema(), partitioning=None))
        count += len(waiting[-1])
      if count >= _GROUP_ROWS or path is None:
        joined = arrow.concat_tables(waiting)
        if shard:
          index = arrow.array(range(done, done + count), arrow.int64())
          joined = joined.set_column(joined.column_names.index('index'), 'index', index)
          joined = joined.set_column(joined.column_names.index('shard'), 'shard',
                                     arrow.array([shard] * count, arrow.string()))
        done += count
        waiting, count = [schema().empty_table()], 0
        yield joined

  return _save(Path(out), tables())


def _save(path: Path, tables: Iterable[Any]) -> int:
  _, parquet = arrow_and_parquet()
  count = 0
  with files.whole(path) as temporary, parquet.ParquetWriter(
      temporary, schema(), compression='zstd', use_dictionary=_REPETITIVE) as writer:
    for one in tables:
      if len(one):
        writer.write_table(one, row_group_size=_GROUP_ROWS)
      count += len(one)
  return count


def read(path: str | os.PathLike[str], columns: Sequence[str] | None = None
         ) -> Iterator[dict[str, Any]]:
  """Streams passports as dictionaries, `verdicts` as one too."""
  _, parquet = arrow_and_parquet()
  with parquet.ParquetFile(path) as file:
    for batch in file.iter_batches(batch_size=1024, columns=columns and list(columns)):
      for row in batch.to_pylist():
        yield _with_dict(row)


def find(directory: str | os.PathLike[str], name: str) -> list[dict[str, Any]]:
  """Returns the passports of the documents of this name: of those that are kept, one a copy.

  Args:
    directory: `passports/` of a corpus; only the names in it are read, and the rows found.
  """
  return _where(Path(directory), 'name', [name])


def duplicates(directory: str | os.PathLike[str], address: int) -> list[dict[str, Any]]:
  """Returns the passports of the documents that the one of this address stands for, and of those
  that these stood for before a later stage removed them."""
  found, wanted = {address: {}}, [address]
  while wanted:
    rows = _where(Path(directory), 'cluster', wanted)
    wanted = [row['address'] for row in rows if row['address'] not in found]
    found |= {row['address']: row for row in rows if row['address'] not in found}
  return list(found.values())[1:]


def clusters(directory: str | os.PathLike[str], most: int
             ) -> tuple[int, int, list[tuple[str, int]]]:
  """Returns the number of clusters, the documents removed for them, and the largest clusters.

  Args:
    directory: `passports/` of a corpus; the columns address and cluster are read.
    most: clusters of which the name of who stands for them and the number of removed are returned,
      the largest first.
  """
  _, parquet = arrow_and_parquet()
  parts = [np.zeros(0, np.int64)]
  for path in sorted(Path(directory).glob('removed-*.parquet')):
    columns = parquet.read_table(path, columns=['address', 'cluster'], partitioning=None)
    address, heads = (columns[name].to_numpy() for name in ('address', 'cluster'))
    parts.append(heads[(heads >= 0) & (heads != address)])
  heads, sizes = np.unique(np.concatenate(parts), return_counts=True)
  largest = np.lexsort([heads, -sizes])[:most]
  names = at(directory, heads[largest].tolist())
  return len(heads), int(sizes.sum()), [
      (names[head]['name'] if head in names else '', size)
      for head, size in zip(heads[largest].tolist(), sizes[largest].tolist())]


def at(directory: str | os.PathLike[str], addresses: Sequence[int]) -> dict[int, dict[str, Any]]:
  """Returns address -> passport, of those that are found."""
  return {row['address']: row for row in _where(Path(directory), 'address', list(addresses))}


def _where(directory: Path, column: str, values: list[Any]) -> list[dict[str, Any]]:
  arrow, parquet = arrow_and_parquet()
  import pyarrow.compute  # `arrow.compute` stands after this.

  found = []
  for path in sorted(directory.glob('*.parquet')):
    with parquet.ParquetFile(path) as file:
      for group in range(file.num_row_groups):
        wanted = arrow.array(values, schema().field(column).type)
        keys = file.read_row_group(group, [column])[column]
        mask = arrow.compute.is_in(keys, value_set=wanted)
        if arrow.compute.any(mask).as_py():
          found += map(_with_dict, file.read_row_group(group).filter(mask).to_pylist())
  return found


def _with_dict(row: dict[str, Any]) -> dict[str, Any]:
  if 'verdicts' in row:
    row['verdicts'] = dict(row['verdicts'] or ())
  return row
