"""A run: what it is made of, the directory it lives in, and what each command does with it.

  config.gin        all bindings, defaults included; every later command starts from it
  metrics.jsonl     one object a row: step, split, loss, ...     events/  the same for TensorBoard
  checkpoints/      the latest and the best                      vocabulary/  to read and write text
  evaluation.json   held-out files, bits per byte                samples.json, report.html
"""
import contextlib
import dataclasses
import difflib
import fcntl
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax

from lm import config, doctor
from lm.data import vocabularies
from lm.data.loader import Loader
from lm.data.tasks import Prepared, TextTask
from lm.errors import UserError
from lm.evaluation import evaluator, report
from lm.inference.generate import complete
from lm.inference.sampling import SamplingConfig
from lm.models.gpt import GPTConfig
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training import checkpoint, meters, monitor
from lm.training.loop import TrainConfig, Trainer
from lm.training.optimizers import AdamW, Muon
from lm.training.state import abstract_params


@dataclasses.dataclass(frozen=True)
class Experiment:
  """All that defines a run; `gin/runs/*.gin` binds it.

  prompts: texts that the trained model goes on with, for the report.
  """
  task: TextTask
  model: GPTConfig
  optimizer: AdamW | Muon
  train: TrainConfig
  mesh: MeshConfig = MeshConfig()
  rules: Rules = Rules()
  sampling: SamplingConfig = SamplingConfig()
  prompts: tuple[str, ...] = ()

  def __post_init__(self):
    if self.train.sequence_length > self.model.max_length:
      raise ValueError(f'sequence_length={self.train.sequence_length} is longer than the context '
                       f'max_length={self.model.max_length}; lower the one or raise the other')
    kind, size = self.task.vocabulary.kind, self.task.vocabulary.size
    size = vocabularies.ByteVocabulary.size if kind == 'byte' else size
    if size != self.model.vocab_size:
      raise ValueError(f'the model has vocab_size={self.model.vocab_size} and the {kind} '
                       f'vocabulary has {size} ids; bind both to VOCAB_SIZE')

  def bound_rules(self) -> Rules:
    """The rules on this machine's mesh."""
    return self.rules.on(self.mesh.build())


