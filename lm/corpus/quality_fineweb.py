"""The rules that FineWeb adds to those of C4 and Gopher.

Penedo et al. 2024, arXiv:2406.17557, section 3.6. The defaults are those with which the data set
was made (datatrove's `FineWebQualityFilter`); the paper's text names 0.1 for duplicated characters.
"""

from __future__ import annotations

import dataclasses

from lm.corpus import words as words_lib
from lm.corpus.document import Document
from lm.corpus.quality_gopher import duplicates
from lm.corpus.stage import Stage

# Ends of sentences in scripts of today.
_ENDS = tuple('.?!‽⁇⁈⁉‼։؟۔܀।॥၊။።፧។៕᠃᠉。．｡？！﹒﹖﹗')
# Chinese and Japanese put the quotation's end, often a line's last character, after the mark.
END_PUNCTUATION = (*_ENDS, *(end + close for end in '。？！…' for close in '”’」』）'))


@dataclasses.dataclass(frozen=True)
class FineWeb(Stage):
  """Removes lists, menus and tables by the look of their lines. Empty lines do not count.

  Attributes:
    min_line_punctuation: 'fineweb.line_punct_ratio', fraction of lines that end like a sentence.
    max_short_lines: 'fineweb.short_line_ratio', fraction of lines of at most `short_line`.
    short_line: in characters; a third of it in scripts without spaces, since the paragraphs of
      XQuAD have 3.1 times as many characters in English as in Chinese.
    max_duplicate_characters: 'fineweb.char_dup_ratio', fraction of characters in lines that stood
      before.
    max_newlines: 'fineweb.newline_ratio', ends of lines per word.
  """

  min_line_punctuation: float = 0.12
  max_short_lines: float = 0.67
  short_line: int = 30
  max_duplicate_characters: float = 0.01
  max_newlines: float = 0.3

  def apply(self, document: Document) -> None:
    """Writes 'fineweb.*'; removes the document at the first that fails."""
    text, words = document.text, words_lib.of(document.text)
    lines = [line for line in text.split('\n') if line and not line.isspace()]
    count = max(1, len(lines))
    ratio = sum(1 for line in lines if line.endswith(END_PUNCTUATION)) / count
    keep = ratio >= self.min_line_punctuation
    document.judge('fineweb.line_punct_ratio', round(ratio, 4), keep)
    longest = self.short_line if words.spaced else self.short_line // 3
    ratio = sum(1 for line in lines if len(line) <= longest) / count
    document.judge('fineweb.short_line_ratio', round(ratio, 4), ratio <= self.max_short_lines)
    newlines = text.count('\n')
    ratio = duplicates(lines)[1] / max(1, len(text) - newlines)
    keep = ratio <= self.max_duplicate_characters
    document.judge('fineweb.char_dup_ratio', round(ratio, 4), keep)
    ratio = newlines * words.pieces_per_word / max(1, len(words.hashes))
    document.judge('fineweb.newline_ratio', round(ratio, 4), ratio <= self.max_newlines)
