"""Static cycles and temporary memory of the TPU kernels, beside bare products and XLA's form.

    python -m pallas_kernels.cross_entropy.bench [--generation v5e] [--spec NAME ...] [--tune]

Cycles are those that the compiler scheduled, of kernels and of XLA's fusions that move memory; a
product is 2 * tokens * d_model * vocab_size FLOPs at the peak of the matrix units.
"""
import argparse
import functools
import itertools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import chips, tpu_compiler
from pallas_kernels.cross_entropy import api, block_sizes, tpu, tpu_kernels
from pallas_kernels.cross_entropy.block_sizes import Blocks
from pallas_kernels.cross_entropy.specs import SPECS

PASSES = ('loss', 'hidden', 'embedding')
CANDIDATES = tuple(itertools.product((256, 512, 1024, 2048), (256, 512, 1024, 2048), (256, 512)))


def arguments(spec, dtype=jnp.bfloat16):
  """Shapes of hidden [1, T, D], embedding, bias, targets and loss weights."""
  shape = jax.ShapeDtypeStruct
  T, D, V = spec.tokens, spec.d_model, spec.vocab_size
  return (shape((1, T, D), dtype), shape((V, D), dtype),
          shape((V,), jnp.float32) if spec.has_bias else None, shape((1, T), jnp.int32),
          shape((1, T), jnp.float32))


def bare_product(blocks, hidden_BTD, embedding_VD):
  """hidden embedding^T [T, V] and nothing else, in blocks that stay in VMEM."""
  (_, T, D), V = hidden_BTD.shape, len(embedding_VD)
  tokens, vocab = blocks[:2]

  def kernel(a_ref, b_ref, out_ref):
    out_ref[...] = tpu_kernels.dot(a_ref[...], b_ref[...], tpu_kernels.NT).astype(out_ref.dtype)

  return pl.pallas_call(
      kernel, grid=(pl.cdiv(T, tokens), pl.cdiv(V, vocab)),
      in_specs=[pl.BlockSpec((tokens, D), lambda i, j: (i, 0)),
                pl.BlockSpec((vocab, D), lambda i, j: (j, 0))],
      out_specs=pl.BlockSpec((tokens, vocab), lambda i, j: (i, j)),
      out_shape=jax.ShapeDtypeStruct((T, V), hidden_BTD.dtype),
      compiler_params=pltpu.CompilerParams(vmem_limit_bytes=blocks.vmem_bytes),
      name='bare_product')(hidden_BTD[0], embedding_VD)


def one_pass(name, options, blocks, hidden, embedding, bias, targets, weights):
  """A single kernel, as the gradients use it."""
  head = hidden[0], embedding, bias, targets[0]
  if name == 'embedding':
    return tpu_kernels.over_tokens(options, *head, weights[0], weights[0], blocks=blocks,
                                   vocabulary=len(embedding), interpret=False)
  return tpu_kernels.over_vocabulary(options, *head, wants_mean=name == 'hidden', blocks=blocks,
                                     interpret=False)


def in_blocks(options, *args):
  """XLA's form of the loss and its gradients."""
  return api.loss_and_gradients(options, 'blocks', None, *args)


def programs(spec, chip):
  """{program: (function, arguments)} of a spec on a generation of TPU."""
  args, options = arguments(spec), spec.options
  found = {name: block_sizes.find(name, *args[:2], chip) for name in PASSES}
  both = found['hidden'], found['embedding']
  return {
      'bare product': (functools.partial(bare_product, found['loss']), args[:2]),
      'loss': (functools.partial(tpu.losses, options, blocks=found['loss']), args[:4]),
      'loss and gradients': (functools.partial(tpu.loss_and_gradients, options, blocks=both), args),
      'in XLA': (functools.partial(in_blocks, options), args)}


def cases():
  """{'spec|generation|program': ...} and, to tune, {'spec|generation|pass|blocks': ...}."""
  out = {}
  for (name, spec), chip in itertools.product(SPECS.items(), chips.VMEM_MIB):
    out |= {f'{name}|{chip}|{key}': case for key, case in programs(spec, chip).items()}
    limit = chips.vmem_limit(chip)
    for key, sizes in itertools.product(PASSES, CANDIDATES):
      run = functools.partial(one_pass, key, spec.options, Blocks(*sizes, limit))
      out['|'.join((name, chip, key, *map(str, sizes)))] = run, arguments(spec)
  return out


def table(names, chip):
  """Prints a row a program: its cycles, those in products, and its temporaries."""
  print(f'{chip:14} program            | cycles         | products | temporaries')
  for name in names:
    spec, asked = SPECS[name], [f'{name}|{chip}|{key}' for key in programs(SPECS[name], chip)]
    flops = 2 * spec.tokens * spec.d_model * spec.vocab_size
    for key, report in tpu_compiler.reports('pallas_kernels.cross_entropy.bench:cases', asked,
                                            tpu_compiler.TOPOLOGIES[chip]).items():
      products = report.cycles * tpu_compiler.FLOPS_PER_CYCLE.get(chip, 0) / flops
      print(f'{name:14} {key.split("|")[-1]:18} | {report.cycles:14,} | {products:8.3f} | '
            f'{report.temp_bytes / 2**20:8.1f} MiB {report.refusal}', flush=True)


def tune(names, chip):
  """Prints the fastest blocks of each pass, in the form of `block_sizes.TABLE`."""
  for name, key in itertools.product(names, PASSES):
    head, best = arguments(SPECS[name])[:2], {}
    for sizes in CANDIDATES:
      need = block_sizes.vmem_bytes(key, Blocks(*sizes), SPECS[name].d_model,
                                    *(x.dtype.itemsize for x in head))
      if need > chips.vmem_limit(chip) or sizes[2] > sizes[key == 'embedding']:
        continue
      case = '|'.join((name, chip, key, *map(str, sizes)))
      report = tpu_compiler.reports('pallas_kernels.cross_entropy.bench:cases', [case],
                                    tpu_compiler.TOPOLOGIES[chip])[case]
      if not report.refusal:
        best[sizes] = report.cycles
    print(chip, key, SPECS[name].d_model, min(best, key=best.get), best, flush=True)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--generation', default='v5e', choices=chips.VMEM_MIB)
  parser.add_argument('--spec', nargs='*', default=list(SPECS), choices=list(SPECS))
  parser.add_argument('--tune', action='store_true', help='print rows of block_sizes.TABLE')
  flags = parser.parse_args()
  (tune if flags.tune else table)(flags.spec, flags.generation)
