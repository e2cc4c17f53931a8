"""`lm evaluate`: a run's held-out files, its task's examples, or those of other tasks."""
import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

from lm import config, run
from lm.commands import harness
from lm.data import vocabularies
from lm.data.examples import ExampleTask, PreparedExamples
from lm.errors import UserError
from lm.evaluation import predictions, report, task_compare, task_report
from lm.parallel.distributed import Hosts

FEW = 5  # classes up to which each is told by itself; all stand on the page of the task
SIGNED = 'bleu', 'chrf', 'ter'  # are cited with sacrebleu's signature (Post 2018)


def execute(experiment: run.Experiment, args: argparse.Namespace, hosts: Hosts) -> dict[str, Any]:
  """Evaluates; all hosts call it.

  Args:
    args: harness, or tasks and split; run_dir.

  Returns:
    {task: {metric: value}}, of examples with the step.
  """
  if args.harness:
    return harness.execute(experiment, args, hosts)
  split, is_own = args.split or 'validation', not args.tasks
  if not isinstance(experiment.task, ExampleTask) and is_own:
    if args.split:
      raise UserError(f'--split={split} is of labelled examples, and the run {args.run_dir} has '
                      'texts, of which the held-out ones are scored; name --tasks, or leave it out')
    return run.evaluate(experiment, args.run_dir, hosts=hosts)
  trained = _trained_on(experiment, is_own, hosts)
  tasks = [_other(experiment, name, trained, args.run_dir, hosts) for name in args.tasks]
  names = [prepared.task.name for prepared in tasks]
  if twice := [name for name in names if names.count(name) > 1]:
    raise UserError(f'two of --tasks have the name {twice[0]!r}, under which predictions are kept; '
                    'bind ExampleTask.name of one to another')
  return run.evaluate_examples(experiment, args.run_dir, tasks or [trained], (split,), trained,
                               hosts)


def _trained_on(experiment: run.Experiment, is_needed: bool, hosts: Hosts
                ) -> PreparedExamples | None:
  """The run's own examples; None where it has none or, unless they are needed, none at hand."""
  if not isinstance(experiment.task, ExampleTask):
    return None

  def prepare():
    try:
      return experiment.task.prepare()
    except UserError as error:
      if is_needed:
        raise
      print(f'warning: what the run was trained on is not compared with the tasks: {error}',
            file=sys.stderr)
      return None
  return hosts.main_first('the data', prepare)


def path_of(task: str) -> str:
  """The gin file of a task that --tasks names."""
  return task if task.endswith('.gin') else f'gin/tasks/{task}.gin'


def _other(experiment: run.Experiment, name: str, trained: PreparedExamples | None, run_dir: str,
           hosts: Hosts) -> PreparedExamples:
  """Another task, by its name; see `as_answered`."""
  path = path_of(name)
  task = config.value(path, 'TASK', True) or config.value(path, 'run.Experiment.task', True)
  if not isinstance(task, ExampleTask):
    raise UserError(f'--tasks={name}: {path} binds no examples.ExampleTask to TASK, so there are '
                    'no examples to evaluate; name a file that does')
  return as_answered(experiment, task, trained, run_dir, hosts)


def as_answered(experiment: run.Experiment, task: ExampleTask, trained: PreparedExamples | None,
                run_dir: str, hosts: Hosts = Hosts()) -> PreparedExamples:
  """A task in the form that the run's model answers, and with the run's vocabulary.

  Where a head answers, the labels are those that the run's own task has (`trained`), in their
  order.
  """
  task = dataclasses.replace(task, cache_dir=experiment.task.cache_dir)
  task = predictions.as_asked(task, type(experiment.model).__name__)
  if task.form == 'encoder' and trained and trained.kind.labelled and (
      trained.kind.name == task.kind.name):
    task = predictions.with_labels(task, trained.kind.labels)
  vocabulary = vocabularies.load(pathlib.Path(run_dir) / 'vocabulary')
  prepare = lambda: task.prepare(vocabulary=vocabulary)
  prepared = hosts.main_first(f'the data of {task.name}', prepare)
  if prepared.vocab_size > experiment.model.vocab_size:
    raise UserError(f'{task.name!r} in the form {task.form!r} needs {prepared.vocab_size} ids and '
                    f'the model has vocab_size={experiment.model.vocab_size}; evaluate it with a '
                    'run of a larger one')
  return prepared


def compare(first: str, second: str, page: str | None) -> dict[str, Any]:
  """Compares the predictions of two runs, and writes a page of it if one is named."""
  result = task_compare.compare_runs(first, second, progress=True)
  print(task_compare.markdown(result), end='')
  if page:
    print(f'page: {task_compare.write(result, pathlib.Path(page))}')
  return result


def tell(result: dict[str, Any], run_dir: str):
  """Prints what `execute` found."""
  for name, metrics in result.items():
    _tell(name, metrics)
  pages = sorted(pathlib.Path(run_dir).glob('predictions/*.html'))
  told = [page for page in pages if page.stem.rpartition('-')[0] in result]
  if told:
    print('pages: ' + ' '.join(map(str, told)))
  for page in told:
    notes = (report.read_json(page.with_suffix('.json')) or {}).get('notes', {})
    for name in SIGNED:
      if name in notes:
        print(f'{page.stem}: {name} is {notes[name]}')


def tell_standing(run_dir: str):
  """Prints the evaluation that stands in a run's directory, if there is one."""
  path = pathlib.Path(run_dir) / 'evaluation.json'
  evaluation = json.loads(path.read_text()) if path.exists() else {}
  for name, metrics in evaluation.pop('tasks', {}).items():
    _tell(name, metrics)
  if len(evaluation) > 1:
    _tell('held-out files', evaluation)


def _tell(name: str, metrics: dict[str, Any]):
  if 'files' not in metrics:
    shown = task_report.headline(metrics)  # not those of one class
    print(f'{name}: ' + ', '.join(f'{key.replace("_", " ")} {metrics[key]:.4g}' for key in shown))
    classes = [key.partition('/')[2] for key in metrics if key.startswith('recall/')]
    for label in classes if len(classes) <= FEW else ():
      print(f'  {label}: ' + ', '.join(f'{kind} {metrics[f"{kind}/{label}"]:.4g}'
                                       for kind in ('precision', 'recall', 'f1')))
    return
  print(f'{name}: {metrics["bits_per_byte"]:.3f} bits per byte; file by file gzip -9 needs '
        f'{metrics["gzip_bits_per_byte"]:.3f} and xz -9 {metrics["xz_bits_per_byte"]:.3f}; the '
        f'model beats both on {metrics["wins"]} of {len(metrics["files"])}; '
        f'all in one xz: {metrics["xz_together_bits_per_byte"]:.3f}')
