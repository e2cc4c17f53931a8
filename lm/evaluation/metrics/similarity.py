"""Metrics of a number an example, by SciPy: Pearson's and Spearman's correlation."""
from collections.abc import Sequence

import numpy as np

from lm.evaluation.metrics.contract import Header, numbers, Row, Scorer


def scorer(header: Header, rows: Sequence[Row]) -> Scorer:
  """Of similarity; a correlation with a constant is not defined and absent.

  Raises:
    UserError: a target or prediction is not a finite number.
  """
  from scipy import stats
  targets, predictions = (numbers(header, rows, field) for field in ('targets', 'prediction'))

  def score(indices):
    both = targets[indices], predictions[indices]
    if any(len(np.unique(values)) < 2 for values in both):
      return {}
    found = {'pearson': stats.pearsonr(*both).statistic,
             'spearman': stats.spearmanr(*both).statistic}
    return {key: float(value) for key, value in found.items()}

  constant = [field for field, values in (('targets', targets), ('predictions', predictions))
              if len(np.unique(values)) < 2]
  notes = {'pearson': f'absent, as spearman: all {constant[0]} are equal'} if constant else {}
  return Scorer(-np.abs(targets - predictions), '-|error|', score, notes=notes)
