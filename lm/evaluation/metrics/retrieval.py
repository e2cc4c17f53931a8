"""Metrics of rankings: MRR, nDCG by scikit-learn, recall@k.

A query has documents that are relevant, all alike, and a ranking of documents, best first. MRR@10
is the mean of 1 / rank of the first relevant document, 0 if it is not among the first ten (MS
MARCO); recall@k the mean share of the relevant documents among the first k (BEIR). nDCG@10 has the
gain 1 and the discount log2(rank + 1); a relevant document that is not ranked counts for the ideal.

Reference: Thakur et al. 2021, arXiv:2104.08663, section 3.4; Järvelin and Kekäläinen 2002.
"""
from collections.abc import Sequence
import functools

import numpy as np

from lm.errors import UserError
from lm.evaluation.metrics.contract import Header, name, Row, Scorer

RECALL_AT = 1, 5, 10, 100
DEPTH = 10


def scorer(header: Header, rows: Sequence[Row]) -> Scorer:
  """Of retrieval; recall@k is absent where no ranking has k documents.

  Raises:
    UserError: a query has no relevant document, or a ranking names one twice.
  """
  for number, row in enumerate(rows):
    said = f'row {number} (id {row.get("id")!r}) of {name(header)}'
    if not row['targets']:
      raise UserError(f'{said} has no relevant document; leave the query out')
    if len({*row['prediction']}) < len(row['prediction']):
      raise UserError(f'{said} ranks a document twice; rank each document once')
  hits = [np.isin(row['prediction'], [*{*row['targets']}]) for row in rows]
  relevant = [len({*row['targets']}) for row in rows]
  longest = max(map(len, hits))
  values = {f'mrr@{DEPTH}': [_reciprocal(hit[:DEPTH]) for hit in hits],
            f'ndcg@{DEPTH}': [_ndcg(tuple(map(bool, hit[:DEPTH])), count)
                              for hit, count in zip(hits, relevant)]}
  values |= {f'recall@{k}': [hit[:k].sum() / count for hit, count in zip(hits, relevant)]
             for k in RECALL_AT if k <= longest}
  arrays = {key: np.array(found, np.float64) for key, found in values.items()}
  mean = lambda i: {key: float(np.mean(x[i])) for key, x in arrays.items()}
  return Scorer(arrays[f'mrr@{DEPTH}'], f'mrr@{DEPTH}', mean, notes={
      f'ndcg@{DEPTH}': "scikit-learn's ndcg_score with gain 1"})


def _reciprocal(hit):
  places = np.flatnonzero(hit)
  return 1 / (places[0] + 1) if len(places) else 0.0


@functools.lru_cache(maxsize=4096)
def _ndcg(hits: tuple[bool, ...], relevant: int) -> float:
  """Of the first ten of a ranking; what is relevant and not among them stands behind them."""
  from sklearn import metrics
  gains = np.zeros(DEPTH + 1 + relevant)
  gains[:len(hits)] = hits
  gains[DEPTH + 1:DEPTH + 1 + relevant - sum(hits)] = 1
  return float(metrics.ndcg_score(gains[None], -np.arange(len(gains), dtype=float)[None], k=DEPTH))
