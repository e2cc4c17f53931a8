"""Metrics are the reference libraries' own, to the last digit, on real data."""
import json
import math
import sys

import numpy as np
import pytest
import real_examples as real
from scipy import special
from scipy import stats
import seqeval.metrics
from seqeval.scheme import IOB2
import sklearn.metrics as sk
from sklearn import calibration

from lm.errors import UserError
from lm.evaluation import metrics


def header(kind, **fields):
  return {'task': 't', 'kind': kind, 'labels': None, 'split': 's', 'step': 1, **fields}


def classes(targets, predictions, labels, scores=None):
  rows = [{'id': str(i), 'inputs': 'x', 'targets': t, 'prediction': p}
          for i, (t, p) in enumerate(zip(targets, predictions))]
  for row, score in zip(rows, scores or ()):
    row['scores'] = score
  return header('classification', labels=labels), rows


@pytest.mark.supports('evaluation', 'metrics equal to scikit-learn, SciPy, seqeval, sacrebleu and '
                      'rouge-score to the last digit')
@pytest.mark.parametrize('examples', [real.polarity, real.banking])
def test_classification_is_scikit_learn(examples):
  about, rows = real.classified(examples()[::7])
  found = metrics.compute(about, rows)
  truth, predicted = ([row[field] for row in rows] for field in ('targets', 'prediction'))
  assert found['accuracy'] == sk.accuracy_score(truth, predicted)
  assert found['balanced_accuracy'] == sk.balanced_accuracy_score(truth, predicted)
  assert found['mcc'] == sk.matthews_corrcoef(truth, predicted)
  report = sk.classification_report(truth, predicted, output_dict=True, zero_division=0)
  for ours, theirs in ('precision', 'precision'), ('recall', 'recall'), ('f1', 'f1-score'):
    assert found[f'{ours}_macro'] == report['macro avg'][theirs]
    assert found[f'{ours}_micro'] == sk.precision_score(truth, predicted, average='micro')
    for label in about['labels']:
      assert found[f'{ours}/{label}'] == report[label][theirs]


@pytest.mark.parametrize('examples', [real.polarity, real.banking])
def test_probabilities_are_scored_as_scikit_learn_does(examples):
  about, rows = real.classified(examples()[::7])
  found = metrics.compute(about, rows)
  truth = [row['targets'] for row in rows]
  p = special.softmax(np.array([row['scores'] for row in rows]), axis=1)
  assert found['log_loss'] == sk.log_loss(truth, p)
  if len(about['labels']) == 2:
    positive = [row['targets'] == 'positive' for row in rows]
    assert found['brier'] == sk.brier_score_loss(positive, p[:, 1])
    assert found['auroc'] == sk.roc_auc_score(positive, np.log(p[:, 1]) - np.log(p[:, 0]))
    assert found['auroc'] == pytest.approx(stats.mannwhitneyu(
        p[np.array(positive), 1], p[~np.array(positive), 1]).statistic
        / (sum(positive) * (len(p) - sum(positive))), abs=1e-12)
  else:
    assert found['brier'] == sk.brier_score_loss(truth, p)
    one_hot = np.array(truth)[:, None] == np.array(about['labels'])
    assert found['auroc'] == sk.roc_auc_score(one_hot, p, average='macro')


def test_calibration_error_is_the_mean_gap_of_scikit_learns_curve():
  about, rows = real.classified(real.polarity()[::7])
  confidence = np.exp([max(row['scores']) for row in rows])
  right = np.array([row['targets'] == row['prediction'] for row in rows])
  accuracy, mean = calibration.calibration_curve(right, confidence, n_bins=15)
  counts = np.histogram(confidence, np.linspace(0, 1, 16))[0]
  expected = (counts[counts > 0] * abs(accuracy - mean)).sum() / len(rows)
  assert metrics.compute(about, rows)['ece'] == pytest.approx(expected, rel=1e-12)


def test_a_perfectly_calibrated_coin_has_no_calibration_error():
  found = metrics.compute(*classes('aabb', 'aaaa', ['a', 'b'], [[math.log(0.5)] * 2] * 4))
  assert found['ece'] == 0 and found['auroc'] == 0.5 and found['brier'] == 0.25


