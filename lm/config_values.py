"""The values of gin files: literals that hold macros and references, and how to write them down."""

import dataclasses
import functools
from typing import Any, Callable


@dataclasses.dataclass(frozen=True)
class Macro:
  """A use of a macro, `%NAME`."""
  name: str


@dataclasses.dataclass(frozen=True)
class Reference:
  """A use of a configurable, `@scope/x.Y()` or, not called, `@scope/x.Y`.

  Attributes:
    selector: the name as written, without its scope.
    scope: the scope as written.
    called: whether parentheses follow.
    target: the function or class; None until the file's imports have resolved the selector.
  """
  selector: str
  scope: tuple[str, ...]
  called: bool
  target: Callable[..., Any] | None = None


class _Required:
  """The type of `%gin.REQUIRED`, a hole that a later binding must fill."""


REQUIRED = _Required()


class Partial(functools.partial):
  """A configurable passed uncalled, with its bindings; equal to another of the same content."""

  def __eq__(self, other):
    return isinstance(other, Partial) and (self.func, self.keywords) == (other.func, other.keywords)

  def __hash__(self):
    return hash(self.func)


def transform(value: Any, leaf: Callable[[Any], Any]) -> Any:
  """Rebuilds nested lists, tuples and dicts with `leaf` applied to everything else in them."""
  if isinstance(value, (list, tuple)):
    return type(value)(transform(x, leaf) for x in value)
  if isinstance(value, dict):
    return {transform(k, leaf): transform(v, leaf) for k, v in value.items()}
  return leaf(value)


def leaves(value: Any) -> list[Any]:
  """Lists what stands inside nested lists, tuples and dicts."""
  found = []
  transform(value, lambda leaf: found.append(leaf) or 0)
  return found


def text(value: Any, name_of: Callable[[Any], str]) -> str:
  """Writes a value in gin's syntax, so that parsing it gives the value back.

  Args:
    value: literals, references and macros in lists, tuples and dicts.
    name_of: gives a reference's target its name.
  """
  write = functools.partial(text, name_of=name_of)
  if isinstance(value, Macro):
    return f'%{value.name}'
  if isinstance(value, Reference):
    return f'@{"/".join([*value.scope, name_of(value.target)])}{"()" if value.called else ""}'
  if value is REQUIRED:
    return '%gin.REQUIRED'
  if isinstance(value, dict):
    return '{' + ', '.join(f'{write(k)}: {write(v)}' for k, v in value.items()) + '}'
  if isinstance(value, list):
    return '[' + ', '.join(map(write, value)) + ']'
  if isinstance(value, tuple):
    return '(' + ', '.join(map(write, value)) + (',)' if len(value) == 1 else ')')
  if value in (float('inf'), float('-inf')):  # gin reads no names, but numbers beyond the range.
    return '1e999' if value > 0 else '-1e999'
  return repr(value)


def is_literal(value: Any) -> bool:
  """Says whether a default can be written in a gin file."""
  return all(type(x) in (bool, int, float, str, bytes, type(None)) and x == x  # nan != nan
             for x in leaves(value))
