"""Spans of text that stand in the corpus a second time, wherever they begin and end.

As Lee et al. (2022, arXiv 2107.06499, section 4.1), who sort a suffix array of the whole corpus.
Here hashes of every span of `length` tokens are compared instead, which needs no more memory than a
partition, and only of spans that may be repeated, which are found first by winnowing (Schleimer,
Wilkerson and Aiken 2003, section 3): the anchor of a span is the least of the hashes of the runs of
length / 2 tokens in it. Equal spans have equal anchors, so only spans whose anchor occurs twice are
compared; and neighbours share anchors, so anchors are few, 2 in every length / 2 + 2 tokens. A
record has 16 bytes in round 1; in round 2, 28 for each token of spans whose anchor is repeated.

What is found is what comparing all spans with all others would find, if no hashes collide. For
that, two spans with one anchor would have to agree in another 64 bits by chance: of 10**12 spans,
each with a thousand others that share its anchor, two do with a probability below 10**-4.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import numpy as np

from lm.corpus.deduplicate import clusters
from lm.corpus.deduplicate import tokens
from lm.corpus.document import Document
from lm.corpus.stage import Grouping
from lm.errors import UserError

_RULE = 'substrings.duplicate'
_ANCHOR = np.dtype([('key', np.uint64), ('address', np.int64)])
_SPAN = np.dtype(
    [('key', np.uint64), ('span', np.uint64), ('address', np.int64), ('start', np.uint32)]
)
_CUT = np.dtype([('address', np.int64), ('start', np.uint32), ('end', np.uint32)])


@dataclasses.dataclass(frozen=True)
class Substrings(Grouping):
  """Cuts every span of `length` tokens that stood before, in another document or in the same one.

  Tokens are what stands between spaces, as it is written; in scripts that write no spaces, the
  characters. A token is cut if it is in a span that has an equal one before it in the order of the
  input, unless that one has the token too (they overlap where a text repeats a few words). A
  document of which nothing is left is removed. The verdict 'substrings.duplicate' counts the
  characters that were cut.

  Attributes:
    length: of a span, in tokens.
  """

  length: int = 50
  rounds = 2

  def __post_init__(self):
    if self.length < 2:
      raise UserError(f'length={self.length} must be 2 or more tokens; 50 is usual.')

  def emit(self, documents: Sequence[Document], decisions: np.ndarray | None) -> np.ndarray:
    """Returns the anchors of each document; in round 2 the spans whose anchor is repeated."""
    parts = [np.empty(0, _ANCHOR if decisions is None else _SPAN)]
    if decisions is not None:
      repeated = np.unique(decisions['key'])
      about = set(decisions['address'].tolist())
      documents = [document for document in documents if document.address in about]
    for at in tokens.batches([len(document.text) for document in documents], tokens.PIECE):
      anchors, spans = self._spans(documents[at])
      if decisions is None:
        parts.append(_at_most_twice(anchors))
      else:
        parts.append(spans[np.isin(spans['key'], repeated)])
    return np.concatenate(parts)

  def resolve(self, records: np.ndarray) -> np.ndarray:
    """Returns the anchors found twice; in round 2 what to cut of each document."""
    if records.dtype == _ANCHOR:
      return clusters.unique(clusters.alike(records, ('key',))[0])
    found, groups = clusters.alike(records, ('key', 'span'))
    new = np.diff(groups, prepend=-1) > 0
    first = found[new][groups]
    again, first = found[~new], first[~new]
    cuts = np.empty(len(again), _CUT)
    cuts['address'], cuts['start'] = again['address'], again['start']
    cuts['end'] = again['start'] + self.length
    same = again['address'] == first['address']
    cuts['start'][same] = np.maximum(again['start'], first['start'] + self.length)[same]
    return _merged(cuts)

  def conclude(self, resolved: np.ndarray) -> np.ndarray:
    """Returns anchors by document; in round 2 what to cut, by document and from its beginning."""
    return super().conclude(resolved) if resolved.dtype == _ANCHOR else _merged(resolved)

  def carry_out(self, document: Document, decisions: np.ndarray) -> None:
    """Cuts the spans; removes the document if nothing is left."""
    text, found = document.text, tokens.pieces_between_spaces([document.text])
    kept, start = [], 0
    for first, last in zip(decisions['start'].tolist(), decisions['end'].tolist()):
      begin = found.ends[first - 1] if first else 0
      end = found.starts[last] if last < len(found.starts) else len(text)
      around = text[begin : found.starts[first]], text[found.ends[last - 1] : end]
      space = max(around, key=lambda space: (space.count('\n'), len(space)))
      kept += [text[start:begin], space if first and last < len(found.starts) else '']
      start = end
    document.text = ''.join([*kept, text[start:]])
    document.verdicts[_RULE] = len(text) - len(document.text)
    if not document.text.strip():
      document.remove(_RULE)

  def _spans(self, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the anchors of documents and their spans, both as (key, address, ...)."""
    found = tokens.pieces_between_spaces([document.text for document in documents])
    runs = tokens.Runs(found.hashes)
    gram = -(-self.length // 2)
    starts, ends, counts = found.runs(gram, short=False)
    grams = tokens.mix(runs.hash(starts, ends))
    owners = np.repeat(np.arange(len(documents)), counts)
    # By the gram with which a span begins; where the text ends too soon for one, 0.
    begins = starts + self.length <= found.bounds[1:][owners]
    width = self.length - gram + 1
    least = np.where(begins, _sliding_minimum(grams, width), np.uint64(0))
    is_anchor = grams == ~_sliding_minimum(~least[::-1], width)[::-1]
    addresses = np.array([document.address for document in documents], np.int64)
    anchors = np.empty(np.count_nonzero(is_anchor), _ANCHOR)
    anchors['key'], anchors['address'] = grams[is_anchor], addresses[owners[is_anchor]]
    spans = np.empty(np.count_nonzero(begins), _SPAN)
    starts, owners = starts[begins], owners[begins]
    spans['key'], spans['address'] = least[begins], addresses[owners]
    spans['span'] = runs.hash(starts, starts + self.length)
    spans['start'] = starts - found.bounds[owners]
    return anchors, spans


def _sliding_minimum(values: np.ndarray, width: int) -> np.ndarray:
  """Returns the least of each `values[i:i + width]`, in time proportional to log(width)."""
  least, covered = values.copy(), 1
  while covered < width:
    step = min(covered, width - covered)
    np.minimum(least[:-step], least[step:], out=least[:-step])
    covered += step
  return least


def _at_most_twice(anchors: np.ndarray) -> np.ndarray:
  """Drops what is in a document a third time: it is repeated already."""
  anchors = anchors[np.lexsort([anchors['address'], anchors['key']])]
  new = np.ones(len(anchors), bool)
  new[2:] = anchors[2:] != anchors[:-2]
  return anchors[new]


def _merged(cuts: np.ndarray) -> np.ndarray:
  """Returns what is covered by the cuts, sorted and as few as can be."""
  cuts = cuts[np.lexsort([cuts['start'], cuts['address']])]
  if not len(cuts):
    return cuts
  places = np.cumsum(np.diff(cuts['address'], prepend=cuts['address'][0]) != 0) << 32
  reach = np.maximum.accumulate(places + cuts['end'])
  first = np.append(True, (places + cuts['start'])[1:] > reach[:-1])
  merged = cuts[first]
  merged['end'] = reach[np.append(np.flatnonzero(first)[1:] - 1, len(cuts) - 1)] & 0xFFFFFFFF
  return merged
