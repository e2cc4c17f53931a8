"""A child of test_cross_entropy_tpu.py: a head cut over 2 devices beside a whole one, as JSON."""
import functools
import json

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from pallas_kernels.cross_entropy import cross_entropy


def error(got, want):
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def main():
  rng = np.random.default_rng(0)
  hidden, embedding, bias = (jnp.asarray(rng.normal(size=shape), jnp.float32)
                             for shape in ((2, 40, 16), (148, 16), (148,)))
  targets = jnp.asarray(rng.integers(0, 148, (2, 40)), jnp.int32)
  weights = jnp.asarray(rng.choice([0, 0.5, 1], (2, 40)), jnp.float32)
  mesh = jax.make_mesh((2,), ('tensor',), axis_types=(jax.sharding.AxisType.Auto,))
  options = dict(softcap=5.0, z_loss=0.02, label_smoothing=0.1)

  def loss(implementation, axis_name, hidden, embedding, bias, targets, weights):
    return 3 * cross_entropy(hidden, embedding, targets, weights, bias=bias, axis_name=axis_name,
                             implementation=implementation, **options)

  def run(fn):
    value, gradients = jax.jit(jax.value_and_grad(fn, (0, 1, 2)))(hidden, embedding, bias, targets,
                                                                  weights)
    return [np.asarray(x) for x in (value, *gradients)]

  whole, errors = run(functools.partial(loss, 'reference', None)), {}
  for implementation in ('reference', 'tpu'):
    cut = jax.shard_map(functools.partial(loss, implementation, 'tensor'), mesh=mesh, out_specs=P(),
                        in_specs=(P(), P('tensor'), P('tensor'), P(), P()), check_vma=False)
    errors[implementation] = list(map(error, run(cut), whole))
  print(json.dumps({'devices': jax.device_count(), 'errors': errors}))


if __name__ == '__main__':
  main()