def open_experiment(gin_files: Sequence[str], bindings: Sequence[tuple[str, str]],
                    run_dir: str | None) -> Experiment:
  """Reads the gin files, or else the run's own config.gin, and turns on the compilation cache."""
  if not gin_files:
    if run_dir is None:
      raise UserError('nothing says what to run; give --gin_file=FILE, or --run_dir of a run that '
                      'stands')
    saved = pathlib.Path(run_dir) / 'config.gin'
    if not saved.exists():
      raise UserError(f'--run_dir={run_dir} holds no config.gin, so it is no run; '
                      'start one with `lm train --gin_file=FILE --run_dir=DIR`')
    gin_files = [str(saved)]
  config.parse(gin_files, bindings)
  experiment = config.build(Experiment)
  cache = pathlib.Path(experiment.task.cache_dir).expanduser() / 'compiled'
  jax.config.update('jax_compilation_cache_dir', str(cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
  return experiment


def train(experiment: Experiment, run_dir: str) -> dict[str, Any]:
  """Prepares the data, trains, evaluates on the held-out files, samples, and writes the report.

  Called again on the same directory it goes on where it stopped, and does again only what is
  missing.
  """
  directory = pathlib.Path(run_dir)
  with _claim(directory):
    prepared, result = _fit(experiment, directory)
    if result['stopped_by'] is None:
      _finish(experiment, directory, prepared)
    result['report'] = str(report.write_report(directory))
  return result


def fit(experiment: Experiment, run_dir: str) -> dict[str, Any]:
  """Trains and no more: what `train` does before it evaluates, samples and reports."""
  with _claim(pathlib.Path(run_dir)):
    return _fit(experiment, pathlib.Path(run_dir))[1]


def _fit(experiment: Experiment, directory: pathlib.Path) -> tuple[Prepared, dict[str, Any]]:
  _save_config(directory)
  prepared = experiment.task.prepare()
  if not (directory / 'vocabulary').exists():
    prepared.vocabulary.save(directory / 'vocabulary')
  result = _trainer(experiment, prepared, directory).run()
  result['losses'] = [row['loss'] for row in monitor.read_rows(directory / monitor.METRICS)
                      if row['split'] == 'train']
  if result['final_loss'] is None:
    result['final_loss'] = result['losses'][-1]
  return prepared, result


def _trainer(experiment: Experiment, prepared: Prepared, directory: pathlib.Path) -> Trainer:
  settings, rules = experiment.train, experiment.bound_rules()
  loader = lambda split, seed: Loader(prepared.cache(split), settings.sequence_length,
                                      settings.batch_size, seed)
  return Trainer(
      settings, experiment.model.build(rules), experiment.optimizer.build(settings.num_steps),
      experiment.optimizer.schedule.build(settings.num_steps), rules,
      loader('train', settings.seed), loader('validation', 0), _data_digest(prepared.info),
      directory, experiment.model.flops_per_token(settings.sequence_length),
      meters.peak_flops(experiment.model.dtype), log=lambda text: print(text, file=sys.stderr))


def _data_digest(info: dict[str, Any]) -> str:
  """What the batches depend on: the documents and the vocabulary, not the versions of packages."""
  return f'{info["digests"]["texts"]}-{info["vocabulary"]["digest"][:16]}'


def _finish(experiment: Experiment, directory: pathlib.Path, prepared: Prepared):
  """Evaluates and samples the last checkpoint, unless that stands already."""
  step = checkpoint.list_steps(directory / 'checkpoints')[-1]
  path = directory / 'evaluation.json'
  if not path.exists() or json.loads(path.read_text())['step'] != step:
    evaluate(experiment, str(directory), prepared)
    completions = generate(experiment, str(directory), experiment.prompts, experiment.sampling)
    _write_json(directory / 'samples.json', completions['completions'])


def evaluate(experiment: Experiment, run_dir: str,
             prepared: Prepared | None = None) -> dict[str, Any]:
  """Scores the held-out files with a run's last good checkpoint, and writes evaluation.json."""
  prepared = prepared or experiment.task.prepare()
  step, module, params = _load(experiment, run_dir)
  documents = prepared.cache('validation')
  result = evaluator.evaluate(module, params, [documents[i] for i in range(len(documents))],
                              experiment.train.sequence_length, experiment.train.batch_size)
  _write_json(pathlib.Path(run_dir) / 'evaluation.json', {'step': step, **result})
  return {experiment.task.name: {'step': step, **result}}


def generate(experiment: Experiment, run_dir: str, prompts: Sequence[str], sampling: SamplingConfig,
             seed: int = 0) -> dict[str, Any]:
  """Continues each prompt with a run's last good checkpoint."""
  _, module, params = _load(experiment, run_dir)
  vocabulary = vocabularies.load(pathlib.Path(run_dir) / 'vocabulary')
  return {'completions': complete(module, params, vocabulary, list(prompts), sampling, seed,
                                  experiment.model.max_length)}


def check_invariants(experiment: Experiment) -> dict[str, Any]:
  """`lm doctor`: what must hold of this model, this mesh and this data."""
  settings = experiment.train
  loader = Loader(experiment.task.prepare().cache('train'), settings.sequence_length,
                  settings.batch_size, settings.seed)
  return doctor.check(experiment.model, experiment.optimizer.build(settings.num_steps),
                      experiment.mesh.build(), experiment.rules, settings.sequence_length,
                      settings.batch_size, loader, settings.seed)


def _load(experiment: Experiment, run_dir: str) -> tuple[int, nn.Module, Any]:
  """The step, the module, and the parameters of a run's last good checkpoint."""
  module = experiment.model.build()
  abstract = abstract_params(module, jax.local_devices()[0])
  step, params = checkpoint.restore_params(pathlib.Path(run_dir) / 'checkpoints', abstract,
                                           log=lambda text: print(text, file=sys.stderr))
  return step, module, params


@contextlib.contextmanager
def _claim(directory: pathlib.Path) -> Iterator[None]:
  """Makes the run directory and keeps other processes from training in it."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    lock = open(directory / '.lock', 'w')
  except OSError as error:
    raise UserError(f'--run_dir={directory} cannot be written ({error.strerror}); '
                    'choose a directory on a disk that is writable and not full') from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise UserError(f'--run_dir={directory} is in use by another process; wait for it or choose '
                      'another directory') from error
    yield


def _save_config(directory: pathlib.Path):
  """Writes config.gin, and says what changed in a run that stands."""
  path = directory / 'config.gin'
  before = path.read_text().splitlines() if path.exists() else None
  config.save(path)
  if before is not None:
    for line in difflib.unified_diff(before, path.read_text().splitlines(), n=0, lineterm=''):
      if line[0] in '+-' and '=' in line:
        print(f'config of this run changed: {line}', file=sys.stderr)


def _write_json(path: pathlib.Path, value: Any):
  temporary = path.with_suffix(f'.{os.getpid()}')
  try:
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise UserError(f'{path} cannot be written ({error.strerror}); free some space or choose '
                    'another directory') from error
