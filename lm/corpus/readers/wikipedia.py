"""XML dumps of MediaWiki (`pages-articles`): the articles, of which `extract` makes text.

Pages are cut out of the stream by their tags, so that memory holds one page and never the tree.
Each is then parsed by itself and without a DTD, so that there are no entities to blow up.
"""

from __future__ import annotations

from collections.abc import Iterator
import re
from typing import TYPE_CHECKING
import urllib.parse
from xml.etree import ElementTree

from lm.corpus.document import Document
from lm.corpus.readers import streams
from lm.corpus.readers.piece import File, Packer, Piece, Report, too_long

if TYPE_CHECKING:
  from lm.corpus.collect import Source

_BEGIN, _END = b'<page>', b'</page>'
_MOST_HEAD = 64 << 10  # Of the dump before its first page.
_ID = re.compile(rb'<id>(\d+)</id>')
_NAMESPACE = re.compile(rb'<ns>(-?\d+)</ns>')
_LANGUAGE = re.compile(rb'<mediawiki[^>]*\sxml:lang="([\w-]+)"')
_BASE = re.compile(rb'<base>(https?://[^<\s"]*/)[^</]*</base>')


def pieces(file: File, source: Source, report: Report) -> Iterator[Piece]:
  """Takes the articles out of a dump; each is named by its page id.

  Reported are those larger than `max_document_bytes`, and together, at the end, how many redirects
  and pages of other kinds (talk, users, templates) there are.

  Raises:
    OSError: the file cannot be read.
  """
  packer, limit = Packer(file), source.max_document_bytes
  stream = streams.Buffer(file, report)
  stream.fill(_MOST_HEAD)
  begin = _begin(bytes(stream.data[:_MOST_HEAD]))
  redirects = others = 0
  while _seek(stream, _BEGIN):
    page = _page(stream, limit)
    if page is None:
      continue
    head = page[: page.find(b'<revision')]
    match = _ID.search(head)
    number = int(match[1]) if match else 0
    namespace = _NAMESPACE.search(head)
    name = f'{file.name}:{number}'
    if len(page) > limit:
      report(name, too_long(limit))
    elif namespace and namespace[1] != b'0':
      others += 1
    elif b'<redirect' in head:
      redirects += 1
    elif piece := packer.add(number, begin + page[len(_BEGIN) :]):
      yield piece
  if piece := packer.flush():
    yield piece
  if redirects:
    report(file.name, f'has redirects ({redirects})')
  if others:
    report(file.name, f'has pages that are no articles ({others})')


def _begin(head: bytes) -> bytes:
  """Returns the tag that a page begins with, and in it what the head of the dump says of all."""
  language, base = _LANGUAGE.search(head), _BASE.search(head)
  return b'<page lang="%s" base="%s">' % (
      language[1] if language else b'', base[1] if base else b''
  )  # fmt: skip


def _seek(stream: streams.Buffer, tag: bytes) -> bool:
  """Eats all before a tag; False if there is none, up to the end."""
  while (at := stream.data.find(tag)) < 0:
    del stream.data[: max(len(stream.data) - len(tag), 0)]
    if not stream.fill(len(stream.data) + 1):
      if not stream.at_gap:
        return False
      stream.pass_gap()
  del stream.data[:at]
  return True


def _page(stream: streams.Buffer, limit: int) -> bytes | None:
  """Eats a page and returns it, of one beyond the limit only the beginning; None if it is cut."""
  searched = 0
  while (end := stream.data.find(_END, searched)) < 0:
    searched = max(len(stream.data) - len(_END), 0)
    if len(stream.data) > limit + len(_END):
      page = bytes(stream.data[: limit + 1])
      del stream.data[:searched]
      _seek(stream, _END)
      return page
    if not stream.fill(len(stream.data) + 1):
      if not stream.at_gap:
        stream.report_damage('it ends in the middle of a page')
      del stream.data[: len(_BEGIN)]
      return None
  end += len(_END)
  page = bytes(stream.data[:end])
  del stream.data[:end]
  return page


def documents(piece: Piece, source: Source, report: Report) -> Iterator[Document]:
  """Reads title, time and wikitext of each page; of several revisions the last."""
  for number, page in zip(piece.numbers, piece.records or ()):
    name = f'{piece.file.name}:{number}'
    try:
      root = ElementTree.fromstring(page)
    except (ElementTree.ParseError, ValueError) as error:
      report(name, f'is not XML ({error})')
      continue
    revision = root.findall('revision')[-1:] or [root]
    model = revision[0].findtext('model', 'wikitext')
    if model != 'wikitext':
      report(name, f'is no wikitext ({model})')
      continue
    title = root.findtext('title', '')
    base = root.get('base', '')
    yield Document(
        name, '', raw=revision[0].findtext('text', '').encode('utf-8'), media_type='text/x-wiki',
        charset='utf-8', title=title, date=revision[0].findtext('timestamp', ''),
        language=root.get('lang', ''),
        url=base and base + urllib.parse.quote(title.replace(' ', '_'), safe="/:(),!*'@;"),
    )  # fmt: skip
