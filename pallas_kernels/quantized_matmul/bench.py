"""Static cycles of the TPU kernel, beside its bounds and what XLA estimates of its own form.

    python -m pallas_kernels.quantized_matmul.bench [--generation v5e] [--spec NAME ...] [--tune]

The product bounds a prompt: 2 M K N FLOPs at the bfloat16 peak of the matrix units. Memory bounds
decoding: each array once at the bandwidth of the generation. Cycles count no wait for memory.
"""
import argparse
import functools
import itertools
import re

import jax
import jax.numpy as jnp

from pallas_kernels import chips, tpu_compiler
from pallas_kernels.quantized_matmul import block_sizes, reference, tpu
from pallas_kernels.quantized_matmul.specs import SPECS

# Bytes a cycle of a device's HBM: v4 614 GB/s at 1.05 GHz, v5e 819 at 1.5, v5p 2,765 at 1.75, v6e
# 1,640 at 1.75.
BYTES_PER_CYCLE = {'v4': 585, 'v5e': 546, 'v5p': 1580, 'v6e': 937}
CANDIDATES = tuple(itertools.product((128, 256, 512, 1024), (256, 512, 1024)))


def arguments(spec):
  """Shapes of x [M, K], values, scales and the scale of int8 x."""
  shape, groups = jax.ShapeDtypeStruct, spec.K // (spec.group_size or spec.K)
  return (shape((spec.M, spec.K), spec.x), shape((spec.K, spec.N), f'int{spec.bits}'),
          shape((groups, spec.N), jnp.float32),
          shape((spec.M, 1), jnp.float32) if spec.x == 'int8' else None)


def kernel(spec, chip, sizes=None):
  """(function, arguments) of a spec in the blocks of a generation, or of (columns, chunk) given."""
  x, values, scales, _ = args = arguments(spec)
  blocks = block_sizes.find(*x.shape, spec.N, scales.shape[0], x.dtype,
                            values.dtype, chip)
  if sizes:
    blocks = blocks._replace(columns=sizes[0], chunk=sizes[1])
  return functools.partial(tpu.quantized_matmul, dtype=jnp.dtype(jnp.bfloat16), interpret=False,
                           blocks=blocks), args


def cases():
  """{'spec|generation|kernel': ..., 'spec|generation|XLA': ...} and, to tune, '...|blocks'."""
  out = {}
  plain = functools.partial(reference.quantized_matmul, dtype=jnp.bfloat16)
  for (name, spec), chip in itertools.product(SPECS.items(), chips.VMEM_MIB):
    out[f'{name}|{chip}|kernel'] = kernel(spec, chip)
    out[f'{name}|{chip}|XLA'] = plain, arguments(spec)
    out |= {f'{name}|{chip}|{a}|{b}': kernel(spec, chip, (a, b)) for a, b in CANDIDATES}
  return out


def bounds(spec, chip):
  """Cycles of the product and of moving each array once; 0 where a rate is not known."""
  groups = spec.K // (spec.group_size or spec.K)
  weights = spec.K * spec.N * spec.bits // 8 + 4 * groups * spec.N
  moved = weights + spec.M * (spec.K * jnp.dtype(spec.x).itemsize + 2 * spec.N)
  flops = 2 * spec.M * spec.K * spec.N
  rate = lambda rates, amount: amount // rates[chip] if chip in rates else 0
  return rate(tpu_compiler.FLOPS_PER_CYCLE, flops), rate(BYTES_PER_CYCLE, moved)


def compiled(names, chip, keep_hlo=False):
  """The reports of these cases."""
  return tpu_compiler.reports('pallas_kernels.quantized_matmul.bench:cases', names,
                              tpu_compiler.TOPOLOGIES[chip], keep_hlo)


def table(names, chip):
  """Prints a row a spec."""
  print(f'{chip:38} | product    | memory     | kernel     | XLA estimates')
  for name in names:
    ours, = compiled([f'{name}|{chip}|kernel'], chip).values()
    product, memory = bounds(SPECS[name], chip)
    print(f'{name:38} | {product:10,} | {memory:10,} | {ours.cycles:10,} | {xla(name, chip)} '
          f'{ours.refusal}', flush=True)


def xla(name, chip):
  """XLA's estimate of the cycles of its own form, or why there is none."""
  try:
    report, = compiled([f'{name}|{chip}|XLA'], chip, keep_hlo=True).values()
  except RuntimeError as error:
    return str(error)
  cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', report.hlo)))
  return f'{cycles:10,} {report.refusal}'


def tune(names, chip):
  """Prints the fastest (columns, chunk) of each spec, for `block_sizes.TABLE`."""
  for name in names:
    reports = compiled([f'{name}|{chip}|{a}|{b}' for a, b in CANDIDATES], chip)
    cycles = {key.split('|', 2)[2]: x.cycles for key, x in reports.items() if not x.refusal}
    print(name, chip, min(cycles, key=cycles.get), cycles, flush=True)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--generation', default='v5e', choices=chips.VMEM_MIB)
  parser.add_argument('--spec', nargs='*', default=list(SPECS), choices=list(SPECS))
  parser.add_argument('--tune', action='store_true', help='print rows of block_sizes.TABLE')
  flags = parser.parse_args()
  (tune if flags.tune else table)(flags.spec, flags.generation)
