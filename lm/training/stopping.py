"""When training ends before its last step: by a signal, or where validation no longer improves."""
import contextlib
import dataclasses
import math
import os
import signal
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
  """Ends a run whose validation loss no longer improves.

  patience: evaluations in a row that are not better than the best before them by `min_delta`, in
    nats.
  """
  patience: int = 5
  min_delta: float = 0.0

  def __post_init__(self):
    if self.patience < 1 or self.min_delta < 0:
      raise ValueError(f'patience={self.patience} must be at least 1 and '
                       f'min_delta={self.min_delta} not negative')

  def is_over(self, losses: Sequence[float]) -> bool:
    """Whether these validation losses, all of a run, say so; one that is not a number is none."""
    best, since = math.inf, 0
    for loss in losses:
      better = loss < best - self.min_delta
      best, since = (loss, 0) if better else (best, since + 1)
    return since >= self.patience


@contextlib.contextmanager
def signals() -> Iterator[list[str]]:
  """Collects SIGTERM and SIGINT instead of dying of them; a second one is taken at its word."""
  received: list[str] = []

  def handler(number, _):
    if received:
      os._exit(128 + number)
    received.append(signal.Signals(number).name)

  numbers = (signal.SIGTERM, signal.SIGINT)
  try:
    before = [signal.signal(number, handler) for number in numbers]
  except ValueError:  # not in the main thread (a notebook's server): signals are its own
    yield received
    return
  try:
    yield received
  finally:
    for number, old in zip(numbers, before):
      signal.signal(number, old)
