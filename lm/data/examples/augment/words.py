"""EDA: synonyms, insertion, swap and deletion of words.

Words are what stands between blanks; one that stands at a comma or in quotation marks keeps them.
Texts in scripts without blanks are one word and stay as they are. Where EDA's code makes text lower
case without punctuation first, case and punctuation are kept here: models today have both.

Reference: Wei and Zou 2019, arXiv:1901.11196, section 2. Its authors advise alpha = 0.05 for up to
2,000 examples and 0.1 for more (table 3), with one of the four changes in each augmented text.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Sequence

import numpy as np

from lm.data.examples.augment import wordnet
from lm.data.examples.augment.base import Augmentation, free_places
from lm.errors import UserError

# The 127 English stop words that EDA leaves (NLTK's list of its time).
STOP_WORDS = frozenset("""
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her
hers herself it its itself they them their theirs themselves what which who whom this that these
those am is are was were be been being have has had having do does did doing a an the and but if or
because as until while of at by for with about against between into through during before after
above below to from up down in out on off over under again further then once here there when where
why how all any both each few more most other some such no nor not only own same so than too very s
t can will just don should now""".split())
_WORD = re.compile(r'(\W*)(.*?)(\W*)', re.DOTALL)

Pieces = list[tuple[int, str]]


@dataclasses.dataclass(frozen=True)
class _Words(Augmentation):
  """A change of words, n = max(1, int(alpha * words)) of them.

  Of tagged words only those outside of entities change, and their tags go with them.

  Attributes:
    alpha: share of a text's words.
  """

  alpha: float = 0.1

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 0 < self.alpha <= 1:
      raise UserError(f'alpha={self.alpha} must be a share of the words, above 0 and at most 1.')

  def count(self, words: Sequence[str]) -> int:
    """Returns how many words change."""
    return max(1, int(self.alpha * len(words)))

  def text(self, text, rng):
    """Returns the text with one blank between words, or the text itself where nothing changed."""
    words = text.split()
    changed = [word for _, word in self.edit(words, list(range(len(words))), False, rng)]
    return text if changed == words else ' '.join(changed)

  def tagged(self, words, tags, rng):
    """Returns words and their tags."""
    pieces = self.edit(words, free_places(tags), True, rng)
    return [word for _, word in pieces], [tags[i] for i, _ in pieces]

  def edit(self, words: list[str], free: list[int], one_word: bool, rng: np.random.Generator
           ) -> Pieces:
    """Returns (place of the word that it came from, word) of each word of the result.

    Args:
      words: of a text, at least one.
      free: places of those that may change.
      one_word: whether what is put in must be one word.
    """
    raise AssertionError(type(self))


@dataclasses.dataclass(frozen=True)
class _WithSynonyms(_Words):
  """What needs synonyms.

  Attributes:
    wordnet: directory of WordNet's data.noun, data.verb, data.adj, data.adv and *.exc, as Debian's
      wordnet-base puts them.
  """

  wordnet: str = '/usr/share/wordnet'

  def open(self, texts):
    """Reads WordNet, once a process."""
    wordnet.load(self.wordnet)

  def candidates(self, words: list[str], free: list[int], rng: np.random.Generator) -> list[int]:
    """Returns the places of words that are no stop words, in random order."""
    places = [i for i in free if core(words[i]).lower() not in STOP_WORDS]
    return [places[i] for i in rng.permutation(len(places))]

  def synonym(self, word: str, one_word: bool, rng: np.random.Generator) -> str | None:
    """Returns a synonym, each as likely as the others, or None if there is none."""
    found = wordnet.load(self.wordnet).synonyms(core(word).lower())
    if one_word:
      found = tuple(each for each in found if ' ' not in each)
    return found[int(rng.integers(len(found)))] if found else None


@dataclasses.dataclass(frozen=True)
class Synonyms(_WithSynonyms):
  """n words that are no stop words, each replaced by one of its synonyms in WordNet.

  The part of speech is not known, so that all senses of all of them count, as in EDA. A plural, or
  a verb in -s, -ed or -ing, is replaced by the same form of the synonym; other inflected forms stay
  as they are. Words without synonyms are passed over.
  """

  growth: float = 1.2

  def edit(self, words, free, one_word, rng):
    """Returns the words, n of them others."""
    words, left = list(words), self.count(words)
    for place in self.candidates(words, free, rng):
      synonym = self.synonym(words[place], one_word, rng)
      if synonym is not None:
        before, old, behind = _WORD.fullmatch(words[place]).groups()
        words[place], left = before + in_case_of(old, synonym) + behind, left - 1
      if not left:
        break
    return list(enumerate(words))


@dataclasses.dataclass(frozen=True)
class RandomInsertion(_WithSynonyms):
  """A synonym of a random word that is no stop word, at a random place; n times, of n words, or of
  as many as have synonyms.

  Of tagged words, what is put in has the tag of the word that it is a synonym of, and no entity is
  parted.
  """

  growth: float = 1.3

  def edit(self, words, free, one_word, rng):
    """Returns the words with up to n more."""
    pieces = list(enumerate(words))
    is_free = np.isin(np.arange(len(words)), free).tolist()
    drawn = ((place, self.synonym(words[place], one_word, rng))
             for place in self.candidates(words, free, rng))
    for piece in itertools.islice((piece for piece in drawn if piece[1]), self.count(words)):
      ends = [True, *is_free, True]
      gaps = [i for i in range(len(pieces) + 1) if ends[i] or ends[i + 1]]
      gap = gaps[int(rng.integers(len(gaps)))]
      pieces.insert(gap, piece)
      is_free.insert(gap, True)
    return pieces


@dataclasses.dataclass(frozen=True)
class RandomSwap(_Words):
  """Two random words change places; n times."""

  def edit(self, words, free, one_word, rng):
    """Returns the words in another order."""
    pieces = list(enumerate(words))
    if len(free) < 2:
      return pieces
    for _ in range(self.count(words)):
      first, step = rng.integers((len(free), len(free) - 1))
      one, other = free[first], free[(first + 1 + step) % len(free)]
      pieces[one], pieces[other] = pieces[other], pieces[one]
    return pieces


@dataclasses.dataclass(frozen=True)
class RandomDeletion(_Words):
  """Each word goes with probability alpha; one at least stays."""

  def edit(self, words, free, one_word, rng):
    """Returns the words that are left."""
    stays = np.ones(len(words), bool)
    stays[free] = rng.random(len(free)) >= self.alpha
    if not stays.any():
      stays[rng.integers(len(words))] = True
    return [(i, word) for i, word in enumerate(words) if stays[i]]


def core(word: str) -> str:
  """Returns a word without the punctuation around it."""
  return _WORD.fullmatch(word).group(2)


def in_case_of(old: str, new: str) -> str:
  """Returns `new` in capitals, or with a capital, where `old` has them."""
  if len(old) > 1 and old.isupper():
    return new.upper()
  return new[:1].upper() + new[1:] if old[:1].isupper() else new
