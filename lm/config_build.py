"""Bindings, and the object that they describe.

`Bindings` is what a set of gin files says, as data: `lm/config.py` fills it, this file evaluates
it, `lm/config_show.py` shows it. The rules of injection are gin's own (a test compares the two): a
reference `@x.Y()` is a call of x.Y with its bindings, evaluated anew at each use; `@scope/x.Y()`
sees the bindings of `scope/x.Y` too; a macro's value is evaluated in the scope of its name. They
are written out here, and not left to gin's wrappers, because gin 0.5.0 forgets the line that a
value came from, checks no types, and appends its own call stack to a constructor's error.
"""

import dataclasses
import inspect
import re
from typing import Any, Callable, NamedTuple

from lm import config_types
from lm import config_values
from lm.config_values import REQUIRED, Macro, Partial, Reference, leaves, transform
from lm.errors import UserError


class Key(NamedTuple):
  """What a binding binds: a parameter of a target in a scope or, with no target, a macro."""
  scope: str
  target: Callable[..., Any] | None
  name: str


@dataclasses.dataclass(frozen=True)
class Binding:
  """A value, where it was written (`file:line` or `--gin.NAME`), and its place in reading order."""
  value: Any
  source: str
  order: int


class Bindings:
  """What the files and the command line say, in the order in which they say it.

  Attributes:
    bindings: the last binding of each key.
    overridden: (value, order of the binding that replaced it), so that what served only a replaced
      value is not mistaken for a misspelling.
    origins: target -> (module, attribute path) under which a file named it.
    referenced: every macro that any value refers to, replaced ones included.
    used: the keys that the last build consumed; `calls` the (target, scope, whether called) it saw.
    spent: the keys that a call consumed whose result was written out in its place.
    lent: the keys of macros that another configuration refers to, see `borrow_macros`.
  """

  def __init__(self):
    self.bindings: dict[Key, Binding] = {}
    self.overridden: list[tuple[Any, int]] = []
    self.origins: dict[Callable[..., Any], tuple[str, str]] = {}
    self.referenced: set[str] = set()
    self.used: set[Key] = set()
    self.spent: set[Key] = set()
    self.lent: set[Key] = set()
    self.calls: dict[tuple[Any, tuple[str, ...], bool], None] = {}
    self.root: Callable[..., Any] | None = None
    self._order = 0
    self._path: list[Any] = []

  def add(self, key: Key, value: Any, source: str) -> None:
    """Binds a value, replacing an earlier binding of the same key."""
    self._order += 1
    if key in self.bindings:
      self.overridden.append((self.bindings[key].value, self._order))
    self.bindings[key] = Binding(value, source, self._order)
    for leaf in leaves(value):
      if isinstance(leaf, Macro):
        self.referenced.add(leaf.name)

  def name(self, target: Callable[..., Any]) -> str:
    """Names a target as files do, `gpt.GPTConfig`: the module's last part and the attribute."""
    module, attribute = self.origins.get(target) or (target.__module__, target.__qualname__)
    return f'{module.rpartition(".")[2]}.{attribute}'

  def key_name(self, key: Key) -> str:
    """Names a key as files do: `scope/gpt.GPTConfig.d_model`, or the macro."""
    if key.target is None:
      return key.name
    return f'{key.scope}{"/" if key.scope else ""}{self.name(key.target)}.{key.name}'

  def macros(self) -> dict[str, Binding]:
    return {key.name: b for key, b in self.bindings.items() if key.target is None}

  def text(self, value: Any) -> str:
    return config_values.text(value, self.name)

  def build(self, target: Callable[..., Any]) -> Any:
    """Calls the target with everything bound to it, then checks that all bindings were used."""
    self.root, self.used, self.calls, self._path = target, set(), {}, []
    self.origins.setdefault(target, (target.__module__, target.__qualname__))
    result = self._call(target, (), f'building {self.name(target)}')
    self._refuse_unused()
    return result

  def value_of(self, name: str) -> Any:
    """Evaluates what is bound to `module.Target.parameter`, and nothing besides; None for
    nothing."""
    for key, binding in self.bindings.items():
      if self.key_name(key) == name:
        return self._value(binding.value, (), key)
    return None

  def borrow_macros(self, other: 'Bindings') -> None:
    """Takes macros that are not defined here, or are set on the command line there, from another
    configuration."""
    for name, binding in other.macros().items():
      if name in self.referenced and (
          name not in self.macros() or binding.source.startswith('--gin.')):
        self.bindings[Key('', None, name)] = binding

  def bound(self, target: Callable[..., Any], scope: tuple[str, ...]) -> dict[str, list[Key]]:
    """Maps each bound parameter to its keys visible from the scope, the innermost last."""
    visible = ['/'.join(scope[:i]) for i in range(len(scope) + 1)]
    found: dict[str, list[Key]] = {}
    for key in sorted((k for k in self.bindings if k.target is target and k.scope in visible),
                      key=lambda k: len(k.scope)):
      found.setdefault(key.name, []).append(key)
    return found

  def trace(self, binding: Binding) -> Binding:
    """Follows macros to the binding that holds the value, whose line is the one to mend."""
    macros = self.macros()
    while isinstance(binding.value, Macro) and binding.value.name in macros:
      binding = macros[binding.value.name]
    return binding

  def _call(self, target: Callable[..., Any], scope: tuple[str, ...], source: str) -> Any:
    self.calls[target, scope, True] = None
    arguments = self._arguments(target, scope)
    missing = [k for k, p in (config_types.parameters(target) or {}).items()
               if p.default is p.empty and k not in arguments]
    if missing:
      known = [self.key_name(k) for k in self.bindings if k.target and k not in self.used]
      name = f'{self.name(target)}.{missing[0]}'
      raise UserError(f'{source}: {name} has no default and no binding'
                      f'{config_types.suggest(name, known, f"add `{name} = VALUE` to a gin file")}')
    try:
      return target(**arguments)
    except (UserError, ValueError, TypeError) as error:
      raise UserError(f'{str(error).strip()} ({self._blame(target, scope, str(error), source)})'
                     ) from error

  def _blame(self, target, scope, message: str, source: str) -> str:
    """Lists where the parameters that an error mentions were bound, else where the call stands."""
    bound = {k: self.trace(self.bindings[keys[-1]]).source
             for k, keys in self.bound(target, scope).items()}
    mentioned = [f'{k} at {v}' for k, v in bound.items() if re.search(rf'\b{k}\b', message)]
    return ', '.join(mentioned) or f'{self.name(target)} at {source}'

  def _arguments(self, target: Callable[..., Any], scope: tuple[str, ...]) -> dict[str, Any]:
    """Evaluates the bindings of a target and fits each to its parameter's annotation."""
    hints, arguments = config_types.annotations(target), {}
    default = config_types.defaults(target)
    for parameter, keys in self.bound(target, scope).items():
      self.used.update(keys)
      binding = self.bindings[keys[-1]]
      value = self._value(binding.value, scope, keys[-1])
      same = parameter in default and type(value) is type(default[parameter])
      if not (same and value == default[parameter]):  # A default is legal whatever it annotates.
        try:
          value = config_types.fit(value, hints.get(parameter, Any))
        except TypeError as error:
          message = self._mismatch(keys[-1], value, error.args[0], hints[parameter], default)
          raise UserError(message) from None
      arguments[parameter] = value
    return arguments

  def _mismatch(self, key: Key, value: Any, item: Any, hint: Any, default: dict[str, Any]) -> str:
    """Says that a value, or an item in it, is not what the annotation asks, and what to write."""
    binding, origin = self.bindings[key], self.trace(self.bindings[key])
    name, literals = self.key_name(key), config_types.choices(hint)
    said = f'{name}={self.text(origin.value)}'
    if isinstance(binding.value, Macro):
      said = f'{binding.value.name}={self.text(origin.value)} reaches {name}, which'
    fix = ''
    if literals and isinstance(value, str):
      match = config_types.nearest(value, [x for x in literals if isinstance(x, str)])
      fix = f'; did you mean {match!r}?' if match else ''
    elif isinstance(value, float) and value.is_integer() and hint is int:
      fix = f'; write {int(value)}'
    elif isinstance(value, str) and re.fullmatch(r'[-+.\deE]+|True|False|None', value):
      fix = f'; write {value} without quotes'
    elif config_values.is_literal(default.get(key.name)) and default.get(key.name) is not None:
      fix = f'; its default is {default[key.name]!r}'
    kind = 'a class or function' if inspect.isroutine(value) or inspect.isclass(value) else (
        type(value).__name__)
    unlike = '' if literals else f', not {kind}' if item is value else f'; {item!r} does not fit'
    return f'{origin.source}: {said} must be {config_types.describe(hint)}{unlike}{fix}'

  def _value(self, value: Any, scope: tuple[str, ...], key: Key) -> Any:
    """Evaluates what stands right of a binding's `=`."""
    return transform(value, lambda leaf: self._leaf(leaf, scope, key))

  def _leaf(self, leaf: Any, scope: tuple[str, ...], key: Key) -> Any:
    source = self.bindings[key].source
    if leaf is REQUIRED:
      name = self.key_name(key)
      raise UserError(f'{source}: {name} is %gin.REQUIRED and nothing fills it; '
                      f'give --gin.{name}=VALUE or bind it in a gin file')
    if not isinstance(leaf, (Macro, Reference)):
      return leaf
    if (leaf, scope) in self._path:
      raise UserError(f'{source}: {self.text(leaf)} refers to itself; remove the circle')
    self._path.append((leaf, scope))
    if isinstance(leaf, Macro):
      macro = Key('', None, leaf.name)
      if macro not in self.bindings:
        raise UserError(f'{source}: nothing defines %{leaf.name}; give --gin.{leaf.name}=VALUE')
      self.used.add(macro)
      value = self._value(self.bindings[macro].value, tuple(leaf.name.split('/')), macro)
    elif getattr(leaf.target, 'is_written_out', False):
      value = self._write_out(leaf, scope, key)
    elif leaf.called:
      value = self._call(leaf.target, leaf.scope or scope, source)
    else:
      self.calls.setdefault((leaf.target, leaf.scope or scope, False))
      arguments = self._arguments(leaf.target, leaf.scope or scope)
      value = Partial(leaf.target, **arguments) if arguments else leaf.target
    self._path.pop()
    return value

  def _write_out(self, leaf: Reference, scope: tuple[str, ...], key: Key) -> Any:
    """Calls a function that reads files, and puts what it returns, a dataclass, in its place.

    The fields that nothing binds are bound to the result's, so that what is saved needs no file.
    """
    used, calls, source = set(self.used), dict(self.calls), self.bindings[key].source
    retired = self._retired()  # by this reference itself, if it took another's place
    result = self._call(leaf.target, leaf.scope or scope, source)
    self.spent |= self.used - used | retired
    self.used, self.calls = used, calls
    given = frozenset(self.bindings) - retired
    reference = self._bind_fields(result, source, {}, given)
    binding = self.bindings[key]
    self.bindings[key] = dataclasses.replace(binding, value=transform(
        binding.value, lambda other: reference if other == leaf else other))
    return self._leaf(reference, scope, key)

  def _bind_fields(self, result: Any, source: str, seen: dict[Any, Any], given: frozenset[Key],
                   scope: tuple[str, ...] = ()) -> Reference:
    """A reference that builds `result`; another of a class that was seen has a scope of its own."""
    target = type(result)
    scope = scope if seen.setdefault(target, result) != result else ()
    self.origins.setdefault(target, (target.__module__, target.__qualname__))
    for field in dataclasses.fields(result):
      value, key = getattr(result, field.name), Key('/'.join(scope), target, field.name)
      is_given = key in given or key._replace(scope='') in given
      is_default = not scope and value == field.default and key not in self.bindings
      if not field.init or is_given or is_default:
        continue
      if dataclasses.is_dataclass(value):
        value = self._bind_fields(value, source, seen, given, (*scope, field.name))
      self.add(key, value, source)
    return Reference(self.name(target), scope, True, target)

  def _retired(self) -> set[Key]:
    """Finds the bindings that served a value which a later binding replaced.

    An experiment that puts another optimiser in the place of the run's need not unbind the first
    one's fields. A binding written after the replacement has no such excuse.
    """
    retired: set[Key] = set()
    for value, order in self.overridden:
      stack = leaves(value)
      while stack:
        leaf = stack.pop()
        for key, binding in self.bindings.items():
          meant = (key.target is None and isinstance(leaf, Macro) and key.name == leaf.name or
                   key.target is not None and isinstance(leaf, Reference)
                   and key.target is leaf.target)
          if meant and binding.order < order and key not in retired:
            retired.add(key)
            stack.extend(leaves(binding.value))
    return retired

  def _refuse_unused(self) -> None:
    excused = self.used | self.spent | self.lent | self._retired()
    unused = [k for k in self.bindings if k not in excused]
    # A macro that only an unused binding refers to is a consequence: name the cause first.
    for key in sorted(unused, key=lambda k: k.target is None):
      binding, name = self.bindings[key], self.key_name(key)
      seen = {target for target, _, _ in self.calls}
      if key.target is None:
        known, why = (), 'every use of it was replaced'
      else:  # The same parameter of what is used, for one who named the wrong class or scope.
        known = {f'{self.name(t)}.{key.name}' for t in seen
                 if key.name in (config_types.parameters(t) or ())}
        why = ('no such scope is entered' if key.target in seen else
               f'{self.name(self.root)} refers to no {self.name(key.target)}')
      raise UserError(f'{binding.source}: {name}={self.text(binding.value)} is never used: {why}'
                      + config_types.suggest(name, known, 'remove the binding'))
