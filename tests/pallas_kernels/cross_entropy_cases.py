"""Programs that test_cross_entropy_tpu.py has compiled in child processes."""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.cross_entropy import bench, block_sizes, cross_entropy, tpu
from pallas_kernels.cross_entropy.block_sizes import Blocks
from pallas_kernels.cross_entropy.reference import Options
from pallas_kernels.cross_entropy.specs import SPECS, Spec

ALL = Options(softcap=30.0, z_loss=1e-4, label_smoothing=0.1)
TINY = {'float32': Spec(300, 96, 1000), 'all options': Spec(300, 256, 1000, ALL, has_bias=True)}


def gradients(spec, blocks, dtype=jnp.bfloat16, parameters=None):
  """(function, arguments) of a spec's loss and gradients."""
  args = bench.arguments(spec, dtype)
  embedding = jax.ShapeDtypeStruct(args[1].shape, parameters or dtype)
  return (functools.partial(tpu.loss_and_gradients, spec.options, blocks=(blocks, blocks)),
          (args[0], embedding, *args[2:]))


def trained(hidden, embedding, targets, weights):
  """As a training step calls it: parameters in float32, and a gradient that is scaled."""
  mean = lambda *head: cross_entropy(*head, targets, weights) / weights.sum()
  return jax.value_and_grad(mean, (0, 1))(hidden, embedding)


def cases():
  """Tiny heads for every generation, and the head of 128k rows in blocks that compile quickly."""
  small, large = Blocks(128, 256, 128, 2**23), SPECS['128k']
  hidden, embedding, _, targets, weights = bench.arguments(large)
  embedding = jax.ShapeDtypeStruct(embedding.shape, jnp.float32)
  return {
      'float32': gradients(TINY['float32'], small, jnp.float32),
      'all options': gradients(TINY['all options'], small, parameters=jnp.float32),
      'losses': (functools.partial(tpu.losses, ALL, wants_best=True, blocks=small),
                 bench.arguments(TINY['all options'])[:4]),
      '128k in training': (trained, (hidden, embedding, targets, weights)),
      '128k': bench.programs(large, 'v5e')['loss and gradients']}
