"""`lm train --seeds=K`: the same run with K seeds, and what its metrics are over them.

    D/seed-0/, D/seed-1/, ...   runs as all others, for every command that takes --run_dir
    D/seeds.json                mean, standard deviation, 95 % interval and values of each metric

The same command goes on where it stopped; with a larger K it adds seeds.
"""
import argparse
import json
import pathlib
from typing import Any

from lm import run
from lm.errors import UserError
from lm.evaluation import compare, report
from lm.parallel.distributed import Hosts

FILE = 'seeds.json'


def train(args: argparse.Namespace, bindings: list[tuple[str, str]], hosts: Hosts
          ) -> dict[str, Any]:
  """Trains with seeds 0 to K - 1, one after the other.

  Returns what `lm compare` finds of these runs, which are one line of it, and `stopped_by` (None,
  or the signal's name).

  Raises:
    UserError: K is below 1, SEED is bound besides, or the directory is that of a single run.
  """
  directory = pathlib.Path(args.run_dir)
  if args.seeds < 1:
    raise UserError(f'--seeds={args.seeds} must be at least 1')
  if any(name == 'SEED' for name, _ in bindings):
    raise UserError('--seeds binds SEED, and --gin.SEED binds it again; give one of them')
  if (directory / 'checkpoints').exists():
    raise UserError(f'--run_dir={directory} is the directory of a run; give the seeds their own')
  runs = [directory / f'seed-{seed}' for seed in range(args.seeds)]
  first = runs[0] / 'config.gin'
  gin_files = args.gin_file or ([str(first)] if first.exists() else [])
  for seed, place in enumerate(runs):
    experiment = run.open_experiment(gin_files, [*bindings, ('SEED', str(seed))], str(place))
    result = run.train(experiment, str(place), hosts)
    if result['stopped_by']:
      return {'stopped_by': result['stopped_by'], 'steps': result['steps'], 'run_dir': str(place)}
  found = compare.compare(list(map(str, runs)))
  if hosts.is_main:
    report.write(directory / FILE, json.dumps(found, indent=1) + '\n')
  return found | {'stopped_by': None}


def tell(result: dict[str, Any], directory: str) -> None:
  """Prints the metrics, a line each."""
  if result['stopped_by']:
    print(f'stopped by {result["stopped_by"]} in {result["run_dir"]} after step '
          f'{result["steps"]}, which is saved; the same command continues')
    return
  one, *others = result['groups']
  for name, found in one['metrics'].items():
    width = found['half_width']
    spread = '' if width is None else (
        f' ± {found["std"]:.4f}, 95 % of the mean {found["mean"] - width:.4f} to '
        f'{found["mean"] + width:.4f}')
    print(f'{name}: {found["mean"]:.4f}{spread} ({len(found["values"])} seeds)')
  if others:
    print('warning: these runs differ in more than the seed; lm compare says in what')
  print(f'seeds: {pathlib.Path(directory) / FILE}')
