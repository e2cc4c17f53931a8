"""Where in the data a step reads, and how much: a function of the step and of what a checkpoint
says."""
from collections.abc import Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class BatchSizes:
  """Sequences a step, which may grow on the way (arXiv:2005.14165, section 2.3).

  final: of the steps behind the ramp.
  ramp: (last step, sequences a step) of each stretch before that, in order.
  """
  final: int
  ramp: tuple[tuple[int, int], ...] = ()

  def __post_init__(self):
    for (until, size), (later, larger) in zip(self.ramp, (*self.ramp[1:], (None, self.final))):
      if until < 1 or size < 1 or larger < size or (later is not None and later <= until):
        raise ValueError(f'batch_ramp={self.ramp} up to batch_size={self.final} must name rising '
                         'steps, each the last of its batch size, and batch sizes that do not fall')

  def of(self, step: int) -> tuple[int, int | None]:
    """Sequences of a step (counted from 1), and the last step of as many; None if all are."""
    return next(((size, until) for until, size in self.ramp if step <= until), (self.final, None))

  def sequences(self, steps: int) -> int:
    """Of the first `steps` steps."""
    total, done = 0, 0
    for until, size in self.ramp:
      total += size * max(0, min(until, steps) - done)
      done = until
    return total + self.final * max(0, steps - done)

  @property
  def all(self) -> list[int]:
    """Each size that some step has."""
    return sorted({self.final, *(size for _, size in self.ramp)})


@dataclasses.dataclass(frozen=True)
class Position:
  """A place in the endless stream of sequences, and how a run came there.

  sizes: sequences of each step.
  stepped_over: (first, end) of the sequences that a rollback stepped over, in order.
  rollbacks: of the run so far; more than windows where one went back behind another.
  """
  sizes: BatchSizes
  stepped_over: tuple[tuple[int, int], ...] = ()
  rollbacks: int = 0

  def sequences(self, step: int) -> int:
    """Trained on or stepped over when `step` steps are done: where the next one reads."""
    return self.sizes.sequences(step) + sum(end - first for first, end in self.stepped_over)

  def first_of(self, step: int) -> int:
    """The first sequence of a step (counted from 1) that is done, whatever was stepped over
    since."""
    first = self.sizes.sequences(step - 1)
    for start, end in self.stepped_over:
      first += (end - start) * (first >= start)
    return first

  def after_spike(self, step: int, end: int, batches_over: int, rollbacks: int) -> 'Position':
    """That of a run that went back to `step`, this being the checkpoint's position.

    Args:
      end: the first sequence behind those of the spike.
      batches_over: from `step` on, that are stepped over; at least to `end`.
      rollbacks: of the run, with this one.
    """
    first = self.sequences(step)
    window = first, max(end, first + batches_over * self.sizes.of(step + 1)[0])
    return dataclasses.replace(self, stepped_over=(*self.stepped_over, window),
                               rollbacks=rollbacks)

  def describe(self, step: int) -> dict[str, Any]:
    """For the checkpoint of a step."""
    found: dict[str, Any] = {'sequences': self.sequences(step)}
    if self.rollbacks:
      found |= {'stepped_over': [list(window) for window in self.stepped_over],
                'rollbacks': self.rollbacks}
    return found

  @classmethod
  def described(cls, sizes: BatchSizes, data: Mapping[str, Any]) -> 'Position':
    """That of a checkpoint."""
    windows = tuple((first, end) for first, end in data.get('stepped_over', ()))
    return cls(sizes, windows, data.get('rollbacks', 0))
