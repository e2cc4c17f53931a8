"""`lm tokenizer`: trains vocabularies of the task's text, and shows what each makes of it.

    lm tokenizer --gin_file=F --run_dir=R --sizes=2000,4000,8000,16000 --kinds=bpe,wordpiece

Each is a directory of R, such as R/bpe-8000, that other programs open (tokenizer.json, and
SentencePiece's tokenizer.model or WordPiece's vocab.txt), with a file that `lm train` takes as one
more --gin_file: R/bpe-8000/vocabulary.gin. What they make of text that is held out is compared in
R/tokenizer.html, .md and .json.
"""
import argparse
from collections.abc import Iterator
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

from lm import run
from lm.corpus.document import Document
from lm.data import splits, tasks, vocabularies, vocabulary_measures, vocabulary_training
from lm.errors import UserError
from lm.evaluation import report, tokenizer_report

HELD_OUT_BYTES = 2_000_000  # at most about so many are measured

BINDINGS = """\
# A vocabulary of `lm tokenizer`. To train with it: a --gin_file behind the others.
from __gin__ import dynamic_registration

from lm.data import vocabularies

VOCAB_SIZE = {size}

vocabularies.VocabularyConfig.kind = 'pretrained'
vocabularies.VocabularyConfig.path = {path!r}
vocabularies.VocabularyConfig.user_defined_symbols = ()
"""


def execute(args: argparse.Namespace, bindings: list[tuple[str, str]]) -> dict[str, Any]:
  """Trains, measures, writes, and returns what --json holds.

  Raises:
    UserError: the flags are wrong, the task is no text, or its text is too little.
  """
  if args.run_dir is None or not args.gin_file:
    raise UserError('`lm tokenizer` needs --gin_file=FILE, which names the text, and --run_dir=DIR,'
                    ' where the vocabularies shall be')
  directory = pathlib.Path(args.run_dir)
  if (directory / 'checkpoints').exists():
    raise UserError(f'--run_dir={directory} is the directory of a run; give vocabularies their own')
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(_unwritable(directory, error)) from error
  experiment = run.open_experiment(args.gin_file, bindings, None)
  task = experiment.task
  if not isinstance(task, tasks.TextTask):
    raise UserError('a mixture has no vocabulary of its own; train one on the files of its tasks '
                    'together: tasks.TextTask.files')
  configs = _configs(task.vocabulary, args.kinds, args.sizes)
  text = _read(task)
  rows = [row for config in configs for row in _rows(config, args.sizes, text, directory)]
  result = {
      'files': task.files, 'training_bytes': text.total_bytes, 'sample_bytes': text.sample_bytes,
      'd_model': getattr(experiment.model, 'd_model', None),
      'languages': {language: {'bytes': each.num_bytes, 'words': each.num_words,
                               'unspaced': each.unspaced}
                    for language, each in text.held_out.items()},
      'vocabularies': rows, 'largest': tokenizer_report.largest(rows)}
  report.write(directory / 'tokenizer.json', json.dumps(result, indent=1) + '\n')
  report.write(directory / 'tokenizer.md', tokenizer_report.markdown(result))
  page = report.write(directory / 'tokenizer.html', tokenizer_report.page(result))
  print(tokenizer_report.markdown(result), end='')
  print(f'report: {page}')
  return result | {'report': str(page)}


def _configs(given, kinds, sizes) -> list[vocabularies.VocabularyConfig]:
  """One of each kind; every kind at every size is checked before any work."""
  found = []
  for kind in dict.fromkeys(kinds or [given.kind]):
    path = given.path if kind == 'pretrained' else None
    symbols = given.user_defined_symbols if kind in vocabularies.TRAINED else ()
    found.append([dataclasses.replace(given, kind=kind, size=size, path=path,
                                      user_defined_symbols=symbols)
                  for size in sizes or [given.size]][0])
  return found


@dataclasses.dataclass(frozen=True)
class _Text:
  """What the vocabularies are trained on (`vocabulary_training.sample`), and measured on."""
  sentences: list[str]
  total_bytes: int
  held_out: dict[str, vocabulary_measures.Text]

  @property
  def sample_bytes(self) -> int:
    """Of the sentences."""
    return sum(len(sentence.encode()) for sentence in self.sentences)


def _read(task: tasks.TextTask) -> _Text:
  """Reads the task's documents, three times, for no more than the samples stay in memory."""
  fraction = task.held_out_fraction
  rule = splits.survey(splits.documents(task.files), fraction)
  split = lambda: splits.split(splits.documents(task.files), rule, fraction)
  sizes = {splits.TRAIN: 0, splits.VALIDATION: 0}
  for part, document in split():
    sizes[part] += len(document.text.encode())
  share = HELD_OUT_BYTES / max(sizes[splits.VALIDATION], 1)
  held_out = []

  def training() -> Iterator[Document]:
    for part, document in split():
      if part == splits.TRAIN:
        yield document
      elif not held_out or splits.position(f'measured {document.name}') < share:
        held_out.append(document)
  limit = task.vocabulary.max_training_bytes
  sentences = list(vocabulary_training.sample(training(), sizes[splits.TRAIN], limit))
  return _Text(sentences, sizes[splits.TRAIN], vocabulary_measures.by_language(held_out))


def _rows(config: vocabularies.VocabularyConfig, sizes: list[int] | None, text: _Text,
          directory: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Trains one kind at all sizes, writes each, and yields what is measured of it.

  What there is nothing to train of is measured alone, to be compared with.
  """
  trained = config.kind in vocabularies.TRAINED
  sizes = sorted(set(sizes or [config.size])) if trained else [config.size]
  began = time.monotonic()
  found = vocabulary_training.train_sizes(config, sizes, text.sentences)
  print(f'{config.kind}: {", ".join(map(str, found))} in {time.monotonic() - began:.0f} s',
        file=sys.stderr, flush=True)
  plain = list(map(vocabularies.unescape, text.sentences))
  for vocabulary in (found[size] for size in sizes):
    path = directory / f'{config.kind}-{vocabulary.size}' if trained else None
    if path:
      _save(vocabulary, path)
    row = vocabulary_measures.measure(vocabulary, config.num_given, text.held_out, plain,
                                      text.total_bytes)
    yield {'kind': config.kind, 'path': path and str(path), 'digest': vocabulary.digest, **row}


def _save(vocabulary: vocabularies.Vocabulary, path: pathlib.Path):
  try:
    vocabulary.save_pretrained(path)
    vocabulary.save(path)
    bindings = BINDINGS.format(size=vocabulary.size, path=str(path.resolve()))
    (path / 'vocabulary.gin').write_text(bindings, 'utf-8')
  except OSError as error:
    raise UserError(_unwritable(path, error)) from error


def _unwritable(path, error):
  return (f'{path} cannot be written ({error.strerror}); choose a --run_dir on a disk that is '
          'writable and has room')
