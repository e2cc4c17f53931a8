"""What predictors share.

A predictor cuts the examples of a split into items (an example, a window of it, a continuation, a
text), and says in which batches the model answers them. The plan is a function of the task and the
model alone, so a killed evaluation, another one and one of more hosts make the same batches.
"""
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any, Protocol

import flax.linen as nn

from lm.data.examples import PreparedExamples
from lm.errors import UserError
from lm.inference import methods
from lm.parallel.distributed import Hosts

Row = dict[str, Any]
Batches = Iterator[Mapping[int, Any]]


@dataclasses.dataclass(frozen=True)
class Model:
  """A checkpoint that answers.

  module, params: over the run's mesh.
  alone: gives (module, params) on one device of this host, for what decodes.
  step: of the checkpoint. digest: of its files.
  sequence_length: tokens of a row. batch_size: rows.
  directory: of the run.
  is_tuned: whether it was trained on labelled examples, whose targets end with the end of text.
  trained: these, where their files are at hand.
  method: how it writes; None takes the likeliest token each time.
  """
  module: nn.Module
  params: Any
  alone: Callable[[], tuple[nn.Module, Any]]
  step: int
  digest: str
  sequence_length: int
  batch_size: int
  directory: pathlib.Path
  is_tuned: bool
  trained: PreparedExamples | None = None
  hosts: Hosts = Hosts()
  method: methods.Method | None = None

  @property
  def family(self) -> str:
    """The name of the model's config, which says what it answers."""
    return type(self.module.config).__name__

  def rows_of(self, length: int) -> int:
    """How many shorter rows make a batch of as many tokens."""
    return self.batch_size * max(1, self.sequence_length // length)


class Predictor(Protocol):
  """How a model answers a split.

  num_items: what it is asked.
  """
  num_items: int

  def batches(self, done: Collection[int]) -> Batches:
    """Yields what the model says of the items of each batch, {item: JSON value}; leaves out batches
    all of whose items are done. All hosts go through it together."""

  def rows(self, answers: Sequence[Any]) -> Iterator[Row]:
    """Yields a row of predictions for each example, in the order of the split, from the answers to
    all items."""


def refuse(model: Model, prepared: PreparedExamples, fix: str) -> UserError:
  """That a model does not answer a kind of task."""
  return UserError(f'{model.family} does not answer {prepared.task.name!r}, a task of kind '
                   f'{prepared.kind.name!r} in the form {prepared.task.form!r}; {fix}')


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
  """The items, `size` at a time."""
  return [items[first:first + size] for first in range(0, len(items), size)]


def bucket(size: int, longest: int, shortest: int = 16) -> int:
  """The next power of two from `shortest` on, at most `longest`: rows have few lengths."""
  return min(max(shortest, 1 << (int(size) - 1).bit_length()), longest)
