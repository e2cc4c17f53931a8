"""Builds a task's cache: stage the documents, train the vocabulary, tokenise shard by shard.

Every stage is skipped where its product stands, and every product appears whole, by a rename, so a
build that is killed goes on where it was; a lock lets a second build of the same documents wait for
the first.

Shards are mapped by `shards.write_shard`, a pure function of a picklable job, with Python's own
process pool, or with Apache Beam if `beam_options` name a runner. The pool is the default on one
machine: Beam's DirectRunner with 2 processes took 1.1 and 1.3 times as long in two paired runs on
the embedded corpus; and the pool starts while the vocabulary trains and reports each shard.
"""

from __future__ import annotations

from concurrent import futures
import dataclasses
import datetime
from importlib import metadata
import json
import multiprocessing
from multiprocessing import connection
import os
from pathlib import Path
import shutil
import sys
import threading
from typing import Any, Iterator

import numpy as np
from tqdm import tqdm

from lm.corpus.document import Document
from lm.data import cache
from lm.data import shards
from lm.data import splits
from lm.data import tasks
from lm.data import vocabularies
from lm.data import vocabulary_training
from lm.errors import UserError

_MIN_SHARD_BYTES, _MAX_SHARD_BYTES, _SHARDS = 1 << 20, 1 << 26, 64


@dataclasses.dataclass(frozen=True)
class Specification:
  """How to build: `TextTask.prepare`'s arguments."""

  workers: int
  progress: bool
  beam_options: tuple[str, ...] | None = None


def main() -> None:
  """Builds what `sys.argv[1]` says; prints {"error"} and exits 2 for a user's mistake."""
  threading.Thread(target=_exit_with, args=(sys.stdin.fileno(),), daemon=True).start()
  arguments = json.loads(sys.argv[1], object_hook=_tuples)
  fields = arguments['task']
  fields['vocabulary'] = vocabularies.VocabularyConfig(**fields['vocabulary'])
  try:
    build(tasks.TextTask(**fields), Specification(**arguments['specification']))
  except UserError as error:
    print(json.dumps({'error': str(error)}), flush=True)
    os._exit(2)  # Without waiting for workers that still import TensorFlow: they end by themselves.


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
  return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


def build(task: tasks.TextTask, specification: Specification) -> None:
  """Builds the cache of `task`, or waits for who is building it."""
  progress = specification.progress
  with cache.lock(tasks.locate(task).lock):
    places = tasks.locate(task)
    if places.cache is not None and (places.cache / 'info.json').exists():
      return
    workers = 0 if specification.beam_options is not None else specification.workers
    pool = futures.ProcessPoolExecutor(
        workers or 1, multiprocessing.get_context('spawn'), initializer=_initialize_worker
    )
    try:
      for _ in range(workers):  # It takes seconds; do it while the texts are read.
        pool.submit(_import_seqio)
      staged = _stage(task, places.texts, progress)
      _train_vocabulary(task, staged, places, progress)
      places = tasks.locate(task)
      if places.cache is None:
        raise UserError(f'The files of task {task.name!r} changed while they were read; run again.')
      _write_shards(task, staged, places, pool, specification)
      _finish(task, staged, places)
    finally:
      pool.shutdown(wait=False, cancel_futures=True)
    shutil.rmtree(places.texts, ignore_errors=True)


