"""The SeqIO side of a task of labelled examples: prompts, targets, metrics of what is written.

As `seqio_tasks`, imported only where somebody registers a task, since it imports TensorFlow.

    source        {'id': 'train-0', 'inputs': 'snips sentence: play it', 'targets': 'PlayMusic',
                   'example': '{"id": ...}'}
    tokenize      {..., 'inputs': [31, 7], 'targets': [64]}
    CacheDatasetPlaceholder, append_eos
"""

from __future__ import annotations

import functools
import json
from typing import Any, Mapping, Sequence

import seqio
import tensorflow as tf

from lm.data.examples.forms import Form
from lm.data.examples.sources import TEST
from lm.data.examples.sources import TRAIN
from lm.data.examples.sources import VALIDATION
from lm.data.seqio_tasks import SeqioVocabulary
from lm.errors import UserError


def register(prepared: Any) -> seqio.Task:
  """Registers a prepared task in `seqio.TaskRegistry`, in place of an older one of its name.

  Features are 'inputs' and 'targets': of text-to-text both end in eos, of a decoder the targets
  alone, which `seqio.DecoderFeatureConverter` puts behind the inputs.

  Raises:
    UserError: the task is of a form without prompts.
  """
  task = prepared.task
  if task.form not in ('text_to_text', 'decoder'):
    raise UserError(f'form={task.form!r} of {task.name!r} has no prompts and targets for SeqIO;'
                    " bind FORM to 'text_to_text' or 'decoder'.")
  splits = [name for name in (TRAIN, VALIDATION, TEST) if name in prepared.info['splits']]
  strings = tf.TensorSpec([], tf.string)

  def dataset_fn(split: str, shuffle_files: bool = False, seed: Any = None) -> tf.data.Dataset:
    del shuffle_files, seed
    return tf.data.Dataset.from_generator(
        functools.partial(_strings, prepared, split),
        output_signature=dict.fromkeys(('id', 'inputs', 'targets', 'example'), strings))

  vocabulary = SeqioVocabulary(prepared.vocabulary)
  if task.name in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(task.name)
  return seqio.TaskRegistry.add(
      task.name,
      source=seqio.FunctionDataSource(
          dataset_fn, splits=splits,
          num_input_examples={s: prepared.info['splits'][s]['documents'] for s in splits}),
      preprocessors=[seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(),
                     seqio.preprocessors.append_eos],
      output_features={
          'inputs': seqio.Feature(vocabulary, add_eos=task.form == 'text_to_text', required=False),
          'targets': seqio.Feature(vocabulary, add_eos=True)},
      postprocess_fn=lambda text, example=None, is_target=False, **_: (
          json.loads(example['example']) if is_target else text),
      metric_fns=[_metric_fn(task.name, prepared.form)])


def _strings(prepared: Any, split: str) -> Any:
  cache, template = prepared.cache(split), prepared.form.template
  for i in range(len(cache)):
    example = cache.example(i)
    fields = {'id': example['id'], 'inputs': template.prompt(example),
              'targets': template.target(example), 'example': json.dumps(example)}
    yield {name: text.encode('utf-8') for name, text in fields.items()}


def _metric_fn(name: str, form: Form) -> Any:
  """Returns the metrics of the task's kind as SeqIO calls them."""

  def metrics(targets: Sequence[Mapping[str, Any]], predictions: Sequence[str]
              ) -> Mapping[str, float]:
    from lm.evaluation import metrics as library
    from lm.evaluation.predictions import texts

    kind = form.kind
    rows = [{'id': example['id'], 'scores': None,
             **texts.answer_row(kind, form.template, example, text.strip())}
            for example, text in zip(targets, predictions)]
    header = {'task': name, 'kind': kind.name, 'labels': getattr(kind, 'labels', None) or None,
              'split': '', 'step': 0, 'metrics': {}}
    return library.compute(header, rows)

  return metrics
