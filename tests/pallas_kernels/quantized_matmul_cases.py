"""Programs that test_quantized_matmul.py has compiled in child processes."""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import chips, platform, tpu_compiler
from pallas_kernels.quantized_matmul import quantized_matmul


def arguments(x_dtype, bits, group_size, M, K, N):
  """Shapes of x, values, scales and the scale of int8 x."""
  shape = jax.ShapeDtypeStruct
  scales = (N,) if group_size is None else (K // group_size, N)
  return (shape((M, K), x_dtype), shape((K, N), f'int{bits}'), shape(scales, jnp.float32),
          shape((M, 1), jnp.float32) if x_dtype == 'int8' else None)


def on(chip, x, values, scales, x_scale):
  """The public product as it is traced on a machine of this generation."""
  chips.generation = lambda: chip
  platform.warn_once = lambda message: None
  return quantized_matmul(x, values, scales, x_scale=x_scale)


def cases():
  """{'generation case': ...}: decoding at a real size, small products of all kinds, a prompt."""
  shapes = {
      'int8': ('bfloat16', 8, None, 16, 4096, 14336),
      'int4 in groups of 32': ('bfloat16', 4, 32, 64, 512, 512),
      'prompt': ('bfloat16', 4, 128, 300, 512, 512),
      'float32 with tails': ('float32', 8, 128, 1, 384, 130),
      'int8 by int4': ('int8', 4, 64, 40, 512, 256)}
  return {f'{chip} {name}': (functools.partial(on, chip), arguments(*shape))
          for chip in tpu_compiler.TOPOLOGIES for name, shape in shapes.items()}
