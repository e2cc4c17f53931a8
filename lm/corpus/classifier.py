"""A linear classifier of documents: hashed n-grams of words and characters, logistic regression.

    model = classifier.train(classifier.Config(), {'good': texts, 'bad': others})
    model.save('good.npz')

What a document holds is the sum of its n-grams, each weighted by idf, over the square root of their
number; idf is multiplied into the weights, so that applying is a look-up per n-gram. Numpy does it
for many documents at once. A model is an .npz of plain arrays: to read one executes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any
import zipfile

import numpy as np

from lm.corpus import classifier_features as features
from lm.corpus.document import Document
from lm.corpus.stage import Stage
from lm.errors import UserError

_MOST_BYTES = 1 << 30  # Of a model, inflated.
_BATCH = 64  # Documents that are classified together.


@dataclasses.dataclass(frozen=True)
class Config:
  """How a classifier is trained.

  Attributes:
    features: which n-grams.
    penalty: L2, of the weights; more is smoother.
    held_out: fraction of the documents of each label that it is tested on and not trained on.
    seed: of the draw of those.
  """

  features: features.Features = features.Features()
  penalty: float = 2.5
  held_out: float = 0.1
  seed: int = 0

  def __post_init__(self) -> None:
    if not 0 < self.held_out < 1:
      raise ValueError(f'held_out={self.held_out} must be between 0 and 1')
    if self.penalty <= 0:
      raise ValueError(f'penalty={self.penalty} must be above 0')


@dataclasses.dataclass(frozen=True)
class Model:
  """Weights [buckets, columns] and biases [columns]; one column where there are two labels, of the
  first, else one a label. `metrics` are those on the held-out documents."""

  labels: tuple[str, ...]
  features: features.Features
  weights: np.ndarray
  bias: np.ndarray
  metrics: Mapping[str, Any]

  def probabilities(self, texts: Sequence[str]) -> np.ndarray:
    """Returns [texts, labels]; of each text the same, whichever others it comes with."""
    sums = np.zeros((len(texts), self.weights.shape[1]))
    counts = np.zeros(len(texts))
    for owners, buckets in features.buckets(texts, self.features):
      counts += np.bincount(owners, minlength=len(texts))
      for column, weights in enumerate(self.weights.T):
        sums[:, column] += np.bincount(owners, weights[buckets], len(texts))
    logits = sums / np.sqrt(np.maximum(counts, 1))[:, None] + self.bias
    chances = 1 / (1 + np.exp(-np.clip(logits, -60, 60)))
    if len(self.labels) == 2:
      return np.concatenate([chances, 1 - chances], axis=1)
    return chances / chances.sum(axis=1, keepdims=True)

  def save(self, path: str | Path) -> None:
    """Writes it, the weights as float16."""
    about = {'labels': self.labels, 'metrics': self.metrics,
             'features': dataclasses.asdict(self.features)}
    data = io.BytesIO()
    np.savez_compressed(data, weights=self.weights.astype(np.float16),
                        bias=self.bias.astype(np.float32), about=np.array(json.dumps(about)))
    Path(path).write_bytes(data.getvalue())


def load(path: str | Path) -> Model:
  """Reads a model.

  Raises:
    UserError: there is none, or it is no classifier of `train`.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      if sum(member.file_size for member in archive.infolist()) > _MOST_BYTES:
        raise ValueError(f'it is larger than {_MOST_BYTES:,} bytes')
    with np.load(path, allow_pickle=False) as arrays:
      about = json.loads(str(arrays['about']))
      weights, bias = arrays['weights'].astype(np.float32), arrays['bias'].astype(np.float32)
    labels = tuple(map(str, about['labels']))
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in about['features'].items()}
    model = Model(labels, features.Features(**settings), weights, bias, about['metrics'])
    columns = 1 if len(labels) == 2 else len(labels)
    if weights.shape != (1 << model.features.bits, columns) or bias.shape != (columns,):
      raise ValueError(f'weights of shape {weights.shape} do not fit {len(labels)} labels')
    if not (np.isfinite(weights).all() and np.isfinite(bias).all()):
      raise ValueError('a weight is not finite')
    return model
  except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError, EOFError) as error:
    raise UserError(
        f'{path} is no classifier ({error}); train one with `lm corpus classifier`.'
    ) from error


