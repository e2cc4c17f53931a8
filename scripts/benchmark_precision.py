#!/usr/bin/env python
"""What each precision of gin/precision/ costs and loses: writes lm/training/PRECISION.md.

  python scripts/benchmark_precision.py compile   # what its table of the TPU compiler has not yet
  python scripts/benchmark_precision.py train     # losses on the quickstart's data
"""
import argparse
import contextlib
import io
import json
import pathlib
import statistics
import tempfile

from lm import main

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLE = ROOT / 'lm/training/PRECISION.md'
FIGURES = TABLE.with_suffix('.json')
PRECISIONS = ('bfloat16', 'pure_bfloat16', 'float16', 'int8', 'fp8', 'fp8_delayed')
TOPOLOGIES = ('v5e:2x4', 'tpu7x:2x2x1')
COMMON = ('gin/objectives/causal_lm.gin', 'gin/optim/adamw.gin', 'gin/runs/pretrain.gin')
LARGE = {'gpt.GPTConfig.num_layers': 4, 'gpt.GPTConfig.scan_layers': True,
         'gpt.GPTConfig.remat': "'full'", 'VOCAB_SIZE': 32000, 'SEQUENCE_LENGTH': 4096,
         'BATCH_SIZE': 8}
SMALL = {'gpt.GPTConfig.num_layers': 2, 'gpt.GPTConfig.d_model': 128,
         'gpt.GPTConfig.d_ff': 384, 'SEQUENCE_LENGTH': 128, 'BATCH_SIZE': 16, 'NUM_STEPS': 400,
         'VOCAB_SIZE': 2048, 'WARMUP_STEPS': 20, 'EVAL_EVERY': 400, 'CHECKPOINT_EVERY': 400}
SEEDS = {'bfloat16': (0, 1, 2, 3, 4)}  # those that say what a seed changes
HEAD = """# What a precision costs and loses

Written by `python scripts/benchmark_precision.py compile` and `... train`.

Llama 2 7B's dimensions, four layers, parameters over all devices (fsdp), 8 sequences of 4,096
tokens, AdamW, remat 'full': HBM a device at the peak, and cycles by the compiler's own estimate
with those of the kernels, if they never wait. A product in int8 takes half the cycles of one in
bfloat16 on a v5e, but with 4,096 tokens a chip quantising takes more than that back. A v5e has no
products of 8-bit floats: there their operands are rounded to fp8 and multiplied in bfloat16.
float16 has no attention kernel on TPUs.

"""
TRAINED = """
A Llama-like model of 2 layers and d_model 128 on the quickstart's text, 400 steps of 16 x 128
tokens: loss on held-out text after the last. Seeds of bfloat16 differ by {spread:.4f} (standard
deviation of five).

"""


def lm(*args: str, gin: tuple[str, ...], bindings: dict) -> dict:
  """Runs a command of `lm` and returns what --json holds."""
  with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    path = pathlib.Path(folder, 'result.json')
    status = main.main([args[0], *(f'--gin_file={ROOT / name}' for name in gin), f'--json={path}',
                        *(f'--gin.{name}={value}' for name, value in bindings.items()),
                        *(arg.format(folder=folder) for arg in args[1:])])
    if status:
      raise SystemExit(status)
    rows = pathlib.Path(folder, 'run/metrics.jsonl')
    result = json.loads(path.read_text())
    if rows.exists():
      result['validation'] = [row['loss'] for row in map(json.loads, rows.read_text().splitlines())
                              if row['split'] == 'validation']
    return result


def compile_all(figures: dict) -> None:
  """Fills in memory and cycles where the table has none."""
  for topology in TOPOLOGIES:
    for name in PRECISIONS:
      if name in figures.get(topology, {}):
        continue
      result = lm('compile', f'--topology={topology}', bindings=LARGE, gin=(
          'gin/models/llama2_7b.gin', *COMMON, 'gin/mesh/fsdp.gin', f'gin/precision/{name}.gin'))
      figures.setdefault(topology, {})[name] = {
          'state': result['hbm_bytes']['parameters'] + result['hbm_bytes']['optimizer'],
          'peak': result['hbm_peak_bytes'], 'cycles': result['estimated_cycles'],
          'kernel_cycles': result['kernel_cycles']}
      print(topology, name, figures[topology][name], flush=True)
      save(figures)


def train_all(figures: dict) -> None:
  """Fills in losses."""
  for name in PRECISIONS:
    for seed in SEEDS.get(name, (0, 1)):
      result = lm('train', '--run_dir={folder}/run', bindings=SMALL | {'SEED': seed}, gin=(
          'gin/models/gpt_small_cpu.gin', *COMMON, f'gin/precision/{name}.gin'))
      figures.setdefault('losses', {}).setdefault(name, {})[str(seed)] = result['validation'][-1]
      print(name, seed, result['validation'][-1], flush=True)
      save(figures)


def save(figures: dict) -> None:
  """Writes the figures, and the tables of those that stand."""
  FIGURES.write_text(json.dumps(figures, indent=1) + '\n')
  text = HEAD
  for topology in filter(figures.__contains__, TOPOLOGIES):
    text += table((f'{topology}: precision', 'state, MiB', 'peak, MiB', 'cycles, millions',
                   'of bfloat16'), [
        (name, f'{x["state"] / 2**20:,.0f}', f'{x["peak"] / 2**20:,.0f}', f'{total(x) / 1e6:,.1f}',
         f'{total(x) / total(figures[topology]["bfloat16"]):.3f}')
        for name, x in figures[topology].items()]) + '\n'
  losses = figures.get('losses', {})
  if len(losses.get('bfloat16', ())) > 1:
    plain = losses['bfloat16']
    text += TRAINED.lstrip('\n').format(spread=statistics.stdev(plain.values()))
    text += table(('precision', 'losses', 'minus those of bfloat16 of the same seed'), [
        (name, ', '.join(f'{x:.4f}' for x in by_seed.values()),
         ', '.join(f'{x - plain[seed]:+.4f}' for seed, x in by_seed.items()))
        for name, by_seed in losses.items()])
  TABLE.write_text(text.rstrip('\n') + '\n')


def total(x: dict) -> int:
  """Cycles of everything."""
  return x['cycles'] + x['kernel_cycles']


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  """Markdown; numbers to the right."""
  lines = [heads, ['---', *['--:'] * (len(heads) - 1)], *rows]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('what', choices=('compile', 'train'))
  stored = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
  (compile_all if parser.parse_args().what == 'compile' else train_all)(stored)
