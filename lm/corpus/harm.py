"""Text that harms: words of a blocklist, and spam.

What a list of words cannot tell, hate and insults, is for `classifier.Classifier`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import itertools
import operator
from pathlib import Path
import re
import zlib

from lm.corpus import collect
from lm.corpus.document import Document
from lm.corpus.stage import Stage
from lm.errors import UserError

_UNSPACED = frozenset(('zh', 'ja', 'th'))
# Words of the lists that C4 lets pass, as too common in clean text (multilingual C4 of Xue et al.
# 2021, arXiv 2010.11934).
_ALLOWED = frozenset(('sm', 'グロ', '女の子', '性'))
_WORD = re.compile(r'\w+')
_MOST_HITS = 5  # listed of a document


@dataclasses.dataclass(frozen=True)
class Blocklist(Stage):
  """Removes documents that hold any entry of the list of their language, as C4 does.

  Entries match in any case, and in languages with spaces only as whole words; in Chinese, Japanese
  and Thai anywhere, but for entries of Latin letters and figures, which are words there too. A
  document of a language without a list is not judged; one whose language is unknown is judged by
  all lists. The verdict 'blocklist.words' lists the entries found, at most five.

  Lists in this form: github.com/LDNOOBW/List-of-Dirty-Naughty-Obscene-and-Otherwise-Bad-Words.

  Reference: Raffel et al. 2020, arXiv 1910.10683, section 2.2.

  Attributes:
    files: glob patterns of lists, an entry a line, each named by its language: 'lists/en',
      'lists/zh.txt'.
    digest: of the lists; filled in by `prepare`, so that other lists make another corpus.
  """

  files: collect.Patterns
  digest: str = ''

  def prepare(self, directory: Path) -> Blocklist:
    """Returns itself with the digest of the lists."""
    del directory
    lists = b'\0'.join(Path(path).read_bytes() for path in collect.paths(self.files))
    return dataclasses.replace(self, digest=hashlib.sha256(lists).hexdigest()[:16])

  def apply(self, document: Document) -> None:
    if document.language and document.language not in self._lists:
      return
    languages = (document.language,) if document.language else self._lists
    text = document.text.lower()
    hits = sorted({entry for name in languages for entry in self._lists[name].found(text)})
    document.judge('blocklist.words', hits[:_MOST_HITS], not hits)

  @functools.cached_property
  def _lists(self) -> Mapping[str, Entries]:
    lists = {}
    for path in collect.paths(self.files):
      try:
        lines = Path(path).read_text(encoding='utf-8').lower().splitlines()
      except UnicodeDecodeError as error:
        raise UserError(
            f'harm.Blocklist.files names {path}, which is not UTF-8 ({error.reason}); convert it.'
        ) from error
      language = Path(path).name.split('.')[0]
      entries = {line.strip() for line in lines} - {''} - _ALLOWED
      lists[language] = Entries(entries, language in _UNSPACED)
    return lists


class Entries:
  """The entries of one language, by one of their words: few documents hold any of those."""

  def __init__(self, entries: set[str], unspaced: bool):
    """entries: lower-cased. unspaced: whether those that are not ASCII match within words."""
    anywhere = []
    self._by_word: dict[str | bytes, list[tuple[str, re.Pattern[str]]]] = {}
    self._words = _ascii_words
    whole = []
    for entry in sorted(entries):
      if _WORD.search(entry) is None or (unspaced and not entry.isascii()):
        anywhere.append(entry)
      else:
        whole.append(entry)
    self._anywhere = _any_of(anywhere) if anywhere else None
    if not all(map(_ascii_words, whole)):
      self._words = _WORD.findall
    for entry in whole:
      literal = re.escape(entry)  # first, since that makes the search fast
      form = re.compile(rf'{literal}(?<!\w{literal})(?!\w)')
      self._by_word.setdefault(max(self._words(entry), key=len), []).append((entry, form))

  def found(self, text: str) -> list[str]:
    """Returns the entries that stand in the text, which is lower-cased."""
    hits = self._anywhere.findall(text) if self._anywhere else []
    for word in self._by_word.keys() & set(self._words(text)):
      hits += [entry for entry, form in self._by_word[word] if form.search(text)]
    return hits


def _any_of(entries: list[str]) -> re.Pattern[str]:
  """Returns a search for the longest of the entries, by first characters since that is faster."""
  by_first = itertools.groupby(sorted(entries, key=lambda entry: (entry[0], -len(entry))), _first)
  forms = (
      re.escape(first) + '(?:' + '|'.join(re.escape(entry[1:]) for entry in group) + ')'
      for first, group in by_first
  )
  return re.compile('|'.join(forms))


_first = operator.itemgetter(0)
_ASCII_WORDS = bytes(code if code < 128 and chr(code).isalnum() else 32 for code in range(256))


def _ascii_words(text: str) -> list[bytes]:
  """Returns runs of ASCII letters and figures: five times as fast as a regular expression."""
  return text.encode('utf-8', 'replace').translate(_ASCII_WORDS).split()


_COMPRESSED_BYTES = 1 << 20  # of a document, from its beginning, that are compressed
_LEAST_WORDS = 50  # Of shorter texts, shares of words say little.
_LINK = re.compile(r'(?:https?://|www\.)\S+')


@dataclasses.dataclass(frozen=True)
class Spam(Stage):
  """Removes documents that repeat themselves, a keyword or links as spam does.

  Rules, each with its measured value as verdict:
    spam.compression: bytes over bytes compressed (zlib). Of the pages over 4.0 in a crawl 70% were
      spam (Ntoulas, Najork, Manasse and Fetterly 2006, "Detecting spam web pages through content
      analysis", section 4.6).
    spam.keyword: share of the most frequent word of at least four letters. Stuffed keywords; the
      paper's section 4.8 finds the same by the share of globally popular words, which takes a list
      a language.
    spam.links: share of the characters in addresses; stands for the share of anchor text (section
      4.4), which extracted text no longer shows.

  Attributes:
    most_compression: documents above are removed.
    most_keyword: likewise, from fifty words on.
    most_links: likewise.
  """

  most_compression: float = 4.0
  most_keyword: float = 0.15
  most_links: float = 0.5

  def apply(self, document: Document) -> None:
    text = document.text
    data = text.encode('utf-8', 'replace')[:_COMPRESSED_BYTES]
    words = _WORD.findall(text.lower())
    counts = Counter(word for word in words if len(word) >= 4)
    top = max(counts.values(), default=0) if len(words) >= _LEAST_WORDS else 0
    measured = {
        'spam.compression': (len(data) / len(zlib.compress(data)), self.most_compression),
        'spam.keyword': (top / max(len(words), 1), self.most_keyword),
        'spam.links': (
            sum(len(link) for link in _LINK.findall(text)) / max(len(text), 1),
            self.most_links,
        ),
    }
    for rule, (value, most) in measured.items():
      document.judge(rule, round(value, 4), value <= most)
