"""Where in the data a step reads: a function of the step and of what a checkpoint says."""
from collections.abc import Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Position:
  """A place in the endless stream of sequences, and how a run came there.

  batch_size: sequences a step.
  stepped_over: (first, end) of the sequences that a rollback stepped over, in order.
  rollbacks: of the run so far; more than windows where one went back behind another.
  """
  batch_size: int
  stepped_over: tuple[tuple[int, int], ...] = ()
  rollbacks: int = 0

  def sequences(self, step: int) -> int:
    """Trained on or stepped over when `step` steps are done: where the next one reads."""
    return step * self.batch_size + sum(end - first for first, end in self.stepped_over)

  def after_spike(self, step: int, end: int, batches_over: int, rollbacks: int) -> 'Position':
    """That of a run that went back to `step`, this being the checkpoint's position.

    Args:
      end: the first sequence behind those of the spike.
      batches_over: from `step` on, that are stepped over; at least to `end`.
      rollbacks: of the run, with this one.
    """
    first = self.sequences(step)
    window = first, max(end, first + batches_over * self.batch_size)
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
  def described(cls, batch_size: int, data: Mapping[str, Any]) -> 'Position':
    """That of a checkpoint."""
    windows = tuple((first, end) for first, end in data.get('stepped_over', ()))
    return cls(batch_size, windows, data.get('rollbacks', 0))
