"""The rules of quality and repetition of Gopher's MassiveText.

Rae et al. 2021, arXiv:2112.11446, appendix A.1.1 and table A1, whose thresholds are the defaults.
What a word is, above all in Chinese, stands in `words`.
"""

from __future__ import annotations

from collections.abc import Collection
import dataclasses
import re

import numpy as np

from lm.corpus import words as words_lib
from lm.corpus.document import Document
from lm.corpus.stage import Stage

# English is Gopher's own list; the others are its nearest equivalents: articles, copula, "and",
# "of", "to", "that", "with" or what marks a sentence of that language in their place.
STOP_WORDS = {
    'en': ('the', 'be', 'to', 'of', 'and', 'that', 'have', 'with'),
    'de': ('der', 'die', 'das', 'und', 'zu', 'ist', 'mit', 'nicht'),
    'fr': ('le', 'la', 'les', 'de', 'et', 'est', 'que', 'dans'),
    'es': ('el', 'la', 'los', 'de', 'y', 'es', 'que', 'con'),
    'ru': ('и', 'в', 'не', 'на', 'что', 'с', 'это', 'как'),
    'zh': ('的', '是', '不', '在', '有', '了', '和', '之', '人'),
    'ja': ('の', 'は', 'を', 'に', 'が', 'と', 'た', 'で'),
}
_BULLETS = ('•', '-')
_ELLIPSES = ('...', '…')
_LETTER = re.compile(r'[^\W\d_]')
_NEWLINES = re.compile(r'\n+')
_BLANK_LINES = re.compile(r'\n{2,}')
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: 2^64 / golden ratio


@dataclasses.dataclass(frozen=True)
class Gopher(Stage):
  """Removes what is not prose by the look of its words and lines.

  Attributes:
    min_words, max_words: 'gopher.word_count', of words with a letter or digit.
    min_word_length, max_word_length: 'gopher.mean_word_length', in characters; has no meaning in
      scripts without spaces.
    max_symbol_ratio: 'gopher.hash_ratio' and 'gopher.ellipsis_ratio', signs per word.
    max_bullet_lines: 'gopher.bullet_lines', fraction of lines that begin with a bullet.
    max_ellipsis_lines: 'gopher.ellipsis_lines', fraction of lines that end with an ellipsis.
    min_alphabetic: 'gopher.alphabetic_words', fraction of what stands between spaces that has a
      letter, as in Dolma. (To datatrove each punctuation mark is a word, so that it removes a
      quarter of the articles of Wikipedia by this rule.)
    min_stop_words: 'gopher.stop_words', different ones of the document's language (English where
      it is not identified); has no meaning in languages without an entry in `STOP_WORDS`.
  """

  min_words: int = 50
  max_words: int = 100_000
  min_word_length: float = 3.0
  max_word_length: float = 10.0
  max_symbol_ratio: float = 0.1
  max_bullet_lines: float = 0.9
  max_ellipsis_lines: float = 0.3
  min_alphabetic: float = 0.8
  min_stop_words: int = 2

  def apply(self, document: Document) -> None:
    """Writes 'gopher.*' of words and lines; removes the document at the first that fails."""
    text, words = document.text, words_lib.of(document.text)
    language = document.language or 'en'
    num_pieces = max(1, len(words.hashes))
    real = len(words.hashes) - words.num_symbols
    num_words = num_pieces / words.pieces_per_word
    lines = text.splitlines() or ['']

    count = real // words.pieces_per_word
    document.judge('gopher.word_count', count, self.min_words <= count <= self.max_words)
    if words.spaced:
      length = (int(words.lengths.sum()) - words.symbol_characters) / max(1, real)
      keep = self.min_word_length <= length <= self.max_word_length
      document.judge('gopher.mean_word_length', round(length, 4), keep)
    else:
      document.judge('gopher.mean_word_length', 'no spaces between words', True)
    for rule, signs in (('hash', ('#',)), ('ellipsis', _ELLIPSES)):
      ratio = sum(text.count(sign) for sign in signs) / num_words
      document.judge(f'gopher.{rule}_ratio', round(ratio, 4), ratio <= self.max_symbol_ratio)
    bullets = sum(1 for line in lines if line.lstrip().startswith(_BULLETS)) / len(lines)
    document.judge('gopher.bullet_lines', round(bullets, 4), bullets <= self.max_bullet_lines)
    ellipses = sum(1 for line in lines if line.rstrip().endswith(_ELLIPSES)) / len(lines)
    keep = ellipses <= self.max_ellipsis_lines
    document.judge('gopher.ellipsis_lines', round(ellipses, 4), keep)
    alphabetic = _alphabetic(text) if words.spaced else words.num_alphabetic / num_pieces
    keep = alphabetic >= self.min_alphabetic
    document.judge('gopher.alphabetic_words', round(alphabetic, 4), keep)
    if language in STOP_WORDS:
      present = words.num_present(STOP_WORDS[language])
      document.judge('gopher.stop_words', present, present >= self.min_stop_words)
    else:
      document.judge('gopher.stop_words', f'no list for {language}', True)


