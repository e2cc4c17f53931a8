"""Short examples packed into rows of one length, anew in each epoch.

The examples of an epoch, in a random order, go one by one into the first of some open rows that has
room. Which examples stand in a row is a function of (seed, row), as everywhere: the plan of an
epoch is made of lengths alone, and epochs are planned one after the other up to the one that is
asked for, since they differ in their number of rows.
"""

from __future__ import annotations

import bisect
import threading
from typing import Any, Callable, Optional, Protocol, Sequence

import numpy as np

from lm.data import loader
from lm.data import packing
from lm.data.examples.forms import Encoded, Form, Lengths
from lm.data.objectives import Features
from lm.errors import UserError

_OPEN_ROWS = 32


class Examples(Protocol):
  """What rows need of a cache."""

  sizes: np.ndarray  # int32 [examples, 3]: tokens of a, of b (-1: none), and targets

  def encoded(self, index: int) -> Encoded:
    """Returns the tokens of an example."""


Augment = Callable[[int, np.random.Generator], Encoded]


class ExampleRows:
  """The endless stream of rows of packed examples.

  Args:
    examples: of one split.
    form: makes features of them.
    lengths: of a row.
    seed: of the order, and of what is random in an example.
    augment: an example by its number, changed at random; None leaves all as they are.
    growth: how many times longer `augment` may make an example; one that it makes longer still
      stays as it was.

  Raises:
    UserError: there is no example.
  """

  def __init__(self, examples: Examples, form: Form, lengths: Lengths, seed: int,
               augment: Optional[Augment] = None, growth: float = 1.0):
    if not len(examples.sizes):
      raise UserError('The split holds no example; name files with some.')
    self._examples, self._form, self._lengths, self._seed = examples, form, lengths, seed
    self._augment = augment
    of_targets = growth if form.kind.name == 'tagging' else 1  # A tag a word, in text too.
    grown = np.array([[growth], [growth], [of_targets]])
    sizes = form.size(*np.ceil(examples.sizes.T * grown).astype(int))
    self._sizes = [np.minimum(size, limit) for size, limit in zip(sizes, self._limits)]
    self._parts = form.parts(examples.sizes)
    self._windows = form.windows(examples.sizes, lengths)
    self._key = np.random.SeedSequence(seed).generate_state(2, np.uint64)
    self._open()

  def _open(self) -> None:
    self._lock = threading.Lock()
    self._plans: dict[int, list[np.ndarray]] = {}  # Of the latest two epochs.
    self._ends: list[int] = []  # Of each epoch planned so far, its last row + 1.

  def __getstate__(self) -> dict[str, Any]:
    hidden = '_lock', '_plans', '_ends'
    return {key: value for key, value in self.__dict__.items() if key not in hidden}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()

  def __len__(self) -> int:
    """Returns the rows of the first epoch; the others' differ by few."""
    with self._lock:
      self._plan(0)
      return self._ends[0]

  def __getitem__(self, row: int) -> Features:
    rng = loader.generator(self._key, row)
    members, first = self.members(row), self.first(row)
    found = [self._encoded(int(i), rng) for i in members]
    if first is not None:
      found = [self._form.window(example, first, self._lengths) for example in found]
    return self._form.features(found, self._lengths)

  @property
  def _limits(self) -> tuple[int, int]:
    """Tokens of a row on both sides."""
    return self._lengths.inputs, max(self._lengths.targets, 1)

  def _encoded(self, index: int, rng: np.random.Generator) -> Encoded:
    """Returns an example, changed if it fits into the place that its row keeps for it."""
    if self._augment is None:
      return self._examples.encoded(index)
    changed = self._augment(index, rng)
    sizes = self._form.size(*np.array([self._form.measure(changed)]).T)
    fits = all(min(size[0], limit) <= planned[index]
               for size, limit, planned in zip(sizes, self._limits, self._sizes))
    return changed if fits else self._examples.encoded(index)

  def members(self, row: int) -> np.ndarray:
    """Returns the numbers of the examples in a row, in their order."""
    units = self._units(row)
    return units if self._windows is None else self._windows[units, 0]

  def first(self, row: int) -> Optional[int]:
    """Returns where in its example the row's window begins, None where rows hold whole examples."""
    return None if self._windows is None else int(self._windows[self._units(row)[0], 1])

  def _units(self, row: int) -> np.ndarray:
    """Returns the numbers of the examples in a row, or of its window."""
    with self._lock:
      while not self._ends or self._ends[-1] <= row:
        self._plan(len(self._ends))
      epoch = bisect.bisect_right(self._ends, row)
      first = self._ends[epoch - 1] if epoch else 0
      return self._plan(epoch)[row - first]

  def examples(self, row: int) -> list[loader.Example]:
    """Returns what a row was made of: the whole of its examples."""
    sizes = self._examples.sizes[:, 0]
    pieces = [packing.Piece(int(i), 0, int(sizes[i]), 0) for i in self.members(row)]
    return [loader.Example(0, row, pieces)]

  def _plan(self, epoch: int) -> list[np.ndarray]:
    """Returns the members of each row of an epoch; to be called under the lock."""
    if epoch not in self._plans:
      units = self._sizes[0] if self._windows is None else self._windows
      order = packing.permutation(len(units), self._seed, epoch, 2)
      rows = pack_first_fit(order, self._sizes, self._lengths, self._parts)
      self._plans = dict([*self._plans.items()][-1:]) | {epoch: rows}
      if epoch == len(self._ends):
        self._ends.append((self._ends[-1] if epoch else 0) + len(rows))
    return self._plans[epoch]


def pack_first_fit(order: np.ndarray, sizes: Sequence[np.ndarray], lengths: Lengths,
                   parts: Optional[np.ndarray] = None) -> list[np.ndarray]:
  """Returns the members of each row, rows in the order of their first members.

  Args:
    order: examples [n], as they come.
    sizes: tokens of each example on each side of a row.
    lengths: of a row.
    parts: of each example, where they fall into several.
  """
  if lengths.examples == 1 or not lengths.packed:
    return [order[i:i + 1] for i in range(len(order))]
  rows: list[list[int]] = []
  limits = np.array([lengths.inputs, max(lengths.targets, 1), lengths.examples])
  room = np.zeros((_OPEN_ROWS, 3), np.int64)
  which = np.zeros(_OPEN_ROWS, np.int64)
  for example in order.tolist():
    count = 1 if parts is None else parts[example]
    needed = np.array([sizes[0][example], sizes[1][example], count])
    fits = (room >= needed).all(1)
    place = int(fits.argmax())
    if not fits[place]:
      place = int(room[:, 0].argmin())  # The fullest makes way.
      room[place], which[place] = limits, len(rows)
      rows.append([])
    room[place] -= needed
    rows[which[place]].append(example)
  return [np.array(row) for row in rows]
