"""Synonyms by the files of WordNet's database (Fellbaum 1998; format: wndb(5WN)).

The data.* files alone are read, and noun.exc and verb.exc for irregular forms. The order of senses
by frequency stands in index.* files and cntlist, which are not needed: all senses count.
"""

from __future__ import annotations

import functools
from pathlib import Path
import re
import threading
from typing import Iterator, Optional

from lm.errors import UserError

_PARTS = ('noun', 'verb', 'adj', 'adv')
_FIRST_WORD = 17  # Column behind offset, file number, type and the number of words.
_SPELT = re.compile(r"[A-Za-z][A-Za-z' -]*")
_REGULAR_MAN = 'human', 'german', 'roman', 'shaman', 'talisman', 'ottoman', 'caiman', 'norman'
# Endings of inflected forms, and what stands for them in the base (wndb's rules of detachment).
_ENDINGS = {
    'noun': (('s', ''), ('ses', 's'), ('xes', 'x'), ('zes', 'z'), ('ches', 'ch'), ('shes', 'sh'),
             ('men', 'man'), ('ies', 'y')),
    'verb': (('s', ''), ('ies', 'y'), ('es', 'e'), ('es', ''), ('ed', 'e'), ('ed', ''),
             ('ing', 'e'), ('ing', '')),
}


class WordNet:
  """Synonyms of English words.

  Args:
    directory: of data.noun, data.verb, data.adj, data.adv, noun.exc and verb.exc.

  Raises:
    UserError: the directory lacks one of them, or what it holds is none of WordNet's.
  """

  def __init__(self, directory: str):
    folder = Path(directory).expanduser()
    files = [*(f'data.{part}' for part in _PARTS), 'noun.exc', 'verb.exc']
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
      raise UserError(f'wordnet={directory!r} holds no {missing[0]}; name the directory with the'
                      ' files of the WordNet 3.0 database (Debian: apt-get install wordnet-base).')
    self._synsets: dict[str, list[list[str]]] = {}
    self._index: dict[str, dict[str, list[int]]] = {}
    for part in _PARTS:
      self._synsets[part], self._index[part] = _read_data(folder / f'data.{part}')
    self._bases = {part: _read_exceptions(folder / f'{part}.exc') for part in _ENDINGS}
    self._irregular = {part: _inverse(bases) for part, bases in self._bases.items()}
    self._found: dict[str, tuple[str, ...]] = {}

  def synonyms(self, word: str) -> tuple[str, ...]:
    """Returns the synonyms of a word in lower case, sorted, in its own form; blanks part words."""
    if word not in self._found:
      forms = {form for part, base, ending in self._analyses(word)
               for number in self._index[part][base] for lemma in self._synsets[part][number]
               if lemma.lower() != base and _SPELT.fullmatch(lemma)
               and (form := self._inflected(part, lemma, ending)) and form.lower() != word}
      self._found[word] = tuple(sorted(forms))
    return self._found[word]

  def _analyses(self, word: str) -> Iterator[tuple[str, str, str]]:
    """Yields (part of speech, base, ending) of what the word may be: '', 's', 'ed' or 'ing'."""
    for part in _PARTS:
      index = self._index[part]
      if word in index:
        yield part, word, ''
      if part not in _ENDINGS:
        continue
      for base in self._bases[part].get(word, ()):
        ending = 's' if part == 'noun' else next(
            (ending for ending in ('ed', 'ing') if word.endswith(ending)), None)
        if base in index and ending:
          yield part, base, ending
      for ending, instead in _ENDINGS[part]:
        base = word.removesuffix(ending) + instead
        if word.endswith(ending) and word not in self._bases[part] and base in index:
          yield part, base, ending if ending in ('ed', 'ing') else 's'

  def _inflected(self, part: str, lemma: str, ending: str) -> Optional[str]:
    """Returns a form of a lemma: of a noun its last word's, of a verb its first word's. None of a
    name, and of an irregular verb, whose past and participle the files do not tell apart."""
    if not ending:
      return lemma
    if lemma != lemma.lower():
      return None
    if part == 'noun':
      if lemma.endswith('s') and lemma[:-1] in self._index[part]:
        return lemma  # Plural already, as 'human beings' is.
      before, blank, base = lemma.rpartition(' ')
      return before + blank + self._irregular[part].get(base, [_regular(base, ending)])[0]
    base, blank, behind = lemma.partition(' ')
    irregular = self._irregular[part].get(base, ())
    form = next((each for each in irregular if ending != 's' and each.endswith(ending)), None)
    if form is None and irregular and ending == 'ed':
      return None
    return (form or _regular(base, ending)) + blank + behind


_lock = threading.Lock()


def load(directory: str) -> WordNet:
  """Returns the WordNet of a directory, read once a process; see `WordNet`."""
  with _lock:
    return _load(directory)


_load = functools.lru_cache(WordNet)


def _read_data(path: Path) -> tuple[list[list[str]], dict[str, list[int]]]:
  """Returns the words of each synset that has several, and the synsets of each word."""
  synsets: list[list[str]] = []
  index: dict[str, list[int]] = {}
  for number, line in enumerate(path.read_text('ascii', 'replace').splitlines(), 1):
    if line[14:16] == '01' or line.startswith(' '):  # One word alone; the licence.
      continue
    try:
      end = 2 * int(line[14:16], 16)
    except ValueError:
      raise UserError(f'{path}:{number} is no line of a WordNet database; name the directory with'
                      ' its files.') from None
    # A lemma, its number in the file, the next lemma; an adjective's marker, as in 'asleep(p)'.
    found = line[_FIRST_WORD:].split(' ', end)[:end:2]
    lemmas = [word.partition('(')[0].replace('_', ' ') for word in found]
    for lemma in lemmas:
      index.setdefault(lemma.lower(), []).append(len(synsets))
    synsets.append(lemmas)
  return synsets, index


def _read_exceptions(path: Path) -> dict[str, list[str]]:
  """Returns the bases of each irregular form."""
  lines = map(str.split, path.read_text('ascii', 'replace').splitlines())
  return {form.replace('_', ' '): [base.replace('_', ' ') for base in bases]
          for form, *bases in filter(None, lines)}


def _inverse(bases: dict[str, list[str]]) -> dict[str, list[str]]:
  """Returns the irregular forms of each base."""
  forms: dict[str, list[str]] = {}
  for form, of in bases.items():
    for base in of:
      forms.setdefault(base, []).append(form)
  return forms


def _regular(base: str, ending: str) -> str:
  """Returns base + ending as English spells it."""
  if base.endswith('y') and base[-2:-1] not in tuple('aeiou') and ending != 'ing':
    return base[:-1] + {'s': 'ies', 'ed': 'ied'}[ending]
  if ending == 's' and base.endswith('man') and not base.endswith(_REGULAR_MAN):
    return base[:-2] + 'en'
  if ending == 's':
    return base + ('es' if base.endswith(('s', 'x', 'z', 'ch', 'sh')) else 's')
  if base.endswith('e') and (ending == 'ed' or base != 'be'
                             and not base.endswith(('ee', 'ye', 'oe'))):
    return base[:-1] + ending
  return base + ending
