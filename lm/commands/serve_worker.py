"""The worker of `lm serve`: loads a run or an artefact, and answers jobs on standard input."""
import dataclasses
import functools
import json
import pathlib
import sys
from typing import Any

import jax

from lm import run, run_directory
from lm.commands import edit
from lm.errors import UserError
from lm.export import artifact, certificate, programs
from lm.inference.engine import Engine
from lm.inference.model_rows import ModelRows
from lm.inference.rows import RowEngine
from lm.inference.scores import Scorer
from lm.serving import worker
from lm.serving.protocol import Backend
from lm.serving.reader import Batching, Reader
from lm.serving.writer import NUM_TOP, Writer

WRITERS = 'GPT', 'T5', 'Transformer-XL'  # families
# What an encoder gives, by the name of its output or its family.
ABILITIES = {'classifier': 'classify', 'tagger': 'tag', 'embedder': 'embed', 'BERT': 'fill'}


def load(spec: dict[str, Any]) -> Backend:
  """The backend of a directory.

  Args:
    spec: directory, num_rows, cache_tokens, max_batch, latency.

  Raises:
    UserError: it holds nothing that can be served.
  """
  directory = pathlib.Path(spec['directory'])
  batching = Batching(spec['max_batch'], spec['latency'])
  if (directory / certificate.FILE).exists():
    return _of_artifact(directory, spec, batching)
  experiment = run.open_experiment([], [], str(directory))
  model = experiment.model
  vocabulary, _ = run_directory.load_vocabulary(directory, False)
  if programs.family(model) in WRITERS:
    return _of_writer(experiment, directory, spec, vocabulary)
  _, module, params = run.load(experiment, str(directory))
  ability, program = _ability(programs.family(model), directory), programs.whole(model, module)
  if ability == 'fill' and 'logits' not in program.outputs:
    raise UserError(f'{directory} holds a BERT without its masked language model; fine-tune a head '
                    'on it, or take one with masked_lm=True')
  answer = functools.partial(jax.jit(program.call), params)
  return Reader(answer, list(program.inputs), ability, vocabulary, model.max_length,
                run_directory.load_labels(directory), batching)


def _of_artifact(directory, spec, batching):
  """What `lm export` made."""
  if certificate.read(directory)['family'] in WRITERS:
    rows, vocabulary, _ = artifact.open_rows(str(directory), **_asked(spec, 'num_rows'))
    return Writer(RowEngine(rows), vocabulary, _chat(directory))
  answer, vocabulary, facts = artifact.open_artifact(str(directory))
  return Reader(answer, facts['inputs'], _ability(facts['family'], directory), vocabulary,
                facts['max_length'], facts['labels'], batching)


def _of_writer(experiment, directory, spec, vocabulary):
  """A run that writes texts: a GPT by the paged engine, others in rows."""
  model, rest = experiment.model, (_chat(directory), _sentinels(experiment, vocabulary))
  if hasattr(model, 'init_pages'):
    _, module, params, _ = run.load_writer(experiment, str(directory), True)
    engine = Engine(module, params, dataclasses.replace(
        experiment.engine, **_asked(spec, 'num_rows', 'cache_tokens')), model.max_length)
    scorer = Scorer(engine.decoder, engine.params, NUM_TOP, model.max_length)
    return Writer(engine, vocabulary, *rest, scorer)
  _, module, params = run.load(experiment, str(directory))
  num_rows = spec['num_rows'] or experiment.engine.num_rows
  rows = ModelRows(module, params, num_rows, model.max_length)
  return Writer(RowEngine(rows), vocabulary, *rest)


def _asked(spec, *names):
  return {name: spec[name] for name in names if spec[name] is not None}


def _ability(family, directory):
  if family not in ABILITIES:
    raise UserError(f'{directory} holds a {family}, which is not served in this form; take the run '
                    'of a GPT, or an encoder with a head')
  return ABILITIES[family]


def _chat(directory):
  try:
    return run_directory.load_vocabulary(directory, True)[1]
  except UserError:
    return None


def _sentinels(experiment, vocabulary):
  try:
    return edit.sentinels(experiment, vocabulary)
  except UserError:
    return None


if __name__ == '__main__':
  worker.main(functools.partial(load, json.loads(sys.argv[1])))
