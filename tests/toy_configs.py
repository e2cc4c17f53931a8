"""Small targets for the configuration tests: a model, two optimisers and an experiment."""

import dataclasses
from typing import Any, Callable, Literal, Sequence

from lm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Model:
  d_model: int = 64
  num_heads: int = 4
  dropout: float = 0.0
  activation: Literal['gelu', 'silu', 'relu'] = 'gelu'
  tied: bool = True
  d_head: int | None = None
  shape: tuple[int, ...] = (1,)
  names: Sequence[str] = ()

  def __post_init__(self):
    if self.d_model % self.num_heads:
      raise UserError(f'd_model={self.d_model} is not divisible by num_heads={self.num_heads}')
    if self.dropout >= 1:
      raise ValueError(f'dropout={self.dropout} must be below 1')


@dataclasses.dataclass(frozen=True)
class Adam:
  learning_rate: float
  b1: float = 0.9


@dataclasses.dataclass(frozen=True)
class Lion:
  learning_rate: float = 1e-4
  interval: int | float = 1


@dataclasses.dataclass(frozen=True)
class Train:
  num_steps: int
  files: str = ''
  schedule: Callable[..., float] | None = None
  seed: int = None  # An annotation that its own default breaks, as foreign code has.
  limits: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Experiment:
  model: Model
  optimizer: Adam | Lion
  train: Train
  teacher: Model | None = None
  note: Any = None


def constant(value: float = 1.0, scale: float = 1.0) -> float:
  return value * scale


def pair(left: Model, right: Model) -> tuple[Model, Model]:
  return left, right
