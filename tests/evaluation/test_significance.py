"""Intervals cover, tests hold their level, and both agree with other ways to the same number."""
import numpy as np
import pytest
import real_examples as real
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest
from scipy import stats

from lm.evaluation import metrics
from lm.evaluation import significance


def right_or_wrong(right):
  """(header, rows) of a classification that is right there."""
  rows = [{'id': str(i), 'inputs': 'x', 'targets': 'ab'[i % 2],
           'prediction': 'ab'[(i + (not ok)) % 2]} for i, ok in enumerate(right)]
  return {'task': 't', 'kind': 'classification', 'labels': ['a', 'b'], 'split': 's'}, rows


def light(right):
  """A scorer of the accuracy alone."""
  return metrics.Scorer(right, 'accuracy', lambda i: {'accuracy': float(right[i].mean())})


@pytest.mark.supports('evaluation', 'bootstrap intervals, McNemar\'s test, paired randomisation')
def test_the_interval_of_an_accuracy_is_scipys():
  right = np.random.default_rng(0).random(200) < 0.8
  found = significance.bootstrap(light(right), seed=3)['accuracy']
  expected = stats.bootstrap((right,), np.mean, n_resamples=1000, method='percentile', batch=50,
                             rng=np.random.default_rng(3)).confidence_interval
  assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
  assert (found.n, found.repeats, found.confidence) == (200, 1000, 0.95)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
  rng, covered = np.random.default_rng(1), 0
  for seed in range(60):
    found = significance.bootstrap(light(rng.random(100) < 0.7), seed, repeats=200)['accuracy']
    covered += found.low <= 0.7 <= found.high
  assert 51 <= covered <= 60  # of a share of 0.95, less than 51 has a probability of 0.0005


def test_intervals_follow_the_seed_and_hold_the_metric():
  scorer = metrics.scorer(*real.generated(real.translations('eng-deu', 100), language='de'))
  found = significance.bootstrap(scorer, seed=1, repeats=200)
  assert found == significance.bootstrap(scorer, seed=1, repeats=200)
  assert found != significance.bootstrap(scorer, seed=2, repeats=200)
  assert {'bleu', 'chrf', 'ter', 'rougeL'} <= set(found) and 'self_bleu' not in found
  values = scorer.metrics()
  for name, interval in found.items():
    assert interval.low < values[name] < interval.high


def test_the_interval_of_bleu_is_sacrebleus():
  about, rows = real.generated(real.translations('eng-deu', 300), language='de')
  found = significance.bootstrap(metrics.scorer(about, rows))['bleu']
  streams = metrics.generation.sacrebleu(about, rows)[1]
  theirs = BLEU().corpus_score([row['prediction'] for row in rows], streams, n_bootstrap=1000)
  half = (found.high - found.low) / 2
  assert half == pytest.approx(theirs._ci, rel=0.15)  # of 1,000 other resamples
  assert (found.high + found.low) / 2 == pytest.approx(theirs._mean, abs=half / 5)


def test_a_metric_that_many_resamples_lack_has_no_interval():
  about, rows = right_or_wrong([True] * 20)
  for row in rows:
    row.update(targets='a', prediction='a', scores=[-0.1, -2.5])
  rows[0].update(targets='b')  # a third of the resamples draw no b, and have no AUROC
  scorer = metrics.scorer(about, rows)
  found = significance.bootstrap(scorer, repeats=100)
  assert 'auroc' in scorer.metrics() and 'auroc' not in found and 'accuracy' in found
  assert significance.bootstrap(metrics.scorer(about, rows[:1])) == {}


def test_mcnemar_is_the_binomial_test_of_what_flipped():
  first = np.array([True] * 50 + [False] * 12 + [True] * 3 + [False] * 35)
  second = np.array([True] * 62 + [False] * 38)
  # 12 won, 3 lost: 2 * sum_{i <= 3} C(15, i) / 2**15.
  assert significance.mcnemar(first, second) == pytest.approx(2 * (1 + 15 + 105 + 455) / 2**15)
  assert significance.mcnemar(second, first) == significance.mcnemar(first, second)
  assert significance.mcnemar(first, first) == 1


def test_runs_that_are_the_same_do_not_differ():
  about, rows = real.classified(real.polarity()[::100])
  found = significance.compare(about, rows, rows, repeats=20)
  assert all(one.value == 0 and one.p == 1 for one in found.values())
  assert all(one.low == one.high == 0 for one in found.values())


def test_randomisation_is_scipys_permutation_test():
  rng = np.random.default_rng(0)
  rows = [[{'id': str(i), 'targets': t, 'prediction': t + noise * e}
           for i, (t, e) in enumerate(zip(rng.normal(size=60), rng.normal(size=60)))]
          for noise in (0.5, 0.5)]
  for one, other in zip(*rows):
    other.update(targets=one['targets'], prediction=0.7 * other['prediction'] + one['targets'])
  found = significance.compare({'kind': 'similarity'}, *rows, repeats=1000)['pearson']
  targets, *predictions = ([row[field] for row in some] for some, field in (
      (rows[0], 'targets'), (rows[0], 'prediction'), (rows[1], 'prediction')))
  gap = lambda a, b: stats.pearsonr(targets, b)[0] - stats.pearsonr(targets, a)[0]
  theirs = stats.permutation_test(predictions, gap, permutation_type='samples', vectorized=False,
                                  n_resamples=1000, rng=np.random.default_rng(5))
  assert found.value == pytest.approx(theirs.statistic, rel=1e-12) and 0.01 < found.p < 0.9
  assert found.p == pytest.approx(theirs.pvalue, abs=4 * (0.25 / 1000)**0.5)
  assert found.low < found.value < found.high


def test_p_values_of_equal_runs_are_spread_evenly():
  rng, values = np.random.default_rng(2), []
  for seed in range(40):
    rows = [right_or_wrong(rng.random(40) < 0.7)[1] for _ in range(2)]
    for one in (*rows[0], *rows[1]):
      one.update(targets=float(one['targets'] == one['prediction']), prediction=rng.normal())
    for one, other in zip(*rows):
      other['targets'] = one['targets']
    values.append(significance.compare({'kind': 'similarity'}, *rows, seed, 39)['pearson'].p)
  assert stats.kstest(values, 'uniform').pvalue > 0.01 and min(values) >= 1 / 40


def test_translations_are_tested_by_sacrebleu():
  examples = real.translations('eng-deu', 80)
  about, first = real.generated(examples, seed=0, language='de')
  _, second = real.generated(examples, seed=1, language='de')
  for row in second[::4]:
    row['prediction'] = row['targets'][0]
  found = significance.compare(about, first, second, repeats=50)
  scorers, streams = metrics.generation.sacrebleu(about, first)
  systems = [('a', [row['prediction'] for row in first]),
             ('b', [row['prediction'] for row in second])]
  _, theirs = PairedTest(systems, {'bleu': scorers['bleu']}, streams)()
  assert found['bleu'].p == theirs['BLEU'][1].p_value < 0.05
  assert found['bleu'].second == theirs['BLEU'][1].score and 'sacrebleu' in found['bleu'].test
  assert found['rougeL'].test == 'approximate randomisation, 50 trials'
  assert found['distinct_1'].p is None and found['distinct_1'].low is None
