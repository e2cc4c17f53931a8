"""Metrics of continuations by their log-likelihood, as lm-evaluation-harness defines them.

`accuracy` takes the largest log-likelihood (the harness's `acc`), `accuracy_bytes` the largest a
byte of UTF-8 (`acc_bytes`), `accuracy_norm` the largest a character (`acc_norm`; it needs a field
'characters', and is `accuracy_bytes` where all is ASCII); of a tie the first. Lengths are of the
continuation without the space before it. Of rows with one continuation (LAMBADA) `accuracy` is the
share that greedy decoding gives, `perplexity` is exp(-mean log-likelihood), a continuation counting
as one.

Reference: Gao et al. 2024, arXiv:2405.14782, section 3; `ConfigurableTask.process_results` of
lm-evaluation-harness 0.4.
"""
from collections.abc import Sequence
import math

import numpy as np

from lm.errors import UserError
from lm.evaluation.metrics.contract import Header, name, numbers, Row, Scorer


def scorer(header: Header, rows: Sequence[Row]) -> Scorer:
  """Of multiple choice.

  Raises:
    UserError: a row has not as many lengths as scores, or some rows have one continuation and
      others several.
  """
  for number, row in enumerate(rows):
    numbers(header, [row], 'scores', len(row['lengths']))
    if not 0 <= row['targets'] < len(row['scores']):
      raise UserError(f'row {number} of {name(header)} has the target {row["targets"]}, which is '
                      f'none of its {len(row["scores"])} continuations; count from 0')
  single = {len(row['scores']) == 1 for row in rows}
  if len(single) > 1:
    raise UserError(f'{name(header)} has rows with one continuation and rows with several; make '
                    'two tasks of them')
  return _one(header, rows) if single.pop() else _several(rows)


def _several(rows):
  lengths = {'accuracy': lambda row: 1.0,
             'accuracy_bytes': lambda row: np.maximum(row['lengths'], 1.0)}
  if all('characters' in row for row in rows):
    lengths['accuracy_norm'] = lambda row: np.maximum(row['characters'], 1.0)
  right = {key: np.array([np.argmax(np.array(row['scores'], np.float64) / of(row))
                          == row['targets'] for row in rows]) for key, of in lengths.items()}
  mean = lambda i: {key: float(np.mean(x[i])) for key, x in right.items()}
  return Scorer(right['accuracy'], 'accuracy', mean, notes={
      'accuracy_bytes': 'log-likelihood by UTF-8 bytes of the continuation'})


def _one(header, rows):
  log_likelihood = numbers(header, rows, 'scores', 1)[:, 0]
  greedy = np.array([_is_greedy(header, row) for row in rows])

  def score(indices):
    nats = -float(np.mean(log_likelihood[indices]))
    found = {'accuracy': float(np.mean(greedy[indices]))}
    return found | ({'perplexity': math.exp(nats)} if nats < 700 else {})

  return Scorer(greedy, 'accuracy', score, notes={
      'accuracy': 'greedy decoding gives the continuation',
      'perplexity': 'exp(-mean log-likelihood of a whole continuation)'})


def _is_greedy(header, row):
  try:
    return bool(row['greedy'][0])
  except (KeyError, TypeError, IndexError) as error:
    raise UserError(f'id {row.get("id")!r} of {name(header)} has no \'greedy\', which rows with '
                    'one continuation need; evaluate again') from error
