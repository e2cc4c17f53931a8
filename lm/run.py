"""A run: what it is made of, and what each command does with it; see also `run_directory`."""
import dataclasses
import functools
import itertools
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import flax.linen as nn
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import optax

from lm import config, doctor, run_directory
from lm.compression import distill
from lm.data import objectives, vocabularies
from lm.data.examples import ExampleTask, PreparedExamples
from lm.data.loader import Loader
from lm.data.mixtures import Mixture, PreparedMixture
from lm.data.tasks import Prepared, TextTask
from lm.errors import UserError
from lm.evaluation import evaluator, live, predictions, reference, report
from lm.inference import complete, methods, runs, SamplingConfig
from lm.inference.engine import EngineConfig
from lm.interop import initial as initial_weights
from lm.interop import of_run
from lm.models import adapters
from lm.models.configs import ModelConfig
from lm.parallel.distributed import Hosts, digest, program_facts
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules, axes_of
from lm.training import checkpoint, losses, meters, monitor, precision
from lm.training.distillation import Distillation
from lm.training.loop import TrainConfig, Trainer
from lm.training.optimizers import Optimizer
from lm.training.preference import DPO
from lm.training.sparsity import Sparsity
from lm.training.state import abstract_params


Data = Prepared | PreparedMixture | PreparedExamples


@dataclasses.dataclass(frozen=True)
class Experiment(adapters.Tunable):
  """All that defines a run; `gin/runs/*.gin` binds it.

  task: a text, or a mixture of texts, each with an objective of its own; or labelled examples.
  objective, loss: what the model is asked, and how its answer counts.
  prompts: texts that the trained model goes on with, for the report.
  decoding: how texts are written where that is not by sampling: `gin/decoding/`.
  engine: how much of a file of prompts is worked on at once: `gin/decoding/engine.gin`.
  writers: who get the metrics beside metrics.jsonl and TensorBoard; see `lm/training/writers.py`.
  initial: the parameters from which a new run begins; None draws them.
  adapter, frozen: what trains; see `adapters.Tunable`.
  teacher: what a loss of distillation compares the model with.
  sparsity: which parameters are, stay or become 0; see `lm/training/sparsity.py`.
  """
  task: TextTask | Mixture | ExampleTask
  model: ModelConfig
  optimizer: Optimizer
  train: TrainConfig
  objective: objectives.Objective = objectives.CausalLM()
  loss: (losses.Prediction | losses.Contrastive | losses.CosineSimilarity
         | DPO | Distillation) = losses.Prediction()
  mesh: MeshConfig = MeshConfig()
  rules: Rules = Rules()
  sampling: SamplingConfig = SamplingConfig()
  decoding: Optional[runs.Decoding] = None
  engine: EngineConfig = EngineConfig()
  prompts: tuple[str, ...] = ()
  writers: tuple[Any, ...] = ()
  initial: Optional[initial_weights.Weights] = None
  teacher: Optional[distill.Teacher] = None
  sparsity: Optional[Sparsity] = None

  def __post_init__(self):
    if self.train.sequence_length > self.model.max_length:
      raise ValueError(f'sequence_length={self.train.sequence_length} is longer than the context '
                       f'max_length={self.model.max_length}; lower the one or raise the other')
    if self.train.batch_ramp and self.objective.contiguous:
      raise ValueError(f'batch_ramp={self.train.batch_ramp} does not go with contiguous=True, '
                       'where each row of a batch goes on with that of the batch before; bind one '
                       'alone')
    if (getattr(self.task, 'form', None) == 'preference') != isinstance(self.loss, DPO):
      raise ValueError("form='preference' of examples and the loss preference.DPO belong together; "
                       'bind both, or neither')
    if isinstance(self.loss, Distillation) != (self.teacher is not None):
      raise ValueError('a teacher and the loss distillation.Distillation belong together; bind '
                       'both, or neither')
    own = getattr(self.task, 'vocabulary', None)  # A mixture has its tasks'.
    if own is not None and own.kind in vocabularies.TRAINED:
      size = self.task.vocabulary.size
      if size > self.model.vocab_size:
        raise ValueError(f'the model has vocab_size={self.model.vocab_size} and the vocabulary '
                         f'{size} ids; bind both to VOCAB_SIZE')

  def build_optimizer(self) -> optax.GradientTransformation:
    """The optimiser of this run's length, of the model's width, and in its precision."""
    optimizer = self.optimizer.build(self.train.num_steps, getattr(self.model, 'width', 1.0))
    optimizer = optimizer if self.sparsity is None else self.sparsity.keep(
        optimizer, self.train.num_steps)
    return precision.prepare(optimizer, self.model.param_dtype, self.train.loss_scale,
                             self.train.guard)

  def bound_rules(self) -> Rules:
    """The rules on this machine's mesh."""
    return self.rules_on(self.mesh.build())

  def rules_on(self, mesh: Mesh) -> Rules:
    """The rules on a mesh.

    Raises:
      UserError: its devices do not divide the length of a row, or of a memory.
    """
    rules = self.rules.on(mesh)
    shards, axes = rules.shards('length'), ', '.join(axes_of(rules.length))
    lengths = {'sequence_length': self.train.sequence_length,
               'memory_length': getattr(self.model, 'memory_length', 0)}
    for name, length in lengths.items():
      if length % shards:
        below = length // shards * shards
        near = [str(n) for n in (below, below + shards) if n]
        raise UserError(f'{name}={length} does not divide over the {shards} devices of mesh axis '
                        f'{axes}; the nearest that does is {" or ".join(near)}')
    return rules


