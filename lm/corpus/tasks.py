"""The tasks of a corpus and the order in which they are done, by whatever executor.

A task is a pure function from files to files, so it may be done on any machine that sees them, and
again. Its product appears whole, and a product that stands is not made again: whatever ends the
process, the same command goes on. In the directory of the work lie

    0-<digest>/                a segment, named by all that makes it what it is
      <group>.split            a group of files was split to its end: into how many blocks, faults
      <block>.docs             documents kept; <block>.removed passports of the others
      <block>.done             counts; written last, so a block that has it is done
      <block>.poison           documents that ended a process
      <block>.keys-<round>     records of the grouping that ends the segment, sorted by key
      resolved-<round>-...     what followed from a partition of them
      decisions-<round>.npy    what followed from all; of the last round: decisions.npy
      <block>.kept             in the last segment: passports
      shards-<digest>/         there too: the shards until all are written, what is known of each
      complete.json            the blocks of the segment; written when all is done
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lm.corpus import collect
from lm.corpus import files
from lm.corpus import passports
from lm.corpus import steps
from lm.corpus import summary
from lm.corpus import write
from lm.corpus.document import Document
from lm.corpus.stage import Grouping

GROUP_BITS = 20  # Of a block's number, the blocks of one group of files.
_PARTITION_BYTES = 128 << 20


class Executor(Protocol):
  """Does tasks; each is also a source of tasks: of itself."""

  workers: int

  def run(self, sources: Sequence[Any], name: str) -> None:
    """Does all of `source.tasks()` of all sources, in any order; `name` is for who waits."""


def name_of(block: int) -> str:
  """Returns the name of a block's files; names are in the order of the input."""
  return f'{block:011x}'


def is_done(directory: Path, block: int) -> bool:
  """Says whether a block went through the segment of this directory."""
  return (directory / f'{name_of(block)}.done').exists()


def counts(directory: Path, block: int) -> dict[str, Any]:
  """Returns what was counted of a block in the segment of this directory."""
  return files.read_json(directory / f'{name_of(block)}.done')


def split_faults(directory: Path) -> Iterator[tuple[str, str]]:
  """Yields (name, reason) of what was wrong when the files were split, in their order."""
  for path in sorted(directory.glob('*.split')):
    yield from files.read_json(path)['faults']


def discard(directory: Path, blocks: Sequence[int]) -> None:
  """Deletes of a segment what only the next one, now complete, had use for."""
  for number in blocks:
    (directory / f'{name_of(number)}.docs').unlink(missing_ok=True)
  for pattern in ('*.keys-*', 'resolved-*', 'decisions*'):
    for path in directory.glob(pattern):
      path.unlink()


class _Task:
  """What all tasks share."""

  def tasks(self) -> Iterator[Any]:
    """Yields itself: a task is a source of one."""
    yield self

  def poison(self, place: int, index: int, reason: str) -> None:
    """Ends the work: it has no document to blame."""
    raise RuntimeError(f'{self} cannot be done: {reason}')


