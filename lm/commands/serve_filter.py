"""The worker of `lm serve` that judges texts: loads what it judges by, and answers jobs."""
import functools
import json
import math
import pathlib
import sys
from typing import Any

from lm.errors import UserError
from lm.serving import filters, worker


def load(spec: dict[str, Any]) -> filters.Filter:
  """The filter of a server.

  Args:
    spec: blocklist, a file, or None; redact, whether; harm_filter, the directory of a run or an
      artefact, or None; threshold; max_batch, latency: of the classifier.

  Raises:
    UserError: a file or directory is not what it should be, or a package is missing.
  """
  words = filters.Words(spec['blocklist']) if spec['blocklist'] else None
  privacy = filters.Privacy() if spec['redact'] else None
  directory, threshold, classifier = spec['harm_filter'], spec['threshold'], None
  if directory:
    from lm.commands import serve_worker  # late: a list of words needs no JAX
    classifier = serve_worker.load({**spec, 'directory': directory, 'num_rows': None,
                                    'cache_tokens': None})
    if classifier.abilities != ('classify',):
      raise UserError(f'--harm_filter={directory} can {", ".join(classifier.abilities)}; give a '
                      'classifier')
  return filters.Filter(words, privacy, classifier, threshold,
                        measured(pathlib.Path(directory), threshold) if directory else None)


def measured(directory: pathlib.Path, threshold: float) -> list[dict[str, Any]]:
  """Precision and recall of harmful texts at a threshold, from each of a run's predictions.

  Returns:
    task, split, examples, precision, recall; [] where no predictions stand, as in an artefact.
  """
  from lm.evaluation.metrics import contract
  found = []
  for path in sorted((directory / 'predictions').glob('*.jsonl')):
    header, rows = contract.read(path)
    if header['kind'] != 'classification' or filters.HARMFUL not in (header['labels'] or ()):
      continue
    place = header['labels'].index(filters.HARMFUL)
    pairs = [(row['targets'] == filters.HARMFUL, math.exp(row['scores'][place]) >= threshold)
             for row in rows]
    right = pairs.count((True, True))
    share = lambda wrong: right / (right + pairs.count(wrong)) if right else 0.0
    found.append({'task': header['task'], 'split': header['split'], 'examples': len(rows),
                  'precision': share((False, True)), 'recall': share((True, False))})
  return found


if __name__ == '__main__':
  worker.main(functools.partial(load, json.loads(sys.argv[1])))