def open_experiment(gin_files: Sequence[str], bindings: Sequence[tuple[str, str]],
                    run_dir: str | None, others: Sequence[str] = ()) -> Experiment:
  """Reads the gin files, or else the run's own config.gin, and turns on the compilation cache; the
  bindings may be of macros of the `others` (see `config.parse`)."""
  config.read(gin_files, bindings, run_dir, others)
  experiment = _with_own_vocabulary(config.build(Experiment), run_dir)
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = pathlib.Path(experiment.task.cache_dir).expanduser() / 'compiled'
    jax.config.update('jax_compilation_cache_dir', str(cache))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
  return experiment


def _with_own_vocabulary(experiment: Experiment, run_dir: str | None) -> Experiment:
  """The experiment with the vocabulary in its run directory, where the one it was of is gone."""
  task, own = experiment.task, pathlib.Path(run_dir or '') / 'vocabulary'
  path = getattr(getattr(task, 'vocabulary', None), 'path', None)
  if run_dir is None or path is None or pathlib.Path(path).expanduser().exists() or (
      not own.exists()):
    return experiment
  vocabulary = dataclasses.replace(task.vocabulary, path=str(own.absolute()))
  return dataclasses.replace(experiment, task=dataclasses.replace(task, vocabulary=vocabulary))


def train(experiment: Experiment, run_dir: str, hosts: Hosts = Hosts(),
          compiled: str | None = None) -> dict[str, Any]:
  """Prepares the data, trains, evaluates on the held-out files, samples, and writes the report.

  Returns what `Trainer.run` does, with `goodput` (the share of each category, of all starts) and
  `report`. Called again on the same directory it goes on where it stopped, and does again only what
  is missing. Of several hosts all train and evaluate, and host 0 samples and writes. `compiled` is
  the file of a train step (`lm compile --save`).
  """
  directory = pathlib.Path(run_dir)
  if compiled and not pathlib.Path(compiled).is_file():
    raise UserError(f'--compiled={compiled} is no file; make one with `lm compile --save`')
  with run_directory.claim(directory, hosts), run_directory.watched(
      experiment.train.alert_command, directory, hosts) as watched:
    experiment, prepared, result = _fit(experiment, directory, hosts, watched, compiled)
    if result['stopped_by'] is None:
      with watched.goodput.spent('evaluation'):
        _finish(experiment, directory, prepared, hosts)
    result['goodput'] = watched.close(result)
    if hosts.is_main:
      state = 'ended' if result['stopped_by'] is None else 'stopped'
      status = report.Status(result['steps'], experiment.train.num_steps, state)
      result['report'] = str(report.write_report(directory, status))
    hosts.wait_for_all('the report')
    watched.tell(result)
    return result


