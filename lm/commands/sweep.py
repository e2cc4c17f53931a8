"""`lm sweep`: many runs of one experiment, to find its best values or its scaling law.

    lm sweep --gin_file=F --run_dir=DIR --trials=30 --gin.LEARNING_RATE='log(1e-4, 1e-1)'

Bindings that are distributions (`sweep_space.py`) are the search space, and the validation loss of
the last step is what is minimised. The study is a file in DIR (`sweep_study.py`): the same command,
or `lm sweep --run_dir=DIR` alone, goes on with it, also in several processes at once. Each trial is
a run in DIR/trial_NNNN, for every command that takes --run_dir. `--scaling_law`: sweep_scaling.py.
"""
import argparse
import itertools
import json
import pathlib
import sys
import traceback
from typing import Any

import jax

from lm import config, run
from lm.commands import sweep_scaling, sweep_space
from lm.commands.sweep_study import import_optuna, JOURNAL, Study, Trial
from lm.errors import UserError
from lm.evaluation import report, scaling_report, search_report
from lm.training import monitor

TRIALS = 20
MAY_CHANGE = 'trials', 'target_flops'  # while a study goes on
HOW = 'gin_files', 'bindings'  # how `config` was said


class _GivenUp(Exception):
  """Ends the run of a trial that ASHA prunes."""


def execute(args: argparse.Namespace, bindings: list[tuple[str, str]]) -> dict[str, Any]:
  """Trains until the study has all its trials, and returns what --json holds; sweep.html stands
  after every trial.

  Raises:
    UserError: the space or the configuration is wrong, the study is another one, or no trial came
      to its end.
  """
  import_optuna()
  if args.run_dir is None:
    raise UserError('`lm sweep` needs --run_dir=DIR, where the study is or shall be')
  directory = pathlib.Path(args.run_dir)
  if (directory / 'checkpoints').exists():
    raise UserError(f'--run_dir={directory} is the directory of a run; give the study its own')
  if not args.gin_file and not (directory / JOURNAL).exists():
    raise UserError(f'--run_dir={directory} holds no study; begin one with --gin_file=FILE')
  asked = _asked(args, bindings) if args.gin_file else {}
  study = Study(directory)
  settings = _agree(study, args, asked)
  _, space = sweep_space.split(settings['bindings'])
  following = (sweep_scaling.following if settings['flops'] else _following)(settings)
  stopped_by = None
  while not stopped_by:
    trial = study.claim(space, settings['sampler'], following)
    if trial is None:
      break
    stopped_by = _train(study, trial, settings)
    _write(directory, summary(study, settings))
  result = summary(study, settings) | {'stopped_by': stopped_by}
  _write(directory, result)
  return _told(result, directory)


def _asked(args, bindings) -> dict[str, Any]:
  """The settings that this command asks for, checked by building every edge of the space."""
  if args.scaling_law != bool(args.flops) or args.target_flops and not args.flops:
    raise UserError('--scaling_law and --flops=C1,C2,... belong together, and --target_flops to '
                    'them; give both')
  for name in ('trials', 'flops', 'ratios', 'target_flops'):
    given = getattr(args, name)
    if given is not None and min(given if isinstance(given, list) else [given]) <= 0:
      raise UserError(f'--{name}={given} must be above 0')
  _, space = sweep_space.split(bindings)
  settings = {'gin_files': args.gin_file, 'bindings': bindings, 'sampler': args.sampler,
              'pruner': args.pruner, 'trials': args.trials or TRIALS, 'flops': args.flops,
              'ratios': args.ratios, 'size': args.size, 'target_flops': args.target_flops,
              'space': {parameter.name: parameter.text() for parameter in space}}
  if args.flops:
    if space:
      raise UserError(f'--gin.{space[0].name}: with --scaling_law the sizes and the lengths are '
                      'the space; give it one value')
    return _plain(settings | sweep_scaling.points(settings))
  if not space:
    raise UserError('there is nothing to search; give a binding a distribution, such as '
                    "--gin.LEARNING_RATE='log(1e-4, 1e-2)'")
  if args.sampler == 'cmaes' and (len(space) < 2 or any(p.kind == 'choice' for p in space)):
    raise UserError('--sampler=cmaes needs two numbers to search or more, and no choice; take tpe')
  if args.sampler == 'grid' and not args.trials:
    settings['trials'] = len(list(sweep_space.grid(space)))
  base = {parameter.name: parameter.edges()[0] for parameter in space}
  points = [base | {parameter.name: edge} for parameter in space for edge in parameter.edges()]
  for point in [*points, base]:
    experiment = open_experiment(settings, _bindings(point))
  if args.pruner == 'asha' and experiment.train.eval_every >= experiment.train.num_steps:
    raise UserError('--pruner=asha needs validation losses before the last step, '
                    f'{experiment.train.num_steps}; lower EVAL_EVERY')
  return _plain(settings | {'config': config.text(), 'min_resource': experiment.train.eval_every})


def _plain(settings):
  """As the journal will give it back: tuples are lists."""
  return json.loads(json.dumps(settings))


def _bindings(point):
  return [(name, sweep_space.text(value)) for name, value in point.items()]


def open_experiment(settings: dict[str, Any], bindings: list[tuple[str, str]]) -> run.Experiment:
  """The experiment at one point of the space."""
  fixed, _ = sweep_space.split(settings['bindings'])
  return run.open_experiment(settings['gin_files'], [*fixed, *bindings], None)


