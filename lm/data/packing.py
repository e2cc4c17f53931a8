"""Documents of any length to sequences of one length, losing nothing.

In every epoch the documents are put in a random order, laid end to end (each ends with its end of
document) and cut every `sequence_length` tokens. A document longer than a sequence goes on in the
next; only the epoch's very last sequence is padded. The sequences are then put in a random order
too, so that neighbours in a long document do not stand in neighbouring batches.

Both orders are functions of (seed, epoch), so sequence i of the endless stream is found directly:
its epoch and place by division, its first document by binary search in the epoch's cumulative
lengths.

Models that carry a memory from batch to batch need the opposite, rows that go on where they ended
one batch ago: `Contiguous` cuts the same stream into as many parts as a batch has rows.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from lm.errors import UserError


class Documents(Protocol):
  """What packing needs of a cache."""

  lengths: np.ndarray

  def slice(self, index: int, start: int, stop: int) -> np.ndarray:
    """Returns ids [stop - start] of document `index`."""


class Piece(NamedTuple):
  """Tokens start..stop of a document, which stand in a row from `place` on."""

  document: int
  start: int
  stop: int
  place: int


class Packed(NamedTuple):
  """One sequence of packed documents, or of parts of them.

  Attributes:
    tokens: int32 [length], 0 where padded.
    segment_ids: int32 [length], 1.. for the documents of a row in order, 0 where padded.
    positions: int32 [length], counted from each document's first token in the row; 0 where padded.
    previous: int32 [], the token before the row's first one in the same document; -1 if the row
      begins with a document.
    restart: int32 [], 0 if the row goes on where the same row of the batch before it ended.
  """

  tokens: np.ndarray
  segment_ids: np.ndarray
  positions: np.ndarray
  previous: np.int32
  restart: np.int32 = np.int32(1)


class _Epoch(NamedTuple):
  number: int
  documents: np.ndarray  # [documents], in the order of this epoch
  starts: np.ndarray  # [documents + 1], where each starts in the epoch's tokens
  sequences: np.ndarray  # [sequences], in the order of this epoch


class ConcatThenSplit(grain.MapDataset[Packed]):
  """The endless stream of packed sequences; `dataset[i]` is O(log documents).

  `len(dataset)` is one epoch; an index beyond it is in a later epoch, as everywhere in Grain.

  Args:
    cache: the documents.
    sequence_length: tokens a sequence.
    seed: of both orders.

  Raises:
    UserError: `sequence_length` is not positive, or there are no tokens.
  """

  def __init__(self, cache: Documents, sequence_length: int, seed: int):
    super().__init__()
    if sequence_length < 1:
      raise UserError(f'sequence_length={sequence_length} must be at least 1.')
    self._cache, self._sequence_length, self._seed = cache, sequence_length, seed
    self._num_tokens = int(cache.lengths.sum())
    if not self._num_tokens:
      raise UserError('The cache holds no token to train on; name files with more text.')
    self._open()

  def _open(self) -> None:
    self._lock = threading.Lock()
    self._epochs: tuple[_Epoch, ...] = ()  # The latest two: batches may straddle epochs.

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k not in ('_lock', '_epochs')}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()

  def __len__(self) -> int:
    return -(-self._num_tokens // self._sequence_length)

  def __getitem__(self, index: int | slice) -> Any:
    if isinstance(index, slice):
      return self.slice(index)
    return self._cut(*self._span(int(index)))

  def pieces(self, index: int) -> list[Piece]:
    """Returns which parts of which documents element `index` is made of, in their order."""
    epoch, start, stop = self._span(index)
    if start >= stop:
      return []
    first, borders = self._borders(epoch, start, stop)
    documents = epoch.documents[first : first + len(borders) - 1].tolist()
    begins = epoch.starts[first : first + len(borders) - 1]
    return [
        Piece(document, left + start - begin, right + start - begin, left)
        for document, begin, left, right in zip(
            documents, begins.tolist(), borders[:-1].tolist(), borders[1:].tolist()
        )
    ]

  def _span(self, index: int) -> tuple[_Epoch, int, int]:
    """Returns the epoch of an element, and where in its tokens it starts and stops."""
    number, place = divmod(index, len(self))
    epoch = self._epoch(number)
    start = int(epoch.sequences[place]) * self._sequence_length
    return epoch, start, min(start + self._sequence_length, self._num_tokens)

  def _borders(self, epoch: _Epoch, start: int, stop: int) -> tuple[int, np.ndarray]:
    """Returns the place of the first document of tokens start..stop in the epoch's order, and
    where in the row each of them begins, and the last ends."""
    first = int(np.searchsorted(epoch.starts, start, side='right')) - 1
    last = int(np.searchsorted(epoch.starts, stop, side='left'))
    return first, np.clip(epoch.starts[first : last + 1], start, stop) - start

  def _cut(self, epoch: _Epoch, start: int, stop: int) -> Packed:
    """Returns tokens start..stop of the epoch."""
    first, borders = self._borders(epoch, start, stop)
    tokens, segment_ids, positions = np.zeros((3, self._sequence_length), np.int32)
    offset = start - int(epoch.starts[first])
    for piece, document in enumerate(epoch.documents[first : first + len(borders) - 1]):
      left, right = int(borders[piece]), int(borders[piece + 1])
      skip = offset if piece == 0 else 0
      tokens[left:right] = self._cache.slice(int(document), skip, skip + right - left)
    counts = np.diff(borders)
    size = stop - start
    segment_ids[:size] = np.repeat(np.arange(1, len(counts) + 1, dtype=np.int32), counts)
    positions[:size] = np.arange(size, dtype=np.int32) - np.repeat(borders[:-1], counts)
    previous = -1
    if offset:
      previous = int(self._cache.slice(int(epoch.documents[first]), offset - 1, offset)[0])
    return Packed(tokens, segment_ids, positions, np.int32(previous))

  def _epoch(self, number: int) -> _Epoch:
    for epoch in self._epochs:
      if epoch.number == number:
        return epoch
    with self._lock:
      for epoch in self._epochs:
        if epoch.number == number:
          return epoch
      documents = permutation(len(self._cache.lengths), self._seed, number, 0)
      starts = np.concatenate([[0], np.cumsum(self._cache.lengths[documents])])
      epoch = _Epoch(number, documents, starts, permutation(len(self), self._seed, number, 1))
      self._epochs = (epoch, *self._epochs[:1])
      return epoch


class Contiguous(ConcatThenSplit):
  """Rows that go on where they ended: element `step * batch_size + row` follows that of step - 1.

  An epoch's tokens are cut into `batch_size` parts as equal as can be, and each part every
  `sequence_length` tokens; the last row of a part is padded. No token is lost or shown twice.

  Args:
    cache: the documents.
    sequence_length: tokens a sequence.
    seed: of the documents' order.
    batch_size: parts an epoch.
  """

  def __init__(self, cache: Documents, sequence_length: int, seed: int, batch_size: int):
    super().__init__(cache, sequence_length, seed)
    self._batch_size = batch_size
    self._part = -(-self._num_tokens // batch_size)

  def __len__(self) -> int:
    return -(-self._part // self._sequence_length) * self._batch_size

  def __getitem__(self, index: int | slice) -> Any:
    if isinstance(index, slice):
      return self.slice(index)
    epoch, start, stop = self._span(int(index))
    packed = Packed(*np.zeros((3, self._sequence_length), np.int32), np.int32(-1))
    if start < stop:  # The last parts run short where tokens are few.
      packed = self._cut(epoch, start, stop)
    return packed._replace(restart=np.int32(int(index) % len(self) < self._batch_size))

  def _span(self, index: int) -> tuple[_Epoch, int, int]:
    """Returns what the base class does; it stops before it starts where there are no tokens."""
    number, place = divmod(index, len(self))
    step, row = divmod(place, self._batch_size)
    start = row * self._part + step * self._sequence_length
    stop = min(start + self._sequence_length, (row + 1) * self._part, self._num_tokens)
    return self._epoch(number), start, stop


def permutation(size: int, *key: int) -> np.ndarray:
  """Returns a permutation of range(size) that is a function of the key, in every version of numpy.

  `Generator.permutation` may change between versions (NEP 19); a bit generator's raw output may
  not.
  """
  raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
  return np.argsort(raw, kind='stable')
