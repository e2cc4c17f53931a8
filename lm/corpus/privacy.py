"""What names a person or opens an account is replaced by a placeholder of its type.

    write to ann@example.org or call 541-754-3010
    write to <EMAIL> or call <PHONE>

Names of persons and addresses are not looked for: that takes a model.

References: the kinds are those of Subramani et al. 2023 (arXiv 2307.08715, "Detecting personal
  information in training corpora", section 2: character-based types) and Dolma (arXiv 2402.00159,
  section 4.2); public addresses alone as in FineWeb (arXiv 2406.17557, section 3.6).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
import dataclasses
import ipaddress
import re

from lm.corpus import privacy_numbers
from lm.corpus import privacy_phones
from lm.corpus import privacy_secrets
from lm.corpus.document import Document
from lm.corpus.stage import Stage
from lm.errors import UserError

Span = tuple[int, int]

KINDS = ('secret', 'email', 'iban', 'card', 'national_id', 'ip', 'phone')  # Earlier ones win.

_LOCAL = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*$")
_DOMAIN = re.compile(
    r'(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}([A-Za-z]{2,24})(?![\w])', re.ASCII
)
_LONGEST_LOCAL = 64  # RFC 5321, section 4.5.3.1.1
_FILE_SUFFIXES = frozenset('png jpg jpeg gif webp svg ico css js html htm pdf'.split())

_IPV4 = re.compile(r'[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}')
_NO_IPV4_BEFORE = re.compile(
    r'[\w.,-]$|[A-Za-z]/$|[<>=~!]=$'
    r'|(?i:\bv(?:er(?:sion|s)?|\.)?|§|release|section)[ .:]{0,2}$',
    re.ASCII,
)
_NO_IPV4_AFTER = re.compile(r'\w|[.-]\w', re.ASCII)
_IPV6 = re.compile(r':[0-9a-fA-F]{0,4}:')
_HEXADECIMAL = frozenset('0123456789abcdefABCDEF:')
_GLOBAL_UNICAST = ipaddress.ip_network('2000::/3')


@dataclasses.dataclass(frozen=True)
class Redact(Stage):
  """Replaces e-mail addresses, telephone numbers, secrets and the like by `<EMAIL>` and so on.

  The verdict of each kind, 'privacy.email' and so on, is the number that was replaced.

  Attributes:
    kinds: which of KINDS to replace.
    regions: ISO 3166 codes of the countries whose national forms of telephone numbers count with
      no word ("phone", "fax", ...) beside them; international, American and trunk-prefixed forms
      always count.
  """

  kinds: tuple[str, ...] = KINDS
  regions: tuple[str, ...] = ('US', 'GB', 'FR', 'IN', 'CN')

  def __post_init__(self):
    for kind in self.kinds:
      if kind not in KINDS:
        raise UserError(f'privacy.Redact.kinds holds {kind!r}; they are {", ".join(KINDS)}.')

  def apply(self, document: Document) -> None:
    found = self.find(document.text)
    counts = Counter(kind for _, _, kind in found)
    for kind in self.kinds:
      document.verdicts[f'privacy.{kind}'] = counts[kind]
    if found:
      pieces, position = [], 0
      for start, end, kind in found:
        pieces += document.text[position:start], f'<{kind.upper()}>'
        position = end
      document.text = ''.join(pieces) + document.text[position:]

  def find(self, text: str) -> list[tuple[int, int, str]]:
    """Returns (start, end, kind) of what would be replaced, in order, none overlapping another."""
    places = privacy_numbers.figures(text)
    searches = {
        'secret': lambda: privacy_secrets.secrets(text),
        'email': lambda: emails(text),
        'iban': lambda: privacy_numbers.ibans(text),
        'card': lambda: privacy_numbers.cards(text, places),
        'national_id': lambda: privacy_numbers.national_ids(text, places),
        'ip': lambda: addresses(text),
        'phone': lambda: privacy_phones.phones(text, places, self.regions),
    }
    found, taken = [], bytearray(len(text))
    for kind in KINDS:
      for start, end in searches[kind]() if kind in self.kinds else ():
        if not any(taken[start:end]):
          taken[start:end] = b'1' * (end - start)
          found.append((start, end, kind))
    return sorted(found)


def emails(text: str) -> Iterator[Span]:
  """Yields e-mail addresses: what stands about each '@' (RFC 5322 `dot-atom`, and a domain).

  Not the `git@` of repositories, nor files such as `image@2x.png`.
  """
  at = text.find('@')
  while at >= 0:
    domain = _DOMAIN.match(text, at + 1)
    if domain and domain[1].lower() not in _FILE_SUFFIXES:
      first = max(0, at - _LONGEST_LOCAL)
      local = _LOCAL.search(text[first:at])
      if local and local[0] != 'git':
        yield first + local.start(), domain.end()
    at = text.find('@', at + 1)


def addresses(text: str) -> Iterator[Span]:
  """Yields public IP addresses, of version 4 and 6.

  Private, reserved and documentation addresses name nobody. Four numbers that are a version
  ('v1.2.3.4', 'Chrome/10.0.0.12') or the number of a section are none: at most one of them has more
  than one digit, or a word before says so. Of addresses drawn at random 2 in 10,000 look like this.
  """
  for match in _IPV4.finditer(text):
    start, end = match.span()
    parts = [int(part) for part in match[0].split('.')]
    if (
        max(parts) > 255
        or sum(part > 9 for part in parts) < 2
        or _NO_IPV4_AFTER.match(text, end)
        or _NO_IPV4_BEFORE.search(text[max(0, start - 10) : start])
    ):
      continue
    if ipaddress.ip_address('.'.join(map(str, parts))).is_global:
      yield start, end
  end = 0
  for match in _IPV6.finditer(text):
    if match.start() < end:
      continue
    start, end = match.span()
    while start and text[start - 1] in _HEXADECIMAL and match.start() - start < 40:
      start -= 1
    while end < len(text) and text[end] in _HEXADECIMAL and end - start < 40:
      end += 1
    candidate = text[start:end].rstrip(':')
    before = text[max(0, start - 1) : start]
    if _is_public_ipv6(candidate) and not re.match('[A-Za-z0-9_]', before):
      yield start, start + len(candidate)


def _is_public_ipv6(candidate: str) -> bool:
  if candidate.count(':') < 3 or not any(map(str.isdigit, candidate)):
    return False
  try:
    address = ipaddress.IPv6Address(candidate)
  except ValueError:
    return False
  if not address.is_global or address.is_multicast:
    return False
  return '::' not in candidate or address in _GLOBAL_UNICAST
