"""Programs that test_grouped_matmul.py has compiled in child processes."""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import chips, tpu_compiler
from pallas_kernels.grouped_matmul import grouped_matmul


def on(chip, x, w, sizes):
  """The public product and its gradients as they are traced on a machine of this generation."""
  chips.generation = lambda: chip
  y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
  return y, vjp(y)


def cases():
  """{'generation case': ...}: experts with float32 masters, and tails in float32."""
  shape = jax.ShapeDtypeStruct
  shapes = {'experts': (4096, 1024, 512, 8, 'bfloat16', 'float32'),
            'float32': (100, 72, 130, 3, 'float32', 'float32')}
  return {f'{chip} {name}': (functools.partial(on, chip), (
      shape((M, K), x_dtype), shape((G, K, N), w_dtype), shape((G,), jnp.int32)))
          for chip in tpu_compiler.TOPOLOGIES
          for name, (M, K, N, G, x_dtype, w_dtype) in shapes.items()}