def _alphabetic(text: str) -> float:
  words = text.split()
  return sum(1 for word in words if _LETTER.search(word)) / max(1, len(words))


@dataclasses.dataclass(frozen=True)
class GopherRepetition(Stage):
  """Removes what repeats its lines, paragraphs or n-grams of words.

  In scripts without spaces, where a word is two characters, an n-gram is of 2n characters.

  Attributes:
    dup_line_fraction, dup_paragraph_fraction: of lines (paragraphs) that stood before.
    dup_line_characters, dup_paragraph_characters: of the text's characters in those.
    top_ngrams: (n, fraction of the text's characters in the most frequent n-gram).
    dup_ngrams: (n, fraction of the text's characters in n-grams that stood before, each character
      counted once).
  """

  dup_line_fraction: float = 0.3
  dup_paragraph_fraction: float = 0.3
  dup_line_characters: float = 0.2
  dup_paragraph_characters: float = 0.2
  top_ngrams: tuple[tuple[int, float], ...] = ((2, 0.2), (3, 0.18), (4, 0.16))
  dup_ngrams: tuple[tuple[int, float], ...] = (
      (5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10),
  )

  def apply(self, document: Document) -> None:
    """Writes 'gopher.dup_*' and 'gopher.top_*'; removes the document at the first that fails."""
    text = document.text
    size = max(1, len(text))
    for rule, parts, most, most_characters in (
        ('paragraph', _BLANK_LINES.split(text.strip()), self.dup_paragraph_fraction,
         self.dup_paragraph_characters),
        ('line', _NEWLINES.split(text), self.dup_line_fraction, self.dup_line_characters),
    ):
      fraction, characters = duplicates(parts)
      document.judge(f'gopher.dup_{rule}_fraction', round(fraction, 4), fraction <= most)
      fraction = characters / size
      keep = fraction <= most_characters
      document.judge(f'gopher.dup_{rule}_characters', round(fraction, 4), keep)
    top, dup = dict(self.top_ngrams), dict(self.dup_ngrams)
    for kind, n, characters in _ngrams(words_lib.of(text), top, dup):
      fraction = characters / size
      keep = fraction <= (top if kind == 'top' else dup)[n]
      document.judge(f'gopher.{kind}_{n}_gram', round(fraction, 4), keep)


def duplicates(parts: list[str]) -> tuple[float, int]:
  """Returns the fraction of parts that stood before, and the number of characters in them."""
  different = set(parts)
  characters = sum(map(len, parts)) - sum(map(len, different))
  return (len(parts) - len(different)) / max(1, len(parts)), characters


def _ngrams(words: words_lib.Words, top: Collection[int], dup: Collection[int]):
  """Yields (kind, n, characters) of the 'top' n-gram, blanks included, and of the 'dup' ones.

  An n-gram that occurs once holds no longer one that occurs twice, so each n looks only where the
  one before it found something: after the first, at a small part of the text.
  """
  step = words.pieces_per_word
  ends = np.concatenate([[0], np.cumsum(words.lengths, dtype=np.int64)])
  keys, size = words.hashes, 1  # of the n-gram that begins at each piece; its pieces
  places = np.arange(len(keys))  # where n-grams begin that may occur more than once
  for n in sorted({*top, *dup}):
    while size < n * step and len(keys):
      keys = keys[:-1] * _MULTIPLIER + words.hashes[size:]
      size += 1
    places = places[: np.searchsorted(places, len(keys))]
    places, most, count = _repeated(keys, places)
    if n in top:
      length = ends[most + size] - ends[most] + (size - 1) * (step == 1) if len(keys) else 0
      yield 'top', n, int(length) * count
    if n in dup:
      yield 'dup', n, _characters_again(places.tolist(), keys[places].tolist(), ends, size)


def _repeated(keys: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, int, int]:
  """Returns the places whose key occurs more than once, where the most frequent key stands first,
  and how often it occurs."""
  order = np.argsort(keys[places], kind='stable')
  ordered = keys[places[order]]
  same = ordered[1:] == ordered[:-1]
  if not same.any():
    return places[:0], 0, 1
  starts = np.flatnonzero(np.concatenate([[True], ~same]))
  counts = np.diff(starts, append=len(order))
  count = int(counts.max())
  first = places[order[starts[counts == count]]].min()  # of several as frequent, as in datatrove
  repeated = np.concatenate([same, [False]]) | np.concatenate([[False], same])
  return np.sort(places[order[repeated]]), int(first), count


def _characters_again(
    places: list[int], keys: list[int], ends: np.ndarray, size: int
) -> int:
  """Returns the characters of n-grams that stood before; the search goes on after each."""
  seen, free, total = set(), 0, 0
  for place, key in zip(places, keys):
    if place < free:
      continue
    if key in seen:
      total += int(ends[place + size] - ends[place])
      free = place + size
    else:
      seen.add(key)
  return total
