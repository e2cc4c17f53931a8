"""The steps of a corpus as pure functions of documents: what a worker does, whoever runs it.

The stages of a corpus are cut at its groupings into segments. A segment carries out what the
grouping before it decided, applies its stages, and emits the records of the grouping that ends it:

    read, apply..., emit | resolve, conclude | carry out, apply..., emit | ... | carry out, apply...

`local.py` runs the steps in processes on one machine, `beam.py` as a pipeline of Apache Beam.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
import dataclasses
import time

import numpy as np

from lm.corpus import collect
from lm.corpus.document import ADDRESS_BITS, Document
from lm.corpus.stage import Grouping, Stage
from lm.errors import UserError

_FIELDS = [field.name for field in dataclasses.fields(Document)]
_INDEX = (1 << ADDRESS_BITS) - 1
# (place of the stage in the corpus, index of the document in its block): before each begins.
Watch = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Segment:
  """Stages between two groupings.

  Attributes:
    first: place of its first stage in the corpus.
    before: the grouping whose decisions it carries out, at place `first - 1`; None at the start.
    stages: applied in order.
    after: the grouping that ends it; None at the end.
  """

  first: int
  before: Grouping | None
  stages: tuple[Stage, ...]
  after: Grouping | None


@dataclasses.dataclass
class Cost:
  """What a stage did in one block: documents, bytes of text, seconds of processor time."""

  documents: int = 0
  size: int = 0
  seconds: float = 0.0

  def add(self, other: Cost) -> None:
    """Adds another block's."""
    self.documents += other.documents
    self.size += other.size
    self.seconds += other.seconds


@dataclasses.dataclass
class Advanced:
  """What a segment made of a block.

  Attributes:
    kept: documents, in input order.
    removed: by a rule or a fault, in the order in which that happened.
    faults: (name of the document, reason).
    costs: of each stage, by its place in the corpus.
  """

  kept: list[Document]
  removed: list[Document] = dataclasses.field(default_factory=list)
  faults: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  costs: dict[int, Cost] = dataclasses.field(default_factory=dict)


def segments(stages: Sequence[Stage | Grouping]) -> list[Segment]:
  """Cuts the stages of a corpus at its groupings."""
  cut = [index for index, stage in enumerate(stages) if isinstance(stage, Grouping)]
  result = []
  for start, end in zip([-1, *cut], [*cut, len(stages)]):
    result.append(Segment(start + 1, stages[start] if start >= 0 else None,
                          tuple(stages[start + 1:end]), stages[end] if end < len(stages) else None))
  return result


def read(block: collect.Block, number: int, poisoned: Collection[tuple[int, int, str]],
         watch: Watch, report: Callable[[str, str], None]) -> list[Document]:
  """Reads the documents of a block and gives them their addresses.

  Args:
    block: a part of the input.
    number: of the block, in the order of the input.
    poisoned: as in `advance`; at place -1 the index is that of a piece of the block on which
      reading ended a process, and which is passed over and reported.
    watch: as in `advance`, with the pieces at place -1.
    report: is told the name and the reason of what is skipped.

  Raises:
    OverflowError: the block has more documents than an address can count.
  """
  reasons = {index: reason for place, index, reason in poisoned if place == -1}
  documents: list[Document] = []
  for index, piece in enumerate(block.pieces):
    if index in reasons:
      report(piece.file.name, reasons[index])
      continue
    watch(-1, index)
    for document in collect.read(dataclasses.replace(block, pieces=(piece,)), report):
      document.address = number << ADDRESS_BITS | len(documents)
      documents.append(document)
  if len(documents) > _INDEX:
    raise OverflowError(f'block {number} has {len(documents)} documents, more than the {_INDEX} '
                        'that addresses count')
  return documents


def advance(segment: Segment, documents: list[Document], decisions: np.ndarray | None,
            poisoned: Collection[tuple[int, int, str]] = (),
            watch: Watch = lambda place, index: None) -> Advanced:
  """Takes a block's documents through a segment.

  Args:
    segment: which.
    documents: of the block, kept so far; changed in place.
    decisions: of the grouping before, about these documents.
    poisoned: (place of a stage, index of a document, reason): it ended or blocked a process there
      and is removed instead.
    watch: called before each document of each stage.
  """
  result = Advanced(documents)
  if segment.before is not None:
    assert decisions is not None
    _run(result, segment.first - 1, _carrying(segment.before, decisions), poisoned, watch)
  for place, stage in enumerate(segment.stages, start=segment.first):
    _run(result, place, stage.apply_all, poisoned, watch)
  return result


