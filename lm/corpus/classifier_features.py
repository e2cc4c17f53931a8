"""Hashed n-grams of words and characters of many texts at once, by numpy.

A word is a run of letters and digits; a mark of punctuation and a character of a script without
spaces are words by themselves. N-grams of characters run over word ends, blanks being alike. Hashes
are the same in every process and on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import Any

import numpy as np

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: 2^64 / golden ratio
_MIXER = np.uint64(0xBF58476D1CE4E5B9)  # of splitmix64
_CHUNK = 1 << 18  # Characters at a time.
_LONGEST = 64  # Characters of a word after which its hash repeats its factors.
_BLANK, _LETTER, _MARK, _UNSPACED = range(4)


@dataclasses.dataclass(frozen=True)
class Features:
  """Which n-grams are features.

  Attributes:
    bits: 2^bits buckets that n-grams are hashed to.
    words: longest n-gram of words, in words.
    characters: shortest and longest n-gram of characters; (1, 0) for none.
    lower_case: whether 'A' is 'a'.
  """

  bits: int = 18
  words: int = 2
  characters: tuple[int, int] = (4, 4)
  lower_case: bool = True

  def __post_init__(self) -> None:
    if not 8 <= self.bits <= 24:
      raise ValueError(f'bits={self.bits} must be from 8 to 24')
    if self.words < 0 or len(self.characters) != 2 or self.characters[0] < 1:
      raise ValueError(f'words={self.words} and characters={self.characters} name no n-grams')


def buckets(texts: Sequence[str], features: Features) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (place of the text, bucket) of all n-grams, in parts.

  A long text is cut, without the n-grams over its cuts: memory is bounded.
  """
  group: list[tuple[int, str]] = []
  size = 0
  for place, text in enumerate(texts):
    text = text.lower() if features.lower_case else text
    for start in range(0, len(text), _CHUNK):
      part = text[start : start + _CHUNK]
      if size + len(part) > _CHUNK:
        yield from _hashed(group, features)
        group, size = [], 0
      group.append((place, part))
      size += len(part)
  yield from _hashed(group, features)


def counts(texts: Sequence[str], features: Features) -> Any:
  """Returns how often each text has each bucket: scipy's CSR, float32 [texts, buckets]."""
  from scipy import sparse
  rows = []
  for start in range(0, len(texts), 256):
    part = texts[start : start + 256]
    pairs = list(buckets(part, features)) or [(np.zeros(0, np.int64),) * 2]
    places, columns = (np.concatenate(arrays) for arrays in zip(*pairs))
    ones = np.ones(len(places), np.float32)
    shape = len(part), 1 << features.bits
    rows.append(sparse.coo_matrix((ones, (places, columns)), shape).tocsr())
  return sparse.vstack(rows, format='csr')


def _hashed(group: list[tuple[int, str]], features: Features
            ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the n-grams of texts that fit in memory, one kind after another."""
  if not group:
    return
  lengths = [len(text) for _, text in group]
  places = np.repeat(np.asarray([place for place, _ in group]), lengths)
  data = ''.join(text for _, text in group).encode('utf-32-le', 'surrogatepass')
  characters = np.frombuffer(data, np.uint32)
  first = np.zeros(len(characters), bool)
  first[np.cumsum([0, *lengths[:-1]])] = True  # All texts here have characters.
  kinds = _kinds()[np.minimum(characters, 0x10000)]
  codes = np.where(kinds == _BLANK, 32, characters).astype(np.uint64)
  starts = np.flatnonzero(
      (kinds != _BLANK) & (first | (kinds >= _MARK) | (kinds != np.roll(kinds, 1)))
  )
  if features.words and len(starts):
    sizes = np.diff(starts, append=len(codes))
    index = np.arange(starts[0], len(codes)) - np.repeat(starts, sizes)
    inside = codes[starts[0]:] * _powers()[index % _LONGEST]
    inside[kinds[starts[0]:] == _BLANK] = 0  # Blanks end a word, and do not change its hash.
    words = np.add.reduceat(inside, starts - starts[0])
    yield from _ngrams(words, places[starts], 1, features.words, 0, features.bits)
  yield from _ngrams(codes, places, *features.characters, 128, features.bits)


def _ngrams(codes: np.ndarray, places: np.ndarray, shortest: int, longest: int, salt: int,
            bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the n-grams of lengths in a range that do not run from one text into the next."""
  hashes = codes
  for n in range(1, longest + 1):
    if n > 1:
      hashes = hashes[:-1] * _MULTIPLIER + codes[n - 1 :]
    if n >= shortest and len(hashes):
      whole = places[: len(hashes)] == places[n - 1 :]
      mixed = hashes[whole] + np.uint64(salt + n)
      mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIXER
      yield places[: len(hashes)][whole], (mixed >> np.uint64(64 - bits)).astype(np.int64)


@functools.cache
def _powers() -> np.ndarray:
  return np.cumprod(np.full(_LONGEST, _MULTIPLIER))


@functools.cache
def _kinds() -> np.ndarray:
  """The kind of each character of the first plane; at the end, of those beyond it."""
  kinds = np.full(0x10001, _MARK, np.uint8)
  for code in range(0x10000):
    character = chr(code)
    if character.isspace():
      kinds[code] = _BLANK
    elif character.isalnum() or 0x300 <= code <= 0x36F or 0x900 <= code <= 0xDFF:
      kinds[code] = _LETTER
  for begin, end in ((0xE00, 0xF00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x3040, 0x3100),
                     (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00)):
    kinds[begin:end] = _UNSPACED
  kinds[0x10000] = _UNSPACED
  return kinds
