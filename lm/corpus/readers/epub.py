"""EPUB books: a ZIP archive of XHTML, read in the order of its spine; a book is one document.

Only what the spine names is inflated, and never more than `max_document_bytes` of it.
Reference: EPUB 3.3, W3C Recommendation, sections 4.2 (container) and 5 (package document).
"""

from __future__ import annotations

from collections.abc import Iterator
import posixpath
import re
import struct
from typing import TYPE_CHECKING
import urllib.parse
from xml.etree import ElementTree
import zipfile
import zlib

from lm.corpus import decode
from lm.corpus.document import Document
from lm.corpus.readers.piece import damaged, File, Piece, Report, too_long

if TYPE_CHECKING:
  from lm.corpus.collect import Source

_MOST_DIRECTORY = 4 << 20  # Bytes of the list of files: 40,000 of them.
_MOST_PACKAGE = 4 << 20  # Bytes of a file of metadata.
_END_OF_DIRECTORY = b'PK\x05\x06'
_BODY = re.compile(r'<body\b[^>]*>(.*)</body\s*>', re.DOTALL | re.IGNORECASE)
_BROKEN = (
    zipfile.BadZipFile, zlib.error, ElementTree.ParseError, KeyError, ValueError, EOFError,
    NotImplementedError, RuntimeError, struct.error,
)  # fmt: skip


def pieces(file: File, source: Source, report: Report) -> Iterator[Piece]:
  """Returns the book as it is: it is opened by who reads it. Pictures in it do not count."""
  yield Piece(file, 0, min(file.size, source.max_document_bytes), (0,))


def documents(piece: Piece, source: Source, report: Report) -> Iterator[Document]:
  """Reads the chapters as one page of XHTML.

  Raises:
    OSError: the file cannot be read.
  """
  name = piece.file.name
  try:
    _check_directory(piece.file.path)
    with zipfile.ZipFile(piece.file.path) as book:
      document = _book(book, name, source.max_document_bytes)
  except _TooLong:
    report(name, too_long(source.max_document_bytes))
  except _BROKEN as error:
    report(name, damaged(error))
  else:
    yield document


class _TooLong(Exception):
  """A book is longer than it may be."""


def _check_directory(path: str) -> None:
  """Looks how long the list of files says it is, before it is read."""
  with open(path, 'rb') as file:
    file.seek(0, 2)
    file.seek(max(file.tell() - (1 << 16) - 22, 0))
    tail = file.read()
  at = tail.rfind(_END_OF_DIRECTORY)
  if at < 0:
    raise ValueError('it is no ZIP archive, or it ends too early')
  (size,) = struct.unpack('<I', tail[at + 12 : at + 16])
  if size > _MOST_DIRECTORY:
    raise ValueError(f'its list of files has {size} bytes')


def _book(book: zipfile.ZipFile, name: str, limit: int) -> Document:
  container = _xml(book, 'META-INF/container.xml')
  root = next(
      element.get('full-path', '') for element in container.iter() if _is(element, 'rootfile')
  )
  package = _xml(book, root)
  about = {key: _metadata(package, key) for key in ('title', 'language', 'rights', 'date')}
  files = {
      element.get('id'): element.get('href', '')
      for element in package.iter()
      if _is(element, 'item') and 'html' in element.get('media-type', '')
  }
  parts = ['<html><body>']
  for element in package.iter():
    if _is(element, 'itemref') and element.get('idref') in files:
      href = urllib.parse.unquote(files[element.get('idref')])
      path = posixpath.normpath(posixpath.join(posixpath.dirname(root), href))
      data = _read(book, path, limit)
      limit -= len(data)
      text = decode.decode(data).text
      body = _BODY.search(text)
      parts += ['<div>', body[1] if body else text, '</div>\n']
  return Document(
      name, '', raw='\n'.join([*parts, '</body></html>']).encode('utf-8', 'replace'),
      media_type='application/epub+zip', charset='utf-8', title=about['title'], date=about['date'],
      licence=about['rights'], language=about['language'].lower().partition('-')[0],
  )  # fmt: skip


def _read(book: zipfile.ZipFile, path: str, limit: int) -> bytes:
  with book.open(path) as file:
    data = file.read(limit + 1)
  if len(data) > limit:
    raise _TooLong
  return data


def _xml(book: zipfile.ZipFile, path: str) -> ElementTree.Element:
  with book.open(path) as file:
    data = file.read(_MOST_PACKAGE + 1)
  if len(data) > _MOST_PACKAGE:
    raise ValueError(f'{path} has more than {_MOST_PACKAGE} bytes')
  return ElementTree.fromstring(data)


def _is(element: ElementTree.Element, name: str) -> bool:
  return isinstance(element.tag, str) and element.tag.rpartition('}')[2] == name


def _metadata(package: ElementTree.Element, key: str) -> str:
  found = (element.text for element in package.iter() if _is(element, key))
  return ' '.join(next(filter(None, found), '').split())
