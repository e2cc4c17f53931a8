"""A grouping on documents that all lie in memory: what the executor does, without files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.corpus.document import Document
from lm.corpus.stage import Grouping


def run(
    grouping: Grouping, documents: Sequence[Document], block: int = 1024, bits: int = 2
) -> None:
  """Changes those documents that are kept so far, as the grouping decides.

  Args:
    grouping: for instance `deduplicate.Exact()`.
    documents: in the order of the input; their addresses become their places in it.
    block: documents of a block.
    bits: leading ones of the keys that tell partitions apart.
  """
  for address, document in enumerate(documents):
    document.address = address
  kept = [document for document in documents if not document.removed_by]
  blocks = [kept[at : at + block] for at in range(0, len(kept), block)]
  decisions = None
  for _ in range(grouping.rounds if blocks else 0):
    emitted = [grouping.emit(some, _about(some, decisions)) for some in blocks]
    records = np.concatenate(emitted)
    partition = records['key'] >> np.uint64(64 - bits)
    order = np.argsort(partition, kind='stable')
    numbers = np.arange(1, 1 << bits, dtype=np.uint64)
    bounds = np.searchsorted(partition[order], numbers)
    resolved = [grouping.resolve(some) for some in np.split(records[order], bounds)]
    decisions = grouping.conclude(np.concatenate(resolved))
  for document in kept:
    if len(about := _about([document], decisions)):
      grouping.carry_out(document, about)


def _about(documents: Sequence[Document], decisions: np.ndarray | None) -> np.ndarray | None:
  """Returns the decisions about documents that follow one another."""
  if decisions is None:
    return None
  limits = [documents[0].address, documents[-1].address + 1]
  return decisions[slice(*np.searchsorted(decisions['address'], limits))]