def test_similarity_is_scipy():
  examples = real.captions()
  rng = np.random.default_rng(0)
  rows = [{'id': e['id'], 'inputs': e['a'], 'targets': e['score'],
           'prediction': e['score'] + rng.normal()} for e in examples]
  found = metrics.compute(header('similarity'), rows)
  both = [row['targets'] for row in rows], [row['prediction'] for row in rows]
  assert found == {'pearson': stats.pearsonr(*both)[0], 'spearman': stats.spearmanr(*both)[0]}


@pytest.mark.filterwarnings('ignore::sklearn.exceptions.UndefinedMetricWarning')
def test_spans_are_seqevals_strict_ones():
  about, rows = real.tagged(real.wnut())
  found = metrics.compute(about, rows)
  both = [row['targets'] for row in rows], [row['prediction'] for row in rows]
  report = seqeval.metrics.classification_report(*both, mode='strict', scheme=IOB2,
                                                 output_dict=True, zero_division=0)
  for ours, theirs in ('precision', 'precision'), ('recall', 'recall'), ('f1', 'f1-score'):
    assert found[f'span_{ours}'] == report['micro avg'][theirs]
    assert found[f'span_{ours}_macro'] == report['macro avg'][theirs]
    for tag in ('person', 'location', 'creative-work'):
      assert found[f'{ours}/{tag}'] == report[tag][theirs]
  assert found['accuracy'] == seqeval.metrics.accuracy_score(*both)
  assert found['span_f1'] != seqeval.metrics.f1_score(*both)  # conlleval forgives lost beginnings


def test_other_tags_are_scored_word_by_word():
  about, rows = real.tagged(real.parts_of_speech()[::5])
  found = metrics.compute(about, rows)
  truth, predicted = ([tag for row in rows for tag in row[field]]
                      for field in ('targets', 'prediction'))
  assert found['accuracy'] == sk.accuracy_score(truth, predicted)
  assert found['f1_macro'] == sk.f1_score(truth, predicted, average='macro')
  assert 'span_f1' not in found


def test_continuations_are_scored_as_the_harness_does():
  rows = [
      {'id': '0', 'targets': 0, 'prediction': 0, 'scores': [-2.0, -3.0], 'lengths': [1, 2]},
      {'id': '1', 'targets': 1, 'prediction': 0, 'scores': [-2.0, -3.0], 'lengths': [1, 2]},
      {'id': '2', 'targets': 1, 'prediction': 0, 'scores': [-4.0, -4.0], 'lengths': [1, 1]},
      {'id': '3', 'targets': 1, 'prediction': 1, 'scores': [-4.0, -1.0], 'lengths': [4, 2]},
      {'id': '4', 'targets': 1, 'prediction': 0, 'scores': [-2.0, -3.0], 'lengths': [1, 3]}]
  found = metrics.compute(header('multiple_choice'), rows)
  # By bytes: -2, -1.5 / -2, -1.5 / a tie goes to the first / -1, -0.5 / -2, -1.
  assert found == {'accuracy': 0.4, 'accuracy_bytes': 0.6}
  wide = [{**row, 'characters': [1, 1]} for row in rows]
  assert metrics.compute(header('multiple_choice'), wide)['accuracy_norm'] == 0.4


def test_one_continuation_is_greedy_accuracy_and_perplexity():
  rows = [{'id': str(i), 'targets': 0, 'prediction': 0, 'scores': [score], 'lengths': [4],
           'greedy': [score > -1]} for i, score in enumerate([-0.5, -2.0, -3.5])]
  found = metrics.compute(header('multiple_choice'), rows)
  assert found == {'accuracy': 1 / 3, 'perplexity': math.exp(2.0)}


def rankings(count=300, seed=0):
  rng = np.random.default_rng(seed)
  return [{'id': str(i), 'inputs': 'q', 'targets': [f'd{j}' for j in rng.choice(40, many, False)],
           'prediction': [f'd{j}' for j in rng.permutation(40)[:30]]}
          for i, many in enumerate(rng.integers(1, 5, count))]


