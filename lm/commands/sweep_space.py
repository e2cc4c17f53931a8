"""The search space of `lm sweep`: bindings whose value is a distribution.

    --gin.LEARNING_RATE='log(1e-4, 1e-2)'      a number, its logarithm uniform
    --gin.gpt.GPTConfig.dropout_rate='uniform(0, 0.3)'
    --gin.gpt.GPTConfig.num_layers='int(2, 8)'      both ends included; int(64, 512, 64) by steps
    --gin.OPTIMIZER='choice(@optimizers.AdamW(), @optimizers.Lion())'      any values of gin
"""
from collections.abc import Iterator, Sequence
import dataclasses
import io
import itertools
import re
import tokenize
from typing import Any

from lm.errors import UserError

_DISTRIBUTION = re.compile(r'\s*(log|uniform|int|choice)\s*\((.*)\)\s*', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Parameter:
  """A binding that a sweep varies.

  kind: log, uniform, int or choice.
  values: of a choice, in gin's syntax.
  low, high: of the others, both of them included.  step: of int.
  """
  name: str
  kind: str
  values: tuple[str, ...] = ()
  low: float = 0.0
  high: float = 0.0
  step: int = 1

  def suggest(self, trial: Any) -> Any:
    """The value that an Optuna trial has, or takes now."""
    if self.kind == 'choice':
      return trial.suggest_categorical(self.name, self.values)
    if self.kind == 'int':
      return trial.suggest_int(self.name, self.low, self.high, step=self.step)
    return trial.suggest_float(self.name, self.low, self.high, log=self.kind == 'log')

  def text(self) -> str:
    """As it is written on the command line."""
    if self.kind == 'choice':
      return f'choice({", ".join(self.values)})'
    step = f', {self.step}' if self.step > 1 else ''
    return f'{self.kind}({self.low!r}, {self.high!r}{step})'

  def edges(self) -> list[Any]:
    """All values of a choice, or the two ends: what must be legal before any work."""
    return list(self.values) if self.kind == 'choice' else [self.low, self.high]

  def grid(self) -> list[Any]:
    """All values.

    Raises:
      UserError: there are too many.
    """
    if self.kind == 'int':
      return list(range(self.low, self.high + 1, self.step))
    if self.kind != 'choice':
      raise UserError(f'--gin.{self.name}: --sampler=grid tries every value and {self.kind}(...) '
                      'has no end of them; write choice(A, B, ...)')
    return list(self.values)


def split(bindings: Sequence[tuple[str, str]]
          ) -> tuple[list[tuple[str, str]], list[Parameter]]:
  """Parts bindings into those with one value and those with a distribution.

  Raises:
    UserError: a distribution cannot be read.
  """
  fixed, space = [], {}
  for name, value in bindings:
    match = _DISTRIBUTION.fullmatch(value)
    space.pop(name, None)  # a later binding replaces an earlier one
    if match:
      fixed = [binding for binding in fixed if binding[0] != name]
      space[name] = _parameter(name, match[1], _arguments(f'--gin.{name}={value}', match[2]))
    else:
      fixed.append((name, value))
  return fixed, list(space.values())


def text(value: Any) -> str:
  """A value in gin's syntax; those of a choice are that already."""
  return value if isinstance(value, str) else repr(value)


def grid(space: Sequence[Parameter]) -> Iterator[dict[str, Any]]:
  """Every combination of the values, the last parameter changing fastest."""
  for values in itertools.product(*(parameter.grid() for parameter in space)):
    yield {parameter.name: value for parameter, value in zip(space, values)}


def _parameter(name, kind, arguments):
  where = f'--gin.{name}={kind}({", ".join(arguments)})'
  if kind == 'choice':
    if len(set(arguments)) < len(arguments) or len(arguments) < 2:
      raise UserError(f'{where}: a choice is of two different values or more')
    return Parameter(name, kind, tuple(arguments))
  number = int if kind == 'int' else float
  try:
    low, high, *step = [number(argument) for argument in arguments]
  except ValueError as error:
    raise UserError(f'{where}: give {kind}(LOW, HIGH) two numbers'
                    f'{", whole ones" if kind == "int" else ""}') from error
  if len(step) > (kind == 'int') or not low < high or step and step[0] < 1:
    raise UserError(f'{where}: give {kind}(LOW, HIGH{", STEP" if kind == "int" else ""}) with LOW '
                    'below HIGH')
  if kind == 'log' and low <= 0:
    raise UserError(f'{where}: log needs LOW above 0')
  step, *_ = step or [1]
  if kind == 'int':
    high -= (high - low) % step
  return Parameter(name, kind, low=low, high=high, step=step)


def _arguments(where, content):
  """Parts text at the commas that no bracket or quote holds."""
  depth, parts, start = 0, [], 0
  try:
    for token in tokenize.generate_tokens(io.StringIO(content.replace('\n', ' ')).readline):
      depth += (token.string in '([{') - (token.string in ')]}') if token.string else 0
      if token.string == ',' and not depth:
        parts.append(content[start:token.start[1]].strip())
        start = token.end[1]
  except (tokenize.TokenError, SyntaxError) as error:
    raise UserError(f'{where}: cannot be read; close its brackets and quotes') from error
  parts.append(content[start:].strip())
  if not all(parts):
    raise UserError(f'{where}: there is nothing between two commas')
  return parts
