"""Tells a good file tree from a damaged one, by a digest of every file."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pathlib

DIGESTS = 'digests.json'


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes text so that, after a kill at any moment, the old or the new file stands, whole.

  Args:
    path: the file; its directory must exist.
    text: the new contents, written as UTF-8.

  Raises:
    OSError: the text could not be written; the old file is untouched.
  """
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    with open(temporary, 'w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise
  sync_directory(path.parent)


def sync_directory(directory: pathlib.Path) -> None:
  """Makes renames in a directory survive a power cut."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _digest(path: pathlib.Path) -> dict[str, int | str]:
  with open(path, 'rb') as file:
    # hashlib drops the interpreter lock, so a training step is not held up.
    digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    return {'bytes': file.tell(), 'blake2b': digest.hexdigest()}


def write_digests(directory: pathlib.Path) -> None:
  """Writes `digests.json`: the size in bytes and the BLAKE2b digest of every file below.

  Args:
    directory: a finished file tree.

  Raises:
    OSError: a file could not be read or the digests not be written.
  """
  files = sorted(path for path in directory.rglob('*') if path.is_file() and path.name != DIGESTS)
  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    digests = threads.map(_digest, files)
    table = {path.relative_to(directory).as_posix(): d for path, d in zip(files, digests)}
  write_atomically(directory / DIGESTS, json.dumps(table, indent=1))


def find_damage(directory: pathlib.Path) -> str | None:
  """Compares every file of a tree with its recorded digest.

  Args:
    directory: a tree in which `write_digests` wrote.

  Returns:
    None when every file is as it was written, else one clause that names the first file that is
    not, and what differs.
  """
  try:
    table = json.loads((directory / DIGESTS).read_text(encoding='utf-8'))
    expected = {name: (entry['bytes'], entry['blake2b']) for name, entry in table.items()}
  except FileNotFoundError:
    return f'{DIGESTS} is missing, so the checkpoint is incomplete'
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return f'{DIGESTS} cannot be read'
  if not expected:
    return f'{DIGESTS} lists no file'
  # Sizes first: they cost nothing and catch most damage before anything large is read.
  for name, (size, _) in expected.items():
    path = directory / name
    if not path.is_file():
      return f'{name} is missing'
    if path.stat().st_size != size:
      return f'{name} has {path.stat().st_size} bytes instead of {size}'
  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    for name, damage in zip(expected, threads.map(
        lambda item: _content_damage(directory / item[0], item[1][1]), expected.items())):
      if damage:
        return f'{name} {damage}'
  return None


def _content_damage(path: pathlib.Path, expected: str) -> str | None:
  try:
    found = _digest(path)['blake2b']
  except OSError as error:
    return f'cannot be read ({error.strerror})'
  return None if found == expected else 'has other contents than were written (digests differ)'