def _loaded(path: str) -> Model:
  """Returns the model, read once a process as long as the file stays as it is."""
  try:
    state = os.stat(path)
  except OSError:
    return load(path)  # It says what is wrong.
  return _load(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _load(path: str, *state: int) -> Model:
  del state
  return load(path)


@dataclasses.dataclass(frozen=True)
class Classifier(Stage):
  """Removes documents by the probability that a classifier gives to some of its labels.

  Attributes:
    path: of the model.
    name: of the rule: '<name>.score', the probability.
    labels: whose probabilities are added up; () is the first label, that of --positive.
    min_score, max_score: documents outside of these are removed: min_score=0.5 keeps what is
      likely of the labels, max_score=0.5 what is not.
  """

  path: str
  name: str = 'classifier'
  labels: tuple[str, ...] = ()
  min_score: float = 0.0
  max_score: float = 1.0

  def prepare(self, directory: Path) -> Classifier:
    """Checks the model, and copies it to where its name tells what it is."""
    self._columns(load(self.path))
    data = Path(self.path).read_bytes()
    copy = Path(directory) / f'{hashlib.sha256(data).hexdigest()[:16]}.npz'
    copy.write_bytes(data)
    return dataclasses.replace(self, path=str(copy))

  def apply(self, document: Document) -> None:
    """Writes '<name>.score'; removes the document where it is too low or too high."""
    self._judge([document])

  def apply_all(self, documents: Sequence[Document]) -> Iterator[int]:
    """Applies it to several documents at a time, which is faster where they are short."""
    for start in range(0, len(documents), _BATCH):
      yield start
      self._judge(documents[start : start + _BATCH])

  def _judge(self, documents: Sequence[Document]) -> None:
    model = _loaded(self.path)
    chances = model.probabilities([document.text for document in documents])
    for document, score in zip(documents, chances[:, self._columns(model)].sum(axis=1).tolist()):
      score = round(score, 4)
      document.judge(f'{self.name}.score', score, self.min_score <= score <= self.max_score)

  def _columns(self, model: Model) -> list[int]:
    labels = self.labels or model.labels[:1]
    unknown = [label for label in labels if label not in model.labels]
    if unknown:
      raise UserError(
          f'classifier.Classifier.labels names {unknown[0]!r}, which {self.path} does not tell; its'
          f' labels are {", ".join(model.labels)}.'
      )
    return [model.labels.index(label) for label in labels]


def train(config: Config, texts: Mapping[str, Sequence[str]]) -> Model:
  """Trains on most of the texts of each label and measures on the others.

  A text that stands twice, under whatever labels, is used once.

  Args:
    config: how.
    texts: of each label. Of two, the first is the one whose score, F1 and AUC are told.

  Returns:
    the model, with metrics 'accuracy', 'majority' (the accuracy of always the same label), 'f1' (of
    the first of two labels, else the mean over labels), 'auc' (of two), 'trained', 'held_out'.

  Raises:
    UserError: fewer than two labels, or one with fewer than 10 different texts.
  """
  try:
    from scipy import sparse
    from sklearn import linear_model, multiclass
  except ImportError as error:
    raise UserError(
        'To train a classifier scikit-learn is needed, which is not installed; `pip install'
        ' lm[corpus]`.'
    ) from error
  labels, kept, chosen, held = _parted(config, texts)
  train_on = np.flatnonzero(~held)
  counts = features.counts([kept[i] for i in train_on], config.features)
  frequency = np.bincount(counts.indices, minlength=counts.shape[1])
  idf = np.log((1 + len(train_on)) / (1 + frequency))
  lengths = np.maximum(1, np.asarray(counts.sum(axis=1)).ravel())
  counts = (sparse.diags(1 / np.sqrt(lengths)) @ counts @ sparse.diags(idf)).tocsr()
  fitted = linear_model.LogisticRegression(C=1 / config.penalty, solver='liblinear', random_state=0)
  weights, biases = [], []
  targets = chosen[train_on]
  for column in range(1 if len(labels) == 2 else len(labels)):
    fitted.fit(counts, targets == column)
    weights.append(fitted.coef_[0] * idf)
    biases.append(fitted.intercept_[0])
  stored = np.stack(weights, axis=1).astype(np.float16).astype(np.float32)
  model = Model(labels, config.features, stored, np.asarray(biases, np.float32), {})
  metrics = _metrics(model, [kept[i] for i in np.flatnonzero(held)], chosen[held])
  return dataclasses.replace(model, metrics={'trained': len(train_on), **metrics})


def _parted(config: Config, texts: Mapping[str, Sequence[str]]
            ) -> tuple[tuple[str, ...], list[str], np.ndarray, np.ndarray]:
  """Returns the labels, the different texts, the place of each text's label, which are held out."""
  labels = tuple(texts)
  if len(labels) < 2:
    raise UserError(f'A classifier tells two labels or more apart, and there is {len(labels)};'
                    ' give documents of another label.')
  owners: dict[str, int] = {}
  for place, label in enumerate(labels):
    for text in texts[label]:
      owners.setdefault(text, place)
  kept, chosen = list(owners), np.asarray(list(owners.values()))
  held = np.zeros(len(kept), bool)
  chance = np.random.default_rng(config.seed)
  for place, label in enumerate(labels):
    places = chance.permutation(np.flatnonzero(chosen == place))
    if len(places) < 10:
      raise UserError(f'Label {label!r} has {len(places)} different documents; give at least 10.')
    held[places[: max(1, round(config.held_out * len(places)))]] = True
  return labels, kept, chosen, held


def _metrics(model: Model, texts: Sequence[str], chosen: np.ndarray) -> dict[str, Any]:
  """Measures the model on texts it has not seen."""
  from sklearn import metrics
  chances = np.concatenate([model.probabilities(texts[start : start + _BATCH])
                            for start in range(0, len(texts), _BATCH)])
  guesses = chances.argmax(axis=1)
  two = len(model.labels) == 2
  f1 = metrics.f1_score(chosen, guesses, **(
      dict(pos_label=0) if two else dict(average='macro')), zero_division=0)
  result = {'held_out': len(texts), 'accuracy': float((guesses == chosen).mean()),
            'majority': float(np.bincount(chosen).max() / len(texts)), 'f1': float(f1)}
  if two:
    result['auc'] = float(metrics.roc_auc_score(chosen == 0, chances[:, 0]))
  return result