@dataclasses.dataclass(frozen=True)
class Advance(_Task):
  """Takes one block through a segment.

  Attributes:
    segment: which.
    directory: of its products.
    number: of the block.
    block: the input; None where the segment before left it in `before`.
    before: directory of that segment.
    weights: of the sources, by which the last segment multiplies documents.
  """

  segment: steps.Segment
  directory: Path
  number: int
  block: collect.Block | None
  before: Path | None
  weights: Mapping[str, float]

  def _file(self, suffix: str) -> Path:
    return self.directory / f'{name_of(self.number)}.{suffix}'

  def poison(self, place: int, index: int, reason: str) -> None:
    """Adds to the file that a later start reads too."""
    if index < 0:
      raise RuntimeError(f'block {self.number} ended its process outside any document: {reason}')
    poisoned = files.read_json(self._file('poison')) or []
    files.write_json(self._file('poison'), [*poisoned, [place, index, reason]])

  def run(self, watch: steps.Watch) -> None:
    """Leaves the block's documents, records, passports and counts."""
    counted = summary.Summary()
    poisoned = [tuple(row) for row in files.read_json(self._file('poison')) or []]
    decisions = None
    if self.block is not None:
      documents = steps.read(self.block, self.number, poisoned, watch, counted.add_fault)
      for document in documents:
        counted.add_input(document)
    else:
      assert self.before is not None
      documents = steps.unpack((self.before / f'{name_of(self.number)}.docs').read_bytes())
      decisions = steps.slices(np.load(self.before / 'decisions.npy', mmap_mode='r'), self.number)
    advanced = steps.advance(self.segment, documents, decisions, poisoned, watch)
    watch(self.segment.first + len(self.segment.stages), -1)
    for name, reason in advanced.faults:
      counted.add_fault(name, reason)
    for document in advanced.removed:
      counted.add_removed(document)
    passports.write(self._file('removed'), advanced.removed)
    kept = advanced.kept
    if self.segment.after is not None:
      files.write_array(self._file('keys-0'), steps.emit(self.segment.after, kept, None))
    else:
      kept = self._written(kept, counted)
      passports.write(self._file('kept'), kept)
    files.write(self._file('docs'), steps.pack(kept))
    files.write_json(self._file('done'), {
        'bytes': sum(len(document.text.encode('utf-8', 'replace')) for document in kept),
        'summary': counted.to_json(),
        'costs': [[place, *dataclasses.astuple(cost)] for place, cost in advanced.costs.items()]})

  def _written(self, kept: list[Document], counted: summary.Summary) -> list[Document]:
    """Counts what came through all stages, and returns it as often as its source's weight says."""
    written = []
    for document in kept:
      copies = write.copies(document.name, self.weights[document.source])
      counted.add_kept(document)
      counted.add_written(document, copies)
      written += [document] * copies
    return written


@dataclasses.dataclass(frozen=True)
class Emit(_Task):
  """Makes the records of one block in a later round of a grouping."""

  grouping: Grouping
  directory: Path
  number: int
  round: int

  def run(self, watch: steps.Watch) -> None:
    """Leaves the records."""
    del watch
    documents = steps.unpack((self.directory / f'{name_of(self.number)}.docs').read_bytes())
    known = np.load(self.directory / f'decisions-{self.round - 1}.npy', mmap_mode='r')
    records = steps.emit(self.grouping, documents, steps.slices(known, self.number))
    files.write_array(self.directory / f'{name_of(self.number)}.keys-{self.round}', records)


@dataclasses.dataclass(frozen=True)
class Resolve(_Task):
  """Resolves one partition of a grouping's records."""

  grouping: Grouping
  directory: Path
  blocks: Path  # holds the numbers of the blocks
  round: int
  part: int
  bits: int

  def run(self, watch: steps.Watch) -> None:
    """Leaves what follows from the partition."""
    del watch
    parts = []
    for number in np.load(self.blocks).tolist():
      path = self.directory / f'{name_of(number)}.keys-{self.round}'
      records = steps.partition(np.load(path, mmap_mode='r'), self.part, self.bits)
      parts.append(np.array(records))
    files.write_array(self.directory / f'resolved-{self.round}-{self.bits}-{self.part:05d}.npy',
                      self.grouping.resolve(np.concatenate(parts)))


@dataclasses.dataclass(frozen=True)
class Split:
  """A source of tasks: the blocks of one group of files that are not done."""

  segment: steps.Segment
  directory: Path
  group: collect.FileGroup
  place: int  # of the group in the input
  weights: Mapping[str, float]

  def tasks(self) -> Iterator[Advance]:
    """Splits the files and draws the tasks; remembers when it came to their end."""
    first, path = self.place << GROUP_BITS, self.directory / f'{self.place:06x}.split'
    split = files.read_json(path)
    if split is not None and all(is_done(self.directory, number)
                                 for number in range(first, first + split['blocks'])):
      return
    faults: list[tuple[str, str]] = []
    number = first
    for block in collect.split(self.group, lambda name, reason: faults.append((name, reason))):
      if not is_done(self.directory, number):
        yield Advance(self.segment, self.directory, number, block, None, self.weights)
      number += 1
    files.write_json(path, {'blocks': number - first, 'faults': faults})


