"""Programs that test_tpu_compiler.py has compiled in a child process."""
import os
import sys

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def _double(x_ref, y_ref):
  y_ref[...] = 2 * x_ref[...]


def _doubled(rows, blocks):
  shape = jax.ShapeDtypeStruct((rows * blocks, 128), jnp.float32)
  spec = pl.BlockSpec((rows, 128), lambda i: (i, 0), memory_space=pltpu.VMEM)
  return pl.pallas_call(_double, shape, grid=(blocks,), in_specs=[spec], out_specs=spec,
                        name='double'), (shape,)


def cases():
  """A kernel at two sizes, and one whose block is larger than a v5e's scoped VMEM."""
  return {'1 block': _doubled(512, 1), '64 blocks': _doubled(512, 64),
          'too large': _doubled(2**16, 2)}


class _Deaths(dict):
  def __missing__(self, name):
    print(f'F1122 {name}', file=sys.stderr, flush=True)
    os.abort()


def deaths():
  """Programs that end the process, and say why before its stack."""
  return _Deaths()
