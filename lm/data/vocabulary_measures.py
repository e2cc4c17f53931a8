"""What a vocabulary makes of a text: tokens by bytes, words and language, and how often each is.

Nothing here depends on a model; a size is chosen by how short it makes the text, and by how often
the training text shows its rarest pieces.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any, Iterable, Mapping, Sequence

import numpy as np

from lm.corpus.document import Document
from lm.data import vocabularies

# Scripts that put no spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han, and their
# punctuation. Each of their characters counts as a word.
_UNSPACED = (
    '\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u31f0-\u31ff\u3400-\u4dbf'
    '\u4e00-\u9fff\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff'
)
_WORD = re.compile(f'[{_UNSPACED}]|[^\\s{_UNSPACED}]+')
_CHARACTER = re.compile(f'[{_UNSPACED}]')
_SHARE = 0.95  # Of the pieces, that `rarest` speaks of.


@dataclasses.dataclass(frozen=True)
class Text:
  """Text in one language.

  Attributes:
    texts: of the documents.
    num_bytes: of UTF-8.
    num_words: runs of what is not space; of scripts without spaces, characters.
    unspaced: the share of these that are characters of such a script.
  """

  texts: tuple[str, ...]
  num_bytes: int
  num_words: int
  unspaced: float

  @classmethod
  def of(cls, texts: Iterable[str]) -> Text:
    """Counts the bytes and the words."""
    texts = tuple(texts)
    words = sum(len(_WORD.findall(text)) for text in texts)
    characters = sum(len(_CHARACTER.findall(text)) for text in texts)
    num_bytes = sum(len(text.encode('utf-8')) for text in texts)
    return cls(texts, num_bytes, words, characters / max(words, 1))


def by_language(documents: Iterable[Document]) -> dict[str, Text]:
  """Returns the documents' text by language, '' where none is stated, the most bytes first."""
  texts: dict[str, list[str]] = {}
  for document in documents:
    texts.setdefault(document.language, []).append(document.text)
  found = {language: Text.of(each) for language, each in texts.items()}
  return dict(sorted(found.items(), key=lambda item: (-item[1].num_bytes, item[0])))


def measure(
    vocabulary: vocabularies.Vocabulary, num_given: int, texts: Mapping[str, Text],
    sentences: Sequence[str], total_bytes: int,
) -> dict[str, Any]:  # fmt: skip
  """Returns a vocabulary's row of the table.

  Args:
    vocabulary: to be measured.
    num_given: the first ids, which are not learnt: special ones, symbols, bytes.
    texts: held-out text, by language.
    sentences: of the training split, plain text.
    total_bytes: of the training split, of which they are a sample.

  Returns:
    `size`; `bytes_per_token`, `fertility` (tokens a word, see `Text`) and `unknown` (share of the
    tokens) of all held-out text, and under `languages` of each; `used`, the share of the learnt
    pieces that occur in the sentences; `rarest`: 95 % of them occur at least so often in the
    training split, by the sample.

  Reference: fertility, Rust et al. 2021, arXiv:2012.15613 section 3; `rarest`, Gowda and May 2020,
    arXiv:2004.02334.
  """
  rows, total = {}, collections.Counter()
  for language, text in texts.items():
    ids = vocabulary.encode_batch(text.texts, num_threads=2)
    tokens = sum(map(len, ids))
    unknown = sum(int(np.count_nonzero(part == vocabulary.unk_id)) for part in ids)
    if vocabulary.unk_id == vocabulary.eos_id:
      unknown = 0
    counts = {'bytes': text.num_bytes, 'tokens': tokens, 'words': text.num_words,
              'unknown': unknown}  # fmt: skip
    total.update(counts)
    rows[language] = _ratios(counts)
  occurrences = np.zeros(vocabulary.size, np.int64)
  for ids in vocabulary.encode_batch(sentences, num_threads=2):
    occurrences += np.bincount(ids, minlength=vocabulary.size)
  learnt = occurrences[num_given : vocabulary.size - vocabulary.extra_ids]
  sample_bytes = sum(len(sentence.encode('utf-8')) for sentence in sentences)
  frequent = np.sort(learnt)[int((1 - _SHARE) * len(learnt))]
  return {
      'size': vocabulary.size,
      **_ratios(total),
      'used': float(np.mean(learnt > 0)),
      'rarest': float(frequent * total_bytes / max(sample_bytes, 1)),
      'languages': rows,
  }


def _ratios(counts: Mapping[str, int]) -> dict[str, float]:
  tokens = max(counts['tokens'], 1)
  return {'bytes_per_token': counts['bytes'] / tokens,
          'fertility': counts['tokens'] / max(counts['words'], 1),
          'unknown': counts['unknown'] / tokens}  # fmt: skip
