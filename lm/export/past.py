"""Keys and values of the rows of an artefact that writes texts, between its calls."""
from collections.abc import Mapping, Sequence

import numpy as np

Arrays = dict[str, np.ndarray]
NUM_ROWS = 16  # texts at once


class Past:
  """Arrays [rows, ...] by name; rows that go on together stand in one batch and are not copied."""

  def __init__(self):
    self._batches: list[tuple[list[int | None], Mapping[str, np.ndarray]]] = []

  def put(self, rows: Sequence[int | None], arrays: Mapping[str, np.ndarray]):
    """Keeps the arrays of these rows, in this order; None is nobody's."""
    self._batches.append((list(rows), arrays))

  def take(self, rows: Sequence[int | None]) -> Arrays:
    """Gives the arrays of these rows, in this order, away; those of None are 0. Where rows of an
    array have other sizes, they are padded behind with 0."""
    for i, (owners, arrays) in enumerate(self._batches):
      if owners == list(rows):
        del self._batches[i]
        return dict(arrays)
    parts = [None if row is None else self._one(row) for row in rows]
    for row in rows:
      self.drop(row)
    return {name: _stacked([None if part is None else part[name] for part in parts])
            for name in next(part for part in parts if part is not None)}

  def drop(self, row: int | None):
    """Forgets a row, if it is there."""
    left = [([None if owner == row else owner for owner in owners], arrays)
            for owners, arrays in self._batches]
    self._batches = [(owners, arrays) for owners, arrays in left
                     if any(owner is not None for owner in owners)]

  def _one(self, row):
    owners, arrays = next(batch for batch in self._batches if row in batch[0])
    return {name: x[owners.index(row)] for name, x in arrays.items()}


def _stacked(rows):
  """Arrays, or None, as one."""
  known = [x for x in rows if x is not None]
  found = np.zeros((len(rows), *np.max([x.shape for x in known], axis=0)), known[0].dtype)
  for i, x in enumerate(rows):
    if x is not None:
      found[(i, *map(slice, x.shape))] = x
  return found