def fit(experiment: Experiment, run_dir: str, hosts: Hosts = Hosts(), **watchers: Any
        ) -> dict[str, Any]:
  """Trains and no more: what `train` does before it evaluates, samples and reports.

  `watchers` are those of the Trainer: `on_validation`.
  """
  directory = pathlib.Path(run_dir)
  with run_directory.claim(directory, hosts), run_directory.watched(
      experiment.train.alert_command, directory, hosts) as watched:
    _, _, result = _fit(experiment, directory, hosts, watched, **watchers)
    result['goodput'] = watched.close(result)
    watched.tell(result)
    return result


def _fit(experiment: Experiment, directory: pathlib.Path, hosts: Hosts,
         watched: run_directory.Watched, compiled: str | None = None, **watchers: Any
         ) -> tuple[Experiment, Data, dict[str, Any]]:
  hosts.prove_same({'the digest of the configuration': digest(config.text()), **program_facts()})
  if hosts.is_main:
    run_directory.save_config(directory)
  prepared = hosts.main_first('the data', experiment.task.prepare)
  experiment = _of_data(experiment, prepared)
  if hosts.is_main and isinstance(prepared, PreparedExamples):
    told = [prepared.tell(split, experiment.train.sequence_length)
            for split in prepared.info['splits']]
    print(*(f'{sentence}\n' for sentence in told if sentence), sep='', end='', file=sys.stderr)
  hosts.prove_same({'the digest of the data': data_digest(prepared.info)})
  if hosts.is_main:
    run_directory.save_vocabulary(directory, prepared, _chat(experiment, prepared))
  trainer = _trainer(experiment, prepared, directory, hosts, watched, **watchers)
  result = trainer.run(compiled and pathlib.Path(compiled))
  if hosts.is_main:  # whose file it is, with the losses of the steps before this start
    result['losses'] = [row['loss'] for row in monitor.read_rows(directory / monitor.METRICS)
                        if row['split'] == 'train']
    finite = [loss for loss in result['losses'] if loss is not None]
    result['final_loss'] = finite[-1] if finite else None
  return experiment, prepared, result


def _of_data(experiment: Experiment, prepared: Data) -> Experiment:
  """The experiment where what depends on its data is known: its steps, and the costs of classes.

  Raises:
    UserError: the head has another number of classes than the task labels.
  """
  loss, settings = experiment.loss, experiment.train
  if isinstance(prepared, PreparedExamples) and isinstance(loss, losses.Prediction):
    counts = prepared.label_counts
    classes = getattr(experiment.model, 'num_classes', len(counts))
    if counts and classes != len(counts):
      raise UserError(f'the head has num_classes={classes} and the task {len(counts)} labels; bind '
                      f'num_classes={len(counts)}, or take the files that it was made for')
    loss = loss.balanced(counts)
  if settings.num_epochs is not None:
    settings = settings.of_length(
        loader_of(experiment, prepared, 'train', settings.seed).steps_per_epoch)
  return dataclasses.replace(experiment, loss=loss, train=settings)


def _objective(experiment: Experiment, prepared: Data) -> Any:
  """What the model is asked (of a mixture, first; of examples, their form), bound to the
  vocabulary.

  Raises:
    UserError: the vocabulary, with the objective's own ids, has more ids than the model.
  """
  if isinstance(prepared, PreparedMixture):
    objective = prepared.bound_objectives[0]
  elif isinstance(prepared, PreparedExamples):
    objective = prepared.form
  else:
    objective = experiment.objective.bind(prepared.vocabulary)
  if objective.vocab_size > experiment.model.vocab_size:
    raise UserError(f'the vocabulary and the objective need {objective.vocab_size} ids and the '
                    f'model has vocab_size={experiment.model.vocab_size}; raise it')
  return objective


