"""`lm corpus classifier`: trains a classifier of documents, by which a corpus is filtered.

    lm corpus classifier --positive='good/*.jsonl' --negative='bad/**/*.txt' --out=good.npz
    lm corpus classifier --labelled='tweets.jsonl' --out=toxic.npz

What documents of --positive are like has the score that `classifier.Classifier` goes by. --labelled
has any number of labels: each line is {"text": ..., "label": ...}, and the first label is the first
seen.
A tenth of the documents is held out; how well the classifier does on those is printed and saved.
"""
import argparse
from collections.abc import Iterator
import json
import pathlib
from typing import Any

from lm import config
from lm.corpus import classifier
from lm.corpus import collect
from lm.corpus.readers import streams
from lm.errors import UserError

GIN_FILE = 'gin/corpus/classifier.gin'


def execute(args: argparse.Namespace, bindings: list[tuple[str, str]]) -> dict[str, Any]:
  """Trains, saves, tells and returns the labels and metrics.

  Args:
    args: positive, negative, labelled (glob patterns, or None), out (path), gin_file.
    bindings: of `classifier.Config` and `classifier_features.Features`.

  Raises:
    UserError: the flags or the files are wrong.
  """
  both = args.positive is not None and args.negative is not None
  if args.out is None or (args.labelled is not None) == both:
    raise UserError('`lm corpus classifier` needs --out=FILE.npz and either --positive=FILES and '
                    '--negative=FILES, or --labelled=FILES')
  config.parse(args.gin_file or [GIN_FILE], bindings)
  settings = config.build(classifier.Config)
  if args.labelled is None:
    texts = {name: [document.text for document in collect.documents(patterns)]
             for name, patterns in (('positive', args.positive), ('negative', args.negative))}
  else:
    texts = {}
    for text, label in _labelled(args.labelled):
      texts.setdefault(label, []).append(text)
  model = classifier.train(settings, texts)
  out = pathlib.Path(args.out)
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    model.save(out)
  except OSError as error:
    raise UserError(f'--out={out} cannot be written ({error.strerror}); choose another file'
                    ) from error
  _tell(model, out)
  return {'labels': list(model.labels), 'path': str(out), **model.metrics}


def _tell(model: classifier.Model, out: pathlib.Path) -> None:
  measured = model.metrics
  auc = f', AUC {measured["auc"]:.4f}' if 'auc' in measured else ''
  print(f'{" / ".join(model.labels)}: trained on {measured["trained"]:,} documents; of '
        f'{measured["held_out"]:,} held out {measured["accuracy"]:.1%} right (always the same: '
        f'{measured["majority"]:.1%}), F1 {measured["f1"]:.4f}{auc}')
  print(f'model: {out}')


def _labelled(patterns: str) -> Iterator[tuple[str, str]]:
  """Yields (text, label) of each line of .jsonl files, which may be compressed."""
  for path in collect.paths(patterns):
    for number, line in enumerate(_lines(path), start=1):
      if not line.strip():
        continue
      try:
        record = json.loads(line)
        text, label = record['text'], record['label']
      except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'{path}:{number} is no {{"text": ..., "label": ...}} '
                        f'({type(error).__name__}: {error}); mend the line') from error
      if not isinstance(text, str) or not isinstance(label, str | int):
        raise UserError(f'{path}:{number} has a "text" or a "label" that is no string; mend the '
                        'line')
      yield text, str(label)


def _lines(path: str) -> Iterator[bytes]:
  tail = b''
  try:
    for chunk in streams.chunks(path):
      if isinstance(chunk, streams.Gap):
        raise UserError(f'{path} is damaged ({chunk.reason}); copy or download it again')
      *lines, tail = (tail + chunk).split(b'\n')
      yield from lines
  except OSError as error:
    raise UserError(f'{path} cannot be read ({error.strerror}); mend its permissions') from error
  yield tail
