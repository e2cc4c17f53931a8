"""Training speed beside PyTorch and beside a hand-written JAX step, interleaved in one run.

  python scripts/benchmark_train.py                        # all that is installed
  python scripts/benchmark_train.py --workers lm:bfloat16,torch_eager:bfloat16 --rounds 12
  python scripts/benchmark_train.py --torch_python PATH    # an interpreter that has torch

6 layers, d_model 512, 8 heads, d_ff 2048, vocabulary 32000, sequence 512, batch 8; forward,
backward and AdamW. Every program is a process of its own, all with the same allocator
(scripts/allocator.sh); one step each in turn, forwards then backwards, so that a slow minute of
the machine hits all alike. Trust the ratios, which pair the steps of a round; a few per
cent are noise.
"""
import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import benchmark_workers as w

HERE = pathlib.Path(__file__).resolve().parent
TOKENS = w.BATCH * w.LENGTH
MATRICES = w.LAYERS * (4 * w.D_MODEL**2 + 2 * w.D_MODEL * w.D_FF) + w.VOCAB * w.D_MODEL
FLOPS = TOKENS * (6 * MATRICES + 12 * w.LAYERS * w.D_MODEL * w.LENGTH)
ALL = ('lm:bfloat16', 'minimal:bfloat16', 'torch_eager:bfloat16', 'torch_compile:bfloat16',
       'lm:float32', 'torch_eager:float32')


class Worker:
  """A program of benchmark_workers.py, in a process of its own."""

  def __init__(self, name: str, python: str, environment: dict[str, str]):
    self.name, self.seconds = name, []
    worker, dtype = name.split(':')
    start = time.perf_counter()
    self.process = subprocess.Popen([python, str(HERE / 'benchmark_workers.py'), worker, dtype],
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                    env=environment)
    self._read('READY')
    self.step(record=False)
    self.first_step_seconds = time.perf_counter() - start

  def _read(self, word: str) -> list[str]:
    for line in self.process.stdout:
      if line.startswith(word):
        return line.split()[1:]
    raise SystemExit(f'{self.name} ended before it answered; its message stands above')

  def step(self, record: bool = True):
    """One training step."""
    self.process.stdin.write('\n')
    self.process.stdin.flush()
    seconds, loss, peak = map(float, self._read('STEP'))
    self.loss, self.peak_rss_mb = loss, peak
    if record:
      self.seconds.append(seconds)

  def close(self):
    """Ends the process."""
    self.process.stdin.close()
    self.process.wait()


def environment(cache: str) -> dict[str, str]:
  """The environment of every worker: the same allocator, and a compilation cache of its own."""
  shell = f'source {HERE}/allocator.sh && env -0'
  lines = subprocess.run(['bash', '-c', shell], capture_output=True, check=True).stdout.decode()
  env = dict(line.split('=', 1) for line in lines.split('\0') if '=' in line)
  return env | {'JAX_COMPILATION_CACHE_DIR': cache, 'TORCHINDUCTOR_CACHE_DIR': f'{cache}/inductor',
                'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
                'PYTHONPATH': f'{HERE.parent}:{HERE}'}


def has_torch(python: str) -> bool:
  """Whether an interpreter can import torch."""
  if python == sys.executable:
    return importlib.util.find_spec('torch') is not None
  return subprocess.run([python, '-c', 'import torch'], capture_output=True).returncode == 0


def peak_of_machine() -> dict[str, float]:
  """The machine's matmul peaks in FLOP/s, measured in a child before anything else runs."""
  code = ('from lm.training import meters; import json\n'
          'print(json.dumps({d: meters.peak_flops(d) for d in ("bfloat16", "float32")}))')
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                       env=os.environ | {'PYTHONPATH': str(HERE.parent)}).stdout
  return json.loads(out.splitlines()[-1])


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--workers', default=','.join(ALL), help='worker:dtype, separated by commas')
  parser.add_argument('--torch_python', default=sys.executable, help='an interpreter with torch')
  parser.add_argument('--rounds', type=int, default=7, help='timed steps of each')
  parser.add_argument('--json', help='write the figures here')
  args = parser.parse_args()
  names = args.workers.split(',')
  if not has_torch(args.torch_python):
    print('torch is not installed here: only our own programs are compared', file=sys.stderr)
    names = [name for name in names if not name.startswith('torch')]
  peaks = peak_of_machine()
  with tempfile.TemporaryDirectory() as cache:
    env = environment(cache)
    python = lambda name: args.torch_python if name.startswith('torch') else sys.executable
    workers = [Worker(name, python(name), env) for name in names]
    cold = {worker.name: worker.first_step_seconds for worker in workers}
    for worker in workers:
      worker.step(record=False)
    for i in range(args.rounds):
      for worker in workers if i % 2 == 0 else workers[::-1]:
        worker.step()
      print(f'\rround {i + 1} of {args.rounds}', end='', file=sys.stderr)
    for worker in workers:
      worker.close()
    warm = {}
    for name in names:
      again = Worker(name, python(name), env)
      warm[name] = again.first_step_seconds
      again.close()
  print(f'\nmeasured peaks: bfloat16 {peaks["bfloat16"] / 1e9:.0f}, float32 '
        f'{peaks["float32"] / 1e9:.0f} GFLOP/s; {FLOPS / 1e9:.0f} GFLOP a step')
  print(f'{"":24} tokens/s    best   MFU  paired with {names[0]:16} peak RSS  first step, warm')
  rows = []
  for worker in workers:
    median, best = statistics.median(worker.seconds), min(worker.seconds)
    ratio = statistics.median(a / b for a, b in zip(workers[0].seconds, worker.seconds))
    mfu = FLOPS / median / peaks[worker.name.split(':')[1]]
    rows.append({'worker': worker.name, 'tokens_per_second': TOKENS / median, 'best': TOKENS / best,
                 'mfu': mfu, 'paired': ratio, 'peak_rss_mb': worker.peak_rss_mb,
                 'first_step_seconds': cold[worker.name],
                 'warm_first_step_seconds': warm[worker.name]})
    print(f'{worker.name:24} {TOKENS / median:8.0f} {TOKENS / best:7.0f} {mfu:5.0%} '
          f'{ratio:21.2f}x {worker.peak_rss_mb:17.0f} MB {cold[worker.name]:7.1f} s '
          f'{warm[worker.name]:5.1f} s')
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == '__main__':
  main()