def test_rankings_are_those_of_scikit_learn():
  rows = rankings()
  for row in rows:
    row['prediction'] += sorted({f'd{j}' for j in range(40)} - {*row['prediction']})
  found = metrics.compute(header('retrieval'), rows)
  gains = np.array([[doc in row['targets'] for doc in row['prediction']] for row in rows])
  scores = np.tile(-np.arange(40.0), (len(rows), 1))
  assert found['ndcg@10'] == pytest.approx(sk.ndcg_score(gains, scores, k=10), rel=1e-12)
  single = [{**row, 'targets': row['targets'][:1]} for row in rows]
  gains = np.array([[doc in row['targets'] for doc in row['prediction'][:10]] for row in single])
  kept = gains.any(axis=1)
  reciprocal = sk.label_ranking_average_precision_score(gains[kept], scores[kept, :10])
  found = metrics.compute(header('retrieval'), single)
  assert found['mrr@10'] == pytest.approx(reciprocal * kept.mean(), rel=1e-12)
  assert found['recall@10'] == pytest.approx(kept.mean(), rel=1e-12)
  assert found['recall@5'] == sk.top_k_accuracy_score(
      [row['prediction'].index(row['targets'][0]) for row in single], scores, k=5,
      labels=range(40))


def test_a_relevant_document_that_is_not_ranked_counts_for_the_ideal():
  rows = [{'id': '0', 'targets': ['a', 'b'], 'prediction': ['x', 'a'], 'scores': [1, 0]}]
  found = metrics.compute(header('retrieval'), rows)
  gain, ideal = 1 / math.log2(3), 1 + 1 / math.log2(3)
  assert found == {'mrr@10': 0.5, 'recall@1': 0.0, 'ndcg@10': pytest.approx(gain / ideal)}


def test_perplexities_divide_the_same_nats():
  rows = [{'id': str(i), 'scores': [nats], 'words': words, 'tokens': 2 * words, 'bytes': 6 * words}
          for i, (nats, words) in enumerate([(30.0, 10), (100.0, 20)])]
  found = metrics.compute(header('language_modelling'), rows)
  assert found == {'word_perplexity': math.exp(130 / 30), 'token_perplexity': math.exp(130 / 60),
                   'bits_per_byte': 130 / 180 / math.log(2)}


def test_of_several_relevant_documents_the_first_and_the_share_count():
  rows = [{'id': '0', 'targets': ['a', 'b', 'c'], 'prediction': ['x', 'a', 'b', 'y', 'z', 'c']},
          {'id': '1', 'targets': ['a'], 'prediction': ['a', 'b', 'c', 'd', 'e']}]
  found = metrics.compute(header('retrieval'), rows)
  ideal = 1 + 1 / math.log2(3) + 1 / 2
  gain = (1 / math.log2(3) + 1 / 2 + 1 / math.log2(7)) / ideal
  assert found == {'mrr@10': 0.75, 'recall@1': 0.5, 'recall@5': pytest.approx((2 / 3 + 1) / 2),
                   'ndcg@10': pytest.approx((gain + 1) / 2)}


@pytest.mark.parametrize('about, rows', [
    real.classified([{'id': str(i), 'a': 'x', 'label': label} for i, label in enumerate('aab')]),
    classes('aaa', 'aaa', ['a']), classes('aaa', 'bbb', ['a', 'b']),
    classes('aaa', 'aaa', ['a', 'b', 'c'], [[-0.1, -3.0, -3.0]] * 3),
    classes('abc', ['a', 'no label', 'a'], ['a', 'b', 'c', 'd'], [[-0.1, -3.0, -3.0, -9.0]] * 3),
    (header('similarity'), [{'id': '0', 'targets': 1, 'prediction': 2.5}] * 3),
    (header('tagging'), [{'id': '0', 'targets': ['O', 'O'], 'prediction': ['O', 'O']}]),
    (header('tagging'), [{'id': '0', 'targets': ['O'], 'prediction': ['I-x']},
                         {'id': '1', 'targets': [], 'prediction': []}]),
    (header('span_extraction'), [{'id': '0', 'targets': [], 'prediction': ''}]),
    (header('generation'), [{'id': '0', 'targets': ['a b', ''], 'prediction': ''}]),
    (header('generation'), [{'id': '0', 'targets': [''], 'prediction': ''}] * 2),
    (header('retrieval'), [{'id': '0', 'targets': ['a'], 'prediction': []}]),
    (header('language_modelling'), [{'id': '0', 'scores': [9e5], 'words': 1, 'tokens': 2,
                                     'bytes': 4}]),
    (header('multiple_choice'), [{'id': '0', 'targets': 0, 'prediction': 0, 'scores': [-9e5],
                                  'lengths': [0], 'greedy': [False]}])])
