"""Metrics of one label an example, by scikit-learn: accuracy, precision, recall, F1, MCC, AUROC.

A precision of a class that was never predicted, and a recall of one that is no target, are 0
(`zero_division=0`). Macro averages are over the classes that occur among targets or predictions,
balanced accuracy over those among the targets, as scikit-learn does by itself. With one label an
example micro precision, recall and F1 are all the accuracy.
"""
from collections.abc import Mapping, Sequence
import dataclasses
import warnings

import numpy as np

from lm.errors import UserError
from lm.evaluation.metrics import calibration
from lm.evaluation.metrics.contract import Header, name, numbers, Row, Scorer

MOST_RANKED = 2  # classes up to which AUROC has an interval: each resample sorts once a class


@dataclasses.dataclass(frozen=True)
class Pairs:
  """(target, prediction) of many decisions, counted.

  names: of the codes.  targets, predictions: codes of each distinct pair, int [pairs].
  pair: of each decision, int [decisions].  example: that it belongs to, int [decisions].
  """
  names: Sequence[str]
  targets: np.ndarray
  predictions: np.ndarray
  pair: np.ndarray
  example: np.ndarray

  @classmethod
  def count(cls, targets: Sequence[str], predictions: Sequence[str], example: np.ndarray,
            labels: Sequence[str]) -> 'Pairs':
    """Codes are places in `labels`, and of what is not there the places after them."""
    names = list(dict.fromkeys([*labels, *sorted({*targets, *predictions} - {*labels})]))
    code = {label: i for i, label in enumerate(names)}
    coded = np.array([[code[x] for x in targets], [code[x] for x in predictions]], np.int64)
    distinct, pair = np.unique(coded, axis=1, return_inverse=True)
    return cls(names, *distinct, pair.reshape(-1), np.asarray(example))

  def weights(self, indices: np.ndarray, size: int) -> np.ndarray:
    """How often each pair occurs in the examples `indices` of `size`: float64 [pairs]."""
    times = np.bincount(indices, minlength=size)
    return np.bincount(self.pair, times[self.example], len(self.targets))

  def accuracy(self, weights: np.ndarray) -> float:
    """The share of decisions that are right."""
    from sklearn import metrics
    return float(metrics.accuracy_score(self.targets, self.predictions, sample_weight=weights))

  def metrics(self, weights: np.ndarray) -> dict[str, float]:
    """Of the pairs by their weights: all of them together."""
    from sklearn import metrics
    kept = weights > 0
    both = self.targets[kept], self.predictions[kept]
    weigh = {'sample_weight': weights[kept]}
    with warnings.catch_warnings():
      # A class that was predicted but is no target; MCC of a single class, which is 0.
      warnings.simplefilter('ignore')
      found = {'accuracy': self.accuracy(weights),
               'balanced_accuracy': metrics.balanced_accuracy_score(*both, **weigh),
               'mcc': metrics.matthews_corrcoef(*both, **weigh)}
      present = np.union1d(*both)
      by_class = metrics.precision_recall_fscore_support(*both, labels=present, zero_division=0,
                                                         **weigh)
    kinds = tuple(zip(('precision', 'recall', 'f1'), by_class))
    found |= {f'{kind}_micro': found['accuracy'] for kind, _ in kinds}
    # np.average is what scikit-learn takes for average='macro'.
    found |= {f'{kind}_macro': np.average(values) for kind, values in kinds}
    found |= {f'{kind}/{self.names[code]}': value for kind, values in kinds
              for code, value in zip(present, values)}
    return {key: float(value) for key, value in found.items()}


def scorer(header: Header, rows: Sequence[Row]) -> Scorer:
  """Of classification; with scores also calibration and AUROC.

  AUROC is of log p(second label) - log p(first label) for two labels, else of each class against
  the rest with p(class), their mean; it is absent where a class is not among the targets.

  Raises:
    UserError: a target is not among the labels, or scores are not finite.
  """
  targets, predictions = ([row[field] for row in rows] for field in ('targets', 'prediction'))
  labels = header.get('labels') or sorted({*targets})
  pairs = Pairs.count(targets, predictions, np.arange(len(rows)), labels)
  if len({*targets} - {*labels}):
    number = next(i for i, target in enumerate(targets) if target not in labels)
    raise UserError(f'target {targets[number]!r} of row {number} of {name(header)} is none of the '
                    f'{len(labels)} labels; name it in the labels of the task')
  notes = _notes(targets, predictions, labels)
  each = np.array([target == prediction for target, prediction in zip(targets, predictions)])
  if any(row.get('scores') is None for row in rows):
    notes['calibration'] = 'absent: the predictions have no scores of the labels'
    return Scorer(each, 'accuracy', lambda i: pairs.metrics(pairs.weights(i, len(rows))),
                  notes=notes)
  log_p = numbers(header, rows, 'scores', len(labels))
  code = {label: i for i, label in enumerate(labels)}
  truth = np.array([code[target] for target in targets])
  chosen = np.array([code.get(prediction, -1) for prediction in predictions])
  probabilities = calibration.Probabilities.of_scores(truth, chosen, log_p)
  notes |= calibration.NOTES

  def score(indices):
    found = pairs.metrics(pairs.weights(indices, len(rows))) | probabilities.metrics(indices)
    return found | (auroc(truth[indices], log_p[indices]) if len(labels) <= MOST_RANKED else {})

  whole = auroc(truth, log_p) if len(labels) > MOST_RANKED else {}
  absent = [label for i, label in enumerate(labels) if i not in truth]
  if absent:
    notes['auroc'] = f'absent: no example is {absent[0]!r}' + (
        f', nor any of {len(absent) - 1} other labels' if absent[1:] else '')
  else:
    notes['auroc'] = ('one against the rest, mean over the classes' if len(labels) > 2 else
                      f'of {labels[-1]!r} against {labels[0]!r}')
  return Scorer(each, 'accuracy', score, whole, notes)


def _notes(targets, predictions, labels) -> dict[str, str]:
  notes = {'f1_macro': 'over the classes that occur among targets or predictions; a precision or '
                       'recall without a case is 0 (zero_division=0)'}
  never = [label for label in labels if label in {*targets} and label not in {*predictions}]
  if never:
    notes['never predicted'] = ', '.join(map(str, never))
  other = sum(prediction not in labels for prediction in predictions)
  if other:
    notes['not a label'] = f'{other} of {len(predictions)} predictions, which count as mistakes'
  if len({*targets}) == 1:
    notes['mcc'] = 'of a single class it is 0 and says nothing'
  return notes


def auroc(truth: np.ndarray, log_p: np.ndarray) -> Mapping[str, float]:
  """{'auroc': ...} of codes [n] and log p [n, classes]; {} where a class is no target."""
  from scipy import special
  from sklearn import metrics
  count = log_p.shape[1]
  if count < 2 or len(np.unique(truth)) < count:
    return {}
  if count == 2:
    return {'auroc': float(metrics.roc_auc_score(truth, log_p[:, 1] - log_p[:, 0]))}
  return {'auroc': float(metrics.roc_auc_score(truth, special.softmax(log_p, axis=1),
                                               multi_class='ovr', average='macro'))}
