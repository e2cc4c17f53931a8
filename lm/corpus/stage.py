"""What a stage of the corpus is: something done to each document, or to all of them together.

A stage is a frozen dataclass of plain values, bound by gin. So it can be sent to another process,
and its `repr` says what it does: with the digest of its source file it decides whether work that
stands may be used again. What is heavy (a model, a list) is opened once a process, on first use: by
`functools.cached_property`.

The name of a rule is `stage.rule`, as in 'gopher.word_count'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any

import numpy as np

from lm.corpus.document import Document


class Stage:
  """Something done to each document by itself."""

  def __getstate__(self) -> dict[str, Any]:
    """Returns its fields, without what was opened: another process opens that for itself."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

  def apply(self, document: Document) -> None:
    """Changes the document: its text, its verdicts, or `document.remove(rule)`.

    It may raise: the document is then removed as a fault, counted and named in the report, and the
    others go on. It must not depend on any other document, nor on time or chance.
    """
    raise TypeError(f'{type(self).__name__} does not say what it does to a document.')

  def apply_all(self, documents: Sequence[Document]) -> Iterator[int]:
    """Applies it to the documents that are kept, and yields the index of each before it begins.

    A worker reports the index to who watches it, so that a document that hangs or ends the process
    is known. Overridden where several documents are faster together.
    """
    for index, document in enumerate(documents):
      yield index
      self.apply(document)


class Grouping:
  """A stage that needs all documents: it sends records to where those of one key meet.

  It runs in rounds. In each, `emit` makes records of a block's documents; records are brought
  together by the leading `partition_bits` of their `key`; `resolve` sees all records of a partition
  and says what follows from them; `conclude` sees what followed in all partitions and decides, by
  document. Decisions go to the next round's `emit`, and after the last to `carry_out`.

  All arrays are structured. Those of `emit` have a field 'key' (uint64, well mixed: a hash); those
  of `conclude` have a field 'address' (int64, of the document) by which they are sorted.
  """

  partition_bits: int = 4
  rounds: int = 1

  def emit(self, documents: Sequence[Document], decisions: np.ndarray | None) -> np.ndarray:
    """Returns the records of the documents of one block.

    Args:
      documents: those of the block that are kept, each with its `address`.
      decisions: of the round before, about these documents; None in the first.
    """
    raise TypeError(f'{type(self).__name__} emits nothing.')

  def resolve(self, records: np.ndarray) -> np.ndarray:
    """Returns what follows from all records of one partition, in input order or any other."""
    raise TypeError(f'{type(self).__name__} resolves nothing.')

  def conclude(self, resolved: np.ndarray) -> np.ndarray:
    """Returns decisions sorted by 'address', given what followed in all partitions."""
    return resolved[np.argsort(resolved['address'], kind='stable')]

  def carry_out(self, document: Document, decisions: np.ndarray) -> None:
    """Changes the document by the decisions about it (at least one): like `Stage.apply`."""
    raise TypeError(f'{type(self).__name__} carries out nothing.')
