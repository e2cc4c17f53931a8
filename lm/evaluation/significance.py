"""How sure a metric is: intervals over examples, and tests between two runs.

Intervals are percentile bootstraps: examples are drawn with replacement, as many as there are, and
the metric of each draw is computed anew from what its examples add to it, of corpus metrics (BLEU,
F1) too (Efron and Tibshirani 1993, chapter 13; for BLEU Koehn 2004). SciPy draws. Intervals say how
a metric would vary over other examples, not over other seeds (`compare.py` says that).

Two runs on the same examples are compared by tests of pairs, of two sides:

    right or wrong     McNemar's exact test: a binomial test of the examples that flipped
    BLEU, chrF, TER    sacrebleu's paired approximate randomisation (10,000 trials)
    everything else    approximate randomisation: in each trial the runs swap a random half of their
                       examples; p is the share of trials, the real one included, whose difference
                       is as large (Noreen 1989; Yeh 2000, arXiv:cs/0008005)

`scipy.stats.permutation_test` does the latter for one metric at a time, here one trial serves all.
"""
from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any
import warnings

import numpy as np
import tqdm

from lm.evaluation import metrics

REPEATS = 1000  # resamples; a p value cannot be less than 1 / (REPEATS + 1)
CONFIDENCE = 0.95
MOST_LOST = 0.05  # of the resamples may lack a metric (no example of a class), else no interval


@dataclasses.dataclass(frozen=True)
class Interval:
  """The middle `confidence` of a metric over `repeats` resamples of `n` examples."""
  low: float
  high: float
  n: int
  repeats: int
  confidence: float


@dataclasses.dataclass(frozen=True)
class Difference:
  """Of a metric of two runs, second minus first.

  low, high: its bootstrap interval.  p: of the test `test`, if both made the same of examples that
  were drawn for one or the other.  None where there is no interval or no test.
  """
  first: float
  second: float
  low: float | None = None
  high: float | None = None
  p: float | None = None
  test: str = ''

  @property
  def value(self) -> float:
    """second - first."""
    return self.second - self.first


def bootstrap(scorer: metrics.Scorer, seed: int = 0, repeats: int = REPEATS,
              confidence: float = CONFIDENCE, progress: bool = False) -> dict[str, Interval]:
  """The interval of each metric that is one of resamples; of one example none.

  Args:
    scorer: see `metrics.scorer`.
    seed: of the resamples; the same gives the same.
  """
  found = _resampled(scorer.score, scorer.size, seed, repeats, confidence, progress)
  return {name: Interval(low, high, scorer.size, repeats, confidence)
          for name, (low, high) in found.items()}


def _resampled(score, size, seed, repeats, confidence, progress) -> dict[str, tuple[float, float]]:
  """The interval of each number that `score` gives for examples by index."""
  from scipy import stats
  names = list(score(np.arange(size)))
  if size < 2 or not names:
    return {}
  with tqdm.tqdm(total=repeats, desc='resample', unit='', disable=not progress) as bar:
    def statistic(indices):
      bar.update()
      found = score(indices.astype(np.int64))
      return np.array([found.get(name, np.nan) for name in names])

    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # of metrics that some resamples lack; see below
      drawn = stats.bootstrap((np.arange(size),), statistic, vectorized=False, batch=50,
                              n_resamples=repeats, method='percentile',
                              rng=np.random.default_rng(seed))
  tails = (1 - confidence) / 2, (1 + confidence) / 2
  kept = {name: values[np.isfinite(values)]
          for name, values in zip(names, drawn.bootstrap_distribution)}
  return {name: tuple(map(float, np.quantile(values, tails))) for name, values in kept.items()
          if len(values) >= (1 - MOST_LOST) * repeats}


def compare(header: Mapping[str, Any], first: Sequence[Mapping], second: Sequence[Mapping],
            seed: int = 0, repeats: int = REPEATS, progress: bool = False
            ) -> dict[str, Difference]:
  """The difference of each metric between two runs' rows of the same examples, in one order."""
  size = len(first)
  both = metrics.scorer(header, [*first, *second])
  own = np.arange(size), np.arange(size, 2 * size)
  ones = [metrics.scorer(header, rows).metrics() for rows in (first, second)]

  def difference(one, other):
    found = both.score(one), both.score(other)
    return {name: found[1][name] - found[0][name] for name in found[0] if name in found[1]}

  intervals = _resampled(lambda i: difference(i, i + size), size, seed, repeats, CONFIDENCE,
                         progress)
  tests = _randomised(difference, *own, seed, repeats, progress)
  if both.each.dtype == bool and both.each_is in ones[0]:
    tests[both.each_is] = mcnemar(*(both.each[i] for i in own)), "McNemar's exact test"
  if header['kind'] == 'generation':
    tests |= _sacrebleu(header, first, second)
  return {name: Difference(ones[0][name], ones[1][name], *intervals.get(name, (None, None)),
                           *tests.get(name, (None, '')))
          for name in ones[0] if name in ones[1]}


def _randomised(difference, first, second, seed, repeats, progress) -> dict[str, tuple[float, str]]:
  """(p, test) of each metric by approximate randomisation."""
  rng = np.random.default_rng((seed, 1))  # not the draws of the intervals
  observed = difference(first, second)
  as_large = dict.fromkeys(observed, 1)  # the observed one is a trial
  for _ in tqdm.trange(repeats, desc='swap', unit='', disable=not progress):
    swap = rng.integers(2, size=len(first), dtype=bool)
    trial = difference(np.where(swap, second, first), np.where(swap, first, second))
    for name, value in observed.items():
      # The same sums in another order differ in their last digits; a lost metric counts against.
      as_large[name] += abs(trial.get(name, np.inf)) >= abs(value) * (1 - 1e-9)
  return {name: (count / (repeats + 1), f'approximate randomisation, {repeats} trials')
          for name, count in as_large.items()}


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
  """p of two runs' right (True) and wrong examples [n] each: exact, of two sides (McNemar 1947)."""
  from scipy import stats
  lost, won = int(np.sum(first & ~second)), int(np.sum(~first & second))
  return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def _sacrebleu(header, first, second) -> dict[str, tuple[float, str]]:
  """(p, test) by sacrebleu itself."""
  from sacrebleu.significance import PairedTest
  scorers, streams = metrics.generation.sacrebleu(header, first)
  systems = [(name, [row['prediction'] for row in rows])
             for name, rows in (('first', first), ('second', second))]
  tested = PairedTest(systems, scorers, streams, test_type='ar')
  _, scores = tested()
  # It names results by what sacrebleu calls the metrics, in their order.
  found = [scores[name][1] for name in scores if name != 'System']
  return {name: (float(result.p_value), f"sacrebleu's paired approximate randomisation, "
                 f'{tested.n_samples} trials') for name, result in zip(scorers, found)}