def _agree(study, args, asked) -> dict[str, Any]:
  """The study's settings, which are those of the command that began it.

  Raises:
    UserError: this command asks for another study.
  """
  with study.alone():
    standing = study.settings
    if not standing and not asked:
      raise UserError(f'--run_dir={study.directory} holds a study that was never begun; give '
                      '--gin_file=FILE')
    for name, value in asked.items():
      if standing and name not in HOW + MAY_CHANGE and standing.get(name) != value:
        raise UserError(f'--run_dir={study.directory} holds a study with another {name} '
                        f'({_difference(standing.get(name), value)}); take its own, or another '
                        'directory')
    given = {name: getattr(args, name) for name in MAY_CHANGE if getattr(args, name) is not None}
    study.settings = settings = (standing or asked) | given
    return settings


def _difference(old, new):
  """The first line of two texts that differs."""
  lines = [value.splitlines() if isinstance(value, str) else [str(value)] for value in (old, new)]
  return next(f'{a!r}, here {b!r}' for a, b in itertools.zip_longest(*lines) if a != b)


def _following(settings):
  """What comes after some trials: the next of the grid, or what the sampler chooses."""
  _, space = sweep_space.split(settings['bindings'])
  grid = list(sweep_space.grid(space)) if settings['sampler'] == 'grid' else None

  def following(trials):
    number = len(trials)
    if number >= (settings['trials'] if grid is None else min(settings['trials'], len(grid))):
      return None
    return ({} if grid is None else grid[number]), {}
  return following


def _train(study: Study, trial: Trial, settings: dict[str, Any]) -> str | None:
  """Runs a trial to its end, whatever that is; returns the signal that stopped it, or None."""
  say = lambda text: print(f'trial {trial.number}: {text}', file=sys.stderr, flush=True)
  say(', '.join(f'{name}={value}' for name, value in trial.bindings))

  def watch(step, metrics):
    study.report(trial, step, metrics['loss'])
    if (settings['pruner'] == 'asha' and step < experiment.train.num_steps
        and study.gives_up(trial, settings['min_resource'])):
      raise _GivenUp(f'the search gives this trial up after step {step}')

  def fail(why):
    say(f'failed: {why}')
    study.finish(trial, 'FAIL', error=why)

  try:
    experiment = open_experiment(settings, trial.bindings)
    result = run.fit(experiment, str(trial.directory), on_validation=watch)
    if result['stopped_by']:
      study.release(trial)
      return result['stopped_by']
    losses = [row['loss'] for row in monitor.read_rows(trial.directory / monitor.METRICS)
              if row['split'] == 'validation']
    study.finish(trial, 'COMPLETE', losses[-1])
    say(f'validation loss {losses[-1]:.4f}')
  except _GivenUp:
    study.finish(trial, 'PRUNED')
    say('given up')
  except UserError as error:
    if isinstance(error.__cause__, OSError):  # the disk's fault, which other trials would meet too
      study.release(trial)
      raise
    fail(str(error))
  except Exception as error:  # of memory, of a compiler, of a bug: one trial's, not the study's
    traceback.print_exc()
    fail(f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]}')
  finally:
    jax.clear_caches()  # the next trial's programs are others
  return None


def summary(study: Study, settings: dict[str, Any]) -> dict[str, Any]:
  """What --json and sweep.json hold: trials, the best, importances; of a scaling law its fit."""
  trials = [{
      'number': trial.number, 'state': trial.state.name.lower(), 'loss': trial.value,
      'values': trial.params, 'curve': sorted(trial.intermediate_values.items()),
      'run_dir': str(study.directory / f'trial_{trial.number:04}'), **trial.user_attrs}
            for trial in study.trials]
  complete = [trial for trial in trials if trial['state'] == 'complete']
  result = {'settings': settings, 'trials': trials,
            'best': min(complete, key=lambda trial: trial['loss'], default=None)}
  if settings['flops']:
    return result | {'law': sweep_scaling.law(trials)}
  return result | {'importances': study.importances()}


def _write(directory, result):
  page = (scaling_report if result['settings']['flops'] else search_report).page(result)
  report.write(directory / 'sweep.json', json.dumps(result, indent=1) + '\n')
  return report.write(directory / 'sweep.html', page)


def _told(result, directory):
  """Prints what came of it, and returns it with the path of its page."""
  page = directory / 'sweep.html'
  count = lambda state: sum(trial['state'] == state for trial in result['trials'])
  print(', '.join(f'{count(state)} {word}' for state, word in (
      ('complete', 'complete'), ('pruned', 'given up'), ('fail', 'failed'),
      ('running', 'running elsewhere')) if count(state)))
  if result['stopped_by']:
    print(f'stopped by {result["stopped_by"]}; the same command continues')
  elif result['best'] is None and not count('running'):
    errors = [trial['error'] for trial in result['trials'] if 'error' in trial]
    raise UserError(f'no trial of {directory} came to its end; the last says: '
                    f'{(errors or ["given up"])[-1]}')
  elif result['settings']['flops']:
    print(scaling_report.text(result))
  elif result['best']:
    best = result['best']
    values = ', '.join(f'{name}={value}' for name, value in best['values'].items())
    print(f'best validation loss {best["loss"]:.4f}, of {values}: {best["run_dir"]}')
    for name, share in result['importances'].items():
      print(f'{100 * share:5.1f} % of the importance: {name}')
  print(f'report: {page}')
  return result | {'report': str(page)}
