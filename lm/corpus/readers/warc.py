"""Web archives: WARC (ISO 28500), as a crawl or as Common Crawl's WET, and the older ARC.

The framing is our own, since it must find the next record behind a damaged one; what is inside a
record (HTTP headers, chunks, compressed bodies) FastWARC reads.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
import re
from typing import Any, TYPE_CHECKING

from lm.corpus.document import Document
from lm.corpus.readers import streams
from lm.corpus.readers.piece import damaged, File, need, Packer, Piece, Report, too_long

if TYPE_CHECKING:
  from lm.corpus.collect import Source

_MOST_HEADER = 64 << 10
_WARC = re.compile(rb'WARC/[01]\.\d+\r?\n')
# URL, IP address, date, media type, (version 2: more fields,) bytes that follow.
_ARC = re.compile(
    rb'([a-z][a-z0-9+.-]{0,20}:[^\s]{0,4096}) [^\s]{0,64} (\d{14}|\d{8}) ([^\s]{0,128})'
    rb'[^\n]{0,512}? (\d{1,12})\r?\n', re.IGNORECASE
)  # fmt: skip
_WARC_BEGINS = re.compile(rb'(?=WARC/[01]\.\d+\r?\n[A-Za-z-]+:)')
_ARC_BEGINS = re.compile(rb'\n(?=' + _ARC.pattern + rb')', re.IGNORECASE)
_HEADER_ENDS = re.compile(rb'\r?\n\r?\n')
_FIELD = re.compile(rb'^([!-9;-~]+):[ \t]*([^\r\n]*)', re.MULTILINE)
_HTTP_STATUS = re.compile(rb'HTTP/[\d.]+[ \t]+(\d+)')
_HTTP_TYPE = re.compile(rb'^content-type:[ \t]*([^;\s]*)', re.MULTILINE | re.IGNORECASE)
_KEPT = frozenset((b'response', b'resource', b'conversion'))
# Servers that say nothing, or that it might be anything, are looked at in the body.
_TEXT_TYPES = {
    'text/html': 'text/html', 'application/xhtml+xml': 'text/html', 'text/plain': 'text/plain',
    'text/markdown': 'text/markdown', '': '', 'application/octet-stream': '', 'unk': '',
}  # fmt: skip
_HTML = re.compile(rb'(?i)<(?:!doctype html|html|head|body|title|meta|div|p)[\s>]')


def pieces(file: File, source: Source, report: Report) -> Iterator[Piece]:
  """Takes the records out of an archive that may hold text: responses, resources, conversions.

  A record is named by its number in the file, counted from 1. Reported are those that are damaged
  or larger than `max_document_bytes`, and together, at the end, how many were no text or no page.

  Raises:
    OSError: the file cannot be read.
  """
  packer = Packer(file)
  frames = _Frames(streams.Buffer(file, report), file, source.max_document_bytes, report)
  for number, record in frames:
    if piece := packer.add(number, record):
      yield piece
  if piece := packer.flush():
    yield piece
  for what, count in sorted(frames.left_out.items()):
    report(file.name, f'has records that are no {what} ({count})')


class _Frames:
  """The records of a stream that may hold text: (number, bytes as of a WARC)."""

  def __init__(self, stream: streams.Buffer, file: File, limit: int, report: Report) -> None:
    self._stream, self._limit, self._number = stream, limit, 0
    self._tell = lambda reason: report(f'{file.name}:{self._number}', reason)
    self.left_out: collections.Counter[str] = collections.Counter()
    self._arc = streams.stem(file.path).lower().endswith('.arc')

  def __iter__(self) -> Iterator[tuple[int, bytes]]:
    stream = self._stream
    while True:
      while stream.fill(1) and stream.data[:1] in (b'\r', b'\n'):
        del stream.data[:1]
      if stream.at_gap and not stream.data:
        stream.pass_gap()
      elif not stream.data:
        return
      else:
        self._number += 1
        if record := self._next():
          yield self._number, record

  def _next(self) -> bytes | None:
    """Eats one record and returns it, None if it is nothing for us."""
    stream = self._stream
    stream.fill(_MOST_HEADER)
    try:
      header = self._arc_header() if self._arc else self._warc_header()
      fields = {name.lower(): value.strip() for name, value in _FIELD.findall(header)}
      length = int(fields.get(b'content-length', b'none'))
      if length < 0:
        raise ValueError(f'Content-Length {length}')
    except ValueError as error:
      if not stream.at_gap:  # Which was reported.
        self._tell(damaged(error))
      self._resynchronise(1)
      return None
    stream.fill(min(length, _MOST_HEADER))
    wanted = self._is_wanted(fields, bytes(stream.data[: min(length, _MOST_HEADER)]))
    if length > self._limit:
      if wanted:
        self._tell(too_long(self._limit))
      if not stream.skip(length) and not stream.at_gap:
        self._tell(damaged('it ends in the middle of a record'))
      return None
    if not stream.fill(length) or not self._ends_well(length):
      if not stream.at_gap:
        self._tell(damaged(f'its {length} bytes are not followed by the end or another record'))
      self._resynchronise(0)
      return None
    record = header + stream.data[:length] if wanted else None
    del stream.data[:length]
    return record

  def _warc_header(self) -> bytes:
    """Eats the header of a WARC record."""
    data = self._stream.data
    match = _HEADER_ENDS.search(data, 0, _MOST_HEADER) if _WARC.match(data) else None
    if match is None:
      raise ValueError('no header of a record where one should be')
    header = bytes(data[: match.end()])
    del data[: match.end()]
    return header

  def _arc_header(self) -> bytes:
    """Eats the line that is the header of an ARC record, and says it as a WARC does."""
    match = _ARC.match(self._stream.data)
    if match is None:
      raise ValueError('no header of a record where one should be')
    url, date, media_type, length = (bytes(group) for group in match.groups())
    del self._stream.data[: match.end()]
    http = url.lower().startswith((b'http:', b'https:'))
    iso = b'%s-%s-%sT%s:%s:%sZ' % (
        date[:4], date[4:6], date[6:8], date[8:10] or b'00', date[10:12] or b'00',
        date[12:14] or b'00')  # fmt: skip
    return b''.join((
        b'WARC/1.0\r\nWARC-Type: ', b'response' if http else b'metadata',
        b'\r\nWARC-Target-URI: ', url, b'\r\nWARC-Date: ', iso, b'\r\nContent-Type: ',
        b'application/http; msgtype=response' if http else media_type,
        b'\r\nContent-Length: ', length, b'\r\n\r\n'))  # fmt: skip

  def _is_wanted(self, fields: dict[bytes, bytes], body: bytes) -> bool:
    """Whether a record may hold text; a response that does not is reported."""
    if fields.get(b'warc-type') not in _KEPT or fields.get(
        b'warc-target-uri', b'').lstrip(b'<').startswith(b'metadata:'):  # fmt: skip
      return False
    media_type = fields.get(b'content-type', b'').split(b';')[0].strip().lower()
    if media_type == b'application/http':
      match = _HEADER_ENDS.search(body)
      http = body[: match.start()] if match else body
      status = _HTTP_STATUS.match(http)
      if status and not 200 <= int(status[1]) < 300:
        self.left_out['page: HTTP status beyond 2xx'] += 1
        return False
      match = _HTTP_TYPE.search(http)
      media_type = match[1].lower() if match else b''
    media_type = fields.get(b'warc-identified-payload-type', media_type)
    kind = media_type.decode('latin-1')
    if kind not in _TEXT_TYPES:
      self.left_out['text'] += 1
    return kind in _TEXT_TYPES

  def _ends_well(self, length: int) -> bool:
    """Whether behind the record come an empty line, another record, or the end."""
    stream, at = self._stream, length
    while stream.fill(at + 1) and stream.data[at : at + 1] in (b'\r', b'\n'):
      at += 1
    if stream.data[length:at].startswith((b'\r\n\r\n', b'\n\n')):
      return True
    if not stream.fill(at + 1):
      return not stream.at_gap or at > length
    stream.fill(at + _MOST_HEADER if self._arc else at + 16)
    return bool((_ARC if self._arc else _WARC).match(stream.data, at))

  def _resynchronise(self, start: int) -> None:
    """Eats all before the next place where a record begins."""
    begins, stream = _ARC_BEGINS if self._arc else _WARC_BEGINS, self._stream
    while True:
      if match := begins.search(stream.data, start):
        del stream.data[: match.end()]
        return
      start = 0
      del stream.data[: max(len(stream.data) - _MOST_HEADER, 0)]
      if not stream.fill(len(stream.data) + 1):
        stream.data.clear()
        return


def documents(piece: Piece, source: Source, report: Report) -> Iterator[Document]:
  """Reads the payload of each record, free of its HTTP chunks and compression.

  Raises:
    UserError: FastWARC is not installed.
  """
  warc = need('fastwarc.warc')
  limit = source.max_document_bytes
  for number, raw in zip(piece.numbers, piece.records or ()):
    name = f'{piece.file.name}:{number}'
    try:
      record = warc.WarcRecord.from_bytes(raw)
      http = b'application/http' in raw[: raw.index(b'\n\r\n')]
      if http:
        record.parse_http(auto_decode='all', max_header_len=_MOST_HEADER)
      payload = record.reader.read(limit + 1)
      document = _document(name, record, http, payload)
    except (OSError, ValueError, EOFError, RuntimeError) as error:
      report(name, damaged(error))
      continue
    if len(payload) > limit:
      report(name, too_long(limit))
    elif document is None:
      report(name, 'is no text (nobody says what it is)')
    else:
      yield document


def _document(name: str, record: Any, http: bool, payload: bytes) -> Document | None:
  headers = record.headers
  declared = record.http_content_type if http else headers.get('Content-Type')
  declared = headers.get('WARC-Identified-Payload-Type') or declared or ''
  media_type, _, parameters = declared.lower().partition(';')
  media_type = _TEXT_TYPES.get(media_type.strip(), '')
  if not media_type and _HTML.search(payload, 0, 4096):
    media_type = 'text/html'
  charset = record.http_charset if http else parameters.partition('charset=')[2]
  return media_type and Document(
      name, '', raw=payload, media_type=media_type, charset=(charset or '').strip(' "\''),
      url=(headers.get('WARC-Target-URI') or '').strip('<> '), date=headers.get('WARC-Date') or '',
  ) or None  # fmt: skip
