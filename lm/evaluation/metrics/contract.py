"""What predictions look like, on disk and in memory, and what is made of them.

`R/predictions/<task>-<split>.jsonl` holds a row an example in the order of the split, {'id',
'inputs', 'targets', 'prediction', 'scores'}; `<task>-<split>.json` beside it the header, {'task',
'kind', 'labels', 'split', 'step', 'metrics', ...}. What the fields hold depends on the kind:

    kind                targets          prediction    scores
    classification      label            label         log p of each of header['labels']
    similarity          number           number
    tagging             tags             tags
    span_extraction     answers          text
    generation          references       text
    multiple_choice     index            index         log-likelihood of each continuation; also
                                                       'lengths' (UTF-8 bytes of each) and 'greedy'
    retrieval           document ids     ranked ids    of these ids
    language_modelling                                 nats (positive); also 'words', 'tokens',
                                                       'bytes'
"""
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from lm.errors import UserError

Header = Mapping[str, Any]
Row = Mapping[str, Any]

FIELDS = {
    'classification': ('targets', 'prediction'), 'similarity': ('targets', 'prediction'),
    'tagging': ('targets', 'prediction'), 'span_extraction': ('targets', 'prediction'),
    'generation': ('targets', 'prediction'),
    'multiple_choice': ('targets', 'prediction', 'scores', 'lengths'),
    'retrieval': ('targets', 'prediction'),
    'language_modelling': ('scores', 'words', 'tokens', 'bytes')}


@dataclasses.dataclass(frozen=True)
class Scorer:
  """The metrics of a task's predictions, or of any choice of them: the work that an example needs
  is done once, so that a thousand resamples cost little more than one evaluation.

  each: how well each example is done by itself, the more the better [examples]; bool where there is
    right and wrong.
  each_is: its name; that of a metric where this is the mean of `each` (or 100 times it).
  score: from the indices of examples, int [any number], with repetitions, to metrics by name; what
    is not defined for these examples is absent, never NaN.
  whole: metrics that are not for resamples: a text that stands there twice would change them, or
    they take too long.
  notes: what a reader must know to cite a metric, by its name: signatures and conventions; also why
    a metric is absent.
  """
  each: np.ndarray
  each_is: str
  score: Callable[[np.ndarray], dict[str, float]]
  whole: Mapping[str, float] = dataclasses.field(default_factory=dict)
  notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def size(self) -> int:
    """The number of examples."""
    return len(self.each)

  def metrics(self) -> dict[str, float]:
    """Of all examples."""
    return {**self.score(np.arange(self.size)), **self.whole}


def read(path: str | pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """The header and the rows of predictions; `path` is that of either file.

  Raises:
    UserError: a file is absent, torn or not of predictions.
  """
  path = pathlib.Path(path)
  place = path.with_suffix('.jsonl')
  try:
    header = json.loads(path.with_suffix('.json').read_text('utf-8'))
    # Not by splitlines, which also cuts at separators within a text.
    lines = place.read_text('utf-8').removesuffix('\n').split('\n')
  except OSError as error:
    raise UserError(f'{error.filename} cannot be read ({error.strerror}); predictions are a .jsonl '
                    'and a .json beside it, which `lm evaluate --tasks` writes') from error
  except ValueError as error:
    raise UserError(f'{path.with_suffix(".json")} or its .jsonl is not what its name says '
                    f'({error}); delete both and evaluate again') from error
  rows = []
  for number, line in enumerate(lines if lines != [''] else [], 1):
    try:
      rows.append(json.loads(line))
    except ValueError as error:
      raise UserError(f'{place}:{number} is not JSON ({error}); evaluate again') from error
  check(header, rows)
  return header, rows


def check(header: Header, rows: Sequence[Row]):
  """Refuses predictions of which no metric can be computed.

  Raises:
    UserError: an unknown kind, no rows, or a row without a field of its kind.
  """
  kind = header.get('kind')
  if kind not in FIELDS:
    raise UserError(f'predictions of kind {kind!r} have no metrics; the kinds are '
                    f'{", ".join(FIELDS)}')
  if not rows:
    raise UserError(f'there are no predictions of {name(header)} to compute metrics from; evaluate '
                    'a split that has examples')
  for number, row in enumerate(rows):
    lost = [field for field in FIELDS[kind] if row.get(field) is None]
    if lost:
      raise UserError(f'row {number} (id {row.get("id")!r}) of {name(header)} has no {lost[0]!r}, '
                      f'which predictions of kind {kind!r} need; evaluate again')


def name(header: Header) -> str:
  """Of a task and its split, for a message."""
  return f'{header.get("task", "a task")}, split {header.get("split", "unknown")}'


def numbers(header: Header, rows: Sequence[Row], field: str, columns: int | None = None
            ) -> np.ndarray:
  """A field of all rows: float64 [rows], or with `columns` [rows, columns].

  Raises:
    UserError: a value is not a finite number, or there are not so many.
  """
  values = []
  for number, row in enumerate(rows):
    found = row[field] if columns is not None else [row[field]]
    said = f'row {number} (id {row.get("id")!r}) of {name(header)} has {field}={row[field]!r}'
    if columns is not None and (not isinstance(found, Sequence) or len(found) != columns):
      raise UserError(f'{said}, which must be {columns} numbers; evaluate again')
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in found):
      raise UserError(f'{said}, which is not finite; find the step at which the weights broke')
    values.append(found)
  array = np.array(values, np.float64)
  return array if columns is not None else array[:, 0]
