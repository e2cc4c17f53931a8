"""All optimisers on one task, at equal tokens: a table and the curves.

  python scripts/optimizer_bakeoff.py --out=runs/bakeoff            # all of gin/optim
  python scripts/optimizer_bakeoff.py --out=runs/bakeoff adamw soap --seeds=5

A small GPT reads the bytes of Python's standard library, or of --files. Each optimiser first runs
once with each of three learning rates, a factor of three apart, around the one below; the best by
validation loss then runs with the other seeds, which decide parameters and the order of the data.
A * in the table is a best rate at the end of the grid. `results.json` holds all curves, and a run
that stands there is not repeated. Drawing needs matplotlib (the extra `test`).

Seen with 200 steps, three seeds and rates up to the * (validation loss, nats a byte, +- standard
deviation): muon 1.814* +- 0.011, adafactor 2.029* 0.015, soap 2.058* 0.024, lamb 2.071 0.033,
schedule_free 2.123* 0.025, adam 2.235 0.025, adamw 2.265 0.007, rmsprop 2.343* 0.006, lion 2.573*
0.043, sgd 2.618 0.034, sophia 2.634 0.046, adagrad 2.742* 0.024. So short a run says little of long
ones, least of Lion and Sophia. RATES have been moved to the best ones since.
"""
import argparse
import json
import pathlib
import statistics
import tempfile
import time

import jax

from lm import config, run
from lm.training import monitor
from lm.training.state import abstract_state

# Learning rates in the middle of the grid.
RATES = {'sgd': 0.3, 'adam': 3e-3, 'adamw': 3e-3, 'adagrad': 0.1, 'rmsprop': 1e-3, 'lion': 3e-3,
         'adafactor': 0.1, 'lamb': 0.03, 'muon': 0.03, 'sophia': 3e-3, 'soap': 0.01,
         'schedule_free': 3e-3}
GRID = -1, 0, 1  # powers of three


def experiment_of(optimizer: str, rate: float, seed: int, args) -> run.Experiment:
  """The run of one optimiser."""
  parts = 'models/gpt_small_cpu', 'objectives/causal_lm', f'optim/{optimizer}', 'runs/pretrain'
  bindings = {'vocabularies.VocabularyConfig.kind': "'byte'", 'VOCAB_SIZE': 259,
              'gpt.GPTConfig.d_model': args.d_model, 'gpt.GPTConfig.num_layers': args.num_layers,
              'gpt.GPTConfig.d_ff': 11 * args.d_model // 4, 'SEQUENCE_LENGTH': 128,
              'BATCH_SIZE': 16, 'NUM_STEPS': args.steps, 'WARMUP_STEPS': args.steps // 10,
              'EVAL_EVERY': args.steps, 'CHECKPOINT_EVERY': args.steps, 'LEARNING_RATE': rate,
              'SEED': seed, 'loop.TrainConfig.eval_batches': 16, 'FILES': repr(args.files)}
  config.parse([f'gin/{name}.gin' for name in parts],
               [(name, str(value)) for name, value in bindings.items()])
  return config.build(run.Experiment)


def trained(experiment: run.Experiment) -> dict:
  """Curve, validation loss, milliseconds a step and bytes of state a parameter of one run."""
  rules = experiment.bound_rules()
  state = abstract_state(experiment.build_model(rules), experiment.build_optimizer(), rules)
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  with tempfile.TemporaryDirectory() as folder:
    start = time.perf_counter()
    result = run.fit(experiment, folder)
    seconds = time.perf_counter() - start
    rows = monitor.read_rows(pathlib.Path(folder, monitor.METRICS))
  tokens = experiment.train.batch_size * experiment.train.sequence_length
  return {'losses': result['losses'], 'seconds': seconds,
          'validation': [row['loss'] for row in rows if row['split'] == 'validation'][-1],
          'step_ms': 1e3 * tokens / result['tokens_per_second'],
          'bytes': 4 * size(state.opt_state) / size(state.params)}


def results_of(optimizer: str, args) -> tuple[float, list[dict], bool]:
  """The best learning rate, its results by seed, and whether it is at the end of the grid."""
  path = args.out / 'results.json'
  done = json.loads(path.read_text()) if path.exists() else {}

  def result(rate, seed):
    key = f'{optimizer} {rate:.3g} {seed} {args.steps} {args.d_model} {args.num_layers}'
    if key not in done:
      try:
        done[key] = trained(experiment_of(optimizer, rate, seed, args))
      except run.UserError as error:  # it diverged
        print(f'{key}: {error}', flush=True)
        done[key] = {'validation': float('inf')}
      path.write_text(json.dumps(done))
    return done[key]

  rates = [RATES[optimizer] * 3.0**power for power in GRID]
  best = min(rates, key=lambda rate: result(rate, 0)['validation'])
  return best, [result(best, seed) for seed in range(args.seeds)], best in (rates[0], rates[-1])


def draw(curves: dict[str, list[dict]], path: pathlib.Path):
  """Means over the seeds, each point over the 10 steps around it."""
  import matplotlib
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  plt.figure(figsize=(8, 5))
  for i, (name, results) in enumerate(curves.items()):
    steps = list(zip(*(result['losses'] for result in results)))
    means = [statistics.mean(loss for step in steps[max(0, t - 5):t + 5] for loss in step)
             for t in range(len(steps))]
    plt.plot(means, label=name, linestyle='-' if i < 10 else '--')
  plt.xlabel('step'), plt.ylabel('loss, nats a byte'), plt.yscale('log'), plt.legend(ncol=2)
  plt.savefig(path, dpi=120, bbox_inches='tight')


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('optimizers', nargs='*', default=list(RATES), help='names in gin/optim')
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--d_model', type=int, default=64)
  parser.add_argument('--num_layers', type=int, default=2)
  parser.add_argument('--files', default=None, help="a glob pattern, as 'books/*.txt'")
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  rows, curves = [], {}
  for name in args.optimizers:
    rate, results, is_end = results_of(name, args)
    losses = [result['validation'] for result in results]
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    step_ms = statistics.median(result['step_ms'] for result in results)
    rows.append((statistics.mean(losses), f'| {name} | {rate:.3g}{"*" * is_end} | '
                 f'{statistics.mean(losses):.3f} | {spread:.3f} | {step_ms:.0f} | '
                 f'{results[0]["bytes"]:.1f} |'))
    curves[name] = results
    print(rows[-1][1], flush=True)
  table = '\n'.join(['| optimiser | learning rate | validation loss | std of seeds | ms a step | '
                     'bytes of state |', '|---|---|---|---|---|---|',
                     *(text for _, text in sorted(rows))])
  (args.out / 'table.md').write_text(table + '\n')
  draw(dict(sorted(curves.items(), key=lambda item: curves[item[0]][0]['validation'])),
       args.out / 'curves.png')
  print(table)


if __name__ == '__main__':
  main()
