"""A child of test_optimizers_sharded.py: steps of every optimiser on a mesh and on one device."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.models.gpt import GPTConfig
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training import optimizers
from lm.training import state as state_lib
from lm.training.optimizers import Schedule

CONFIG = GPTConfig(vocab_size=128, max_length=16, d_model=64, num_layers=2, num_heads=4, d_ff=64,
                   norm='rmsnorm', positions='rotary', use_bias=False, init_std=0.1,
                   scan_layers=True)
NAMES = ('SGD', 'AdamW', 'Adagrad', 'RMSprop', 'Adafactor', 'Lion', 'LAMB', 'Muon', 'Sophia',
         'SOAP', 'ScheduleFree')
FIELDS = {'SOAP': dict(block_size=8, every=1), 'Sophia': dict(every=1),
          'Adafactor': dict(min_size_to_factor=32)}
CASES = {name: (name, {}) for name in NAMES} | {
    'average': ('AdamW', dict(average_decay=0.5)), 'units': ('SGD', dict(clip_units=0.01)),
    'AdamW in 8 bits': ('AdamW', dict(state_bits=8)),
    'SOAP in 8 bits': ('SOAP', dict(state_bits=8))}


def build(name, fields):
  schedule = Schedule('constant', 0.01, 0)
  settings = FIELDS.get(name, {}) | fields
  return getattr(optimizers, name)(schedule, layer_decay=0.9, **settings).build(10)


def steps(built, params):
  """Three steps of each."""
  states = {}
  for case, optimizer in built.items():
    states[case] = params, optimizer.init(params)

  def step(states, t):
    out = {}
    for case, optimizer in built.items():
      params, state = states[case]
      grads = jax.tree.map(lambda p: jnp.sin((50 + t) * p + jnp.arange(p.shape[-1])), params)
      sampled = lambda grads=grads: (jax.tree.map(jnp.cos, grads), 7.0)
      updates, state = optax.with_extra_args_support(optimizer).update(
          grads, state, params, sampled_gradient=sampled)
      out[case] = optax.apply_updates(params, updates), state
    return out, None

  return jax.lax.scan(step, states, jnp.arange(3))[0]


def some_of(tree):
  """A kernel in and one out, a norm and a table: fewer compile faster."""
  layers = tree['blocks']['layers']
  return {'token_embedding': tree['token_embedding'], 'blocks': {'layers': {
      'attention': {'out': layers['attention']['out']}, 'mlp_norm': layers['mlp_norm'],
      'mlp': {'wi': layers['mlp']['wi']}}}}


def main():
  built = {case: build(*arguments) for case, arguments in CASES.items()}
  rules = Rules().on(MeshConfig(data=1, fsdp=4, tensor=2).build())
  shapes = some_of(state_lib.abstract_params(CONFIG.build(rules), rules))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape) * 0.1), shapes)
  shardings = jax.tree.map(lambda x: x.sharding, shapes)
  opt_shardings = {case: state_lib._like_params(
      jax.eval_shape(optimizer.init, shapes), shapes, shardings, rules.sharding())
      for case, optimizer in built.items()}
  everywhere = {case: (shardings, found) for case, found in opt_shardings.items()}
  one = jax.jit(lambda params: steps(built, params))(params)
  many = jax.jit(lambda params: steps(built, params), out_shardings=everywhere)(
      jax.device_put(params, shardings))
  out = {'devices': jax.device_count()}
  for case in built:
    moved = lambda tree: jax.tree.map(lambda x, p: np.asarray(x) - p, tree, params)
    differences = jax.tree.map(lambda x, y: float(np.linalg.norm(x - y) / np.linalg.norm(y)),
                               moved(many[case][0]), moved(one[case][0]))
    leaves = jax.tree.leaves(many[case][1])
    held = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    out[case] = {'difference': max(jax.tree.leaves(differences)),
                 'share': held / sum(x.nbytes for x in leaves)}
  print(json.dumps(out))


if __name__ == '__main__':
  main()
