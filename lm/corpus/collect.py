"""The user's own files as a stream of documents.

`.jsonl` files hold one document a line under the key `text`; every other file is one document.
Either may be compressed (`.gz`, `.zst`). Lines of `.jsonl` are read one at a time, so memory holds
one document, never the corpus.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
from typing import Iterator, Union
import zlib

from lm.corpus.document import Document
from lm.errors import UserError

Patterns = Union[str, tuple[str, ...]]
_READ_BYTES = 1 << 16  # Of a compressed file at a time.


def paths(patterns: Patterns) -> list[str]:
  """Returns the files that the glob patterns match, sorted, each once (`**` goes into
  subdirectories).

  Raises:
    UserError: a pattern matches no file.
  """
  found: set[str] = set()
  for pattern in (patterns,) if isinstance(patterns, str) else tuple(patterns):
    matches = [
        os.path.realpath(path)
        for path in glob.glob(os.path.expanduser(pattern), recursive=True)
        if os.path.isfile(path)
    ]
    if not matches:
      raise UserError(
          f'FILES pattern {pattern!r} matches no file (looked from {os.getcwd()}); give a path or a'
          " glob such as 'books/*.txt'."
      )
    found.update(matches)
  if not found:
    raise UserError("FILES=() names no file; give a path or a glob such as 'books/*.txt'.")
  return sorted(found)


def names(files: list[str]) -> list[str]:
  """Returns short names, relative to the files' common directory.

  So the same files give the same names, hence the same held-out split, wherever they lie.
  """
  root = os.path.commonpath([os.path.dirname(path) for path in files])
  return [os.path.relpath(path, root).replace(os.sep, '/') for path in files]


def documents(patterns: Patterns) -> Iterator[Document]:
  """Streams the non-empty documents of all matching files, in the order of their paths.

  Args:
    patterns: one glob pattern or a tuple of them.

  Yields:
    `Document(name, text)`; the name of a `.jsonl` document is `file:line`, counted from 1.

  Raises:
    UserError: no match, not UTF-8, a broken line of JSON, a truncated archive, or nothing but empty
      documents.
  """
  files = paths(patterns)
  count = 0
  for path, name in zip(files, names(files)):
    read = _read_jsonl if _stem(path).endswith('.jsonl') else _read_text
    for document in read(path, name):
      if document.text.strip():
        count += 1
        yield document
  if not count:
    raise UserError(
        f'The corpus is empty: no document with text in {len(files)} file(s) matching {patterns!r};'
        ' name files that hold text.'
    )


def _stem(path: str) -> str:
  """Returns the path without the suffix of its compression."""
  root, suffix = os.path.splitext(path)
  return root if suffix in ('.gz', '.zst') else path


def _lines(path: str) -> Iterator[bytes]:
  """Streams a file's lines, decompressed, and names the file when the archive is broken."""
  try:
    if path.endswith('.zst'):
      yield from _zst_lines(path)
    else:
      with gzip.open(path, 'rb') if path.endswith('.gz') else open(path, 'rb') as file:
        yield from file
  except PermissionError as error:
    raise UserError(f'{path} cannot be read ({error.strerror}); mend its permissions.') from error
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise UserError(_broken(path, error)) from error


def _broken(path: str, why: object) -> str:
  return f'{path} is truncated or damaged ({why}); copy or download it again.'


def _zst_lines(path: str) -> Iterator[bytes]:
  """Streams the lines of all frames; zstandard's own reader is silent when one is cut short."""
  import zstandard  # Only for those who have such files.

  frame, tail = zstandard.ZstdDecompressor().decompressobj(), b''
  with open(path, 'rb') as file:
    try:
      while data := file.read(_READ_BYTES):
        while data:
          if frame.eof:
            frame = zstandard.ZstdDecompressor().decompressobj()
          *lines, tail = (tail + frame.decompress(data)).split(b'\n')
          data = frame.unused_data
          for line in lines:
            yield line + b'\n'
    except zstandard.ZstdError as error:
      raise UserError(_broken(path, error)) from error
  if not frame.eof:
    raise UserError(_broken(path, 'it ends in the middle of a frame'))
  if tail:
    yield tail


def _decode(data: bytes, path: str, offset: int) -> str:
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as error:
    byte = data[error.start]
    raise UserError(
        f'{path} is not UTF-8: byte 0x{byte:02x} at offset {offset + error.start}; convert it, for'
        f' example with `iconv -f LATIN1 -t UTF-8 {path}`.'
    ) from error


def _read_text(path: str, name: str) -> Iterator[Document]:
  yield Document(name, _decode(b''.join(_lines(path)), path, 0))


def _read_jsonl(path: str, name: str) -> Iterator[Document]:
  offset = 0
  for number, line in enumerate(_lines(path), start=1):
    text = _decode(line, path, offset)
    offset += len(line)
    if not text.strip():
      continue
    try:
      record = json.loads(text)
    except json.JSONDecodeError as error:
      raise UserError(
          f'{path}:{number} is not JSON ({error.msg} at column {error.colno}); each line must be an'
          ' object such as {"text": "..."}.'
      ) from error
    value = record.get('text') if isinstance(record, dict) else None
    if not isinstance(value, str):
      raise UserError(
          f'{path}:{number} has no string under the key "text"; each line must be an object such as'
          ' {"text": "..."}.'
      )
    yield Document(f'{name}:{number}', _well_formed(value, f'{path}:{number}'))


def _well_formed(text: str, where: str) -> str:
  """Refuses lone surrogates, which JSON can spell (`\\ud800`) and UTF-8 cannot."""
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as error:
    raise UserError(
        f'{where} holds a lone surrogate U+{ord(text[error.start]):04X}, which is not a character;'
        ' remove it.'
    ) from error
  return text
