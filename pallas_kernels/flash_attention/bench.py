"""Static cycles of the TPU kernels beside jax's splash attention.

    python -m pallas_kernels.flash_attention.bench [--generation v5e] [--spec NAME ...] [--tune]

Cycles are those that the compiler scheduled for all kernels of a call, the copies around attention
included; splash is charged for the blocks that its causal mask leaves. --tune prints a row of
`block_sizes.TABLE` for each spec.
"""
import argparse
import itertools

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
import jax.numpy as jnp

from pallas_kernels import tpu_compiler
from pallas_kernels.flash_attention import block_sizes, tpu
from pallas_kernels.flash_attention.block_sizes import Blocks
from pallas_kernels.flash_attention.reference import Masking, Options, Terms
from pallas_kernels.flash_attention.specs import SPECS

PASSES = ('forward', 'backward')
CANDIDATES = tuple(itertools.product((256, 512), (256, 512, 1024), (2, 4, 6, 8)))
SPLASH_BLOCK = 1024


def options_of(spec) -> Options:
  """What a spec's kernels are compiled for."""
  return Options(spec.causal, spec.window, spec.head_dim**-0.5, None)


def arguments(spec, dtype=jnp.bfloat16):
  """Shapes of query, key, value, and of the log-sum-exp."""
  B, T, N, K, H = spec[:5]
  shape = jax.ShapeDtypeStruct
  key = shape((B, T, K, H), dtype)
  return shape((B, T, N, H), dtype), key, key, shape((B, K, N // K, T), jnp.float32)


def one_pass(spec, name, chip, blocks=None):
  """(function, arguments) of a pass of the kernel, compiled for `chip`."""
  query, key, value, lse = arguments(spec)
  options = options_of(spec)
  if name == 'forward':
    return (lambda q, k, v: tpu.forward(options, q, k, v, Terms(), Masking(), chip=chip,
                                        blocks=blocks),
            (query, key, value))
  return (lambda q, k, v, out, lse, g: tpu.backward(options, q, k, v, Terms(), Masking(), out, lse,
                                                    g, chip=chip, blocks=blocks),
          (query, key, value, query, lse, query))


def splash_pass(spec, name):
  """(function, arguments) of splash attention: its forward pass, or both passes."""
  B, T, N, K, H = spec[:5]
  mask = masks.CausalMask((T, T)) if spec.causal else masks.FullMask((T, T))
  block, inner = min(T, SPLASH_BLOCK), min(T, SPLASH_BLOCK // 2)
  sizes = splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=inner,
                            block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=inner,
                            use_fused_bwd_kernel=True)
  make = splash.make_splash_mha if N == K else splash.make_splash_mqa
  kernel = make(masks.MultiHeadMask([mask] * N), head_shards=1, q_seq_shards=1, block_sizes=sizes)
  attend = jax.vmap(kernel)
  loss = lambda *qkv: attend(*qkv).astype(jnp.float32).sum()
  qkv = (jax.ShapeDtypeStruct((B, N, T, H), jnp.bfloat16),) * 3
  return (attend if name == 'forward' else jax.grad(loss, (0, 1, 2))), qkv


def splash_share(spec) -> float:
  """The share of splash's blocks that a causal mask leaves."""
  parts = -(-spec.length // SPLASH_BLOCK)
  return (parts + 1) / (2 * parts) if spec.causal else 1.0


def cases():
  """What the compiler's child process compiles: 'chip spec pass', with 'queries keys tiles' to tune
  them, and 'splash spec pass'."""
  made = {}
  for (name, spec), pass_ in itertools.product(SPECS.items(), PASSES):
    made[f'splash {name} {pass_}'] = splash_pass(spec, pass_)
    for chip in block_sizes.TABLE:
      made[f'{chip} {name} {pass_}'] = one_pass(spec, pass_, chip)
      for blocks in CANDIDATES:
        sizes = ' '.join(map(str, blocks))
        made[f'{chip} {name} {pass_} {sizes}'] = one_pass(spec, pass_, chip, Blocks(*blocks))
  return made


def compiled(names, chip):
  """The reports of some of `cases`."""
  return tpu_compiler.reports('pallas_kernels.flash_attention.bench:cases', names,
                              tpu_compiler.TOPOLOGIES[chip])


def has_splash(spec) -> bool:
  """Whether splash attention takes the spec as it is."""
  return spec.heads == spec.kv_heads and spec.window is None and spec.head_dim % 64 == 0


def show(chip, names):
  """Prints the table of cycles; splash's second column is both passes."""
  print(f'{"cycles on " + chip:16s} {"forward":>12s} {"backward":>12s} {"both":>12s} '
        f'{"splash fwd":>12s} {"splash both":>12s}')
  for name in names:
    spec = SPECS[name]
    wanted = [f'{chip} {name} {pass_}' for pass_ in PASSES]
    splash_names = [f'splash {name} {pass_}' for pass_ in PASSES] if has_splash(spec) else []
    reports = compiled(wanted + splash_names, chip)
    cells = [reports[case].cycles for case in wanted]
    cells += [sum(cells)] + [int(reports[case].cycles * splash_share(spec))
                             for case in splash_names]
    print(f'{name:16s}', *(f'{cell:12,d}' for cell in cells), flush=True)


def tune(chip, names):
  """Prints the best of CANDIDATES for each spec, as a row of `block_sizes.TABLE`."""
  for name, pass_ in itertools.product(names, PASSES):
    spec = SPECS[name]
    wanted = [f'{chip} {name} {pass_} {" ".join(map(str, blocks))}' for blocks in CANDIDATES
              if max(blocks[:2]) <= spec.length]
    reports = {case: report for case, report in compiled(wanted, chip).items()
               if not report.refusal}
    best = min(reports, key=lambda case: reports[case].cycles)
    sizes = ', '.join(best.split()[3:])
    print(f"'{chip}' '{pass_}' ({spec.head_dim}, {spec.length}): Blocks({sizes}),  "
          f'# {reports[best].cycles:,} cycles', flush=True)


def main():
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--generation', default='v5e', choices=sorted(block_sizes.TABLE))
  parser.add_argument('--spec', nargs='+', default=list(SPECS), choices=list(SPECS))
  parser.add_argument('--tune', action='store_true')
  args = parser.parse_args()
  (tune if args.tune else show)(args.generation, args.spec)


if __name__ == '__main__':
  main()
