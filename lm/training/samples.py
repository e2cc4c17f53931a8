"""What a model writes while it learns: samples.jsonl, one object a completion, with its step."""
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lm.errors import UserError
from lm.training import integrity

FILE = 'samples.jsonl'


def read(run_dir: pathlib.Path) -> list[dict[str, Any]]:
  """All of a run, in order, up to a line that a kill tore."""
  rows: list[dict[str, Any]] = []
  path = run_dir / FILE
  for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else ():
    try:
      rows.append(json.loads(line))
    except ValueError:
      break
  return rows


def write(run_dir: pathlib.Path, step: int, completions: Sequence[Mapping[str, Any]]):
  """Adds those of a step, in place of those of this step or later ones, which were run again.

  Raises:
    UserError: the disk is full; what stood before stays whole.
  """
  rows = [row for row in read(run_dir) if row['step'] < step]
  rows += [{'step': step, **completion} for completion in completions]
  try:
    integrity.write_atomically(run_dir / FILE, ''.join(
        json.dumps(row) + '\n' for row in rows))
  except OSError as error:
    raise UserError(f'{run_dir / FILE} cannot be written ({error.strerror}); free some space, then '
                    'start the same command again') from error