def _chat(experiment: Experiment, prepared: Data) -> Any:
  """The chat template of examples that are conversations; None of others."""
  return getattr(_objective(experiment, prepared), 'chat', None)


def loader_of(experiment: Experiment, prepared: Data, split: str, seed: int) -> Loader:
  """Batches of a split under the run's objective."""
  objective, settings = _objective(experiment, prepared), experiment.train
  if isinstance(prepared, (PreparedMixture, PreparedExamples)):
    return prepared.loader(split, settings.sequence_length, settings.batch_size, seed)
  return Loader(prepared.cache(split), settings.sequence_length, settings.batch_size, seed,
                objective)


def _trainer(experiment: Experiment, prepared: Data, directory: pathlib.Path, hosts: Hosts,
             watched: run_directory.Watched, **watchers: Any) -> Trainer:
  settings, rules, loss = experiment.train, experiment.bound_rules(), experiment.loss
  experiment = dataclasses.replace(experiment, model=distill.uniform(experiment.model, loss))
  loader, module = functools.partial(loader_of, experiment, prepared), experiment.build_model(rules)
  log = lambda text: print(text, file=sys.stderr) if hosts.is_main else None
  watchers |= {} if experiment.teacher is None else {'teach': experiment.teacher.open(
      loss, experiment.model, rules, directory, hosts, log, prepared.vocabulary)}
  initial = experiment.initial and initial_weights.open_weights(
      experiment.initial, directory, hosts, log, prepared.vocabulary.digest,
      lambda path: not experiment.trainable(path))
  return Trainer(
      settings, module, loss, experiment.build_optimizer(),
      experiment.optimizer.schedule.build(settings.num_steps), rules,
      loader('train', settings.seed), loader('validation', 0), data_digest(prepared.info),
      directory, experiment.model.flops_per_token(settings.sequence_length),
      meters.peak_flops(experiment.model.dtype),
      log=log, goodput=watched.goodput, alerts=watched.alerts,
      sample=functools.partial(_sample, experiment, prepared, hosts), hosts=hosts,
      writers=(live.LiveReport(settings.num_steps), *experiment.writers), initial=initial,
      on_start=reference.of_run(prepared, directory, module, settings, hosts), **watchers)


def _sample(experiment: Experiment, prepared: Data, hosts: Hosts, params: Any
            ) -> Sequence[Mapping[str, Any]]:
  """Completes the prompts with parameters that lie over the devices of all hosts, who all call it;
  host 0 does it, on one device."""
  if not experiment.prompts:
    return ()
  module, params = _alone(experiment, hosts, params)
  if not hosts.is_main:
    return ()
  return complete(module, params, prepared.vocabulary, list(experiment.prompts),
                  experiment.sampling, 0, experiment.model.max_length,
                  _chat(experiment, prepared))


def _alone(experiment: Experiment, hosts: Hosts, params: Any) -> tuple[nn.Module, Any]:
  """The model on one device of this host, of parameters that lie over the devices of all, who all
  call it."""
  if hosts.count > 1:
    params = multihost_utils.process_allgather(params, tiled=True)
  params = jax.device_put(jax.device_get(params), jax.local_devices()[0])
  return experiment.build_model(Rules()), params


def data_digest(info: dict[str, Any]) -> str:
  """What the batches depend on: the documents and the vocabulary, not the versions of packages."""
  return f'{info["digests"]["texts"]}-{info["vocabulary"]["digest"][:16]}'


