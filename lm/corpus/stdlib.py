"""The embedded corpus: Python's own standard library, read from the running interpreter.

Real text that every machine has, in three kinds of documents: the language's documentation
(`topics/<topic>`), the docstrings of modules written in C (`docs/<module>`, no source to read), and
the source of the modules written in Python (`lib/<path>`). Left out: tests (fragments and data, not
prose), installed packages, and what a machine wrote: the build's own configuration, which differs
from machine to machine, and the tables of `encodings`, `pydoc_data` and `lib2to3`.

The same interpreter version gives the same documents, byte for byte, in every process.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
from pathlib import Path
import re
import sys
import sysconfig
from typing import Iterator
import warnings

from lm.corpus.document import Document
from lm.errors import UserError

_SKIPPED_DIRECTORIES = frozenset((
    'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__', 'pydoc_data',
    'lib-dynload',
))  # fmt: skip
# Written by a build or by a generator: not text that anyone wrote, and partly full of build paths.
_GENERATED = re.compile(
    r'^(config-.*/.*|_sysconfigdata.*|_sysconfig_vars.*|__phello__.*|lib2to3/pgen2/.*\.pickle'
    r'|encodings/(cp|iso8859|koi8|mac_|kz1048|ptcp154|tis_620|hp_roman8|palmos).*)$'
)
# Importing these touches the terminal, a display or a device.
_UNSAFE_TO_IMPORT = frozenset(
    ('readline', '_tkinter', '_curses', '_curses_panel', 'nis', 'ossaudiodev')
)
_SHORTEST = 256  # characters; an `__init__.py` of one comment is no document to be tested on
_ADDRESS = re.compile(r' at 0x[0-9a-fA-F]+')


def documents() -> Iterator[Document]:
  """Streams the standard library: documentation topics, docstrings of C modules, source of the
  rest.

  Raises:
    UserError: this Python comes without the source of its library.
  """
  yield from _topics()
  for name in _c_modules():
    text = _docstrings(name)
    if len(text) >= _SHORTEST:
      yield Document(f'docs/{name}', text)
  for path in _sources():
    text = path.read_text(encoding='utf-8', errors='strict')
    if len(text) >= _SHORTEST:
      yield Document('lib/' + path.relative_to(_root()).as_posix(), text)


def stamp() -> str:
  """Returns a digest of the library's names, sizes and times, by which to remember its content."""
  digest = hashlib.sha256(repr((sys.version, sys.implementation.name)).encode())
  binary = [Path(sys.executable), *sorted((_root() / 'lib-dynload').glob('*'))]
  for path in [*_sources(), *binary, _root() / 'pydoc_data' / 'topics.py', Path(__file__)]:
    if path.exists():
      stat = path.stat()
      digest.update(f'{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n'.encode())
  return digest.hexdigest()


def _root() -> Path:
  return Path(sysconfig.get_path('stdlib'))


def _sources() -> list[Path]:
  root = _root()
  found = []
  for directory, subdirectories, files in os.walk(root):
    subdirectories[:] = sorted(set(subdirectories) - _SKIPPED_DIRECTORIES)
    for file in files:
      path = Path(directory, file)
      if file.endswith('.py') and not _GENERATED.match(path.relative_to(root).as_posix()):
        found.append(path)
  if not found:
    raise UserError(
        f'This Python has no library source under {root}, so there is no embedded corpus; bind'
        ' FILES to text of your own.'
    )
  return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _topics() -> Iterator[Document]:
  try:
    from pydoc_data import topics
  except ImportError:  # Some distributions ship it apart, in their documentation package.
    return
  for name, text in sorted(topics.topics.items()):
    if len(text) >= _SHORTEST:
      yield Document(f'topics/{name}', text)


def _c_modules() -> list[str]:
  """Names the modules without Python source, less those made for CPython's own tests."""
  extensions = (path.name.split('.')[0] for path in (_root() / 'lib-dynload').glob('*.so'))
  candidates = {*sys.builtin_module_names, *extensions} - _UNSAFE_TO_IMPORT
  return sorted(name for name in candidates if not re.match(r'_?(test|xx)|_ctypes_test', name))


def _docstrings(name: str) -> str:
  """Renders docstrings like `help()` does, less values and paths, which vary by machine."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      module = importlib.import_module(name)
  except Exception:  # An extension whose shared library is missing here; nothing to read then.
    return ''
  blocks = [f'{name}\n{"=" * len(name)}\n', _clean(module.__doc__)]
  members = vars(module)
  for key in sorted(key for key in members if not key.startswith('__')):
    # `sys.excepthook` may be a debugger's; `sys.__excepthook__` is Python's own.
    member = members.get(f'__{key}__', members[key])
    if getattr(member, '__module__', name) not in (name, 'builtins', None):
      continue
    if inspect.isclass(member):
      blocks.append(_class(key, member))
    elif inspect.isroutine(member):
      blocks.append(_routine(key, member))
  body = [block for block in blocks if block.strip()]
  return _ADDRESS.sub('', '\n'.join(body)) if len(body) > 1 else ''


def _class(name: str, cls: type) -> str:
  blocks = [f'class {name}\n', _indent(_clean(cls.__doc__))]
  for key, member in sorted(vars(cls).items()):
    documented = inspect.isroutine(member) or inspect.isgetsetdescriptor(member)
    if documented and not key.startswith('__'):
      blocks.append(_indent(_routine(key, member)))
  return '\n'.join(block for block in blocks if block.strip())


def _routine(name: str, routine: object) -> str:
  text = _clean(getattr(routine, '__doc__', None))
  if not text:
    return ''
  try:
    signature = str(inspect.signature(routine)) if callable(routine) else ''
  except (TypeError, ValueError):  # Written in C without a text signature.
    signature = '(...)'
  return f'{name}{signature}\n\n{_indent(text)}'


def _clean(text: object) -> str:
  return inspect.cleandoc(text).rstrip() + '\n' if isinstance(text, str) and text.strip() else ''


def _indent(text: str) -> str:
  return ''.join('    ' + line if line.strip() else line for line in text.splitlines(keepends=True))


