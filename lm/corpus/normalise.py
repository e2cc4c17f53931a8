"""One spelling for what looks the same: mended encoding, NFC, nothing invisible, plain blanks.

ftfy mends mojibake, but at 5 to 10 MB/s. Here it sees only the lines that hold what it could mend,
which one search finds: most documents cost a few searches and no copy.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import unicodedata

from lm.corpus.document import Document
from lm.corpus.stage import Stage
from lm.errors import UserError

# Ends of lines, blanks, invisible and forbidden characters. Left alone: variation selectors and the
# tags of flags, which are parts of emoji, and private use.
_LINE_ENDS = '\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029'
_BLANKS = '\xa0\u1680\u2000-\u200a\u202f\u205f\u3000'
_INVISIBLE = (
    '\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u180e\u200b\u200e\u200f\u202a-\u202e'
    '\u2060-\u206f\ufeff\ufff9-\ufffc\ufffe\uffff'
)
_ODD = re.compile(f'[{_LINE_ENDS}{_BLANKS}{_INVISIBLE}\u200c\u200d]')
_ANY_LINE_END = re.compile(f'\r\n|[{_LINE_ENDS}]')
_ANY_BLANK = re.compile(f'[{_BLANKS}]')
# Joiners shape letters in Arabic, the scripts of India, Khmer, Mongolian; U+200D joins emoji too.
_SHAPED = '\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af'
_EMOJI = '\u2190-\u2bff\ufe0f\U0001f000-\U0001faff\U000e0020-\U000e007f'
_UNSEEN = re.compile(
    f'[{_INVISIBLE}]'
    f'|\u200c(?:(?<![{_SHAPED}].)|(?![{_SHAPED}]))'
    f'|\u200d(?:(?<![{_SHAPED}{_EMOJI}].)|(?![{_SHAPED}{_EMOJI}]))',
    re.DOTALL,
)
_QUOTES = re.compile('[‘’‚‛“”„‟]')
_SINGLE, _DOUBLE = re.compile('[‘’‚‛]'), re.compile('[“”„‟]')
_CJK = re.compile('[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]')
_ENTITY = re.compile(r'&(?:#\w+|\w+);')
_EMPTY_LINES = re.compile(r'\n{4,}')
_INNER_BLANKS = re.compile(r'(?<=\S)[ \t]{2,}')
_PASSES = 8  # Each mends what the one before uncovered; texts need one or two.


@dataclasses.dataclass(frozen=True)
class Normalise(Stage):
  """Mends and unifies characters; done twice it changes nothing more.

  Lines end in '\\n', blanks are U+0020 or tabs, lines have none at their end, more than two empty
  lines in a row become two. The beginning of a line (code) and blanks inside it (tables) stay.
  Curly quotes become straight, except on lines with Chinese, Japanese or Korean characters, where
  they are the standard ones. 'normalise.mended_lines' counts the lines that ftfy changed;
  'normalise.characters' those left: a document without any is removed.

  Attributes:
    mend_encoding: whether ftfy undoes mojibake, terminal escapes and, in texts without '<', HTML
      entities.
    straight_quotes: whether to replace ‘ ’ ‚ ‛ “ ” „ ‟ by ' and ".
    lower_case: whether to lower-case.
    remove_punctuation: whether to replace punctuation by blanks; apostrophes vanish.
  """

  mend_encoding: bool = True
  straight_quotes: bool = True
  lower_case: bool = False
  remove_punctuation: bool = False

  def apply(self, document: Document) -> None:
    """Normalises the document's text."""
    text, mended = document.text, 0
    for _ in range(_PASSES):
      before = text
      if self.mend_encoding:
        text, lines = _mend(text)
        mended += lines
      text = self._unify(text)
      if text == before:
        break
    document.text = text
    document.judge('normalise.mended_lines', mended, True)
    document.judge('normalise.characters', len(text), bool(text))

  def _unify(self, text: str) -> str:
    if _ODD.search(text):
      text = _ANY_LINE_END.sub('\n', text)
      text = _ANY_BLANK.sub(' ', text)
      text = _UNSEEN.sub('', text)
    if not text.isascii():
      text = unicodedata.normalize('NFC', text)  # returns the same object where it is already
      if self.straight_quotes and _QUOTES.search(text):
        if _CJK.search(text):
          lines = text.split('\n')
          text = '\n'.join(l if _CJK.search(l) else _straighten(l) for l in lines)
        else:
          text = _straighten(text)
    if self.lower_case:
      text = text.lower()
    if self.remove_punctuation:
      text = _INNER_BLANKS.sub(' ', text.translate(_punctuation()))
    if ' \n' in text or '\t\n' in text:
      text = '\n'.join(line.rstrip(' \t') for line in text.split('\n'))
    if '\n\n\n\n' in text:
      text = _EMPTY_LINES.sub('\n\n\n', text)
    return text.rstrip().lstrip('\n')


def _straighten(text: str) -> str:
  return _SINGLE.sub("'", _DOUBLE.sub('"', text))


def _mend(text: str) -> tuple[str, int]:
  """Returns the text with the lines that ftfy can mend mended, and their number."""
  entities = '<' not in text and _ENTITY.search(text) is not None
  garbled = not text.isascii() and _mendable().search(text) is not None
  if not (entities or garbled or '\x1b' in text):
    return text, 0
  config, mended, lines = _ftfy_config(entities), 0, text.split('\n')
  for index, line in enumerate(lines):
    if (
        (entities and '&' in line)
        or (garbled and not line.isascii() and _mendable().search(line))
        or '\x1b' in line
    ):
      fixed = _ftfy().fix_text(line, config)
      mended += fixed != line
      lines[index] = fixed
  return '\n'.join(lines), mended


def _ftfy():
  try:
    import ftfy
  except ImportError as error:
    raise UserError(
        'normalise.Normalise needs ftfy, which is not installed; `pip install lm[corpus]`, or set'
        ' Normalise.mend_encoding=False.'
    ) from error
  return ftfy


@functools.cache
def _ftfy_config(entities: bool):
  """What ftfy does to a line: encodings and escapes; the rest is done here."""
  return _ftfy().TextFixerConfig(
      unescape_html=entities, fix_latin_ligatures=False, fix_character_width=False,
      uncurl_quotes=False, fix_line_breaks=False, normalization=None, explain=False,
  )


@functools.cache
def _mendable() -> re.Pattern:
  """Compiles a search for what every sequence that ftfy takes for mojibake has in it: a suspicious
  character beside another of those that occur in mojibake, or one of four that may stand alone.

  Begins with a class of characters, so that the search runs at 300 MB/s; ftfy's own at 8.
  """
  _ftfy()
  from ftfy.badness import MOJIBAKE_CATEGORIES

  harmless = ('common', 'c1', 'kaomoji', 'upper_common', 'lower_common')
  suspicious = ''.join(v for k, v in MOJIBAKE_CATEGORIES.items() if k not in harmless) + 'ÙЂ'
  other = '\xa0-\u05ff\u2000-\u25ff\uf8ff\ufb01\ufb02\ufffd'
  alone = '\x80-\x9f\ud800-\udfff'
  return re.compile(
      f'[{suspicious}{alone}](?:[{other}]|(?<=[{other}].)|(?<=[{alone}])|(?<=[Œœ])(?![A-Za-z])'
      '|(?<=[ÃÂ])[ \xa0])'
  )


@functools.cache
def _punctuation() -> dict[int, str]:
  """Maps punctuation of all scripts to blanks, apostrophes to nothing."""
  marks = (code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == 'P')
  return {**dict.fromkeys(marks, ' '), ord("'"): '', ord('’'): ''}