def advance(segment: steps.Segment, directory: Path, sources: Sequence[Any], executor: Executor
            ) -> list[int]:
  """Takes all blocks through a segment and decides for the next; returns the blocks' numbers.

  Args:
    segment: which.
    directory: of its products.
    sources: of its tasks; those that are done are left out here.
    executor: does them.
  """
  complete = directory / 'complete.json'
  if (numbers := files.read_json(complete)) is not None:
    return numbers
  directory.mkdir(parents=True, exist_ok=True)
  names = [type(stage).__name__ for stage in (segment.before, *segment.stages) if stage]
  executor.run(sources, ', '.join(names) or 'reading')
  numbers = sorted(int(path.stem, 16) for path in directory.glob('*.done'))
  if segment.after is not None:
    _group(segment.after, directory, numbers, executor)
  files.write_json(complete, numbers)
  return numbers


def _group(grouping: Grouping, directory: Path, numbers: Sequence[int], executor: Executor) -> None:
  """Leaves the decisions of a grouping in decisions.npy."""
  title = type(grouping).__name__
  blocks = directory / 'blocks.npy'
  files.write_array(blocks, np.array(numbers, np.int64))
  for round_ in range(grouping.rounds):
    last = round_ == grouping.rounds - 1
    decided = directory / ('decisions.npy' if last else f'decisions-{round_}.npy')
    if decided.exists():
      continue
    keys = [directory / f'{name_of(number)}.keys-{round_}' for number in numbers]
    executor.run([Emit(grouping, directory, number, round_)
                  for number, path in zip(numbers, keys) if not path.exists()], f'{title}: records')
    size = sum(path.stat().st_size for path in keys)
    bits = max((2 * executor.workers - 1).bit_length(),
               math.ceil(math.log2(size / _PARTITION_BYTES + 1)))
    parts = [directory / f'resolved-{round_}-{bits}-{part:05d}.npy' for part in range(1 << bits)]
    executor.run([Resolve(grouping, directory, blocks, round_, part, bits)
                  for part, path in enumerate(parts) if not path.exists()], f'{title}: groups')
    files.write_array(decided, grouping.conclude(np.concatenate([np.load(path) for path in parts])))


@dataclasses.dataclass(frozen=True)
class Shard(_Task):
  """Writes one shard of the corpus and the passports of its blocks.

  Attributes:
    writer: of which form.
    directory: of its products: data/, passports/ and what is known of each shard.
    name: of the corpus.
    index: of the shard.
    count: of shards.
    blocks: their numbers, in order.
    directories: of all segments, in order.
  """

  writer: write.Writer
  directory: Path
  name: str
  index: int
  count: int
  blocks: tuple[int, ...]
  directories: tuple[Path, ...]

  @property
  def info(self) -> Path:
    """What is known of the shard; a shard that has it is whole."""
    return self.directory / f'shard-{self.index:05d}-of-{self.count:05d}.json'

  def run(self, watch: steps.Watch) -> None:
    """Leaves the shard, its two files of passports, and what is known of it."""
    del watch
    names = [name_of(number) for number in self.blocks]
    documents = (document for name in names
                 for document in steps.unpack((self.directories[-1] / f'{name}.docs').read_bytes()))
    shard = self.writer.write(
        write.stem(self.directory / 'data', self.name, self.index, self.count), documents)
    merged = lambda kind: Path(
        write.stem(self.directory / 'passports', kind, self.index, self.count) + '.parquet')
    passports.merge([self.directories[-1] / f'{name}.kept' for name in names], merged('kept'),
                    shard.file)
    passports.merge([directory / f'{name}.removed' for name in names
                     for directory in self.directories], merged('removed'))
    files.write_json(self.info, dataclasses.asdict(shard))