def _stage(task: tasks.TextTask, directory: Path, progress: bool) -> list[dict[str, Any]]:
  """Writes the documents, split, into files of some megabytes and returns what stands in each."""
  done = directory / 'texts.json'
  if done.exists():
    return json.loads(done.read_text('utf-8'))
  with cache.writing(directory):
    directory.mkdir(parents=True, exist_ok=True)
  fraction = task.held_out_fraction
  with _bar('reading documents', None, progress) as bar:
    rule = splits.survey(_counted(splits.documents(task.files), bar), fraction)
  limit = min(max(rule.num_bytes // _SHARDS, _MIN_SHARD_BYTES), _MAX_SHARD_BYTES)
  staged: list[dict[str, Any]] = []
  pending: dict[str, list[Document]] = {splits.TRAIN: [], splits.VALIDATION: []}
  sizes = dict.fromkeys(pending, 0)

  def flush(part: str) -> None:
    number = sum(shard['split'] == part for shard in staged)
    name = f'{part}-{number:05d}'
    records = (cache.encode_record(np.zeros(0, np.int32), document.name, document.text)
               for document in pending[part])
    cache.write_array_record(directory / f'{name}.array_record', records)
    count = len(pending[part])
    staged.append({'name': name, 'split': part, 'documents': count, 'bytes': sizes[part]})
    pending[part], sizes[part] = [], 0

  with _bar('splitting documents', rule.num_bytes, progress) as bar:
    stream = splits.split(_counted(splits.documents(task.files), bar), rule, fraction)
    for part, document in stream:
      pending[part].append(document)
      sizes[part] += len(document.text.encode('utf-8'))
      if sizes[part] >= limit:
        flush(part)
  for part in pending:
    if pending[part]:
      flush(part)
  cache.write_whole(done, json.dumps(staged).encode('utf-8'))
  return staged


def _train_vocabulary(
    task: tasks.TextTask, staged: list[dict[str, Any]], places: tasks.Places, progress: bool
) -> None:
  """Trains the vocabulary on the staged training split unless it stands."""
  if (places.vocabulary / 'vocabulary.json').exists():
    return
  train = [shard for shard in staged if shard['split'] == splits.TRAIN]
  total = sum(shard['bytes'] for shard in train)
  config = task.vocabulary
  if progress and config.kind in vocabularies.TRAINED:
    used = min(total, config.max_training_bytes)
    what = f'training a {config.kind} vocabulary of {config.size} on {used / 1e6:.1f} MB'
    tqdm.write(what, sys.stderr)
  stream = (
      document
      for shard in train
      for document in shards.read_texts(places.texts / f'{shard["name"]}.array_record')
  )
  vocabulary = vocabulary_training.train(config, stream, total)
  temporary = places.vocabulary.with_name(f'{places.vocabulary.name}.{os.getpid()}.part')
  with cache.writing(places.vocabulary):
    vocabulary.save(temporary)
    provenance = {
        'config': dataclasses.asdict(config),
        'files': task.files,
        'training_bytes': min(total, config.max_training_bytes),
        'sentencepiece': metadata.version('sentencepiece'),
    }
    (temporary / 'info.json').write_text(json.dumps(provenance, indent=2) + '\n', 'utf-8')
    shutil.rmtree(places.vocabulary, ignore_errors=True)
    os.replace(temporary, places.vocabulary)


def _write_shards(
    task: tasks.TextTask,
    staged: list[dict[str, Any]],
    places: tasks.Places,
    pool: futures.Executor,
    specification: Specification,
) -> None:
  """Maps `write_shard` over the shards that are not finished."""
  assert places.cache is not None
  with cache.writing(places.cache):
    places.cache.mkdir(parents=True, exist_ok=True)
  jobs = {
      shards.ShardJob(
          shard['name'],
          shard['split'],
          str(places.texts / f'{shard["name"]}.array_record'),
          str(places.vocabulary),
          str(places.cache),
      ): shard['bytes']
      for shard in staged
      if not shards.finished(places.cache, shard)
  }
  if specification.beam_options is not None:
    _map_with_beam(list(jobs), specification.beam_options)
    return
  total = sum(shard['bytes'] for shard in staged)
  with _bar('tokenising', total, specification.progress) as bar:
    bar.update(total - sum(jobs.values()))
    bar.unpause()  # Only what is done now counts for the rate.
    running = {pool.submit(shards.write_shard, job): size for job, size in jobs.items()}
    for future in futures.as_completed(running):
      future.result()
      bar.update(running[future])


def _map_with_beam(jobs: list[shards.ShardJob], options: tuple[str, ...]) -> None:
  import apache_beam as beam  # Takes seconds; only for those who ask for it.
  from apache_beam.options import pipeline_options

  with beam.Pipeline(options=pipeline_options.PipelineOptions(list(options))) as pipeline:
    _ = pipeline | beam.Create(jobs) | beam.Reshuffle() | beam.Map(shards.write_shard)


def _finish(task: tasks.TextTask, staged: list[dict[str, Any]], places: tasks.Places) -> None:
  """Joins lengths, copies the vocabulary and writes info.json, which makes the cache whole."""
  assert places.cache is not None
  vocabulary = vocabularies.load(places.vocabulary)
  parts = {}
  for part in (splits.TRAIN, splits.VALIDATION):
    members = [shard for shard in staged if shard['split'] == part]
    arrays = [np.load(places.cache / f'{shard["name"]}.lengths.npy') for shard in members]
    lengths = np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
    cache.write_array(places.cache / f'{part}.lengths.npy', lengths)
    num_bytes, tokens = sum(shard['bytes'] for shard in members), int(lengths.sum())
    parts[part] = {
        'documents': len(lengths),
        'bytes': num_bytes,
        'tokens': tokens,
        'bytes_per_token': num_bytes / max(tokens, 1),
        'shards': [
            {'file': f'{shard["name"]}.array_record', 'records': cache.count_records(array)}
            for shard, array in zip(members, arrays)
        ],
    }
  with cache.writing(places.cache):
    vocabulary.save(places.cache / 'vocabulary')
  packages = ('seqio', 'tensorflow', 'sentencepiece', 'array-record', 'numpy')
  info = {
      'task': dataclasses.asdict(task),
      'splits': parts,
      'digests': {'cache': places.cache.name, 'texts': places.texts.name, **tasks.sources()},
      'vocabulary': {'digest': vocabulary.digest, 'size': vocabulary.size},
      'packages': {package: metadata.version(package) for package in packages},
      'python': sys.version,
      'built': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
  }
  for left_over in places.cache.glob('*.part'):  # Of builds that were killed.
    left_over.unlink(missing_ok=True)
  cache.write_whole(places.cache / 'info.json', (json.dumps(info, indent=2) + '\n').encode('utf-8'))


def _counted(stream: Iterator[Document], bar: tqdm) -> Iterator[Document]:
  for document in stream:
    bar.update(len(document.text.encode('utf-8')))
    yield document


def _bar(what: str, total: int | None, progress: bool) -> tqdm:
  return tqdm(
      desc=what, total=total, unit='B', unit_scale=True, disable=not progress, mininterval=0.5
  )


def _initialize_worker() -> None:
  """Makes a worker end with its parent, for whose sake the executor's own queue would wait for
  ever.

  TensorFlow's C++ logs a page on import, which no setting stops and which tears the progress bar; a
  worker's errors reach the parent as exceptions, so its standard output and error are closed.
  """
  for stream in (1, 2):
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
  parent = multiprocessing.parent_process()
  assert parent is not None
  threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(handle: int) -> None:
  """Waits until the other end of `handle` is closed, that is, its process is gone, and exits."""
  connection.wait([handle])
  os._exit(1)


def _import_seqio() -> None:
  from lm.data import seqio_tasks

  del seqio_tasks
