"""Losses of classes: what PyTorch computes, packed or not, and numbers in place of labels."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.errors import UserError
from lm.training.losses import Prediction

RNG = np.random.default_rng(5)
LOGITS = RNG.normal(size=(6, 4)).astype(np.float32)
LABELS = np.int32([0, 3, 1, 1, 2, 3])
COSTS = 0.5, 2.0, 1.0, 0.25


def mean(loss, outputs, batch):
  """The loss of a batch, all parts."""
  sums, weights = loss(outputs, batch), loss.weights(batch)
  assert sums.keys() == weights.keys()
  return sum(sums[name] / weights[name] for name in sums)


# By torch 2.9, torch.nn.CrossEntropyLoss(weight, label_smoothing) in float64, and the gradient of
# the second row.
@pytest.mark.supports('fine-tuning', 'class weights and label smoothing, as PyTorch')
@pytest.mark.parametrize('costs, smoothing, want, slope', [
    ((), 0.0, 1.4340938706488933, [0.09864487, 0.03534603, 0.01822569, -0.1522166]),
    ((), 0.1, 1.4607795503838883, [0.0944782, 0.03117936, 0.01405903, -0.1397166]),
    (COSTS, 0.0, 0.873792521877942, [0.02466122, 0.00883651, 0.00455642, -0.03805415]),
    (COSTS, 0.1, 0.9260482558277298, [0.02935972, 0.00293321, 0.00164277, -0.03393571])])
def test_costs_and_smoothing_are_those_of_pytorch(costs, smoothing, want, slope):
  loss = Prediction(label_smoothing=smoothing, class_costs=costs)
  batch = {'class_labels': jnp.asarray(LABELS)}
  value, grads = jax.value_and_grad(lambda x: mean(loss, {'classes': x}, batch))(LOGITS)
  assert float(value) == pytest.approx(want, abs=1e-6)
  np.testing.assert_allclose(grads[1], slope, atol=1e-6)
  tags = mean(loss, {'tags': LOGITS[None]}, {'tag_labels': jnp.asarray(LABELS[None])})
  assert float(tags) == pytest.approx(want, abs=1e-6)


def pack(x, rows=3):
  """Examples [6, ...] two a row, behind one that does not count: [3, 3, ...]."""
  packed = np.asarray(x).reshape(rows, 2, *np.shape(x)[1:])
  return jnp.asarray(np.concatenate([packed[:, :1] * 0 + 1, packed], axis=1))


WEIGHTS = jnp.asarray(np.float32([[0, 1, 1]] * 3))


@pytest.mark.parametrize('loss', [
    Prediction(label_smoothing=0.1, class_costs=COSTS), Prediction(r_drop=0.7, class_costs=COSTS),
    Prediction()], ids=['smoothed', 'r_drop', 'plain'])
def test_examples_packed_in_a_row_count_as_those_in_rows_of_their_own(loss):
  flat = {'class_labels': jnp.asarray(LABELS)}
  packed = {'class_labels': pack(LABELS), 'class_weights': WEIGHTS}
  if loss.r_drop:  # two passes
    other = RNG.normal(size=LOGITS.shape).astype(np.float32)
    both = lambda x, y: jnp.concatenate([x, y])
    double = lambda batch: {name: both(x, x) for name, x in batch.items()}
    alone = mean(loss, {'classes': both(LOGITS, other)}, double(flat))
    together = mean(loss, {'classes': both(pack(LOGITS), pack(other))}, double(packed))
    weights = [loss.weights(double(batch)) for batch in (flat, packed)]
    assert float(weights[0]['classes_divergence']) == float(weights[1]['classes_divergence']) == 12
  else:
    alone = mean(loss, {'classes': LOGITS}, flat)
    together = mean(loss, {'classes': pack(LOGITS)}, packed)
  assert float(together) == pytest.approx(float(alone), rel=1e-6)
  found = [loss.metrics({'classes': x}, batch) for x, batch in (
      (LOGITS, flat), (pack(LOGITS), packed))]
  for name in 'loss', 'accuracy', 'classes_accuracy':
    assert [float(x) for x in found[0][name]] == pytest.approx([float(x) for x in found[1][name]])
  assert float(found[0]['accuracy'][1]) == 6
  part = loss.of_rows(packed, jnp.array([True, False, True]))
  counted = loss.metrics({'classes': pack(LOGITS)}, packed | part)['accuracy']
  right = (LOGITS.argmax(-1) == LABELS)[[0, 1, 4, 5]]
  assert tuple(map(float, counted)) == (right.sum(), 4)


@pytest.mark.supports('fine-tuning', 'regression')
@pytest.mark.parametrize('is_packed', [True, False])
def test_numbers_in_place_of_labels_pay_their_squared_error(is_packed):
  values, said = RNG.normal(size=(2, 6)).astype(np.float32)
  place = pack if is_packed else jnp.asarray
  batch = {'class_values': place(values)} | ({'class_weights': WEIGHTS} if is_packed else {})
  outputs = {'classes': place(said)[..., None]}
  want = np.square(values - said).mean()
  assert float(mean(Prediction(), outputs, batch)) == pytest.approx(want, rel=1e-6)
  # Smoothing and costs are of labels, so they change nothing here.
  smoothed = Prediction(label_smoothing=0.1, class_costs=COSTS)
  assert float(mean(smoothed, outputs, batch)) == pytest.approx(want, rel=1e-6)
  total, weight = Prediction().metrics(outputs, batch)['loss']
  assert float(total / weight) == pytest.approx(want, rel=1e-6)
  double = lambda tree: jax.tree.map(lambda x: jnp.concatenate([x, x + 1]), tree)
  both = {name: jnp.concatenate([x, x]) for name, x in batch.items()}
  apart = Prediction(r_drop=0.5)(double(outputs), both)['classes_divergence']
  assert float(apart) == pytest.approx(0.5 * 6)  # all differ by 1


def test_balanced_costs_are_those_of_scikit_learn():
  counts = [30, 10, 60]
  loss = Prediction(class_costs='balanced').balanced(counts)
  assert loss.class_costs == pytest.approx([100 / 90, 100 / 30, 100 / 180])
  assert Prediction().balanced(counts) == Prediction()
  with pytest.raises(UserError, match="class_costs='balanced' has no cost for class 1"):
    Prediction(class_costs='balanced').balanced([3, 0])
  batch = {'class_labels': jnp.asarray(LABELS)}
  with pytest.raises(UserError, match="class_costs='balanced' needs a task of labelled examples"):
    Prediction(class_costs='balanced').weights(batch)
  with pytest.raises(UserError, match='class_costs has 2 numbers and the head 4 classes'):
    Prediction(class_costs=(1.0, 2.0))({'classes': LOGITS}, batch)
  with pytest.raises(ValueError, match='class_costs=.* must not be negative'):
    Prediction(class_costs=(-1.0, 2.0))