def test_poor_predictions_give_no_nan(about, rows):
  scorer = metrics.scorer(about, rows)
  for found in (scorer.metrics(), scorer.score(np.zeros(1, int))):
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())


def test_what_is_not_defined_is_absent_and_said():
  about, rows = classes('aab', 'aaa', ['a', 'b', 'c'], [[-0.1, -3.0, -3.0]] * 3)
  scorer = metrics.scorer(about, rows)
  assert 'auroc' not in scorer.metrics() and "no example is 'c'" in scorer.notes['auroc']
  assert scorer.notes['never predicted'] == 'b'
  assert scorer.metrics()['precision/b'] == 0 and 'f1/c' not in scorer.metrics()
  constant = metrics.scorer(header('similarity'), [{'id': '', 'targets': 1, 'prediction': 2}] * 3)
  assert constant.metrics() == {} and 'all targets are equal' in constant.notes['pearson']


def test_files_give_what_memory_gives_whatever_the_texts_hold(tmp_path):
  about, rows = real.classified(real.snips('validate')[::20])
  rows[0]['inputs'] = 'a line\nand\u2028another\x85one\x0cmore'
  (tmp_path / 'a-b.json').write_text(json.dumps(about))
  lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in rows]
  (tmp_path / 'a-b.jsonl').write_text(''.join(lines), 'utf-8')
  for name in ('a-b.json', 'a-b.jsonl'):
    assert metrics.read(tmp_path / name) == (about, rows)
    assert metrics.of_file(tmp_path / name) == metrics.compute(about, rows)
  (tmp_path / 'a-b.jsonl').write_text('')
  with pytest.raises(UserError, match='there are no predictions of real, split validation'):
    metrics.of_file(tmp_path / 'a-b.json')


@pytest.mark.parametrize('change, message', [
    ({'targets': 'x'}, "target 'x' of row 2 .* is none of the 7 labels"),
    ({'scores': [-1.0, float('nan')] + [-2.0] * 5}, 'row 2 .* not finite'),
    ({'scores': [-1.0]}, 'row 2 .* must be 7 numbers')])
def test_bad_rows_are_one_sentence(change, message):
  about, rows = real.classified(real.snips('validate')[::20])
  rows[2].update(change)
  with pytest.raises(UserError, match=message):
    metrics.compute(about, rows)


def test_a_missing_package_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'seqeval.scheme', None)
  with pytest.raises(UserError, match=r'need the package seqeval.*pip install "lm\[eval\]"'):
    metrics.compute(*real.tagged(real.wnut()[:3]))


def test_a_resample_is_scored_as_its_rows_are():
  tasks = [real.classified(real.banking()[::50]), real.tagged(real.wnut()[::9]),
           real.generated(real.translations('eng-deu', 30)), (header('retrieval'), rankings(30))]
  for about, rows in tasks:
    scorer = metrics.scorer(about, rows)
    chosen = np.random.default_rng(1).integers(len(rows), size=len(rows))
    of_rows = metrics.scorer(about, [rows[i] for i in chosen])
    expected = of_rows.score(np.arange(len(rows)))
    found = scorer.score(chosen)
    assert found == {key: pytest.approx(value, rel=1e-12) for key, value in expected.items()}
