"""The study of a sweep: a file that several processes share, and that a kill at any moment spares.

    DIR/study.journal     Optuna's JournalStorage: every operation a line, appended under a lock
    DIR/trial_0007/       the run directory of trial 7, and the lock of the process that trains it

All locks are flock's, which end with their process. So a trial that the journal calls running and
whose lock is free has lost its process: the next that asks for work goes on with it, from its
checkpoint. There is no heartbeat, and no time to wait for.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import fcntl
import os
import pathlib
from typing import Any, IO

import numpy as np

from lm.commands import sweep_space
from lm.commands.sweep_space import Parameter
from lm.errors import UserError
from lm.training import checkpoint

NAME, JOURNAL = 'sweep', 'study.journal'
MOST_STARTS = 3  # from one checkpoint: a trial that takes all memory shall not kill for ever
MIN_TRIALS = 4  # of which one is the better quarter
REDUCTION = 4  # of ASHA: the best quarter goes on (arXiv:1810.05934, section 4)

Point = tuple[dict[str, Any], dict[str, Any]]  # parameters, notes


@dataclasses.dataclass
class Trial:
  """A trial that this process holds.

  bindings: what it adds to the configuration.  notes: what was written down of it.
  """
  number: int
  bindings: list[tuple[str, str]]
  directory: pathlib.Path
  notes: Mapping[str, Any]
  optuna: Any
  lock: IO[str]


class Study:
  """The study in a directory.

  settings: what was written down when it began, the same in every process that shares it.
  """

  def __init__(self, directory: pathlib.Path):
    self._optuna = import_optuna()
    self.directory, journal = directory, directory / JOURNAL
    try:
      directory.mkdir(parents=True, exist_ok=True)
      backend = self._optuna.storages.journal.JournalFileBackend(str(journal), _Lock(journal))
      with self.alone():
        self._study = self._optuna.create_study(
            storage=self._optuna.storages.JournalStorage(backend), study_name=NAME,
            load_if_exists=True)
    except OSError as error:
      raise UserError(f'--run_dir={directory} cannot hold a study ({error.strerror}); choose a '
                      'directory on a disk that is writable and not full') from error

  @property
  def settings(self) -> dict[str, Any]:
    """As the command that began the study wrote them down; empty before."""
    return self._study.user_attrs.get('settings', {})

  @settings.setter
  def settings(self, value: Mapping[str, Any]):
    self._study.set_user_attr('settings', dict(value))

  @property
  def trials(self) -> list[Any]:
    """All of them, as Optuna's FrozenTrial, in the order in which they began; to be read alone."""
    return self._study.get_trials(deepcopy=False)

  @contextlib.contextmanager
  def alone(self) -> Iterator[None]:
    """Keeps other processes from claiming trials and from changing settings."""
    with open(self.directory / '.study_lock', 'w') as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      yield

  def claim(self, space: Sequence[Parameter], sampler: str,
            following: Callable[[list[Any]], Point | None]) -> Trial | None:
    """Takes a trial that lost its process, else a new one; None where nothing is left to begin.

    Args:
      following: says what comes after the trials that are there, as parameters that are not left to
        the sampler and notes; None for nothing.
    """
    with self.alone():
      for frozen in self.trials:
        if frozen.state.name == 'RUNNING':
          trial = self._take(frozen, space)
          if trial is not None and self._may_start(trial):
            return trial
      trials = self.trials
      if not any(trial.state.name == 'WAITING' for trial in trials):
        point = following(trials)
        if point is None:
          return None
        self._study.enqueue_trial(*point)
      # A sampler of its own for every trial: what it chooses depends on the trials before alone,
      # and no two processes choose by the same random numbers.
      self._study.sampler = self._sampler(sampler, len(trials))
      trial = self._take(self.trials[self._study.ask().number], space)
      self._may_start(trial)
      return trial

  def _sampler(self, name: str, number: int) -> Any:
    samplers = self._optuna.samplers
    seed = int(np.random.SeedSequence(number).generate_state(1)[0])
    if name == 'tpe':
      return samplers.TPESampler(seed=seed)
    if name == 'cmaes':
      return samplers.CmaEsSampler(seed=seed)
    return samplers.RandomSampler(seed=seed)

  def _take(self, frozen: Any, space: Sequence[Parameter]) -> Trial | None:
    """A running trial, unless another process holds it."""
    directory = self.directory / f'trial_{frozen.number:04}'
    directory.mkdir(exist_ok=True)
    lock = open(directory / '.trial_lock', 'w')
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      lock.close()
      return None
    trial = self._optuna.trial.Trial(self._study, frozen._trial_id)
    bindings = [(parameter.name, sweep_space.text(parameter.suggest(trial))) for parameter in space]
    notes = trial.user_attrs
    bindings += [tuple(pair) for pair in notes.get('bindings', ())]
    return Trial(frozen.number, bindings, directory, notes, trial, lock)

  def _may_start(self, trial: Trial) -> bool:
    """Counts a start; a trial whose last starts all began at one checkpoint has failed."""
    steps = checkpoint.list_steps(trial.directory / 'checkpoints')
    starts = [*trial.notes.get('starts', ()), steps[-1] if steps else 0]
    if starts[-MOST_STARTS - 1:] == [starts[-1]] * (MOST_STARTS + 1):
      self.finish(trial, 'FAIL', error=f'its process died {MOST_STARTS} times after step '
                                       f'{starts[-1]}; of too little memory?')
      return False
    trial.optuna.set_user_attr('starts', starts)
    return True

  def report(self, trial: Trial, step: int, loss: float):
    """Writes down a validation loss, once."""
    if step not in self.trials[trial.number].intermediate_values:
      trial.optuna.report(loss, step)

  def gives_up(self, trial: Trial, min_resource: int) -> bool:
    """Whether ASHA ends a trial: at rungs of `min_resource` steps times powers of 4 the best
    quarter of all that came there goes on."""
    self._study.pruner = self._optuna.pruners.SuccessiveHalvingPruner(min_resource, REDUCTION)
    return trial.optuna.should_prune()

  def finish(self, trial: Trial, state: str, loss: float | None = None, **notes: Any):
    """Writes down how a trial ended: COMPLETE with its loss, PRUNED or FAIL."""
    for name, value in notes.items():
      trial.optuna.set_user_attr(name, value)
    self._study.tell(trial.number, loss, self._optuna.trial.TrialState[state])
    self.release(trial)

  def release(self, trial: Trial):
    """Leaves a trial to whoever claims it next."""
    trial.lock.close()

  def importances(self) -> dict[str, float]:
    """Of the parameters, by PED-ANOVA (arXiv:2304.10255), adding to 1: how much each tells the
    better quarter of the trials from the others. It asks for their order alone, and a trial that
    was given up comes after those that went further. Empty where there are too few to say."""
    ended = [t for t in self.trials if t.state.name in ('COMPLETE', 'PRUNED') and t.params]
    if len(ended) < MIN_TRIALS:
      return {}
    ended.sort(key=lambda trial: (-trial.last_step, trial.value))
    ranks, create = self._optuna.create_study(), self._optuna.trial.create_trial
    ranks.add_trials([create(params=trial.params, distributions=trial.distributions, value=rank)
                      for rank, trial in enumerate(ended)])
    evaluator = self._optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    found = self._optuna.importance.get_param_importances(ranks, evaluator=evaluator)
    return {name: float(value) for name, value in found.items()}


class _Lock:
  """Of the journal: flock's, so that who is killed gives it back; cuts off what such a one tore."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._file = None

  def acquire(self) -> bool:
    """Waits for the lock."""
    file = open(self._path, 'rb+')
    fcntl.flock(file, fcntl.LOCK_EX)
    end = file.seek(0, os.SEEK_END)
    if end:
      file.seek(end - 1)
      if file.read() != b'\n':
        file.seek(0)
        file.truncate(file.read().rfind(b'\n') + 1)
    self._file = file
    return True

  def release(self):
    """Gives it back."""
    self._file.close()


def import_optuna() -> Any:
  """Optuna, silent but for errors."""
  try:
    import cmaes  # of CmaEsSampler, which would say so late
    import optuna
    del cmaes
  except ModuleNotFoundError as error:
    raise UserError(f'`lm sweep` needs the package {error.name}; pip install "lm[search]"'
                    ) from error
  optuna.logging.set_verbosity(optuna.logging.ERROR)
  return optuna
