"""`lm evaluate --harness`: tasks of lm-evaluation-harness with the checkpoint of a run.

Its own command knows our runs too, as the model type `lm`:

    python -m lm.commands.harness run --model lm --model_args run_dir=R --tasks piqa
"""
import argparse
import json
import pathlib
import sys
from typing import Any

from lm import run
from lm.data import vocabularies
from lm.evaluation import harness
from lm.evaluation.predictions import store
from lm.parallel.distributed import Hosts


def execute(experiment: run.Experiment, args: argparse.Namespace, hosts: Hosts) -> dict[str, Any]:
  """Runs the tasks, and writes harness.json and predictions/TASK-SPLIT.jsonl.

  Args:
    args: harness (names of tasks, or YAML files, with commas between), limit, num_fewshot, run_dir.

  Returns:
    {task: {metric: value}}, by the harness.
  """
  step, module, params = run.load_on_mesh(experiment, args.run_dir, hosts)
  directory = pathlib.Path(args.run_dir)
  answering = harness.model(module, params, vocabularies.load(directory / 'vocabulary'),
                            hosts=hosts)
  result = harness.evaluate(answering, args.harness.split(','), args.limit, args.num_fewshot)
  if hosts.is_main:
    text = json.dumps({'step': step, 'limit': args.limit, 'num_fewshot': args.num_fewshot,
                       'tasks': result.metrics}, indent=1)
    (directory / 'harness.json').write_text(text + '\n')
    (directory / 'predictions').mkdir(exist_ok=True)
    for header, rows in result.predictions:
      name = f'{header["task"]}-{header["split"]}.jsonl'
      store.write(directory / 'predictions' / name, {**header, 'step': step}, rows)
  return result.metrics


def register():
  """Makes `lm` a model type of lm_eval: `run_dir=R`, `batch_size` (rows of 128 tokens at a time)
  and `max_length`."""
  from lm_eval.api.model import LM
  from lm_eval.api.registry import register_model

  @register_model('lm')
  class Run(LM):  # what lm_eval makes; the methods are those of `harness.model`
    """A run of ours."""

    def __new__(cls, run_dir: str, batch_size: int | str | None = None,
                max_length: int | None = None, **others: Any):
      del others  # the harness' own: device, max_batch_size
      experiment = run.open_experiment((), (), run_dir)
      _, module, params = run.load(experiment, run_dir)
      vocabulary = vocabularies.load(pathlib.Path(run_dir) / 'vocabulary')
      return harness.model(module, params, vocabulary, batch_size=int(batch_size or 16),
                           max_length=max_length)
  del Run


if __name__ == '__main__':
  from lm_eval.__main__ import cli_evaluate
  register()
  sys.exit(cli_evaluate())
