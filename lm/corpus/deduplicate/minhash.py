"""Documents that are nearly the same: MinHash finds who may be, their shingles say who is.

Round 1 finds candidates. A document is the set of its shingles, runs of `shingle` words; of two
documents a minimum of their hashed shingles is equal with a probability of their Jaccard similarity
(Broder 1997). Minima are taken by `num_hashes` functions and put together in bands of `rows`; two
documents that agree in a band are a candidate pair (Leskovec, Rajaraman and Ullman, Mining of
Massive Datasets, section 3.4).

Round 2 verifies. The shingles themselves of candidates meet, and a pair stands if its similarity
reaches the threshold. So the bands need not be strict, and nothing is removed by chance. Documents
linked by pairs are a cluster, of which one is kept.

The records of n documents are proportional to n: in round 1, 16 bytes a band; in round 2, of each
candidate 5.8 bytes a shingle, of 1024 at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools

import numpy as np

from lm.corpus.deduplicate import clusters
from lm.corpus.deduplicate import tokens
from lm.corpus.document import Document
from lm.corpus.stage import Grouping
from lm.errors import UserError

RECALL = 0.95  # Of pairs at the threshold, by the bands.
SKETCH = 1024  # Of a longer document, so many shingles are compared: those of the lowest hashes.
_NEIGHBOURS = 3  # Before a document, of those that agree with it in a band: they are its pairs.
_PART = 16  # Shingles a record.
_SLICE = 1024  # Pairs that are verified together; a partition has any number of slices.
_AT_ONCE = 1 << 20  # Shingles that are compared at a time.
_WORD = np.uint64(32)
_BAND = np.dtype([('key', np.uint64), ('address', np.int64)])
_PAIR = np.dtype([('address', np.int64), ('other', np.int64)])
# A pair, or a document that is the other of one (then `other` is its own address).
_CANDIDATE = np.dtype([*_PAIR.descr, ('slice', np.uint64)])
# A pair, or some shingles of a document (then `other` is its own address).
_EVIDENCE = np.dtype(
    [*_BAND.descr, ('other', np.int64), ('rank', np.int32), ('shingles', np.uint32, _PART)]
)
_VERIFIED = np.dtype([*_PAIR.descr, ('rank', np.int64), ('other_rank', np.int64)])


@dataclasses.dataclass(frozen=True)
class MinHash(Grouping):
  """Keeps one of each cluster of documents that are nearly the same.

  Attributes:
    threshold: Jaccard similarity of the sets of shingles from which two documents are duplicates.
    shingle: words of a shingle; in scripts that write no spaces, characters.
    num_hashes: minima of a document; bands and rows follow, see `bands`.
    keep: of a cluster, 'first' in the order of the input, or 'longest' (of these the first).
  """

  threshold: float = 0.75
  shingle: int = 5
  num_hashes: int = 112
  keep: str = 'first'
  rounds = 2

  def __post_init__(self):
    clusters.check_keep(self.keep)
    if not 0 < self.threshold <= 1:
      raise UserError(f'threshold={self.threshold} must be more than 0 and at most 1.')
    if self.shingle < 1 or self.num_hashes < 1:
      raise UserError(
          f'shingle={self.shingle} and num_hashes={self.num_hashes} must each be 1 or more.'
      )
    if self.recall(self.threshold, *self.bands) < RECALL:
      raise UserError(
          f'num_hashes={self.num_hashes} find fewer than {RECALL:.0%} of the pairs at'
          f' threshold={self.threshold}; give more of them.'
      )

  @staticmethod
  def recall(similarity: float, bands: int, rows: int) -> float:
    """Returns the probability that a pair of this similarity agrees in a band."""
    return 1 - (1 - similarity**rows) ** bands

  @property
  def bands(self) -> tuple[int, int]:
    """Bands and rows: the most rows with which RECALL is reached at the threshold.

    More rows mean fewer candidates in vain; those that are, verification drops.
    """
    rows = self.num_hashes
    while rows > 1 and self.recall(self.threshold, self.num_hashes // rows, rows) < RECALL:
      rows -= 1
    return self.num_hashes // rows, rows

  def emit(self, documents: Sequence[Document], decisions: np.ndarray | None) -> np.ndarray:
    """Returns the bands of each document; in round 2 the pairs and shingles of candidates."""
    if decisions is None:
      found = [self._bands(documents[at]) for at in _batches(documents)]
    else:
      candidates = set(decisions['address'].tolist())
      documents = [document for document in documents if document.address in candidates]
      found = [self._evidence(documents[at], decisions) for at in _batches(documents)]
    return np.concatenate(found or [np.empty(0, _BAND if decisions is None else _EVIDENCE)])

  def resolve(self, records: np.ndarray) -> np.ndarray:
    """Returns candidate pairs; in round 2 those that are similar."""
    return _pairs(records) if records.dtype == _BAND else self._verified(records)

  def conclude(self, resolved: np.ndarray) -> np.ndarray:
    """Returns pairs and where each is verified; in round 2 the cluster of each document in one."""
    pairs = clusters.unique(resolved)
    addresses, linked = clusters.components(pairs)
    if resolved.dtype == _VERIFIED:
      ranks = np.empty(len(addresses), np.int64)
      ranks[np.searchsorted(addresses, pairs['address'])] = pairs['rank']
      ranks[np.searchsorted(addresses, pairs['other'])] = pairs['other_rank']
      return super().conclude(clusters.representatives(linked, ranks, addresses))
    component = linked[np.searchsorted(addresses, pairs['address'])]
    pairs = pairs[np.argsort(component, kind='stable')]  # So most documents are in one slice.
    found = np.empty((2, len(pairs)), _CANDIDATE)
    found['address'] = pairs['address'], pairs['other']
    found['other'] = pairs['other']
    found['slice'] = np.arange(len(pairs)) // _SLICE
    return super().conclude(found.ravel())

  def carry_out(self, document: Document, decisions: np.ndarray) -> None:
    """Removes the document unless it is the one that is kept."""
    clusters.carry_out(document, decisions, 'minhash')

  def _shingles(self, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hashes of the shingles of all documents, and how many each document has."""
    words = tokens.words([document.text for document in documents])
    starts, ends, counts = words.runs(self.shingle, short=True)
    return tokens.mix(tokens.Runs(words.hashes).hash(starts, ends)), counts

  def signatures(self, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (num_hashes, n) minima, and the index of each of the n documents that have words."""
    hashes, counts = self._shingles(documents)
    low = hashes.astype(np.uint32)  # A multiple modulo 2**32 of a random number is another.
    some = np.flatnonzero(counts)
    bounds = (np.cumsum(counts) - counts)[some]
    minima = np.empty((self.num_hashes, len(some)), np.uint32)
    if len(some):
      product = np.empty_like(low)
      for factor, row in zip(_factors(self.num_hashes), minima):
        np.minimum.reduceat(np.multiply(low, factor, out=product), bounds, out=row)
    return minima, some

  def _bands(self, documents: Sequence[Document]) -> np.ndarray:
    minima, some = self.signatures(documents)
    bands, rows = self.bands
    keys = np.zeros((bands, len(some)), np.uint64)
    for row in range(rows):
      keys = tokens.mix(keys ^ minima[row : bands * rows : rows])
    found = np.empty(keys.shape, _BAND)
    found['key'] = tokens.mix(keys + np.arange(bands, dtype=np.uint64)[:, None])
    found['address'] = np.array([document.address for document in documents], np.int64)[some]
    return found.ravel()

  def _evidence(self, documents: Sequence[Document], decisions: np.ndarray) -> np.ndarray:
    """Returns the pairs of these documents, and their shingles in each slice that they are of."""
    hashes, counts = self._shingles(documents)
    codes = _codes(np.repeat(np.arange(len(documents)), counts), hashes.astype(np.uint32))
    bounds = _bounds(codes, len(documents))
    sizes = np.minimum(np.diff(bounds), SKETCH)
    parts = -(-sizes // _PART)
    # Filled up with the last of a document again: sets do not mind.
    places = _ranges(np.zeros(len(documents), int), parts * _PART)
    last = np.repeat(sizes - 1, parts * _PART)
    shingles = codes[np.repeat(bounds[:-1], parts * _PART) + np.minimum(places, last)]
    shingles = shingles.astype(np.uint32).reshape(-1, _PART)

    addresses = np.array([document.address for document in documents])
    ranks = np.array([clusters.rank(document, self.keep) for document in documents])
    first, last = np.searchsorted(decisions['address'], [addresses[0], addresses[-1] + 1])
    own = decisions[first:last]
    pairs = own[own['other'] != own['address']]
    members = clusters.unique(own[['address', 'slice']])
    owners = np.searchsorted(addresses, members['address'])
    found = np.zeros(len(pairs) + parts[owners].sum(), _EVIDENCE)
    sketches = found[len(pairs) :]
    found['address'][: len(pairs)], found['other'][: len(pairs)] = pairs['address'], pairs['other']
    found['key'][: len(pairs)] = tokens.mix(pairs['slice'])
    for name, column in (('address', members['address']), ('other', members['address']),
                         ('key', tokens.mix(members['slice'])), ('rank', ranks[owners])):
      sketches[name] = np.repeat(column, parts[owners])
    sketches['shingles'] = shingles[_ranges((np.cumsum(parts) - parts)[owners], parts[owners])]
    return found

  def _verified(self, records: np.ndarray) -> np.ndarray:
    """Returns the pairs of one partition that reach the threshold."""
    is_pair = records['address'] != records['other']
    pairs, sketches = records[is_pair], records[~is_pair]
    addresses, places = np.unique(sketches['address'], return_inverse=True)
    ranks = np.zeros(len(addresses), np.int64)
    ranks[places] = sketches['rank']
    codes = _codes(places[:, None], sketches['shingles'])
    bounds = _bounds(codes, len(addresses))
    ends = np.searchsorted(addresses, [pairs['address'], pairs['other']])
    sizes = np.diff(bounds)[ends].sum(axis=0)
    similar = [
        similarities(codes.astype(np.uint32), bounds, ends[:, at]) >= self.threshold
        for at in tokens.batches(sizes.tolist(), _AT_ONCE)
    ]
    similar = np.concatenate(similar or [np.zeros(0, bool)])
    found = np.empty(np.count_nonzero(similar), _VERIFIED)
    found['address'], found['other'] = addresses[ends[:, similar]]
    found['rank'], found['other_rank'] = ranks[ends[:, similar]]
    return found


def similarities(values: np.ndarray, bounds: np.ndarray, pairs: np.ndarray) -> np.ndarray:
  """Returns the Jaccard similarity of pairs of sets of uint32.

  That of sets of SKETCH numbers, which are the least of a larger set, is estimated by those numbers
  that are among the least of both (Cohen and Kaplan 2007): standard deviation 0.013.

  Args:
    values: the numbers of set i, sorted, are values[bounds[i]:bounds[i + 1]].
    bounds: one more than there are sets.
    pairs: (2, pairs) numbers of sets.
  """
  sizes = np.diff(bounds)
  largest = np.full(len(sizes), np.iinfo(np.uint32).max, np.uint32)
  largest[sizes >= SKETCH] = values[bounds[1:][sizes >= SKETCH] - 1]
  limits = largest[pairs].min(axis=0)
  counts = sizes[pairs.ravel()]
  owners = np.repeat(np.tile(np.arange(pairs.shape[1]), 2), counts)
  members = values[_ranges(bounds[pairs.ravel()], counts)]
  counted = members <= limits[owners]
  owners, members = owners[counted], members[counted]
  union = np.bincount(
      (_codes(owners, members) >> _WORD).astype(np.int64), minlength=pairs.shape[1]
  )
  both = np.bincount(owners, minlength=pairs.shape[1])
  return (both - union) / union


def _codes(owners: np.ndarray, values: np.ndarray) -> np.ndarray:
  """Returns owner << 32 | value, sorted, each once."""
  codes = np.sort(((owners.astype(np.uint64) << _WORD) | values).ravel())
  return codes[np.append(True, codes[1:] != codes[:-1])[: len(codes)]]


def _bounds(codes: np.ndarray, owners: int) -> np.ndarray:
  """Returns where the codes of each owner begin, and the end."""
  return np.searchsorted(codes, np.arange(owners + 1, dtype=np.uint64) << _WORD)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Returns start, start + 1, ... of each range, `count` numbers of it."""
  return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


def _batches(documents: Sequence[Document]) -> Iterator[slice]:
  return tokens.batches([len(document.text) for document in documents], tokens.PIECE)


@functools.lru_cache(maxsize=4)
def _factors(count: int) -> np.ndarray:
  """Returns odd numbers of 32 bits: each orders all numbers of 32 bits in another way."""
  return tokens.mix(np.arange(1, count + 1, dtype=np.uint64)).astype(np.uint32) | np.uint32(1)


def _pairs(records: np.ndarray) -> np.ndarray:
  """Returns pairs of those who agree in a band, the lower address first; linear in their number."""
  found, groups = clusters.alike(records, ('key',))
  parts = []
  for distance in range(1, 1 + _NEIGHBOURS):
    agree = groups[distance:] == groups[:-distance]
    pairs = np.empty(np.count_nonzero(agree), _PAIR)
    pairs['address'] = found['address'][:-distance][agree]
    pairs['other'] = found['address'][distance:][agree]
    parts.append(pairs)
  return clusters.unique(np.concatenate(parts))
