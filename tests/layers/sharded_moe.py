"""A child of test_moe.py: a layer of experts on several meshes of 8 host devices, as JSON."""
import json

import flax.linen as nn
import jax
import numpy as np

from lm.layers.moe import MoE, MoEConfig
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules

# capacity factor, mesh axes, rules
RUNS = {
    'expert None': (None, dict(data=2, expert=4), {}),
    'few None': (None, dict(data=4, expert=2), {}),
    'expert apart None': (None, dict(data=2, expert=4), dict(batch='data')),
    'fsdp 0.7': (0.7, dict(data=2, fsdp=2, expert=2), {}),
    'sequence 0.7': (0.7, dict(data=2, sequence=2, expert=2), {}),
    'sequence None': (None, dict(data=1, sequence=2, expert=2, tensor=2), {}),
    'hidden None': (None, dict(data=2, fsdp=2, tensor=2), {}),
}
B, T, D = 8, 6, 12


def gradients(rules, capacity_factor):
  """y, penalties, and gradients of the parameters and of x."""
  config = MoEConfig(num_experts=4, num_selected=2, d_ff=10, capacity_factor=capacity_factor)
  module = MoE(config, D, 'swiglu', 0.5, 0.5, rules)
  rng = np.random.default_rng(0)
  x, weights = rng.normal(size=(B, T, D)).astype('f'), rng.choice([0., 1.], (B, T)).astype('f')
  direction = rng.normal(size=x.shape).astype('f')
  boxed = jax.eval_shape(module.init, jax.random.key(0), x)['params']
  params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype('f'), nn.meta.unbox(boxed))
  if rules.mesh is not None:
    names = jax.tree.map(lambda s: s.names, boxed, is_leaf=lambda s: hasattr(s, 'names'))
    params = jax.tree.map(lambda p, n: jax.device_put(p, rules.sharding(*n)), params, names)
    x, weights = jax.device_put((x, weights), rules.sharding('batch'))

  def loss(params, x):
    y, penalties = module.apply({'params': params}, x, weights)
    return (y * direction).sum() + sum(s for s, _ in penalties.values()), (y, penalties)

  return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)


def main():
  out, one = {}, {factor: gradients(Rules(), factor) for factor in (None, 0.7)}
  for name, (factor, axes, rules) in RUNS.items():
    got = gradients(Rules(**rules).on(MeshConfig(**axes).build()), factor)
    shares = jax.tree.map(lambda x, y: np.abs(x - y).max() / np.abs(y).max(), got, one[factor])
    out[name] = float(max(jax.tree.leaves(shares)))
  print(json.dumps(out))


if __name__ == '__main__':
  main()
