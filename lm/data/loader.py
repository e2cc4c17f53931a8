"""Batches for training: `batch(step)` is a pure function of (seed, step).

Row r of the batch of a step is row `step * batch_size + r` of an endless stream: a sequence of
packed documents, and what the objective makes of it with a random generator of (seed, row). Nothing
else enters: not the number of hosts, threads or workers, nor what was read before. So a run resumes
at any step without reading what went before, and a host computes only its own rows.
"""

from __future__ import annotations

import sys
import threading
from typing import Any, Iterator, NamedTuple, Optional, Protocol
import weakref

import grain
import numpy as np

from lm.data import objectives
from lm.data import packing
from lm.errors import UserError

_ENDLESS = sys.maxsize // 2


class Example(NamedTuple):
  """A packed row that features were made of.

  Attributes:
    stream: of a mixture, which of its components; 0 of a single task.
    row: of that stream of packed rows.
    pieces: the parts of documents in the packed row. What the objective makes of it may move,
      mask or drop them; a decoder's targets are the packed row itself.
  """

  stream: int
  row: int
  pieces: list[packing.Piece]


class Rows(Protocol):
  """An endless stream of rows; its length is an epoch's."""

  def __len__(self) -> int:
    """Returns the number of rows that show every token once."""

  def __getitem__(self, row: int) -> objectives.Features:
    """Returns the features of a row, without a batch axis."""

  def examples(self, row: int) -> list[Example]:
    """Returns what a row was made of: its own packed row, then those that the objective drew."""


class ObjectiveRows:
  """The rows of one cache under one objective; the arguments are `Loader`'s."""

  def __init__(
      self,
      cache: packing.Documents,
      sequence_length: int,
      batch_size: int,
      seed: int,
      objective: objectives.Objective,
  ):
    if sequence_length < 1:
      raise UserError(f'sequence_length={sequence_length} must be at least 1.')
    self._objective = objective
    length = objective.source_length(sequence_length)
    if objective.contiguous:
      self._packed = packing.Contiguous(cache, length, seed, batch_size)
    else:
      self._packed = packing.ConcatThenSplit(cache, length, seed)
    self._key = np.random.SeedSequence(seed).generate_state(2, np.uint64)

  def __len__(self) -> int:
    return len(self._packed)

  def __getitem__(self, row: int) -> objectives.Features:
    return self._make(row, [])

  def examples(self, row: int) -> list[Example]:
    """Returns what a row was made of: its own packed row, then those that the objective drew."""
    self._make(row, drawn := [])
    return [Example(0, each, self._packed.pieces(each)) for each in (row, *drawn)]

  def _make(self, row: int, drawn: list[int]) -> objectives.Features:
    """Returns the features of a row, and appends the packed rows that the objective drew."""
    rng = generator(self._key, row)

    def draw() -> packing.Packed:
      epoch, place = divmod(row, len(self))
      other = (place + rng.integers(1, max(len(self), 2))) % len(self)
      drawn.append(epoch * len(self) + int(other))
      return self._packed[drawn[-1]]

    return self._objective(self._packed[row], rng, draw)


class _From:
  """A stream from one of its rows on."""

  def __init__(self, rows: Rows, first: int):
    self._rows, self._first = rows, first

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, row: int) -> objectives.Features:
    return self._rows[self._first + row]

  def examples(self, row: int) -> list[Example]:
    return self._rows.examples(self._first + row)


class Loader:
  """Batches of a cache.

  Args:
    cache: documents to learn from, for instance `Prepared.cache('train')`.
    sequence_length: the model's input length; a row takes the objective's `source_length` of it.
    batch_size: rows of the global batch.
    seed: decides the order of everything, and every random choice of the objective.
    objective: from packed tokens to features.
  """

  def __init__(
      self,
      cache: packing.Documents,
      sequence_length: int,
      batch_size: int,
      seed: int,
      objective: objectives.Objective = objectives.CausalLM(),
  ):
    self.batch_size = _checked(batch_size)
    self._rows: Rows = ObjectiveRows(cache, sequence_length, batch_size, seed, objective)

  @classmethod
  def of_rows(cls, rows: Rows, batch_size: int) -> Loader:
    """Returns a loader of any stream of rows, such as a mixture's."""
    loader = cls.__new__(cls)
    loader.batch_size, loader._rows = _checked(batch_size), rows
    return loader

  def from_row(self, first: int, batch_size: int) -> Loader:
    """Returns a loader of the same rows from row `first` on, which its step 0 begins with."""
    return Loader.of_rows(_From(self._rows, first), batch_size)

  @property
  def steps_per_epoch(self) -> float:
    """Batches that show every token once."""
    return len(self._rows) / self.batch_size

  def batch(self, step: int, rows: Optional[slice] = None) -> objectives.Features:
    """Returns the features of `step`, [batch_size, ...] each, or of its `rows`."""
    return _Batches(self._rows, self.batch_size, rows)[step]

  def examples(self, row: int) -> list[Example]:
    """Returns what row `row` of all batches laid end to end was made of; see `Rows`."""
    return self._rows.examples(row)

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
    batches = _Batches(self._rows, self.batch_size, rows, start_step, stop)
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


def _checked(batch_size: int) -> int:
  if batch_size < 1:
    raise UserError(f'batch_size={batch_size} must be at least 1.')
  return batch_size


class Batches(Iterator[objectives.Features]):
  """An iterator of batches; closes itself when forgotten or the program ends."""

  def __init__(self, iterator: Any):
    self._open = [iterator]
    self._finalizer = weakref.finalize(self, _close_all, self._open)

  def __next__(self) -> objectives.Features:
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


class _Batches(grain.MapDataset[objectives.Features]):
  """Element i is the batch of step `start + i`, less the rows of other hosts."""

  def __init__(
      self,
      rows: Rows,
      batch_size: int,
      host_rows: Optional[slice],
      start: int = 0,
      stop: int = _ENDLESS,
  ):
    super().__init__()
    self._rows, self._batch_size = rows, batch_size
    self._host_rows = range(batch_size)[host_rows or slice(None)]
    self._start, self._stop = start, stop

  def __len__(self) -> int:
    return self._stop - self._start

  def __getitem__(self, index: int | slice) -> Any:
    if isinstance(index, slice):
      return self.slice(index)
    first = (self._start + int(index)) * self._batch_size
    rows = [self._rows[first + row] for row in self._host_rows]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


_thread = threading.local()


def generator(key: np.ndarray, row: int) -> np.random.Generator:
  """Returns this thread's generator, set to the beginning of a row's own random numbers.

  Philox counts: with the seed as its key, 2**128 numbers of the counter belong to each row. Setting
  its counter takes 3 microseconds, where a new generator would take 25, as long as half a row.
  """
  if not hasattr(_thread, 'generator'):
    _thread.generator = np.random.Generator(np.random.Philox())
  _thread.generator.bit_generator.state = {
      'bit_generator': 'Philox',
      'state': {'counter': np.array([0, 0, row, 0], np.uint64), 'key': key},
      'buffer': np.zeros(4, np.uint64), 'buffer_pos': 4, 'has_uint32': 0, 'uinteger': 0,
  }
  return _thread.generator


def _parse_absl_flags() -> None:
  """Grain hands its flags to workers and fails where nobody has parsed them, as in a notebook."""
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
