"""Documents that are the same: in all their text, or by their URL."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import re
import urllib.parse

import numpy as np

from lm.corpus.deduplicate import clusters
from lm.corpus.document import Document
from lm.corpus.stage import Grouping

_RECORD = np.dtype(
    [('key', np.uint64), ('rest', np.uint64), ('rank', np.int32), ('address', np.int64)]
)
# Parameters that say how a reader came to a page, not which page it is.
_TRACKING = re.compile(
    r'utm_\w+|fbclid|gclid|dclid|gbraid|wbraid|msclkid|yclid|twclid|igshid|mc_[ce]id|_ga|_gl|_hs\w+'
    r'|mkt_tok|ref_src|ref_url|cmpid|spm',
    re.IGNORECASE,
)
_SAFE = "/!$&'()*+,;=:@~"  # Characters of a path that have no need of an escape.


class _Same(Grouping):
  """Keeps one of the documents that have the same identity.

  A cryptographic hash of 128 bits stands for the identity: no two of 10**12 documents share one by
  chance (probability 10**-15). A record has 28 bytes; a document has one.
  """

  stage: str
  keep: str = 'first'

  def identity(self, document: Document) -> str:
    """Returns what makes a document a duplicate; '' makes it none."""
    raise TypeError(f'{type(self).__name__} does not say what is the same.')

  def emit(self, documents: Sequence[Document], decisions: np.ndarray | None) -> np.ndarray:
    """Returns the hash of each document's identity."""
    some = [(document, same) for document in documents if (same := self.identity(document))]
    records = np.empty(len(some), _RECORD)
    digests = b''.join(clusters.digest(same, 16) for _, same in some)
    records['key'], records['rest'] = np.frombuffer(digests, '<u8').reshape(-1, 2).T
    records['rank'] = [clusters.rank(document, self.keep) for document, _ in some]
    records['address'] = [document.address for document, _ in some]
    return records

  def resolve(self, records: np.ndarray) -> np.ndarray:
    """Returns the cluster of each document that has a duplicate."""
    found, groups = clusters.alike(records, ('key', 'rest'))
    return clusters.representatives(groups, found['rank'], found['address'])

  def carry_out(self, document: Document, decisions: np.ndarray) -> None:
    """Removes the document unless it is the one that is kept."""
    clusters.carry_out(document, decisions, self.stage)


@dataclasses.dataclass(frozen=True)
class Exact(_Same):
  """Keeps the first of equal documents; white space around their texts does not count."""

  stage = 'exact'

  def identity(self, document: Document) -> str:
    """Returns the text."""
    return document.text


@dataclasses.dataclass(frozen=True)
class URL(_Same):
  """Keeps one of the documents that were published at one URL, as `normalised` writes it.

  Documents without a URL are kept.

  Attributes:
    keep: 'first' in the order of the input, or 'longest' (of these the first).
  """

  stage = 'url'
  keep: str = 'first'

  def __post_init__(self):
    clusters.check_keep(self.keep)

  def identity(self, document: Document) -> str:
    """Returns the normalised URL."""
    return normalised(document.url)


def normalised(url: str) -> str:
  """Returns a URL without what does not change the page that it names.

  The scheme, 'www.', user, default port, fragment, trailing slashes and parameters of tracking are
  dropped, the host is in lower case, escapes are written one way and the query is sorted:
  'HTTP://www.Example.org:80/a/?b=2&utm_source=x&a=1#top' is 'example.org/a?a=1&b=2'.
  """
  url = url.strip()
  try:
    parts = urllib.parse.urlsplit(url if re.match(r'([a-zA-Z][\w+.-]*:)?//', url) else f'//{url}')
    host, port = (parts.hostname or '').rstrip('.').removeprefix('www.'), parts.port
    pairs = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    path = urllib.parse.unquote(parts.path, errors='surrogateescape')
    path = urllib.parse.quote(path, _SAFE, errors='surrogateescape').rstrip('/')
    query = urllib.parse.urlencode(sorted(p for p in pairs if not _TRACKING.fullmatch(p[0])))
  except ValueError:  # No URL, but the same for the same documents.
    return url
  port_text = '' if port in (None, 80, 443) else f':{port}'
  return f'{host}{port_text}{path}{"?" * bool(query)}{query}'
