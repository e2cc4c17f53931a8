"""Which texts of one set stand in another one: whole, nearly, or in a long passage.

Words are those of `lm.corpus.deduplicate.tokens`: letters and digits in any case, and in scripts
without spaces each character. All is exact, nothing is drawn: near duplicates are found by prefix
filtering (Chaudhuri et al. 2006; Bayardo et al. 2007, "Scaling up all pairs similarity search"):
two sets of a Jaccard similarity of t or more share one of the |x| - ceil(t |x|) + 1 rarest members
of each, so that only pairs which share such a member are compared.
"""
from collections.abc import Iterator, Sequence
import dataclasses
import functools

import numpy as np

from lm.corpus.deduplicate import tokens

NEAR = 0.8  # Jaccard similarity of two texts' pairs of neighbouring words
PASSAGE = 13  # words in a row that two texts share (Brown et al. 2020, arXiv:2005.14165, C)
_AT_ONCE = 1 << 21  # pairs that are looked at together


class Texts:
  """Some texts by their words."""

  def __init__(self, texts: Sequence[str]):
    self.texts = texts
    self._words = tokens.words(texts)
    self._hashes = tokens.Runs(tokens.mix(self._words.hashes))

  @functools.cached_property
  def identities(self) -> np.ndarray:
    """A hash of all words of each text, uint64 [texts]; 0 for a text without words."""
    bounds = self._words.bounds
    found = tokens.mix(self._hashes.hash(bounds[:-1], bounds[1:]))
    return np.where(np.diff(bounds) > 0, found, np.uint64(0))

  def runs(self, length: int, short: bool) -> tuple[np.ndarray, np.ndarray]:
    """(text, hash) of the runs of `length` words, each once a text, by text; with `short` a text of
    fewer words is one run."""
    starts, ends, counts = self._words.runs(length, short)
    of = np.repeat(np.arange(len(self.texts)), counts)
    hashes = tokens.mix(self._hashes.hash(starts, ends))
    order = np.lexsort((hashes, of))
    of, hashes = of[order], hashes[order]
    first = np.ones(len(of), bool)
    first[1:] = (of[1:] != of[:-1]) | (hashes[1:] != hashes[:-1])
    return of[first], hashes[first]


@dataclasses.dataclass(frozen=True)
class Seen:
  """Which texts stand elsewhere: `place` of the other text, -1 where there is none."""
  place: np.ndarray

  @property
  def where(self) -> np.ndarray:
    """The indices of those that do."""
    return np.flatnonzero(self.place >= 0)


def same(texts: Texts, others: Texts) -> Seen:
  """Which texts have all their words in common with another, in their order."""
  order = np.argsort(others.identities, kind='stable')
  return Seen(np.where(texts.identities == 0, -1,
                       _find(others.identities[order], order, texts.identities)))


def passages(texts: Texts, others: Texts, length: int = PASSAGE) -> Seen:
  """Which texts share `length` words in a row with another."""
  of, hashes = others.runs(length, short=False)
  order = np.argsort(hashes, kind='stable')
  text, own = texts.runs(length, short=False)
  found = _find(hashes[order], of[order], own)
  place = np.full(len(texts.texts), -1)
  place[text[found >= 0]] = found[found >= 0]
  return Seen(place)


def _find(ordered, values, wanted) -> np.ndarray:
  """values[i] where ordered[i] == wanted, the first; -1 where there is none."""
  if not len(ordered):
    return np.full(len(wanted), -1)
  at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
  return np.where(ordered[at] == wanted, values[at], -1)


def near(texts: Texts, others: Texts, threshold: float = NEAR) -> Seen:
  """Which texts have pairs of neighbouring words of a Jaccard similarity of `threshold` or more
  with another; the most similar one is named."""
  parts = [one.runs(2, short=True) for one in (texts, others)]
  _, code, times = np.unique(np.concatenate([hashes for _, hashes in parts]), return_inverse=True,
                             return_counts=True)
  codes = code[:len(parts[0][0])], code[len(parts[0][0]):]
  rare = [_prefix(of, ids, times, threshold) for (of, _), ids in zip(parts, codes)]
  bounds = [np.searchsorted(of, np.arange(len(one.texts) + 1))
            for (of, _), one in zip(parts, (texts, others))]
  members = lambda side, i: codes[side][bounds[side][i]:bounds[side][i + 1]]
  sizes = [np.diff(bound) for bound in bounds]
  best = np.zeros(len(texts.texts))
  place = np.full(len(texts.texts), -1)
  for left, right in _candidates(*rare):
    small, large = np.sort([sizes[0][left], sizes[1][right]], axis=0)
    for i, j in zip(*(side[small >= threshold * large] for side in (left, right))):
      shared = len(np.intersect1d(members(0, i), members(1, j), assume_unique=True))
      similarity = shared / (sizes[0][i] + sizes[1][j] - shared)
      if similarity >= threshold and similarity > best[i]:
        best[i], place[i] = similarity, j
  return Seen(place)


def _prefix(of, ids, times, threshold) -> tuple[np.ndarray, np.ndarray]:
  """(id, text) of the rarest members of each text of which a similar text has one, by id."""
  order = np.lexsort((ids, times[ids], of))
  of, ids = of[order], ids[order]
  size = np.bincount(of)[of] if len(of) else of
  rank = np.arange(len(of)) - np.searchsorted(of, of)
  kept = rank < size - np.ceil(threshold * size - 1e-9) + 1
  by_id = np.argsort(ids[kept], kind='stable')
  return ids[kept][by_id], of[kept][by_id]


def _candidates(left, right) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Pairs (text, other text) that share a rare member, each once in what comes together."""
  (ids, of), (other_ids, other_of) = left, right
  first, end = (np.searchsorted(other_ids, ids, side) for side in ('left', 'right'))
  for part in tokens.batches((end - first).tolist(), _AT_ONCE):
    counts = end[part] - first[part]
    if counts.sum():
      at = np.arange(counts.sum()) + np.repeat(first[part] - np.cumsum(counts) + counts, counts)
      yield np.unique(np.stack([np.repeat(of[part], counts), other_of[at]]), axis=1)
