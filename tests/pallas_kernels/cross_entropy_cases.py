"""Programs that test_cross_entropy_tpu.py has compiled in child processes."""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import chips
from pallas_kernels.cross_entropy import bench, tpu
from pallas_kernels.cross_entropy.block_sizes import Blocks
from pallas_kernels.cross_entropy.reference import Options
from pallas_kernels.cross_entropy.specs import SPECS, Spec

ALL = Options(softcap=30.0, z_loss=1e-4, label_smoothing=0.1)
TINY = {'float32': Spec(300, 96, 1000), 'all options': Spec(300, 128, 1000, ALL, has_bias=True)}


def gradients(spec, blocks, dtype=jnp.bfloat16, parameters=None):
  """(function, arguments) of a spec's loss and gradients."""
  args = bench.arguments(spec, dtype)
  embedding = jax.ShapeDtypeStruct(args[1].shape, parameters or dtype)
  return (functools.partial(tpu.loss_and_gradients, spec.options, blocks=blocks),
          (args[0], embedding, *args[2:]))


def cases():
  """Tiny heads for every generation, and one of 128k rows in blocks that compile quickly."""
  small, limit = Blocks(128, 128, 128, 2**23), chips.vmem_limit('v5e')
  medium = Blocks(256, 512, 256, limit), Blocks(512, 256, 256, limit)
  return {
      'float32': gradients(TINY['float32'], (small, small), jnp.float32),
      'all options': gradients(TINY['all options'], (small, small), parameters=jnp.float32),
      'losses': (functools.partial(tpu.losses, ALL, wants_best=True, blocks=small),
                 bench.arguments(TINY['all options'])[:4]),
      '128k': gradients(SPECS['128k'], medium, parameters=jnp.float32)}
