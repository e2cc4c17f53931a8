"""Slips of fingers on a QWERTY keyboard."""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.data.examples.augment.base import Augmentation
from lm.errors import UserError

_ROWS = ((0.0, 'qwertyuiop'), (0.25, 'asdfghjkl'), (0.75, 'zxcvbnm'))  # And how far they are in.
_PLACES = {key: (first + column, row) for row, (first, keys) in enumerate(_ROWS)
           for column, key in enumerate(keys)}
NEIGHBOURS = {
    key: ''.join(other for other, (v, t) in _PLACES.items()
                 if other != key and abs(u - v) <= 1 and abs(s - t) <= 1)
    for key, (u, s) in _PLACES.items()}
_BETWEEN = '\0'


@dataclasses.dataclass(frozen=True)
class Typos(Augmentation):
  """Letters a to z are mistyped, in four ways that are equally likely: the key beside it, the next
  letter first (transposition), left out, or twice.

  A word's first letter is never left out, so that none becomes empty. Case stays with the letter
  that is typed. These are the four kinds of error of a spelling corrector (Damerau 1964).

  Attributes:
    letters: share of the letters of an example that are mistyped.
  """

  growth: float = 1.3
  letters: float = 0.03

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 0 < self.letters <= 1:
      raise UserError(f'letters={self.letters} must be a share of the letters, above 0 and at most'
                      ' 1.')

  def tagged(self, words, tags, rng):
    """Returns the words with typos; tags stay."""
    return self.text(_BETWEEN.join(words), rng).split(_BETWEEN), tags

  def text(self, text, rng):
    """Returns the text with typos."""
    hit = np.nonzero(rng.random(len(text)) < self.letters)[0].tolist()
    ways, which = rng.integers(4, size=len(hit)), rng.random(len(hit))
    typed, moved = list(text), -1
    for i, way, share in zip(hit, ways.tolist(), which.tolist()):
      letter = text[i]
      if letter.lower() not in NEIGHBOURS or i == moved:
        continue
      if way == 1 and text[i + 1:i + 2].lower() in NEIGHBOURS:
        typed[i], typed[i + 1], moved = text[i + 1], letter, i + 1
      elif way == 2 and text[i - 1:i].isalnum():
        typed[i] = ''
      elif way == 3:
        typed[i] = 2 * letter
      else:
        beside = NEIGHBOURS[letter.lower()]
        key = beside[int(share * len(beside))]
        typed[i] = key.upper() if letter.isupper() else key
    return ''.join(typed)
