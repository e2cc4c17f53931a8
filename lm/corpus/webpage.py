"""The main text of a web page, its title, date and licence.

The page is parsed once, rid of what is never text, and handed to Trafilatura as a tree; what it
keeps is written with the line structure of paragraphs, lists, tables and code.

Reference: A. Barbaresi, Trafilatura: A Web Scraping Library and Command-Line Tool for Text
Discovery and Extraction, ACL 2021 (system demonstrations).
"""

from __future__ import annotations

from collections.abc import Iterator
import functools
import re
from typing import Any, NamedTuple

from lm.corpus.readers.piece import need

# Neither text nor a help in finding it. Scripts of JSON-LD stay: some pages have their text there.
_NO_TEXT = (
    'style', 'svg', 'noscript', 'iframe', 'template', 'canvas', 'object', 'embed', 'link', 'select',
    'input', 'textarea', 'button', 'source', 'map', 'audio', 'video', 'picture', 'img', 'nav',
    'footer', 'form',
)  # fmt: skip
_BLANKS = re.compile(r'\s+')
_BLOCKS = frozenset(('p', 'head', 'list', 'quote', 'table', 'div'))
# Code's blanks while blanks are joined: code points that are no characters, and never will be.
_BREAK = '\ufdd0'
_KEPT = {ord('\n'): _BREAK, ord(' '): '\ufdd1', ord('\t'): '\ufdd2'}
_RESTORED = {0xFDD1: ' ', 0xFDD2: '\t'}
_CREATIVE = re.compile(
    r'https?://(?:www\.)?creativecommons\.org/(licenses|publicdomain)/([a-z+-]+)/(\d\.\d)'
    r'(?:/([a-z]{2,4})(?=/|$))?', re.IGNORECASE
)  # fmt: skip
_DATE = re.compile(r'\d{4}-\d\d-\d\d(?:T[\d:.]+(?:Z|[+-]\d\d:?\d\d)?)?')


class Page(NamedTuple):
  """What a page says; '' is what it does not."""

  text: str
  title: str
  date: str
  licence: str
  elements: int


class TooComplex(Exception):
  """A page has more elements, or attributes in one, than may be looked at."""


# A tag that is so long is an embedded picture, or it has very many attributes, on which libxml2
# spends the square of their number.
_LONG_TAG = re.compile(rb'<[a-zA-Z][^<>]{8192,}')
_MOST_ATTRIBUTES = 512
_DEEP = 240  # libxml2 does not go on beyond 256.


def read(text: str, max_elements: int) -> Page:
  """Reads a page.

  Args:
    text: its HTML.
    max_elements: more are refused.

  Raises:
    TooComplex: it has more, or is nested too deeply, or cannot be parsed at all.
    UserError: lxml or Trafilatura is not installed.
  """
  lxml, etree = need('lxml.html'), need('lxml.etree')
  data = text.replace('\0', '').encode('utf-8', 'replace')
  for match in _LONG_TAG.finditer(data):
    if match[0].count(b'=') > _MOST_ATTRIBUTES:
      raise TooComplex(f'more than {_MOST_ATTRIBUTES} attributes of an element')
  try:
    tree = lxml.document_fromstring(data, parser=_parser())
  except (etree.ParserError, etree.XMLSyntaxError, ValueError) as error:
    raise TooComplex(f'cannot be parsed: {error}') from error
  count = int(tree.xpath('count(//*)'))
  if count > max_elements:
    raise TooComplex(f'{count} elements')
  if _is_deep()(tree):
    raise TooComplex(f'nested {_DEEP} levels deep')
  title = _BLANKS.sub(' ', tree.findtext('.//title') or '').strip()
  licence, date = _licence(tree), _date(tree)
  _clean(tree, etree)
  found = need('trafilatura').bare_extraction(tree, options=_options())
  text = _written(found.body) if found is not None else ''
  return Page(text, title, date, licence, count)


@functools.cache
def _parser() -> Any:
  return need('lxml.html').HTMLParser(
      encoding='utf-8', remove_comments=True, remove_pis=True, collect_ids=False,
      default_doctype=False)  # fmt: skip


@functools.cache
def _is_deep() -> Any:
  return need('lxml.etree').XPath('boolean(' + '/*' * _DEEP + ')')


