"""What a configurable accepts: its parameters, their annotations, and values that fit them.

Nothing here knows gin. `fit` is stricter than Python where a configuration goes wrong in silence
(`True` is no number, `'adam'` no sequence of strings) and kinder where a person's meaning is plain
(`3` is a float, `[1, 2]` a tuple).
"""

import collections.abc
import dataclasses
import difflib
import inspect
import types
import typing
from typing import Any, Callable, Iterable

_SEQUENCES = (collections.abc.Sequence, collections.abc.Collection, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
  """Maps the names that may be bound to their parameters; None if any name may (`**kwargs`)."""
  try:
    signature = inspect.signature(target)
  except (TypeError, ValueError):  # A builtin without a signature.
    return None
  found = dict(signature.parameters)
  kinds = {parameter.kind for parameter in found.values()}
  if inspect.Parameter.VAR_KEYWORD in kinds:
    return None
  return {k: p for k, p in found.items() if p.kind is not inspect.Parameter.VAR_POSITIONAL}


def defaults(target: Callable[..., Any]) -> dict[str, Any]:
  """Maps each parameter that has a default to it, calling a dataclass's default factories."""
  found = {k: p.default for k, p in (parameters(target) or {}).items() if p.default is not p.empty}
  if dataclasses.is_dataclass(target):
    for field in dataclasses.fields(target):
      if field.name in found and field.default_factory is not dataclasses.MISSING:
        found[field.name] = field.default_factory()
  return found


def annotations(target: Callable[..., Any]) -> dict[str, Any]:
  """Maps parameters to their annotations as types, strings evaluated.

  Raises:
    NameError: a dataclass annotates a field by a name that its module lacks at run time; a silent
      pass would switch off every check of that class.
  """
  if dataclasses.is_dataclass(target):
    hints = typing.get_type_hints(target)
    return {k: h.type if isinstance(h, dataclasses.InitVar) else h for k, h in hints.items()}
  try:
    return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
  except (NameError, TypeError, AttributeError):  # Foreign code: unchecked rather than unusable.
    return {}


def _fit_union(value: Any, arms: tuple[Any, ...]) -> Any:
  """Fits the arm that keeps the value's own type, else the first that accepts it."""
  accepted = []
  for arm in arms:
    try:
      accepted.append(fit(value, arm))
    except TypeError:
      pass
  if not accepted:
    raise TypeError(value)
  return next((x for x in accepted if type(x) is type(value)), accepted[0])


def _fit_items(value: Any, origin: type, arms: tuple[Any, ...]) -> Any:
  """Fits a sequence; a list becomes a tuple where a tuple will do: configs stay hashable."""
  if not isinstance(value, list if origin is list else (list, tuple)):
    raise TypeError(value)
  if origin is tuple and arms and arms[-1] is not Ellipsis:
    if arms == ((),):  # tuple[()] on Python 3.10 and before.
      arms = ()
    if len(value) != len(arms):
      raise TypeError(value)
    return tuple(fit(x, arm) for x, arm in zip(value, arms))
  items = (fit(x, arms[0] if arms else Any) for x in value)
  return list(items) if origin is list else tuple(items)


def fit(value: Any, hint: Any) -> Any:
  """Returns the value as the annotation wants it: int as float, list as tuple, all else unchanged.

  Raises:
    TypeError: the value, or the item of it that is its argument, does not satisfy the annotation.
      Annotations that cannot be decided here (type variables, protocols that are not
      runtime-checkable) accept everything.
  """
  origin, arms = typing.get_origin(hint) or hint, typing.get_args(hint)
  if hint is None:
    hint = origin = type(None)
  if isinstance(hint, typing.NewType):
    return fit(value, hint.__supertype__)
  if origin is typing.Annotated:
    return fit(value, arms[0])
  if origin in (typing.Union, types.UnionType):
    return _fit_union(value, arms)
  if origin is typing.Literal:
    accepted = any(type(value) is type(arm) and value == arm for arm in arms)
  elif origin in (tuple, list, *_SEQUENCES):
    return _fit_items(value, origin, arms)
  elif origin in _MAPPINGS and isinstance(value, collections.abc.Mapping):
    key, item = arms or (Any, Any)
    return {fit(k, key): fit(v, item) for k, v in value.items()}
  elif origin is collections.abc.Callable:
    accepted = callable(value)
  elif origin is type:
    accepted = inspect.isclass(value) and (
        not arms or not inspect.isclass(arms[0]) or issubclass(value, arms[0]))
  elif origin is float and type(value) is int:
    return float(value)
  elif origin in (int, float) and isinstance(value, bool):  # bool is a subclass of int.
    accepted = False
  else:
    try:
      accepted = isinstance(value, origin) if inspect.isclass(origin) else True
    except TypeError:  # A protocol that is not runtime-checkable.
      accepted = True
  if not accepted:
    raise TypeError(value)
  return value


def choices(hint: Any) -> list[Any]:
  """Lists the values that an annotation spells out as literals, inside unions too."""
  arms = typing.get_args(hint)
  if typing.get_origin(hint) is typing.Literal:
    return list(arms)
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return [choice for arm in arms for choice in choices(arm)]
  return []


def describe(hint: Any) -> str:
  """Names an annotation as a reader would write it: `int`, `tuple[int, ...]`, `one of 'a', 'b'`."""
  literal = choices(hint)
  if literal:
    spelt = 'one of ' + ', '.join(map(repr, literal))
    return spelt + (' or None' if type(None) in typing.get_args(hint) else '')
  if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
    return ' or '.join(describe(arm) for arm in typing.get_args(hint))
  if hint in (None, type(None)):
    return 'None'
  if inspect.isclass(hint) and not typing.get_args(hint):
    return hint.__name__
  return inspect.formatannotation(hint)


def nearest(name: str, known: Iterable[str]) -> str | None:
  """Finds the known name that was most likely meant, ignoring case; None if none is near.

  A name given without its prefix (`d_model` for `gpt.GPTConfig.d_model`) is recognised too.
  """
  known = sorted(set(known) - {name})
  by_tail = [k for k in known if k.endswith('.' + name)]
  if len(by_tail) == 1:
    return by_tail[0]
  folded = {k.lower(): k for k in known}
  match = difflib.get_close_matches(name.lower(), folded, n=1)
  return folded[match[0]] if match else None


def suggest(name: str, known: Iterable[str], otherwise: str = '') -> str:
  """Ends an error sentence: the nearest name as a question, else all names if few, else a rule."""
  known = sorted(set(known))
  match = nearest(name, known)
  if match is not None:
    return f'; did you mean {match}?'
  if otherwise:
    return f'; {otherwise}'
  listed = ', '.join(known[:12] + ['...'] * (len(known) > 12))
  return f'; choose from {listed}' if known else ''
