"""`lm corpus`: raw documents to clean, deduplicated, documented text.

    lm corpus --gin_file=gin/corpus/web.gin --run_dir=corpora/web --gin.FILES="'crawl/*.warc.gz'"
    lm corpus --run_dir=corpora/web                  # goes on where it was ended
    lm corpus ... --runner=FlinkRunner --flink_master=HOST:8081
    lm corpus why --run_dir=runs/web --step=100 --index=3
    lm corpus classifier --positive='good/*.jsonl' --negative='bad/*.jsonl' --out=good.npz

The second argument is what to do: make a corpus (nothing said), tell where an example of a training
batch comes from, or train a classifier that a corpus filters by.
"""
import argparse
import os
import pathlib
from typing import Any

from lm import config
from lm.corpus import beam
from lm.corpus import pipeline
from lm.corpus import workers
from lm.errors import UserError


def execute(args: argparse.Namespace, bindings: list[tuple[str, str]]) -> dict[str, Any]:
  """Does what `args.what` says and returns what --json holds.

  Raises:
    UserError: the config, the input or the flags are wrong.
  """
  if args.flags and args.what != 'make':
    raise UserError(f'{args.flags[0]} is no flag of `lm corpus {args.what}`; see `lm corpus '
                    '--help`')
  if args.what == 'why':
    from lm.commands import corpus_why
    return corpus_why.execute(args, bindings)
  if args.what == 'classifier':
    from lm.commands import corpus_classifier
    return corpus_classifier.execute(args, bindings)
  if args.run_dir is None:
    raise UserError('`lm corpus` needs --run_dir=DIR, where the corpus is or shall be')
  config.read(args.gin_file, bindings, args.run_dir)
  corpus = config.build(pipeline.Corpus)
  run_dir = pathlib.Path(args.run_dir)
  if not (run_dir / 'corpus.json').exists():
    config.save(run_dir / 'config.gin')
  with _executor(args, corpus) as executor:
    result = pipeline.build(corpus, run_dir, config.text(), executor)
  _tell(result, run_dir)
  return result


def _executor(args: argparse.Namespace, corpus: pipeline.Corpus) -> Any:
  processes = args.workers or len(os.sched_getaffinity(0))
  if args.flags:
    return beam.Beam(tuple(args.flags), processes)
  return workers.Processes(processes, corpus.document_seconds, corpus.worker_bytes, progress=True)


def _tell(result: dict[str, Any], run_dir: pathlib.Path) -> None:
  """Prints what came of the corpus."""
  collected = sum(documents for documents, _ in result['collected'].values())
  kept = sum(documents for documents, _ in result['kept'].values())
  size = sum(written for *_, written in result['written'].values())
  print(f'collected {collected:,} documents, kept {kept:,} ({kept / max(collected, 1):.1%}): '
        f'{size:,} bytes of text in {len(result["shards"])} shards')
  removed = sorted(result['removed'].items(), key=lambda item: -item[1][0])
  for rule, (documents, _) in removed[:8]:
    print(f'  {documents:>9,} removed by {rule}')
  if len(removed) > 8:
    print(f'  {sum(documents for _, (documents, _) in removed[8:]):>9,} removed by '
          f'{len(removed) - 8} other rules')
  for kind, (count,) in sorted(result['faults'].items()):
    print(f'  {count:>9,} passed over: {kind}')
  print(f'card: {run_dir / "card.html"}')
