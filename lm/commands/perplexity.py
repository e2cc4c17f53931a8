"""Removes documents that a model of ours finds too surprising, or not surprising at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import hashlib
import math
import os
from pathlib import Path
from typing import Self

import numpy as np

from lm.corpus.document import Document
from lm.corpus.stage import Stage
from lm.errors import UserError

_DOCUMENTS = 64  # Scored together.


@dataclasses.dataclass(frozen=True)
class Perplexity(Stage):
  """Keeps documents whose bits a byte, by a language model, lie between two bounds.

  CCNet (Wenzek et al. 2019, arXiv:1911.00359, section 4) ranks the web by the perplexity of a model
  of Wikipedia: clean prose has a low one, lists and machine text a high one. Bits a byte are the
  logarithm of perplexity over the text's own length, so they do not depend on the vocabulary. A
  very low figure is of text that repeats itself.

  Attributes:
    run_dir: of a run of `lm train` with `CausalLM`, small and of text as it should be; its last
      checkpoint scores, on one core of each worker.
    max_bits_per_byte: above it a document is removed.
    min_bits_per_byte: below it too.
    max_tokens: of a document, from its start, that are scored.
    digest: of the checkpoints; filled in by `prepare`, so that a run that trained on makes another
      corpus.
  """

  run_dir: str
  max_bits_per_byte: float
  min_bits_per_byte: float = 0.0
  max_tokens: int = 512
  digest: str = ''

  def __post_init__(self):
    if not 0 <= self.min_bits_per_byte < self.max_bits_per_byte:
      raise ValueError(f'min_bits_per_byte={self.min_bits_per_byte} must be at least 0 and below '
                       f'max_bits_per_byte={self.max_bits_per_byte}')
    if self.max_tokens < 1:
      raise ValueError(f'max_tokens={self.max_tokens} must be at least 1')

  def prepare(self, directory: Path) -> Self:
    """Returns itself with the digest of the run's checkpoints."""
    del directory
    digests = sorted(Path(self.run_dir).glob('checkpoints/[0-9]*/digests.json'))
    if not digests:
      raise UserError(f'run_dir={self.run_dir!r} of Perplexity holds no checkpoint; train a small '
                      'model there by `lm train`, or leave the stage out.')
    whole = hashlib.sha256(b''.join(path.read_bytes() for path in digests))
    return dataclasses.replace(self, run_dir=os.path.abspath(self.run_dir),
                               digest=whole.hexdigest()[:16])

  @functools.cached_property
  def _score(self) -> Callable[[Sequence[str]], np.ndarray]:
    os.environ['JAX_PLATFORMS'] = 'cpu'  # Accelerators do not go round among the workers.
    return _scorer(self.run_dir, self.max_tokens)

  def apply(self, document: Document) -> None:
    """Scores one document."""
    for _ in self.apply_all([document]):
      pass

  def apply_all(self, documents: Sequence[Document]) -> Iterator[int]:
    """Scores some documents at a time."""
    for first in range(0, len(documents), _DOCUMENTS):
      yield first
      some = documents[first:first + _DOCUMENTS]
      for document, score in zip(some, self._score([document.text for document in some]).tolist()):
        document.verdicts['perplexity.bits_per_byte'] = score
        if not self.min_bits_per_byte <= score <= self.max_bits_per_byte:
          document.remove('perplexity.bits_per_byte')


def _scorer(run_dir: str, max_tokens: int) -> Callable[[Sequence[str]], np.ndarray]:
  """Returns what gives the bits a byte of texts, of at most their first `max_tokens` tokens."""
  from lm import run
  from lm.data import objectives, vocabularies
  from lm.evaluation import evaluator

  experiment = run.open_experiment((), (), run_dir)
  if not isinstance(experiment.objective, objectives.CausalLM):
    raise UserError(f'the model of run_dir={run_dir!r} was trained by '
                    f'{type(experiment.objective).__name__} and gives texts no probability; name a '
                    'run of CausalLM')
  _, module, params = run.load(experiment, run_dir)
  vocabulary = vocabularies.load(Path(run_dir) / 'vocabulary')
  length, batch_size = experiment.train.sequence_length, experiment.train.batch_size

  def score(texts: Sequence[str]) -> np.ndarray:
    tokens = [np.asarray(vocabulary.encode(text)[:max_tokens], np.int32) for text in texts]
    sizes = [len(vocabulary.decode(ids.tolist()).encode()) for ids in tokens]
    nats = evaluator.document_nats(module, params, tokens, length, batch_size, progress=False)
    return nats / math.log(2) / np.maximum(sizes, 1)

  return score
