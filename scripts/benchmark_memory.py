#!/usr/bin/env python
"""What each choice makes of the memory of 7B on TPUs: writes lm/training/MEMORY.md.

  python scripts/benchmark_memory.py                    # what its table has not yet; some hours
  python scripts/benchmark_memory.py --again offload    # those whose name has this, once more

Every row is a train step compiled by the TPU compiler, without a TPU. One that does not fit, or
that a compiler refuses, is a row that says so.
"""
import argparse
import contextlib
import io
import json
import pathlib

from benchmark_precision import lm, table, total

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLE = ROOT / 'lm/training/MEMORY.md'
FIGURES = TABLE.with_suffix('.json')
EXPERIMENTS = {'v5e:16x16': 'gin/experiments/gpt_7b.gin',
               'v5p:4x4x4': 'gin/experiments/gpt_7b_v5p.gin'}
# {topology: {choice: (gin files behind the experiment's, bindings)}}; the first is the experiment.
REMAT = 'gpt.GPTConfig.remat'
FULL, KEPT = {REMAT: "'full'"}, "'qkv+attention+attention_out+mlp_in{}'"
SHARED = {
    "remat 'full'": ((), FULL),
    "remat 'dots'": ((), {REMAT: "'dots'"}),
    "remat 'none'": ((), {REMAT: "'none'"}),
    'what is kept, on the host': ((), {REMAT: KEPT.format('@host')}),
    "optimiser's state on the host": ((), FULL | {'loop.TrainConfig.offload_optimizer': True}),
    'pure bfloat16': (('gin/precision/pure_bfloat16.gin',), FULL),
    'AdamW in 8 bits': ((), FULL | {'optimizers.AdamW.state_bits': 8}),
    'Adafactor': (('gin/optim/adafactor.gin',), FULL),
    'pure bfloat16, AdamW in 8 bits': (('gin/precision/pure_bfloat16.gin',),
                                       FULL | {'optimizers.AdamW.state_bits': 8}),
    'int8 products': (('gin/precision/int8.gin',), FULL),
}
CHOICES = {
    'v5e:16x16': {'the experiment: ' + KEPT.format('')[1:-1] + ' kept': ((), {})} | SHARED,
    'v5p:4x4x4': {'the experiment: 2 microbatches, all kept': ((), {})} | SHARED | {
        "remat 'full', 4 microbatches": ((), FULL | {'loop.TrainConfig.num_microbatches': 4})}}
HEAD = """# What each choice makes of the memory of 7B

Written by `python scripts/benchmark_memory.py`: Llama 2 7B's train step with 256 sequences of 4,096
tokens, compiled by the TPU compiler for chips that were not there. Each row differs from the
experiment in what it names, and all but those about remat keep nothing of a block (remat 'full').
MiB of one device: of parameters and the optimiser's state between steps, and of everything at the
peak; cycles are the compiler's estimate with those of the kernels, if they never wait. 'dots' kept
no more than 'full' here.

"""


def save(figures: dict):
  """Writes the figures and their tables."""
  FIGURES.write_text(json.dumps(figures, indent=1) + '\n')
  text = HEAD
  for topology, rows in figures.items():
    mib = lambda x: f'{x / 2**20:,.0f}'
    text += table((f'{EXPERIMENTS[topology]}, {topology}', 'state', 'peak', 'cycles, millions'), [
        (name, row['refusal'], '', '') if 'refusal' in row else
        (name, mib(row['state']), mib(row['peak']), f'{total(row) / 1e6:,.0f}')
        for name, row in rows.items()]) + '\n'
  TABLE.write_text(text.rstrip('\n') + '\n')


def compiled(topology: str, gin: tuple[str, ...], bindings: dict) -> dict:
  """A row."""
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):
      result = lm('compile', f'--topology={topology}', gin=(EXPERIMENTS[topology], *gin),
                  bindings=bindings)
  except SystemExit:
    last = said.getvalue().strip().splitlines()[-1]
    return {'refusal': last.removeprefix('error: ').split(':')[0]}
  return {'state': result['hbm_bytes']['parameters'] + result['hbm_bytes']['optimizer'],
          'peak': result['hbm_peak_bytes'], 'cycles': result['estimated_cycles'],
          'kernel_cycles': result['kernel_cycles']}


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--again', help='part of the names of rows to compile again')
  flags = parser.parse_args()
  stored = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
  for where, choices in CHOICES.items():
    for choice, (gin_files, changes) in choices.items():
      known = stored.setdefault(where, {})
      if choice in known and not (flags.again and flags.again in choice):
        continue
      known[choice] = compiled(where, gin_files, changes)
      print(where, choice, known[choice], flush=True)
      save(stored)
