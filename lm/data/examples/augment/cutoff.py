"""Tokens that nobody sees."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from lm.data.examples.augment.base import Augmentation
from lm.errors import UserError


@dataclasses.dataclass(frozen=True)
class TokenCutoff(Augmentation):
  """Tokens of an encoder's input are cut off: single ones or a span.

  The others keep their positions, and none attends to what is cut off, as in the authors' code,
  which sets embeddings and mask to 0. Departures: [CLS] and [SEP] are never cut off, a text of few
  tokens loses one at least (and keeps one), and the paper's second loss, the divergence between the
  predictions of several views, is not part of it (`losses.Prediction.r_drop` is like it).

  Reference: Shen et al. 2020, arXiv:2009.13818.

  Attributes:
    ratio: share of the tokens that is cut off.
    kind: 'token' draws them one by one, 'span' takes neighbours.
  """

  ratio: float = 0.1
  kind: Literal['token', 'span'] = 'token'

  kinds = ('classification', 'similarity', 'tagging', 'generation')
  forms = ('encoder', 'text_to_text')

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.kind not in ('token', 'span'):
      raise UserError(f"kind={self.kind!r} must be 'token' or 'span'.")
    if not 0 < self.ratio < 1:
      raise UserError(f'ratio={self.ratio} must be a share of the tokens, between 0 and 1.')
    if self.fields:
      raise UserError(f'fields={self.fields}: TokenCutoff takes an example as a whole; leave fields'
                      ' out.')

  def __call__(self, example, rng):
    """Returns the example itself: what changes is its tokens."""
    return example

  def tokens(self, encoded, rng):
    """Returns the tokens with -1 where they are cut off."""
    sizes = [len(encoded.a), 0 if encoded.b is None else len(encoded.b)]
    total = sum(sizes)
    if rng.random() >= self.rate or total < 2:
      return encoded
    count = min(max(1, int(self.ratio * total)), total - 1)
    if self.kind == 'span':
      places = np.arange(count) + rng.integers(total - count + 1)
    else:
      places = rng.permutation(total)[:count]
    both = encoded.a if encoded.b is None else np.concatenate([encoded.a, encoded.b])
    both = both.copy()
    both[places] = -1
    a, b = np.split(both, sizes[:1])
    return encoded._replace(a=a, b=None if encoded.b is None else b)
