"""Raw documents to text, by their media type: HTML, wikitext, Markdown, books, plain text."""

from __future__ import annotations

import dataclasses
import re

from lm.corpus import decode
from lm.corpus import markdown
from lm.corpus import webpage
from lm.corpus import wikitext
from lm.corpus.document import Document
from lm.corpus.readers.piece import need
from lm.corpus.stage import Stage
from lm.errors import UserError

# Control characters but for tab, line ends, form feed and escape: text has none.
_CONTROL = re.compile('[\0-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]')
_MOST_CONTROL = 0.01  # Of the characters, or it is no text; few are left to `normalise`.
_SEEN = 1 << 16  # Characters that are looked at for that.
_MARKUP = frozenset(('text/html', 'application/epub+zip'))


@dataclasses.dataclass(frozen=True)
class Extract(Stage):
  """Makes `text` of `raw`, and fills in title, date and licence where the document says them.

  Rules:
    extract.encoding: the encoding that was found; removed where none fits.
    extract.binary: share of control characters; removed above 0.01.
    extract.complexity: elements of a page; removed above `max_elements`, and where (the value says
      so) they are nested 240 deep or one has hundreds of attributes.
    extract.empty: characters of text; removed at 0.

  Attributes:
    max_elements: of a page of HTML. Time grows as their number: 100,000 take about a second.
  """

  max_elements: int = 100_000

  def __post_init__(self) -> None:
    if self.max_elements < 1:
      raise UserError(f'max_elements={self.max_elements} must be at least 1.')

  def apply(self, document: Document) -> None:
    """Extracts the text of a document that has none yet."""
    if document.raw is None:
      return
    raw, document.raw = document.raw, None
    decoded = decode.decode(raw, document.charset, document.media_type in _MARKUP)
    document.verdicts['extract.encoding'] = decoded.encoding if decoded else ''
    if decoded is None:
      document.remove('extract.encoding')
      return
    control = len(_CONTROL.findall(decoded.text[:_SEEN])) / max(len(decoded.text[:_SEEN]), 1)
    document.verdicts['extract.binary'] = round(control, 4)
    if control > _MOST_CONTROL:
      document.remove('extract.binary')
      return
    self._extract(decoded.text, document)
    document.verdicts['extract.empty'] = len(document.text)
    if not document.text.strip():
      document.remove('extract.empty')

  def _extract(self, text: str, document: Document) -> None:
    kind = document.media_type
    if kind == 'text/html':
      try:
        page = webpage.read(text, self.max_elements)
      except webpage.TooComplex as error:
        document.verdicts['extract.complexity'] = str(error)
        document.remove('extract.complexity')
        return
      document.verdicts['extract.complexity'] = page.elements
      document.text = page.text
      document.title = document.title or page.title
      document.licence = page.licence or document.licence
      document.date = page.date or document.date
    elif kind == 'application/epub+zip':
      plain = need('resiliparse.extract.html2text').extract_plain_text
      document.text = plain(text, preserve_formatting=True, alt_texts=False)
    elif kind == 'text/x-wiki':
      document.text = wikitext.text(text)
    elif kind == 'text/markdown':
      document.text, title = markdown.text(text)
      document.title = document.title or title
    else:
      document.text = text.replace('\r\n', '\n').replace('\r', '\n')
