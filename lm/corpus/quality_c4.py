"""The rules of the Colossal Clean Crawled Corpus: lines first, then the page.

Raffel et al. 2020, arXiv:1910.10683, section 2.2, and the code that made the data set (TensorFlow
Datasets' `c4_utils`), which adds citation marks, over-long words and policies. Not here: the
list of bad words (see harm), the language (see language), three-sentence spans (see deduplicate).
"""

from __future__ import annotations

import dataclasses
import re

from lm.corpus import words as words_lib
from lm.corpus.document import Document
from lm.corpus.stage import Stage

_ENDS = ('.', '?', '!', '"', "'", '”', '’', '。', '？', '！', '」', '』')
_CITATION = re.compile(r'\[\d*\]|\[edit\]|\[citation needed\]')
_POLICIES = ('terms of use', 'privacy policy', 'cookie policy', 'uses cookies', 'use of cookies',
             'use cookies')
# A period after an initial ("J.", "U.S.", "e.g.") or a title ends no sentence, nor does a mark
# before a small letter.
_SENTENCE = re.compile(
    r'(?:[!?…]|(?<![\s.(][A-Za-z])(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)\.)'
    r'["\'”’)\]]*+(?=\s++[^a-z])'
    r'|(?<![。！？])[。！？]++[”’」』）]*+(?=.)'
)


@dataclasses.dataclass(frozen=True)
class C4(Stage):
  """Drops lines that are not sentences of prose, and pages of which little is left.

  The verdict of a rule of lines is the number of lines that it dropped: 'c4.long_words',
  'c4.terminal_punctuation', 'c4.line_words', 'c4.javascript', 'c4.policy'. 'c4.citations' counts
  marks such as [3] that were cut. The page is removed by 'c4.lorem_ipsum' and 'c4.curly_bracket'
  (lines that hold one) and 'c4.sentences' (in the lines left). A removed page keeps its lines.

  Attributes:
    terminal_punctuation: whether lines must end with . ? ! or a quotation mark, or those of Chinese
      and Japanese. False is FineWeb's choice: the rule takes the most text for the least gain.
    min_words_per_line: 5, as in the paper from its second version on and in the code; the first had
      3. Two characters are a word in Chinese.
    min_sentences: 3, likewise; the first version, and datatrove, 5.
    max_word_length: in characters, of a word between blanks; has no meaning in Chinese, where lines
      have no blanks.
  """

  terminal_punctuation: bool = True
  min_words_per_line: int = 5
  min_sentences: int = 3
  max_word_length: int = 1000

  def apply(self, document: Document) -> None:
    """Writes 'c4.*', leaves the lines that pass, or removes the document."""
    text = document.text
    lower = text.lower()
    policies = tuple(policy for policy in _POLICIES if policy in lower)
    javascript, lorem = 'javascript' in lower, 'lorem ipsum' in lower
    curly, citation = '{' in text, '[' in text
    dropped = dict.fromkeys(
        ('long_words', 'terminal_punctuation', 'line_words', 'javascript', 'policy'), 0
    )
    citations = lorems = curlies = sentences = 0
    kept = []
    for line in text.splitlines():
      line = line.strip()
      whole = line
      if citation:
        line, marks = _CITATION.subn('', line)
        citations += marks
      if self._has_long_word(whole):
        dropped['long_words'] += 1
        continue
      if self.terminal_punctuation and (not line.endswith(_ENDS) or line.endswith('...')):
        dropped['terminal_punctuation'] += 1
        continue
      if not self._has_enough_words(whole):
        dropped['line_words'] += 1
        continue
      lower = line.lower() if lorem or javascript or policies else ''
      lorems += lorem and 'lorem ipsum' in lower
      if javascript and 'javascript' in lower:
        dropped['javascript'] += 1
        continue
      curlies += curly and '{' in line
      if policies and any(policy in lower for policy in policies):
        dropped['policy'] += 1
        continue
      sentences += 1 + sum(1 for _ in _SENTENCE.finditer(line))
      kept.append(line)
    for rule, count in dropped.items():
      document.judge(f'c4.{rule}', count, True)
    document.judge('c4.citations', citations, True)
    document.judge('c4.lorem_ipsum', lorems, not lorems)
    document.judge('c4.curly_bracket', curlies, not curlies)
    document.judge('c4.sentences', sentences, sentences >= self.min_sentences)
    if not document.removed_by:
      document.text = '\n'.join(kept).strip()

  def _has_long_word(self, line: str) -> bool:
    if len(line) <= self.max_word_length:
      return False
    longest = max(line.split(), key=len, default='')
    return len(longest) > self.max_word_length and words_lib.is_spaced(longest)

  def _has_enough_words(self, line: str) -> bool:
    if len(line.split(None, self.min_words_per_line)) >= self.min_words_per_line:
      return True
    return not line.isascii() and words_lib.count(line) >= self.min_words_per_line
