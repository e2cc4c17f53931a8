"""Bytes of unknown encoding as text.

What is believed, in this order: a byte order mark; that the bytes are UTF-8, if they are (others
hardly ever are by chance), even where something else is declared; what was declared beside them
(HTTP), what they declare themselves (HTML, XML), and at last what they look like. An encoding that
does not fit all of the bytes is not believed, so that nothing turns into mojibake silently; of
UTF-8 with few broken places, these become U+FFFD.
"""

from __future__ import annotations

import codecs
import re
from typing import NamedTuple

from lm.corpus.readers.piece import need

_MARKS = (
    (codecs.BOM_UTF8, 'utf-8'), (codecs.BOM_UTF32_LE, 'utf-32-le'),
    (codecs.BOM_UTF32_BE, 'utf-32-be'), (codecs.BOM_UTF16_LE, 'utf-16-le'),
    (codecs.BOM_UTF16_BE, 'utf-16-be'),
)  # fmt: skip
_META_BYTES = 4096
_DETECTED_BYTES = 1 << 15  # By the second detector, which is slow.
_META = re.compile(rb'<meta\b[^>]{0,512}?\bcharset\s*=\s*["\']?\s*([\w:.-]{1,40})', re.IGNORECASE)
_XML = re.compile(rb'^\s*<\?xml\b[^>]{0,256}?\bencoding\s*=\s*["\']([\w:.-]{1,40})', re.IGNORECASE)
_HIGH = bytes(range(128, 256))
# Servers declare it without looking: of such bytes less than this is no ASCII in Western languages.
_WESTERN, _MOST_WESTERN = 'cp1252', 0.25
_FEW = 8  # Bytes beyond ASCII that are too few to tell encodings apart; it is the usual one then.
# What files that say the name hold in fact (https://encoding.spec.whatwg.org/#names-and-labels).
_SUPERSETS = {
    'shift_jis': 'cp932', 'euc_kr': 'cp949', 'gbk': 'gb18030', 'gb2312': 'gb18030',
    'big5': 'big5hkscs', 'iso8859-1': 'cp1252', 'latin-1': 'cp1252', 'ascii': 'cp1252',
    'utf-16': 'utf-16-le',
}  # fmt: skip


class Decoded(NamedTuple):
  """Text and the encoding that it was in."""

  text: str
  encoding: str


def decode(data: bytes, declared: str = '', markup: bool = False) -> Decoded | None:
  """Returns the text of bytes, None if no encoding fits (they are probably no text).

  Args:
    data: at most some MiB.
    declared: name of an encoding, by who sent the bytes; '' if none.
    markup: looks for a declaration in the bytes, as HTML and XML have it.
  """
  for mark, encoding in _MARKS:
    if data.startswith(mark):
      return Decoded(data[len(mark) :].decode(encoding, 'replace'), encoding)
  wide = _wide(data)
  if wide:
    return Decoded(data.decode(wide, 'replace'), wide)
  candidates = [_normal(declared)]
  if markup:
    match = _XML.match(data[:_META_BYTES]) or _META.search(data[:_META_BYTES])
    candidates.append(_normal(match[1].decode('ascii')) if match else '')
  candidates = list(dict.fromkeys(name for name in candidates if name))
  if b'\x1b$' in data or b'\x1b(' in data:  # ISO-2022, in ASCII's clothes.
    try:
      return Decoded(data.decode('iso2022_jp_2'), 'iso2022_jp_2')
    except UnicodeDecodeError:
      pass
  text = _utf8(data)
  if text is not None:
    return Decoded(text, 'utf-8')
  if _is_doubtful(data, candidates):
    candidates[:0] = [
        name for name in _guesses(data) if len(candidates) == 1 or name in candidates]
  for name in (*candidates, *_guesses(data)):
    try:
      return Decoded(data.decode(name), name)
    except (UnicodeDecodeError, LookupError):
      continue
  return None


def _normal(name: str) -> str:
  """Returns Python's name of an encoding that decodes all that bears the name; '' if unknown."""
  try:
    known = codecs.lookup(name.strip(' "\'')).name
  except (LookupError, ValueError):
    return ''
  return _SUPERSETS.get(known, known) if codecs.lookup(known)._is_text_encoding else ''


def _wide(data: bytes) -> str:
  """Returns the UTF-16 without a mark that zeros in mostly Latin text betray, else nothing."""
  head = data[:1024]
  even, odd = head[::2].count(0), head[1::2].count(0)
  if len(head) >= 16 and max(even, odd) * 3 > len(head) and min(even, odd) * 16 < len(head):
    return 'utf-16-be' if even > odd else 'utf-16-le'
  return ''


def _utf8(data: bytes) -> str | None:
  """Returns the text if it is UTF-8, but for a few places or a character that is cut at the end."""
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as error:
    if error.reason == 'unexpected end of data' and error.start:
      return data[: error.start].decode('utf-8')
  text = data.decode('utf-8', 'replace')
  broken = text.count('\ufffd')
  high = len(data) - len(data.translate(None, _HIGH))
  return text if high >= 16 * broken else None


def _is_doubtful(data: bytes, candidates: list[str]) -> bool:
  """Whether what is declared is contradictory or improbable."""
  high = len(data) - len(data.translate(None, _HIGH))
  return len(candidates) > 1 or (
      candidates == [_WESTERN] and high > _MOST_WESTERN * (len(data) - data.count(b' ')))


def _guesses(data: bytes) -> list[str]:
  """Returns what the bytes look like to one detector, and if that does not fit, to another."""
  guess = _normal(need('resiliparse.parse.encoding').detect_encoding(data) or '')
  high = len(data) - len(data.translate(None, _HIGH))
  if high < _FEW:
    return [_WESTERN, guess]
  try:
    data.decode(guess)
    return [guess]
  except (UnicodeDecodeError, LookupError):
    best = need('charset_normalizer').from_bytes(data[:_DETECTED_BYTES]).best()
    return [_normal(best.encoding)] if best else []