def _finish(experiment: Experiment, directory: pathlib.Path, prepared: Data, hosts: Hosts):
  """Evaluates and samples the checkpoint that later commands take, unless that stands already."""
  is_answered = isinstance(prepared, PreparedExamples) and predictions.is_answered(prepared)
  splits = [split for split in ('validation', 'test') if is_answered
            and split in prepared.info['splits']]

  def stands() -> bool:
    checkpoints, path = directory / 'checkpoints', directory / 'evaluation.json'
    step = _chosen(experiment) and checkpoint.best_step(checkpoints)
    step = checkpoint.list_steps(checkpoints)[-1] if step is None else step
    found = report.read_json(path) or {}
    tasks = [found.get('tasks', {}).get(predictions.name_of(prepared, split), {})
             for split in splits]
    return all(of.get('step') == step for of in (found, *tasks))

  if hosts.ask_main('whether an evaluation stands', stands):
    return
  if is_answered:
    evaluate_examples(experiment, str(directory), [prepared], splits, prepared, hosts)
  else:
    evaluate(experiment, str(directory), prepared, hosts)
  if experiment.prompts and hosts.is_main:
    completions = generate(experiment, str(directory), experiment.prompts, experiment.sampling,
                           chat=_chat(experiment, prepared) is not None)
    run_directory.write_json(directory / 'samples.json', completions['completions'])


def evaluate(experiment: Experiment, run_dir: str, prepared: Data | None = None,
             hosts: Hosts = Hosts()) -> dict[str, Any]:
  """Scores the held-out files with a run's last good checkpoint (under early stopping, its best),
  and writes evaluation.json.

  Models of next tokens are measured in bits a byte of whole files, the others, and mixtures, by
  what their objective asks, on all held-out text. All hosts compute, over the run's mesh; a process
  alone whose devices do not fit it takes one of them.
  """
  prepared = prepared or hosts.main_first('the data', experiment.task.prepare)
  step, module, params = load_on_mesh(experiment, run_dir, hosts)
  is_text = isinstance(prepared, Prepared)
  if is_text and isinstance(_objective(experiment, prepared), objectives.CausalLM):
    documents = prepared.cache('validation')
    result = evaluator.evaluate(module, params, [documents[i] for i in range(len(documents))],
                                experiment.train.sequence_length, experiment.train.batch_size,
                                hosts=hosts)
  else:
    reference.load(prepared, pathlib.Path(run_dir), experiment.train)
    loader = loader_of(experiment, prepared, 'validation', seed=0)
    result = evaluator.held_out(module, experiment.loss, params, loader, hosts=hosts)
  if hosts.is_main:
    path = pathlib.Path(run_dir) / 'evaluation.json'
    tasks = (report.read_json(path) or {}).get('tasks')
    run_directory.write_json(path, {'step': step, **result, **({'tasks': tasks} if tasks else {})})
  return {experiment.task.name: {'step': step, **result}}


def evaluate_examples(experiment: Experiment, run_dir: str, wanted: Sequence[PreparedExamples],
                      splits: Sequence[str], trained: PreparedExamples | None,
                      hosts: Hosts = Hosts()) -> dict[str, Any]:
  """Predicts labelled examples with the checkpoint that `evaluate` takes, and puts the metrics into
  evaluation.json beside those that stand there.

  Args:
    trained: the run's own examples, where their files are at hand.

  Returns:
    {task: {metric: value}} with the step; of the last of several splits.
  """
  path, result = pathlib.Path(run_dir) / 'evaluation.json', {}
  if not isinstance(experiment.decoding, methods.Method | None):
    raise UserError(f'examples are answered by the run alone, and decoding={experiment.decoding} '
                    'asks for others; take a file of gin/decoding that names no other run')
  step, module, params = load_on_mesh(experiment, run_dir, hosts)
  model = predictions.Model(
      module, params, functools.partial(_alone, experiment, hosts, params), step,
      checkpoint.digest(path.parent / 'checkpoints', step), experiment.train.sequence_length,
      experiment.train.batch_size, path.parent, isinstance(experiment.task, ExampleTask), trained,
      hosts, experiment.decoding)
  for prepared, split in itertools.product(wanted, splits):
    found = {'step': step, **predictions.evaluate(model, prepared, split)}
    result[prepared.task.name] = found
    if hosts.is_main:
      standing = report.read_json(path) or {}
      standing |= {'step': step} if prepared.task == experiment.task else {}
      tasks = standing.get('tasks', {}) | {predictions.name_of(prepared, split): found}
      run_directory.write_json(path, standing | {'tasks': tasks})
  return result


