"""Batches for training: `batch(step)` is a pure function of (seed, step).

Row r of the batch of a step is sequence `step * batch_size + r` of the packed stream. Nothing else
enters: not the number of hosts, threads or workers, nor what was read before. So a run resumes at
  any step without reading what went before, and a host computes only its own rows.
"""

from __future__ import annotations

import sys
from typing import Any, Iterator, Optional
import weakref

import grain
import numpy as np

from lm.data import objectives
from lm.data import packing
from lm.errors import UserError

_ENDLESS = sys.maxsize // 2


class Loader:
  """Batches of a cache.

  Args:
    cache: documents to learn from, for instance `Prepared.cache('train')`.
    sequence_length: tokens a row.
    batch_size: rows of the global batch.
    seed: decides the order of everything.
    objective: from packed rows to features.
  """

  def __init__(
      self,
      cache: packing.Documents,
      sequence_length: int,
      batch_size: int,
      seed: int,
      objective: objectives.Objective = objectives.causal_lm,
  ):
    if batch_size < 1:
      raise UserError(f'batch_size={batch_size} must be at least 1.')
    self.packed = packing.ConcatThenSplit(cache, sequence_length, seed)
    self.batch_size, self.objective = batch_size, objective

  @property
  def steps_per_epoch(self) -> float:
    """Batches that show every token once."""
    return len(self.packed) / self.batch_size

  def batch(self, step: int, rows: Optional[slice] = None) -> objectives.Batch:
    """Returns the features of `step`, [batch_size, sequence_length] each, or of its `rows`."""
    return _Batches(self.packed, self.batch_size, rows, self.objective)[step]

  def iterate(
      self,
      start_step: int = 0,
      num_steps: Optional[int] = None,
      rows: Optional[slice] = None,
      num_threads: int = 2,
      num_workers: int = 0,
      prefetch: int = 8,
  ) -> Batches:
    """Returns an iterator of the batches of steps start_step, start_step + 1, ...

    Args:
      start_step: first step.
      num_steps: how many; None for no end.
      rows: the rows of this host; None for all. Hosts' rows laid together are the global batch.
      num_threads: threads that read and pack ahead; 0 reads in the caller's thread.
      num_workers: processes to do it in, for objectives whose Python would hold the training loop's
        interpreter. They are spawned, so the program needs the usual `if __name__ == '__main__'`.
      prefetch: batches read ahead.

    Use it in a `with`, or call `close()`, to end its threads and processes.
    """
    stop = _ENDLESS if num_steps is None else start_step + num_steps
    batches = _Batches(self.packed, self.batch_size, rows, self.objective, start_step, stop)
    ahead = prefetch if num_threads else 0
    dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads, ahead))
    if num_workers:
      _parse_absl_flags()
      workers = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=max(1, prefetch))
      dataset = dataset.mp_prefetch(workers)
      # Through pipes, not shared memory, which Grain unlinks too late when a program ends.
      options = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
      dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
    return Batches(iter(dataset))


class Batches(Iterator[objectives.Batch]):
  """An iterator of batches; closes itself when forgotten or the program ends."""

  def __init__(self, iterator: Any):
    self._open = [iterator]
    self._finalizer = weakref.finalize(self, _close_all, self._open)

  def __next__(self) -> objectives.Batch:
    if not self._open:
      raise StopIteration
    return next(self._open[0])

  def __enter__(self) -> Batches:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Ends the threads and processes that read ahead."""
    self._finalizer()


def _close_all(iterators: list[Any]) -> None:
  while iterators:
    iterators.pop().close()


class _Batches(grain.MapDataset[objectives.Batch]):
  """Element i is the batch of step `start + i`, less the rows of other hosts."""

  def __init__(
      self,
      packed: packing.ConcatThenSplit,
      batch_size: int,
      rows: Optional[slice],
      objective: objectives.Objective,
      start: int = 0,
      stop: int = _ENDLESS,
  ):
    super().__init__()
    self._packed, self._batch_size, self._objective = packed, batch_size, objective
    self._rows = range(batch_size)[rows or slice(None)]
    self._start, self._stop = start, stop

  def __len__(self) -> int:
    return self._stop - self._start

  def __getitem__(self, index: int | slice) -> Any:
    if isinstance(index, slice):
      return self.slice(index)
    first = (self._start + int(index)) * self._batch_size
    packed = [self._packed[first + row] for row in self._rows]
    return self._objective(*map(np.stack, zip(*packed)))


def _parse_absl_flags() -> None:
  """Grain hands its flags to workers and fails where nobody has parsed them, as in a notebook."""
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
