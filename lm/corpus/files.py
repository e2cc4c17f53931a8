"""Files that appear whole or not at all, however a process ends."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from lm.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
  """Gives a path to write to that becomes `path` at the end of the block, and only if it ends well.

  Raises:
    UserError: the disk is full or the directory cannot be written.
  """
  temporary = path.with_name(f'{path.name}.{os.getpid()}.part')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.touch()  # Says what is wrong with the directory; ArrayRecord's writer does not.
    yield temporary
    with open(temporary, 'rb') as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    why = 'the disk is full (or a quota is spent)' if error.errno in _FULL else (
        error.strerror or error)
    raise UserError(f'{path} cannot be written: {why}; free space or choose another --run_dir, and'
                    ' run the same command again. What is finished is kept.') from error
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)


def write(path: Path, data: bytes | str) -> None:
  """Writes a small file."""
  with whole(path) as temporary:
    temporary.write_bytes(data.encode('utf-8') if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
  """Writes a value as JSON; equal values give equal bytes, whatever the order of their keys."""
  write(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + '\n')


def read_json(path: Path) -> Any:
  """Reads a JSON file; None if there is none."""
  try:
    return json.loads(path.read_text('utf-8'))
  except FileNotFoundError:
    return None


def write_array(path: Path, array: np.ndarray) -> None:
  """Writes an array, to be read by `np.load(path, mmap_mode='r')`."""
  with whole(path) as temporary:
    with open(temporary, 'wb') as file:
      np.save(file, array, allow_pickle=False)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
  """Holds a lock while the body runs.

  Raises:
    UserError: another process holds it.
  """
  with open(path, 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(f'{path.parent} is being written by another process; wait for it or choose '
                      'another --run_dir.') from error
    yield