def generate(experiment: Experiment, run_dir: str, prompts: Sequence[str], sampling: SamplingConfig,
             seed: int = 0, chat: bool = False) -> dict[str, Any]:
  """Continues each prompt with a run's last good checkpoint; under early stopping, its best. In a
  `chat` a prompt is a user's message, and the assistant answers."""
  _, module, params, method = load_writer(experiment, run_dir)
  vocabulary, template = run_directory.load_vocabulary(pathlib.Path(run_dir), chat)
  return {'completions': complete(module, params, vocabulary, list(prompts), sampling, seed,
                                  experiment.model.max_length, template, method)}


def load_writer(experiment: Experiment, run_dir: str, on_mesh: bool = False
                ) -> tuple[int, Any, Any, methods.Method | None]:
  """The step, and what writes texts: the run's model, or it and those of the runs that its decoding
  asks for; parameters; and the method. On one device, or with `on_mesh` on the run's tensor mesh.
  On a CPU layers are unrolled where the run does not say: a loop copies the weights of each.
  """
  if on_mesh and experiment.mesh.tensor != 1:
    return *load_on_mesh(experiment, run_dir, Hosts()), None
  if jax.default_backend() == 'cpu' and getattr(experiment.model, 'scan_layers', False) is None:
    model = dataclasses.replace(experiment.model, scan_layers=False)
    experiment = dataclasses.replace(experiment, model=model)
  step, module, params = load(experiment, run_dir)

  def other(path):
    adapter = config.value(pathlib.Path(path) / 'config.gin', 'run.Experiment.adapter')
    its = dataclasses.replace(experiment, model=of_run.model(path), adapter=adapter, decoding=None)
    return load(its, path)[1:]
  return step, *runs.resolve(experiment.decoding, module, params, other)


def check_invariants(experiment: Experiment) -> dict[str, Any]:
  """`lm doctor`: what must hold of this model, this mesh and this data."""
  settings = experiment.train
  prepared = experiment.task.prepare()
  return doctor.check(
      experiment.model, experiment.build_optimizer(), experiment.mesh.build(),
      experiment.rules, settings.sequence_length, settings.batch_size,
      loader_of(experiment, prepared, 'train', settings.seed), settings.seed,
      objective=_objective(experiment, prepared), loss=experiment.loss.plain)


def load(experiment: Experiment, run_dir: str, rules: Rules | None = None
          ) -> tuple[int, nn.Module, Any]:
  """The step, the module, and the parameters of a run's last good checkpoint (under early stopping,
  its best), sharded by `rules` or on one device."""
  module = experiment.build_model(rules or Rules())
  abstract = abstract_params(module, rules or jax.local_devices()[0])
  step, params = checkpoint.restore_params(pathlib.Path(run_dir) / 'checkpoints', abstract,
                                           _chosen(experiment),
                                           log=lambda text: print(text, file=sys.stderr))
  return step, module, params


def _chosen(experiment: Experiment) -> str | None:
  """Which checkpoint `restore_params` takes."""
  return 'best' if experiment.train.early_stopping else None


def load_on_mesh(experiment: Experiment, run_dir: str, hosts: Hosts) -> tuple[int, nn.Module, Any]:
  """`load` on the run's mesh or, where a process alone has not its devices, on one device."""
  try:
    rules = experiment.bound_rules()
    abstract_params(experiment.build_model(rules), rules)
  except UserError as error:
    if hosts.count > 1:
      raise
    print(f'computes on one device: {error}', file=sys.stderr)
    rules = experiment.rules_on(MeshConfig(data=1).build(jax.devices()[:1]))
  loaded = load(experiment, run_dir, rules)
  hosts.prove_same({'the step of the checkpoint': str(loaded[0])})
  return loaded
