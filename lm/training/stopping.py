"""When training ends before its last step: by a signal, or where validation no longer improves."""
from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
from collections.abc import Iterator, Mapping, Sequence

from lm.errors import UserError

LOWER_IS_BETTER = 'loss', 'error', 'perplexity', 'bits_per_byte'  # what their names end with


def score(name: str, metrics: Mapping[str, float | None]) -> float:
  """A metric as a number that is the lower the better; NaN where it is none.

  Raises:
    UserError: there is no such metric.
  """
  if name not in metrics:
    known = ', '.join(key for key in metrics if key not in ('step', 'split'))
    raise UserError(f'stopping.EarlyStopping.metric={name!r} is no metric of validation; take one '
                    f'of {known}')
  value = math.nan if metrics[name] is None else metrics[name]
  return value if name.endswith(LOWER_IS_BETTER) else -value


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
  """Ends a run whose validation no longer improves.

  patience: evaluations in a row that are not better than the best before them by `min_delta`, in
    the metric's unit.
  metric: of those that validation shows, such as 'accuracy', which is the better the higher; as
    are all but losses, errors and perplexities.
  """
  patience: int = 5
  min_delta: float = 0.0
  metric: str = 'loss'

  def __post_init__(self):
    if self.patience < 1 or self.min_delta < 0:
      raise ValueError(f'patience={self.patience} must be at least 1 and '
                       f'min_delta={self.min_delta} not negative')

  def is_over(self, scores: Sequence[float]) -> bool:
    """Whether the scores of all evaluations of a run say so; one that is not a number is none."""
    best, since = math.inf, 0
    for one in scores:
      better = one < best - self.min_delta
      best, since = (one, 0) if better else (best, since + 1)
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
