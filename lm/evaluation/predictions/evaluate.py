"""A task and a split: predictions, the metrics that follow from them, and a page.

`R/predictions/<task>-<split>.jsonl` and `.json` are as `lm.evaluation.metrics.contract` says; the
header also has the `key` of what was asked, and of two equal keys the predictions are the same, so
that they are made once and their metrics computed as often as wanted.
"""
from collections.abc import Sequence
import dataclasses
import json
import pathlib
import sys
from typing import Any

import tqdm

from lm.data.examples import PreparedExamples
from lm.errors import UserError
from lm.evaluation import leakage, metrics, task_report
from lm.evaluation.leakage import TRAIN
from lm.evaluation.predictions import store, texts
from lm.evaluation.predictions.contract import Model, Predictor
from lm.evaluation.predictions.heads import Heads
from lm.evaluation.predictions.vectors import Vectors
from lm.parallel.distributed import digest

FORMS = {'ClassifierConfig': 'encoder', 'TaggerConfig': 'encoder', 'SpanConfig': 'encoder',
         'EmbedderConfig': 'embedder', 'DualEncoderConfig': 'embedder', 'T5Config': 'text_to_text'}


def name_of(prepared: PreparedExamples, split: str) -> str:
  """Of the files of predictions, and in evaluation.json."""
  return f'{prepared.task.name}-{split}'


def evaluate(model: Model, prepared: PreparedExamples, split: str, progress: bool = True
             ) -> dict[str, float]:
  """Predicts a split, unless the predictions stand, and computes their metrics.

  All hosts call it; host 0 writes. A call that was killed goes on where it was.

  Raises:
    UserError: the task has no such split, or the model does not answer it.
  """
  hosts = model.hosts
  path = model.directory / 'predictions' / f'{name_of(prepared, split)}.jsonl'
  prepared.cache(split)  # must be there
  key = _key(model, prepared, split)
  if not hosts.ask_main('whether predictions stand', lambda: store.standing(path, key)):
    predictor = predictor_of(model, prepared, split)
    part = store.Part(path, key) if hosts.is_main else None
    _complete(model, predictor, part, path.stem, progress)
    if part:
      header = _header(model, prepared, split, key)
      for sentence in header['warnings']:
        print(f'warning: {sentence}', file=sys.stderr)
      store.write(path, header, predictor.rows([part.answers[i]
                                                for i in range(predictor.num_items)]))
      part.close()
      part.path.unlink()
  return hosts.ask_main('the metrics', lambda: _metrics(path))


def predictor_of(model: Model, prepared: PreparedExamples, split: str) -> Predictor:
  """What answers examples of this form and kind."""
  if prepared.task.form == 'embedder':
    return Vectors(model, prepared, split)
  if prepared.task.form == 'encoder':
    return Heads(model, prepared, split)
  return texts.predictor(model, prepared, split)


def is_answered(prepared: PreparedExamples) -> bool:
  """Whether there are predictions of the task's kind in its form: vectors name no class, and what
  is said of conversations and preferences is their loss."""
  if prepared.task.form in ('chat', 'preference'):
    return False
  return prepared.task.form != 'embedder' or prepared.kind.name != 'classification'


def as_asked(task: Any, family: str) -> Any:
  """Another task in the form that a model of this family takes.

  Raises:
    UserError: it takes none.
  """
  if family == 'BERTConfig':
    raise UserError('a BERT without a head answers no task; train one with a head on it first')
  return dataclasses.replace(task, form=FORMS.get(family, 'decoder'))


def with_labels(task: Any, labels: Sequence[str]) -> Any:
  """The task with the labels, in their order, that a head was trained on.

  Raises:
    UserError: it names others itself.
  """
  if strange := [label for label in task.kind.labels if label not in labels]:
    raise UserError(f'the task {task.name!r} has the label {strange[0]!r}, and the head knows '
                    f'{len(labels)} others; evaluate a task of the same labels')
  return dataclasses.replace(task, kind=dataclasses.replace(task.kind, labels=tuple(labels)))


def _complete(model: Model, predictor: Predictor, part: store.Part | None, name: str,
              progress: bool):
  """Asks for what the part lacks, and puts it there."""
  hosts = model.hosts
  done = set(hosts.ask_main('the answers that stand', lambda: sorted(part.answers)))
  with tqdm.tqdm(total=predictor.num_items, initial=len(done), desc=f'predict {name}',
                 unit=' answers', disable=not (progress and hosts.is_main)) as bar:
    for answers in predictor.batches(done):
      if part:
        part.add(answers)
        bar.update(len(part.answers) - bar.n)


def _header(model: Model, prepared: PreparedExamples, split: str, key: str) -> dict[str, Any]:
  labels = getattr(prepared.kind, 'labels', None)
  return {'task': prepared.task.name, 'kind': prepared.kind.name,
          'labels': list(labels) if labels else None, 'split': split, 'step': model.step,
          'language': getattr(prepared.kind, 'language', None),
          'key': key, 'warnings': _warnings(model, prepared, split), 'metrics': {}}


def _warnings(model: Model, prepared: PreparedExamples, split: str) -> list[str]:
  """What makes the numbers of a split better than the model: examples of it that were trained on,
  labels that their input gives away."""
  trained, kind = model.trained, prepared.kind.name
  if trained is None or trained.kind.name != kind or TRAIN not in trained.info['splits']:
    return []
  caches = {TRAIN: trained.cache(TRAIN), split: prepared.cache(split)}
  found = leakage.find(kind, {name: [cache.example(i) for i in range(len(cache))]
                              for name, cache in caches.items()})
  return [finding.sentence for finding in found if finding.split == split]


def _metrics(path: pathlib.Path) -> dict[str, float]:
  """Computes the metrics of predictions, and writes them into the header and onto the page."""
  header, rows = metrics.read(path)
  scorer = metrics.scorer(header, rows)
  header['metrics'], header['notes'] = scorer.metrics(), dict(scorer.notes)
  store.write_header(path, header)
  page = path.with_suffix('.html')
  if not page.exists():
    task_report.write(header, rows, page, scorer)
  return header['metrics']


def _key(model: Model, prepared: PreparedExamples, split: str) -> str:
  """What predictions depend on."""
  task = prepared.task
  parts = [model.digest, model.step, repr(model.module.config), model.sequence_length, split,
           task.form, task.packed, task.scored, task.target_length,
           model.is_tuned, prepared.info['digests']['texts'],
           prepared.vocabulary.digest, prepared.info['labels'], repr(model.method)]
  return digest(json.dumps(parts))