@functools.cache
def _options() -> Any:
  """Returns Trafilatura's defaults, less comments and its second opinion.

  That (readability, jusText) changes none of the scores on pages with gold text, for a fifth of the
  time.
  """
  settings = need('trafilatura.settings')
  return settings.Extractor(output_format='python', fast=True, comments=False)


def _clean(tree: Any, etree: Any) -> None:
  for script in list(tree.iter('script')):
    if 'ld+json' not in (script.get('type') or ''):
      script.drop_tree()
  etree.strip_elements(tree, *_NO_TEXT, with_tail=False)


def _licence(tree: Any) -> str:
  """Returns the licence that a page declares, '' if none or several."""
  declared = tree.xpath('//*[self::a or self::link][contains(@rel, "licen")]/@href')
  named = tree.xpath('//a[contains(@href, "creativecommons.org/")]/@href')
  for addresses in (declared, named):
    found = {name for address in addresses if (name := _creative(address))}
    if found:
      return found.pop() if len(found) == 1 else ''
  others = {address.strip() for address in declared if address.startswith(('http:', 'https:'))}
  return others.pop() if len(others) == 1 else ''


def _creative(address: str) -> str:
  """Returns the SPDX name of a Creative Commons licence, its address if ported to a country."""
  match = _CREATIVE.search(address)
  if not match:
    return ''
  family, name, version, country = (part and part.lower() for part in match.groups())
  if country and country != 'deed':
    return f'https://creativecommons.org/{family}/{name}/{version}/{country}/'
  if family == 'licenses':
    return f'CC-{name.upper()}-{version}'
  return 'CC0-1.0' if name == 'zero' else f'https://creativecommons.org/{family}/{name}/{version}/'


def _date(tree: Any) -> str:
  for value in tree.xpath(
      '//meta[@property="article:published_time" or @itemprop="datePublished"]/@content'):
    match = _DATE.match(value.strip())
    if match:
      return match[0]
  return ''


def _written(body: Any) -> str:
  """Writes Trafilatura's tree: blocks apart by an empty line, items, rows and code line by line."""
  for code in body.iter('code'):
    for element in code.iter():
      element.text = (element.text or '').translate(_KEPT)
      if element is not code:
        element.tail = (element.tail or '').translate(_KEPT)
  for line_break in body.iter('lb'):
    line_break.text = _BREAK
  return '\n\n'.join(filter(None, _blocks(body)))


def _blocks(element: Any) -> Iterator[str]:
  """Yields the blocks in an element; what stands between them is a block too."""
  inline = [element.text or '']
  for child in element:
    if child.tag in _BLOCKS or child.tag == 'code' and _BREAK in ''.join(child.itertext()):
      yield _flow(''.join(inline))
      inline = []
      if child.tag == 'list':
        yield '\n'.join(_items(child, 0))
      elif child.tag == 'table':
        yield '\n'.join(_rows(child))
      else:
        yield from _blocks(child)
    else:
      inline.extend(child.itertext())
    inline.append(child.tail or '')
  yield _flow(''.join(inline))


def _flow(text: str) -> str:
  """Returns text with single blanks, but for those and the lines that were marked to be kept."""
  lines = _BLANKS.sub(' ', text).split(_BREAK)
  return '\n'.join(line.strip().translate(_RESTORED) for line in lines).strip('\n')


def _items(element: Any, level: int) -> Iterator[str]:
  ordered = element.get('rend') == 'ol'
  for number, item in enumerate(element, start=1):
    inline, inner = [item.text or ''], []
    for child in item:
      if child.tag == 'list':
        inner.extend(_items(child, level + 1))
      else:
        inline.extend((' ', *child.itertext(), ' ') if child.tag in _BLOCKS else child.itertext())
      inline.append(child.tail or '')
    text = _flow(''.join(inline))
    if text:
      yield f'{"  " * level}{number}. {text}' if ordered else f'{"  " * level}- {text}'
    yield from inner


def _rows(element: Any) -> Iterator[str]:
  for row in element.iter('row'):
    cells = [_flow(' '.join(cell.itertext())).replace('\n', ' ') for cell in row.iter('cell')]
    if any(cells):
      yield '| ' + ' | '.join(cells) + ' |'
