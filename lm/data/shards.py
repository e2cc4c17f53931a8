"""One shard of a cache, from staged texts to records: the unit of parallel and of resumed work."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Iterator

import numpy as np

from lm.corpus.document import Document
from lm.data import cache
from lm.data import splits
from lm.data import vocabularies


@dataclasses.dataclass(frozen=True)
class ShardJob:
  """One shard to tokenise: from staged texts to records."""

  name: str
  split: str
  texts: str
  vocabulary: str
  directory: str


def write_shard(job: ShardJob) -> None:
  """Tokenises one shard through the SeqIO task: `<name>.array_record`, then `<name>.lengths.npy`.

  A pure function of the job and idempotent, so any runner may map it, and map it again.
  """
  from lm.data import seqio_tasks

  task = seqio_tasks.register('shard', (), 0.5, vocabularies.load(job.vocabulary))
  lengths: list[int] = []
  keep = job.split != splits.TRAIN  # Evaluation compares with compressors on the same bytes.

  def records() -> Iterator[bytes]:
    for tokens, name, text in seqio_tasks.tokenized(task, lambda: read_texts(Path(job.texts))):
      lengths.append(len(tokens))
      yield from cache.split_records(tokens, name, text if keep else '')

  directory = Path(job.directory)
  cache.write_array_record(directory / f'{job.name}.array_record', records())
  cache.write_array(directory / f'{job.name}.lengths.npy', np.array(lengths, np.int64))


def read_texts(path: Path) -> Iterator[Document]:
  """Streams the documents of a staged file."""
  from array_record.python import array_record_module

  reader = array_record_module.ArrayRecordReader(str(path))
  try:
    for _ in range(reader.num_records()):
      _, name, text = cache.decode_record(reader.read())
      yield Document(name, text)
  finally:
    reader.close()


def finished(directory: Path, shard: dict[str, Any]) -> bool:
  """Says whether a shard stands whole in `directory`."""
  try:
    lengths = np.load(directory / f'{shard["name"]}.lengths.npy')
  except (OSError, ValueError, EOFError):
    return False
  records = cache.num_records(directory / f'{shard["name"]}.array_record')
  return len(lengths) == shard['documents'] and records == cache.count_records(lengths)
