"""Which documents stand for one another: equal records, linked pairs, and who is kept."""

from __future__ import annotations

import hashlib

import numpy as np

from lm.corpus.document import Document
from lm.errors import UserError

# Of each document that has a duplicate: the address of the document that is kept of its cluster.
CLUSTERS = np.dtype([('address', np.int64), ('cluster', np.int64)])
KEEP = ('first', 'longest')


def check_keep(keep: str) -> None:
  """Raises UserError if it is no rule of which document of a cluster is kept."""
  if keep not in KEEP:
    raise UserError(f'keep={keep!r} is no rule of which document is kept; give one of {KEEP}.')


def rank(document: Document, keep: str) -> int:
  """Returns a number that is lowest for the document to keep; the first of the lowest is kept."""
  return -len(document.raw or document.text) if keep == 'longest' else 0


def digest(text: str, size: int) -> bytes:
  """Returns the BLAKE2b hash, `size` bytes, of a text without the white space around it."""
  data = text.strip().encode('utf-8', 'surrogatepass')
  return hashlib.blake2b(data, digest_size=size).digest()


def alike(records: np.ndarray, fields: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Returns those records whose `fields` are found more than once, group by group, and the groups.

  Args:
    records: any number, in any order.
    fields: 'key' first; by those behind it records of one key are told apart.

  Returns:
    The records sorted by `fields`, then by the other fields; and the number of each one's group.
  """
  order = np.argsort(records['key'])
  key = records['key'][order]
  equal = key[1:] == key[:-1]
  repeated = np.zeros(len(key), bool)
  repeated[1:] = equal
  repeated[:-1] |= equal
  found = records[order[repeated]]  # Few: only these are sorted by all that they hold.
  others = [name for name in found.dtype.names if name not in fields]
  found = found[np.lexsort([found[name] for name in (*fields, *others)[::-1]])]
  new = np.ones(len(found), bool)
  if len(found):
    new[1:] = np.logical_or.reduce([found[name][1:] != found[name][:-1] for name in fields])
  groups = np.cumsum(new) - 1
  several = np.bincount(groups)[groups] > 1 if len(found) else np.zeros(0, bool)
  found, new = found[several], new[several]
  return found, np.cumsum(new) - 1


def unique(records: np.ndarray) -> np.ndarray:
  """Returns the records sorted by their fields, the first above all, each once."""
  records = records[np.lexsort([records[name] for name in records.dtype.names[::-1]])]
  return records[np.append(True, records[1:] != records[:-1])[: len(records)]]


def components(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the addresses in the pairs, sorted, and the least address that each is linked with.

  Args:
    pairs: with fields 'address' and 'other'.
  """
  from scipy.sparse import coo_matrix, csgraph

  ends = np.concatenate([pairs['address'], pairs['other']])
  addresses, places = np.unique(ends, return_inverse=True)
  one, other = places[: len(pairs)], places[len(pairs) :]
  shape = (len(addresses), len(addresses))
  graph = coo_matrix((np.ones(len(pairs), bool), (one, other)), shape=shape)
  count, labels = csgraph.connected_components(graph, directed=False)
  least = np.full(count, np.iinfo(np.int64).max)
  np.minimum.at(least, labels, addresses)
  return addresses, least[labels]


def representatives(groups: np.ndarray, ranks: np.ndarray, addresses: np.ndarray) -> np.ndarray:
  """Returns CLUSTERS: each document with the one of its group that is kept.

  Args:
    groups: of each document, any number.
    ranks: the lowest of a group is kept, then the lowest address.
    addresses: of each document.
  """
  order = np.lexsort([addresses, ranks, groups])
  groups, addresses = groups[order], addresses[order]
  first = np.ones(len(groups), bool)
  first[1:] = groups[1:] != groups[:-1]
  found = np.empty(len(groups), CLUSTERS)
  found['address'] = addresses
  found['cluster'] = addresses[first][np.cumsum(first) - 1]
  return found


def carry_out(document: Document, decisions: np.ndarray, stage: str) -> None:
  """Writes the document's cluster, and removes it if another document of that is kept."""
  document.cluster = int(decisions['cluster'][0])
  if document.cluster != document.address:
    document.verdicts[f'{stage}.duplicate_of'] = document.cluster
    document.remove(f'{stage}.duplicate')
