"""Bindings shown to people and written to files: rows for `lm explain`, text for `config.gin`."""

from typing import Any, Iterator, NamedTuple

from lm import config_types
from lm import config_values
from lm.config_build import Bindings, Key
from lm.config_values import Macro, leaves, transform


class Row(NamedTuple):
  """One line of an explanation: `value` in gin's syntax, `source` a `file:line` or `default`."""
  name: str
  value: str
  source: str


def rows(bindings: Bindings) -> Iterator[tuple[Row, set[str]]]:
  """Yields a row for each macro and parameter that was used, with the macros in its value."""
  macros = bindings.macros()

  def resolve(leaf: Any) -> Any:
    return transform(macros[leaf.name].value, resolve) if isinstance(leaf, Macro) else leaf

  def row(key: Key) -> tuple[Row, set[str]]:
    binding = bindings.bindings[key]
    via, stack = set(), leaves(binding.value)
    while stack:
      leaf = stack.pop()
      if isinstance(leaf, Macro):
        via.add(leaf.name)
        stack.extend(leaves(macros[leaf.name].value))
    value = bindings.text(transform(binding.value, resolve))
    return Row(bindings.key_name(key), value, bindings.trace(binding).source), via

  seen = set()
  for key in bindings.bindings:
    if key.target is None and key in bindings.used:
      yield row(key)
  for target, scope, _ in bindings.calls:
    bound, default = bindings.bound(target, scope), config_types.defaults(target)
    for name in dict.fromkeys([*(config_types.parameters(target) or ()), *bound]):
      key = bound[name][-1] if name in bound else Key('', target, name)
      if key in seen:
        continue
      seen.add(key)
      if name in bound:
        yield row(key)
      elif name in default:
        yield Row(bindings.key_name(key), bindings.text(default[name]), 'default'), set()


def gin_text(bindings: Bindings) -> str:
  """Writes what the built object used as one gin file: imports, macros, parameters."""
  aliases: dict[str, str] = {}  # Module -> the name that the file binds it to.

  def name_of(target) -> str:
    module, attribute = bindings.origins[target]
    if module not in aliases:
      base = alias = module.rpartition('.')[2]
      while alias in aliases.values() or alias == 'gin':  # gin keeps its own name to itself.
        alias = f'{base}{len(aliases) + 1}'
      aliases[module] = alias
    return f'{aliases[module]}.{attribute}'

  # A binding that one of a narrower scope hid everywhere was not evaluated, nor was its macro.
  hidden = lambda value: any(isinstance(leaf, Macro) and Key('', None, leaf.name) not in
                             bindings.used for leaf in leaves(value))
  used = {k: config_values.text(b.value, name_of) for k, b in bindings.bindings.items()
          if k in bindings.used and not hidden(b.value)}
  macros = [f'{key.name} = {value}' for key, value in used.items() if key.target is None]
  blocks = []
  for target in dict.fromkeys(target for target, _, _ in bindings.calls):
    # An uncalled function gets no defaults: with them it would no longer be the function itself.
    called = any(called for other, _, called in bindings.calls if other is target)
    lines = {Key('', target, name): config_values.text(value, name_of)
             for name, value in config_types.defaults(target).items()
             if called and config_values.is_literal(value)}
    lines |= {key: value for key, value in used.items() if key.target is target}
    blocks += ['', *(f'{key.scope}{"/" if key.scope else ""}{name_of(target)}.{key.name} = {value}'
                     for key, value in lines.items())] if lines else []
  imports = []
  for module, alias in sorted(aliases.items()):
    parent, _, last = module.rpartition('.')
    imports.append((f'from {parent} import {last}' if parent else f'import {module}')
                   + (f' as {alias}' if alias != last else ''))
  head = '# The whole configuration of a run. Override a macro by --gin.NAME=VALUE.'
  return '\n'.join([head, 'from __gin__ import dynamic_registration', *imports, '',
                    *macros, *blocks, ''])
