"""What watching a run costs: norms by group, rows, tables, the probe and the live report.

  python scripts/benchmark_watching.py                # the quickstart's model, about three minutes
  python scripts/benchmark_watching.py --gin_file=F --rounds=300

One process has two programs of the train step, with the norms and without them, and runs them in
turn, forwards then backwards, so that a slow minute of the machine hits both alike. The watched
step also writes its row to metrics.jsonl, TensorBoard and a CSV file, before it ends: in a run the
last is a thread's. What comes less often is timed by itself, and its share is that of the run's own
cadence: rows of norms every `watch_every` steps, the probe every `eval_every`, a page every half
minute.

Seen of the quickstart on two cores that nothing else used: the watched step takes 0.995 of the
other (150 pairs), the probe 0.26 % and pages 0.03 %: all together nothing that can be told from
noise. On the same cores with five to ten other programs: 0.5 %, 1.3 % and 2.2 %.
"""
import argparse
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
import optax

from lm import run
from lm.data.loader import Loader
from lm.evaluation import live
from lm.training import monitor, norms, probe, writers
from lm.training import state as state_lib
from lm.training import step as step_lib


class Rows:
  """Random tokens, a document a row."""

  def __init__(self, vocab_size, length):
    self.shape = vocab_size, length

  def __len__(self):
    return 1000

  def __getitem__(self, row):
    vocab_size, length = self.shape
    ids = np.random.default_rng(row).integers(1, vocab_size, length + 1).astype(np.int32)
    return {'decoder_input_tokens': ids[:-1], 'decoder_target_tokens': ids[1:],
            'decoder_loss_weights': np.ones(length, np.float32),
            'decoder_segment_ids': np.ones(length, np.int32),
            'decoder_positions': np.arange(length, dtype=np.int32)}


class Session:
  """A state and the program of its step."""

  def __init__(self, experiment, module, loader, is_watched):
    rules, optimizer = module.rules, experiment.build_optimizer()
    self.state = state_lib.init_state(module, optimizer, rules, 0)
    batch = loader.batch(0)
    by_group = norms.by_group
    if not is_watched:
      norms.by_group = lambda grads, *_: (optax.tree.norm(grads), {})
    start = time.perf_counter()
    step = step_lib.jit_train_step(module, experiment.loss, optimizer, rules, self.state)
    self.step = step.lower(self.state, batch).compile()
    self.compile_seconds = time.perf_counter() - start
    norms.by_group = by_group

  def run(self, batch, after):
    """Seconds of a step and of what follows it, and its norms."""
    start = time.perf_counter()
    self.state, metrics = self.step(self.state, batch)
    found = metrics.pop('norms')
    after({name: float(value) for name, value in metrics.items()})
    return time.perf_counter() - start, found


def seconds(function, times=5):
  """The median time of a call."""
  found = []
  for _ in range(times):
    start = time.perf_counter()
    function()
    found.append(time.perf_counter() - start)
  return statistics.median(found)


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--gin_file', default='gin/experiments/quickstart.gin')
  parser.add_argument('--rounds', type=int, default=150, help='timed steps of each')
  args = parser.parse_args()
  experiment = run.open_experiment([args.gin_file], [], None)
  settings = experiment.train
  module = experiment.build_model(experiment.bound_rules())
  loader = Loader.of_rows(Rows(experiment.model.vocab_size, settings.sequence_length),
                          settings.batch_size)
  sessions = {name: Session(experiment, module, loader, name == 'on') for name in ('off', 'on')}
  times = {name: [] for name in sessions}
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    own, table = monitor.MetricsWriter(folder), writers.CSV()
    table.open(folder, 0)
    page = live.LiveReport(10 * settings.num_steps)

    def keep(split, step, row):
      own.write(step, split, row)
      table.write(step, split, monitor.flat({name: np.asarray(x).tolist()
                                             for name, x in row.items()}))

    for i in range(args.rounds + 2):
      for name in ('off', 'on')[::1 if i % 2 else -1]:
        after = (lambda row: keep('train', i + 1, row)) if name == 'on' else (lambda row: None)
        took, found = sessions[name].run(loader.batch(i), after)
        if i > 1:
          times[name].append(took)
        if name == 'on':
          by_group = found
    params = sessions['on'].state.params
    measure = probe.Probe(module, loader)
    found, steps = measure(params), range(settings.watch_every, 16 * settings.watch_every + 1,
                                          settings.watch_every)
    extra = {  # seconds, and of how many steps, or of how many seconds
        'norms': (seconds(lambda: keep('norms', 1, jax.device_get(by_group))),
                  settings.watch_every),
        'probe': (seconds(lambda: keep('probe', 1, measure(params))), settings.eval_every)}
    for step in range(args.rounds, settings.num_steps):  # a page of the whole run
      own.write(step, 'train', {'loss': 1.0, 'grad_norm': 1.0, 'learning_rate': 1.0, 'mfu': 0.1})
    for step in steps:
      own.write(step, 'norms', jax.device_get(by_group))
      own.write(step, 'probe', found)
    page.open(folder, 0)
    one_page = seconds(lambda: page._update('live'))
    size = (folder / 'report.html').stat().st_size
    own.close()
  off = statistics.median(times['off'])
  ratio = statistics.median(a / b for a, b in zip(times['on'], times['off']))
  shares = {name: took / (every * off) for name, (took, every) in extra.items()}
  shares['page'] = one_page / live.SECONDS
  print(f'step            {1000 * off:.1f} ms, watched {1000 * statistics.median(times["on"]):.1f}'
        f' ms, ratio {ratio:.4f} (median of {args.rounds} pairs)')
  for name, (took, every) in extra.items():
    print(f'{name:15} {1000 * took:.1f} ms every {every} steps: {100 * shares[name]:.2f} %')
  print(f'page            {1000 * one_page:.1f} ms every {live.SECONDS:.0f} s, in a thread: '
        f'{100 * shares["page"]:.2f} %; {size:,} bytes')
  print(f'compiling       {sessions["off"].compile_seconds:.1f} s, watched '
        f'{sessions["on"].compile_seconds:.1f} s')
  print(f'all together    {100 * (ratio - 1 + sum(shares.values())):+.2f} % of a step')


if __name__ == '__main__':
  main()
