"""Which documents there are, what they contain in one digest, and which of them are held out.

The rule is one for every corpus: a document is held out if the hash of its name, read as a number
in [0, 1), lies below `held_out_fraction`. It knows nothing of other documents, so it is the same in
every process and hardly moves as a corpus grows. Three cases of few documents: if it would hold out
none, the document of the lowest hash is held out; if it would hold out all, that of the highest is
not; and of a single document the last tenth, cut at a line's end, becomes the document `name#tail`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
import time
from typing import Iterator, NamedTuple, Union

from lm.corpus import collect
from lm.corpus import stdlib
from lm.corpus.document import Document
from lm.errors import UserError

Files = Union[str, tuple[str, ...], None]
TRAIN, VALIDATION = 'train', 'validation'
_TAIL = 0.1  # Share of a single document that is held out.


class Survey(NamedTuple):
  """What one pass over the corpus finds: all that the held-out rule needs beside a name."""

  num_documents: int
  num_bytes: int
  lowest: str
  highest: str
  num_below: int


def documents(files: Files) -> Iterator[Document]:
  """Streams the corpus: the user's files, or Python's standard library if `files` is None."""
  return stdlib.documents() if files is None else collect.documents(files)


def position(name: str) -> float:
  """Returns the hash of a name as a number in [0, 1)."""
  digest = hashlib.sha256(name.encode('utf-8', 'surrogateescape')).digest()
  return int.from_bytes(digest[:6], 'big') / 2**48


def survey(stream: Iterator[Document], fraction: float) -> Survey:
  """Reads a stream to its end and returns what the rule needs."""
  count = size = below = 0
  lowest, highest = (2.0, ''), (-1.0, '')
  for document in stream:
    key = (position(document.name), document.name)
    lowest, highest = min(lowest, key), max(highest, key)
    count, size = count + 1, size + len(document.text.encode('utf-8'))
    below += key[0] < fraction
  return Survey(count, size, lowest[1], highest[1], below)


def split(
    stream: Iterator[Document], rule: Survey, fraction: float
) -> Iterator[tuple[str, Document]]:
  """Yields ('train' | 'validation', document) in the order of the stream.

  Raises:
    UserError: the only document is too short to be cut in two.
  """
  for document in stream:
    if rule.num_documents == 1:
      head, tail = _cut(document)
      yield TRAIN, head
      yield VALIDATION, tail
      continue
    held_out = position(document.name) < fraction
    if rule.num_below == 0:
      held_out = document.name == rule.lowest
    elif rule.num_below == rule.num_documents:
      held_out = document.name != rule.highest
    yield VALIDATION if held_out else TRAIN, document


def _cut(document: Document) -> tuple[Document, Document]:
  name, text = document.name, document.text
  at = int(len(text) * (1 - _TAIL))
  border = text.rfind('\n', 0, at) + 1
  if border < len(text) // 2:  # No line ends near there: a word may.
    border = text.rfind(' ', 0, at) + 1
  border = border if border >= len(text) // 2 else at
  head, tail = text[:border], text[border:]
  if not head.strip() or not tail.strip():
    raise UserError(
        f'{name} is the only document and its {len(text)} characters are too few to hold some out;'
        ' add text.'
    )
  return (dataclasses.replace(document, text=head),
          dataclasses.replace(document, name=f'{name}#tail', text=tail))  # fmt: skip


def fingerprint(files: Files, cache_dir: Path) -> str:
  """Returns a digest of the names and contents of all files.

  A file's digest is remembered by (path, size, time of change), so that a standing corpus is not
  read again; a file changed in the last two seconds is not remembered, since it may change again
  within the clock's resolution.

  Raises:
    UserError: a pattern matches no file, or a file cannot be read.
  """
  memo_path = cache_dir / 'fingerprints.json'
  try:
    memo = json.loads(memo_path.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    memo = {}
  known = dict(memo)
  if files is None:
    stamp = stdlib.stamp()
    if memo.get('stdlib', [None])[0] != stamp:
      memo['stdlib'] = [stamp, _digest_documents(stdlib.documents())]
    result = memo['stdlib'][1]
  else:
    paths = collect.paths(files)
    whole = hashlib.sha256()
    for path, name in zip(paths, collect.names(paths)):
      whole.update(json.dumps([name, _digest_file(path, memo)]).encode('utf-8'))
    result = whole.hexdigest()
  if memo != known:
    _remember(memo_path, memo)
  return result


def _digest_documents(stream: Iterator[Document]) -> str:
  whole = hashlib.sha256()
  for document in stream:
    whole.update(json.dumps([document.name, document.text]).encode('utf-8'))
  return whole.hexdigest()


def _digest_file(path: str, memo: dict[str, list]) -> str:
  try:
    stat = os.stat(path)
    key = [stat.st_size, stat.st_mtime_ns]
    if memo.get(path, [])[:2] == key:
      return memo[path][2]
    with open(path, 'rb') as file:
      digest = hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError as error:
    raise UserError(f'{path} cannot be read ({error.strerror}); mend its permissions.') from error
  if time.time_ns() - stat.st_mtime_ns > 2_000_000_000:
    memo[path] = [*key, digest]
  return digest


def _remember(path: Path, memo: dict[str, list]) -> None:
  """Writes the memo; it only saves time, so a directory that cannot be written is no error here."""
  temporary = path.with_name(f'{path.name}.{os.getpid()}')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(memo), encoding='utf-8')
    os.replace(temporary, path)
  except OSError:
    temporary.unlink(missing_ok=True)
