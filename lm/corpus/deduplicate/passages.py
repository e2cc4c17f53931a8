"""Lines and paragraphs that stand in the corpus a second time."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import re

import numpy as np

from lm.corpus.deduplicate import clusters
from lm.corpus.document import Document
from lm.corpus.stage import Grouping
from lm.errors import UserError

_HASH = np.dtype([('key', np.uint64), ('check', np.uint32)])
_RECORD = np.dtype(
    [('key', np.uint64), ('check', np.uint32), ('address', np.int64), ('index', np.uint32)]
)
_REPEATED = np.dtype([('address', np.int64), ('index', np.uint32)])


class _Passages(Grouping):
  """Keeps the first of equal passages, in the order of the input, and cuts the others.

  White space around a passage does not count. A hash of 96 bits stands for one: of 10**11 passages
  two share one by chance with a probability of 10**-7. A record has 24 bytes.
  """

  stage: str
  separator: re.Pattern[str]
  min_characters: int

  def __post_init__(self):
    if self.min_characters < 1:
      raise UserError(f'min_characters={self.min_characters} must be 1 or more characters.')

  def emit(self, documents: Sequence[Document], decisions: np.ndarray | None) -> np.ndarray:
    """Returns the hash of each passage that is long enough."""
    digests, addresses, places = [], [], []
    for document in documents:
      for index, passage in enumerate(self.separator.split(document.text)):
        if len(passage) >= self.min_characters and len(passage.strip()) >= self.min_characters:
          digests.append(clusters.digest(passage, 12))
          addresses.append(document.address)
          places.append(index)
    records = np.empty(len(digests), _RECORD)
    hashes = np.frombuffer(b''.join(digests), _HASH)
    records['key'], records['check'] = hashes['key'], hashes['check']
    records['address'], records['index'] = addresses, places
    return records

  def resolve(self, records: np.ndarray) -> np.ndarray:
    """Returns the places of all passages but the first of each."""
    found, groups = clusters.alike(records, ('key', 'check'))
    again = np.zeros(len(found), bool)
    again[1:] = groups[1:] == groups[:-1]
    repeated = np.empty(np.count_nonzero(again), _REPEATED)
    for name in _REPEATED.names:
      repeated[name] = found[name][again]
    return repeated

  def conclude(self, resolved: np.ndarray) -> np.ndarray:
    """Returns the places in the order of the input."""
    return resolved[np.lexsort([resolved['index'], resolved['address']])]

  def carry_out(self, document: Document, decisions: np.ndarray) -> None:
    """Cuts the passages, each with the separator behind it; removes what has no text left."""
    cut = set(decisions['index'].tolist())
    kept, start = [], 0
    ends = [match.end() for match in self.separator.finditer(document.text)]
    for index, end in enumerate([*ends, len(document.text)]):
      if index not in cut:
        kept.append(document.text[start:end])
      start = end
    text = ''.join(kept)
    if not document.text[-1].isspace():
      text = text.rstrip()  # The separator before a last passage that was cut.
    rule = f'{self.stage}.duplicate'
    document.verdicts[rule] = len(document.text) - len(text)
    document.text = text
    if not text.strip():
      document.remove(rule)


@dataclasses.dataclass(frozen=True)
class Lines(_Passages):
  """Keeps the first of equal lines of all documents (RefinedWeb, arXiv 2306.01116, section 3.3).

  The verdict 'lines.duplicate' counts the characters that were cut.

  Attributes:
    min_characters: shorter lines stay: headings, lines of code, of verse and of lists.
  """

  stage = 'lines'
  separator = re.compile(r'\n')
  min_characters: int = 80


@dataclasses.dataclass(frozen=True)
class Paragraphs(_Passages):
  """Keeps the first of equal paragraphs of all documents (CCNet, arXiv 1911.00359, section 3.2).

  Blank lines separate paragraphs. The verdict 'paragraphs.duplicate' counts the characters cut.

  Attributes:
    min_characters: shorter paragraphs stay: headings.
  """

  stage = 'paragraphs'
  separator = re.compile(r'\n(?:[^\S\n]*\n)+')
  min_characters: int = 80
