"""Does the tasks of a corpus with Apache Beam, on any of its runners.

The machines share the file system on which the run directory lies. A task reads and writes whole
files there, so what a runner must do is to spread tasks and to do again what failed; the shuffles
of deduplication go through the files. Who watches single documents is the runner: one that hangs is
not named, and its bundle is tried again by the runner's own rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any, Self

from lm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Beam:
  """The executor of a cluster.

  Attributes:
    flags: of the runner, as on Beam's own command lines: ('--runner=FlinkRunner', ...).
    workers: about how many, for the number of partitions; no limit.
  """

  flags: tuple[str, ...]
  workers: int

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    pass

  def run(self, sources: Sequence[Any], name: str) -> None:
    """Does all of `source.tasks()` of all sources, in any order.

    Raises:
      UserError: Beam is not installed, or it does not know the flags.
    """
    try:
      import apache_beam as beam
      from apache_beam.options import pipeline_options
    except ImportError as error:
      raise UserError(f'the flags {" ".join(self.flags)} need Apache Beam, which is not installed:'
                      " pip install 'lm[beam]', or leave them out.") from error
    if not sources:
      return
    options = pipeline_options.PipelineOptions(list(self.flags))
    unknown = [flag for flag in self.flags
               if flag.removeprefix('--').partition('=')[0] not in options.get_all_options()]
    if unknown:
      raise UserError(f'{unknown[0]} is neither a flag of `lm corpus` nor one of Beam\'s; see `lm '
                      'corpus --help`, and write bindings as --gin.NAME=VALUE.')
    with beam.Pipeline(options=options) as pipeline:
      drawn = (pipeline
               | f'{name}: sources' >> beam.Create(list(sources))
               | f'{name}: spread sources' >> beam.Reshuffle()
               | f'{name}: draw' >> beam.FlatMap(_draw)
               | f'{name}: spread' >> beam.Reshuffle())
      drawn | name >> beam.Map(_do)  # pylint: disable=expression-not-assigned


def _draw(source: Any) -> Iterator[Any]:
  yield from source.tasks()


def _do(task: Any) -> None:
  task.run(lambda place, index: None)
