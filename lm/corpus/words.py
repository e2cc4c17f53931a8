"""The words of a text, as numbers: what the rules of quality and repetition count.

A word is a run of letters, digits and marks ("don't" is "don" and "'t", "3.14" and "U.S." are one),
or a character of punctuation, or a run of dots or dashes. In scripts without spaces between words
(Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is a piece, and two pieces count as
one word: the paragraphs of XQuAD have 1.6 Chinese characters for each English word.

datatrove segments by spaCy instead, at 2 % of the speed, with lists of abbreviations and of what
stays whole ("and/or", addresses without their slashes), and Chinese by a dictionary.
"""

from __future__ import annotations

import collections
import dataclasses
import re

import numpy as np

PIECES_PER_WORD = 2  # in scripts without spaces
_UNSPACED = (
    '\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff'
    '\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff'
)
# Combining marks are no letters to `\w`: of Latin, Cyrillic, Hebrew, Arabic, the scripts of India.
_MARKS = (
    '\u0300-\u036f\u0483-\u0489\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed'
    '\u0900-\u0963\u0966-\u0dff\u200c\u200d'
)
_INITIALS, _NUMBER, _MARK = r'(?:[A-Za-z]\.)+', r'(?:[.,]\d+)*', r'[.-]{2,}|[^\w\s]'
_ASCII = re.compile(rf"{_INITIALS}|'?\w+{_NUMBER}|{_MARK}", re.ASCII)
_SPACED = re.compile(rf"{_INITIALS}|['’]?[\w{_MARKS}]+{_NUMBER}|{_MARK}")
_LETTERS = rf'(?:[^\W{_UNSPACED}]|[{_MARKS}])+'
_MIXED = re.compile(rf"[{_UNSPACED}]|{_INITIALS}|['’]?{_LETTERS}{_NUMBER}|{_MARK}")
_UNSPACED_CHARACTER = re.compile(f'[{_UNSPACED}]')
_HAS_LETTER = re.compile(r'[^\W\d_]')
_HAS_LETTER_OR_DIGIT = re.compile(r'[^\W_]')
_CHUNK = 1 << 20  # Characters that are lists of words at a time.
_REMEMBERED = 1 << 24  # Characters whose words are kept for the next stage: those of a block.


@dataclasses.dataclass(frozen=True, slots=True)
class Words:
  """The pieces of a text in their order, without the text.

  Attributes:
    hashes: of each piece, uint64; the same for the same piece in one process only.
    lengths: of each piece, in characters.
    num_symbols: pieces without a letter or digit; `symbol_characters` are their lengths together.
    num_alphabetic: pieces with a letter.
    num_unspaced: pieces that are characters of a script without spaces.
  """

  hashes: np.ndarray
  lengths: np.ndarray
  num_symbols: int
  symbol_characters: int
  num_alphabetic: int
  num_unspaced: int

  @property
  def spaced(self) -> bool:
    """Whether most of it is in scripts that put spaces between words."""
    return 2 * self.num_unspaced <= len(self.hashes) - self.num_symbols

  @property
  def pieces_per_word(self) -> int:
    """Of this text's script, by which to compare with thresholds that are in words."""
    return 1 if self.spaced else PIECES_PER_WORD

  def num_present(self, vocabulary: tuple[str, ...]) -> int:
    """Returns how many of these words stand in the text."""
    hashes = np.asarray([hash(word) for word in vocabulary], np.int64).view(np.uint64)
    return int(np.isin(hashes, self.hashes).sum())


def split(text: str) -> list[str]:
  """Returns the pieces of a text: words, characters of unspaced scripts, punctuation marks."""
  if text.isascii():
    return _ASCII.findall(text)
  return (_MIXED if _UNSPACED_CHARACTER.search(text) else _SPACED).findall(text)


def is_spaced(text: str) -> bool:
  """Whether no more than half of a short text is in scripts without spaces between words."""
  return text.isascii() or 2 * len(_UNSPACED_CHARACTER.findall(text)) <= len(text)


def count(text: str) -> float:
  """Returns the number of words of a short text, such as a line: between blanks or, in scripts
  without spaces, two characters each."""
  if is_spaced(text):
    return len(text.split())
  return len(_UNSPACED_CHARACTER.findall(text)) / PIECES_PER_WORD


_cache: collections.OrderedDict[int, tuple[str, Words]] = collections.OrderedDict()
_cached = 0  # Characters in `_cache`.


def of(text: str) -> Words:
  """Returns the words of a text; of the same object as lately, without counting again."""
  global _cached
  held = _cache.get(id(text))
  if held is not None:  # The cache holds the text, so that no other can have its id.
    _cache.move_to_end(id(text))
    return held[1]
  words = _measure(text)
  _cache[id(text)] = text, words
  _cached += len(text)
  while _cached > _REMEMBERED:
    _cached -= len(_cache.popitem(last=False)[1][0])
  return words


def _measure(text: str) -> Words:
  hashes, lengths, symbols, characters, alphabetic, unspaced = [], [], 0, 0, 0, 0
  for chunk in _chunks(text):
    pieces = split(chunk)
    hashes.append(np.fromiter(map(hash, pieces), np.int64, len(pieces)))
    lengths.append(np.fromiter(map(len, pieces), np.int32, len(pieces)))
    others = [piece for piece in pieces if not piece.isalpha()]
    marks = [piece for piece in others if not piece.isalnum()]
    mixed = [piece for piece in others if len(piece) > 1 and _HAS_LETTER.search(piece)]
    alphabetic += len(pieces) - len(others) + len(mixed)
    marks = [piece for piece in marks if len(piece) == 1 or not _HAS_LETTER_OR_DIGIT.search(piece)]
    symbols += len(marks)
    characters += sum(map(len, marks))
    if not chunk.isascii():
      unspaced += len(_UNSPACED_CHARACTER.findall(chunk))
  return Words(np.concatenate(hashes).view(np.uint64), np.concatenate(lengths), symbols,
               characters, alphabetic, unspaced)


def _chunks(text: str):
  """Cuts a long text at blanks, so that its words need not be in memory together."""
  start = 0
  while len(text) - start > _CHUNK:
    end = max(text.rfind(' ', start, start + _CHUNK), text.rfind('\n', start, start + _CHUNK))
    end = start + _CHUNK if end <= start else end
    yield text[start:end]
    start = end
  yield text[start:]
