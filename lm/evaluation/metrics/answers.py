"""Exact match and F1 of answers, as the official script of SQuAD counts them, in per cent.

Both are of normalised answers: lower case, without punctuation (ASCII), without the words a, an and
the, white space as one space; F1 is of the bags of words that spaces separate. Of several answers
the best counts, for each metric by itself. The rule of version 2.0 holds besides: answers that
normalise to nothing do not count, and a question without an answer has the answer '', which the
prediction meets if it normalises to nothing.

Reference: Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1; evaluate-v1.1.py and
evaluate-v2.0.py of https://rajpurkar.github.io/SQuAD-explorer. There is no package of it.
"""
import collections
from collections.abc import Sequence
import re
import string

import numpy as np

from lm.evaluation.metrics.contract import Header, Row, Scorer

_ARTICLES = re.compile(r'\b(a|an|the)\b')
_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)
NOTES = {'exact_match': 'in %, SQuAD 2.0: normalised, best of the answers; none is the empty one'}


def scorer(header: Header, rows: Sequence[Row]) -> Scorer:
  """Of span extraction."""
  del header
  answers = [list(filter(normalise, row['targets'])) or [''] for row in rows]
  values = np.array([[max(metric(row['prediction'], answer) for answer in expected)
                      for metric in (exact_match, f1)]
                     for row, expected in zip(rows, answers)], np.float64)

  def score(indices):
    # The script adds one answer after the other up.
    match, overlap = 100.0 * np.cumsum(values[indices], axis=0)[-1] / len(indices)
    return {'exact_match': float(match), 'f1': float(overlap)}

  return Scorer(values[:, 0] == 1, 'exact_match', score, notes=NOTES)


def normalise(text: str) -> str:
  """Lower case, no punctuation, no articles, single spaces; in this order."""
  return ' '.join(_ARTICLES.sub(' ', text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> bool:
  """Whether the normalised texts are the same."""
  return normalise(prediction) == normalise(answer)


def f1(prediction: str, answer: str) -> float:
  """Of the bags of words; of two empty ones 1, of one empty 0."""
  words, expected = normalise(prediction).split(), normalise(answer).split()
  if not words or not expected:
    return float(words == expected)
  shared = (collections.Counter(words) & collections.Counter(expected)).total()
  if not shared:
    return 0.0
  precision, recall = shared / len(words), shared / len(expected)
  return 2 * precision * recall / (precision + recall)
