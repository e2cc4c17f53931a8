"""Whether a probability means what it says: expected calibration error, Brier score, log loss.

Probabilities are a softmax of the scores: of a classifier's log p they are p, log-likelihoods of
labels as text they normalise over the labels.
"""
import dataclasses

import numpy as np

BINS = 15
NOTES = {
    'ece': f'{BINS} bins of equal width of the confidence in the prediction (Guo et al. 2017, '
           'arXiv:1706.04599, section 2)',
    'brier': "scikit-learn's: of two labels (p - y)^2, of more the sum over the labels"}


@dataclasses.dataclass(frozen=True)
class Probabilities:
  """What a classifier believes.

  truth: codes [n].  p: [n, classes].  correct: bool [n].  confidence: in its prediction, [n].
  """
  truth: np.ndarray
  p: np.ndarray
  correct: np.ndarray
  confidence: np.ndarray

  @classmethod
  def of_scores(cls, truth: np.ndarray, chosen: np.ndarray, log_p: np.ndarray) -> 'Probabilities':
    """chosen: the codes of the predictions; -1 for what is no label, of confidence 0."""
    from scipy import special
    p = np.minimum(special.softmax(log_p, axis=1), 1.0)  # the sum of a softmax may be 1 + 2**-52
    confidence = np.where(chosen >= 0, p[np.arange(len(p)), chosen], 0.0)
    return cls(truth, p, truth == chosen, confidence)

  def metrics(self, indices: np.ndarray) -> dict[str, float]:
    """Of some examples."""
    from sklearn import metrics
    truth, p = self.truth[indices], self.p[indices]
    labels = range(p.shape[1])
    found = {'ece': self._error(indices)}
    if len(labels) == 2:
      found['brier'] = metrics.brier_score_loss(truth, p[:, 1], labels=labels, pos_label=1)
    elif len(labels) > 2:
      found['brier'] = metrics.brier_score_loss(truth, p, labels=labels)
    if len(labels) > 1:
      found['log_loss'] = metrics.log_loss(truth, p, labels=labels)
    return {key: float(value) for key, value in found.items()}

  def reliability(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean confidence, accuracy, number of examples) of each bin that is not empty."""
    from sklearn import calibration
    confidence = self.confidence[indices]
    accuracy, mean = calibration.calibration_curve(self.correct[indices].astype(int), confidence,
                                                   pos_label=1, n_bins=BINS)
    # The bins of calibration_curve, which keeps the counts to itself.
    bins = np.searchsorted(np.linspace(0.0, 1.0, BINS + 1)[1:-1], confidence)
    counts = np.bincount(bins, minlength=BINS)
    return mean, accuracy, counts[counts > 0]

  def _error(self, indices):
    mean, accuracy, counts = self.reliability(indices)
    return np.average(np.abs(mean - accuracy), weights=counts)