def _carrying(grouping: Grouping, decisions: np.ndarray
              ) -> Callable[[Sequence[Document]], Iterator[int]]:
  """Returns what carries decisions out, in the form of `Stage.apply_all`."""

  def apply_all(documents: Sequence[Document]) -> Iterator[int]:
    addresses = np.array([document.address for document in documents], np.int64)
    starts = np.searchsorted(decisions['address'], addresses, 'left')
    ends = np.searchsorted(decisions['address'], addresses, 'right')
    for index in np.flatnonzero(ends > starts).tolist():
      yield index
      grouping.carry_out(documents[index], decisions[starts[index]:ends[index]])

  return apply_all


def _run(result: Advanced, place: int, apply_all: Callable[[Sequence[Document]], Iterator[int]],
         poisoned: Collection[tuple[int, int, str]], watch: Watch) -> None:
  """Applies one stage to the kept documents, and parts them; a fault removes its document alone."""
  reasons = {index: reason for at, index, reason in poisoned if at == place}
  documents = []
  for document in result.kept:
    if (document.address & _INDEX) in reasons:
      _fail(result, document, reasons[document.address & _INDEX])
    else:
      documents.append(document)
  cost = Cost(len(documents), sum(len(document.raw or document.text) for document in documents))
  started = time.process_time()
  begun = 0
  while begun < len(documents):
    index = begun
    try:
      for offset in apply_all(documents[begun:]):
        index = begun + offset
        watch(place, documents[index].address & _INDEX)
      break
    except UserError:  # Of the user, as a file that is not there; not of the document.
      raise
    except Exception as error:  # pylint: disable=broad-except  # Of any library, on hostile input.
      _fail(result, documents[index], f'{type(error).__name__}: {error}'[:300])
      begun = index + 1
  cost.seconds = time.process_time() - started
  result.costs[place] = cost
  result.removed += [document for document in documents
                     if document.removed_by and not document.removed_by.startswith('fault.')]
  result.kept = [document for document in documents if not document.removed_by]


def _fail(result: Advanced, document: Document, reason: str) -> None:
  document.remove('fault.' + reason.partition(':')[0])
  document.verdicts['fault'] = reason
  result.faults.append((document.name, reason))
  result.removed.append(document)


def emit(grouping: Grouping, documents: Sequence[Document], decisions: np.ndarray | None
         ) -> np.ndarray:
  """Returns the grouping's records of a block, sorted by key."""
  records = grouping.emit(documents, decisions)
  return records[np.argsort(records['key'], kind='stable')]


def partition(records: np.ndarray, part: int, bits: int) -> np.ndarray:
  """Returns those of sorted records whose key has `part` as its leading bits."""
  if not bits:
    return records
  ends = np.array([part << (64 - bits), ((part + 1) << (64 - bits)) - 1], np.uint64)
  first = np.searchsorted(records['key'], ends[0], 'left')
  return records[first:np.searchsorted(records['key'], ends[1], 'right')]


def slices(decisions: np.ndarray, block: int) -> np.ndarray:
  """Returns the decisions about the documents of a block."""
  first, last = np.searchsorted(
      decisions['address'], [block << ADDRESS_BITS, (block + 1) << ADDRESS_BITS])
  return decisions[first:last]


def pack(documents: Sequence[Document]) -> bytes:
  """Serialises documents; the same documents give the same bytes."""
  import msgpack
  import zstandard
  rows = [[getattr(document, field) for field in _FIELDS] for document in documents]
  return zstandard.ZstdCompressor(level=1).compress(
      msgpack.packb(rows, unicode_errors='surrogatepass', default=_plain))


def unpack(data: bytes) -> list[Document]:
  """Reads what `pack` wrote."""
  import msgpack
  import zstandard
  rows = msgpack.unpackb(zstandard.ZstdDecompressor().decompress(data), strict_map_key=False,
                         unicode_errors='surrogatepass')
  return [Document(*row) for row in rows]


def _plain(value: object) -> object:
  """Makes a plain value of numpy's, which verdicts may hold."""
  if isinstance(value, (np.generic, np.ndarray)):
    return value.tolist()
  raise TypeError(f'a verdict is of type {type(value).__name__}: make it a number, text or list')
