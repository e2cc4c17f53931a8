"""Static cycles of the TPU kernels of a product and its gradients, beside the bare product's.

    python -m pallas_kernels.grouped_matmul.bench [--generation v5e] [--spec NAME ...] [--tune]

The bare product is 2 M K N FLOPs at the bfloat16 peak of the matrix units. Kernels are counted for
the most visits that any sizes of the groups can need: every group begins within a tile.
"""
import argparse
import functools
import itertools

import jax
import jax.numpy as jnp

from pallas_kernels import chips, tpu_compiler
from pallas_kernels.grouped_matmul import block_sizes, tpu
from pallas_kernels.grouped_matmul.specs import SPECS

PASSES = ('product', 'input', 'weights')
CANDIDATES = ((128, 512), (256, 256), (256, 512), (256, 1024), (512, 512), (512, 1024))


def one_pass(name, spec, chip, sizes=None):
  """(function, arguments) of a pass, in the blocks of a generation, or in (rows, columns) given:
  'input' is the gradient of x."""
  shape, (M, K, N, G) = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16), spec
  operands = {'product': (K, N), 'input': (N, K), 'weights': (K, N)}[name]
  blocks = block_sizes.find('weights' if name == 'weights' else 'product', M, *operands, 2, chip)
  if sizes:
    blocks = blocks._replace(rows=sizes[0], columns=min(sizes[1], operands[1]))
  sizes_P = jax.ShapeDtypeStruct((G,), jnp.int32)
  if name == 'weights':
    return (functools.partial(tpu.weights_gradient, dtype=jnp.bfloat16, blocks=blocks,
                              interpret=False), (shape((M, K)), shape((M, N)), sizes_P))
  run = functools.partial(tpu.product, transposed=name == 'input', blocks=blocks, interpret=False)
  return run, (shape((M, operands[0])), shape((G, K, N)), sizes_P)


def cases():
  """{'spec|generation|pass': ...} and, to tune, {'spec|generation|pass|rows|columns': ...}."""
  out = {}
  for (name, spec), chip, key in itertools.product(SPECS.items(), chips.VMEM_MIB, PASSES):
    out[f'{name}|{chip}|{key}'] = one_pass(key, spec, chip)
    out |= {f'{name}|{chip}|{key}|{a}|{b}': one_pass(key, spec, chip, (a, b))
            for a, b in CANDIDATES}
  return out


def compiled(names, chip):
  """{name: cycles of the kernel, or why there is none}."""
  reports = tpu_compiler.reports('pallas_kernels.grouped_matmul.bench:cases', names,
                                 tpu_compiler.TOPOLOGIES[chip])
  cycles = lambda x: sum(n for kernel, n in x.kernels.items() if 'grouped_matmul' in kernel)
  return {name: x.refusal or cycles(x) for name, x in reports.items()}


def table(names, chip):
  """Prints a row a spec."""
  print(f'{chip:20} | bare product | ' + ' | '.join(f'{key:>10}' for key in PASSES))
  for name in names:
    M, K, N, _ = SPECS[name]
    bare = 2 * M * K * N // tpu_compiler.FLOPS_PER_CYCLE[chip]
    cycles = compiled([f'{name}|{chip}|{key}' for key in PASSES], chip).values()
    print(f'{name:20} | {bare:12,} | ' + ' | '.join(f'{x:>10}' for x in cycles), flush=True)


def tune(names, chip):
  """Prints the cycles of each pass by (rows, columns), for `block_sizes.TABLE`."""
  for name, key in itertools.product(names, PASSES):
    cycles = compiled([f'{name}|{chip}|{key}|{a}|{b}' for a, b in CANDIDATES], chip)
    for case, x in sorted(cycles.items(), key=lambda item: str(item[1])):
      print(case, x, flush=True)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--generation', default='v5e', choices=tpu_compiler.FLOPS_PER_CYCLE)
  parser.add_argument('--spec', nargs='*', default=list(SPECS), choices=list(SPECS))
  parser.add_argument('--tune', action='store_true', help='print cycles of other blocks')
  flags = parser.parse_args()
  (tune if flags.tune else table)(flags.spec, flags.generation)
