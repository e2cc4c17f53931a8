"""A child of test_adapters.py: gradients of adapters on meshes of 8 host devices beside those on
one, as JSON: the largest difference of each case, relative to the largest element of its leaf."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.models import adapters
from lm.models.gpt import GPTConfig
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training import state as state_lib, step as step_lib
from lm.training.losses import Prediction

B, T, V = 16, 16, 48
LLAMA = GPTConfig(
    vocab_size=V, max_length=T, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=32,
    norm='rmsnorm', positions='rotary', activation='swiglu', use_bias=False, tie_embeddings=False,
    dtype='float32', init_std=0.2, scan_layers=True, attention_implementation='reference')
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads))
EVERYWHERE = '.*/kernel',
CUT = dict(data=2, fsdp=2, tensor=2)
CASES = {  # name: adapter, frozen, axes of the mesh, microbatches
    'dora': (adapters.DoRA(rank=2, targets=EVERYWHERE), (), CUT, 2),
    'prefix': (adapters.PrefixTuning(length=3, init_std=0.5), (), CUT, 1),
    'adapter in stages': (adapters.Adapter(size=4), (), dict(data=4, stage=2), 1),
    'frozen layer': (None, ('blocks/layers/0/.*',), dict(data=8), 2)}


def gradients(name, rules):
  """Of what trains, after noise on all of it."""
  adapter, frozen, _, parts = CASES[name]
  module = adapters.adapt(LLAMA.build(rules), adapter, frozen)
  state = state_lib.init_state(module, KEEP_GRADIENT, rules, 1, B)
  noise = lambda x: x + 0.1 * np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
  params = jax.tree.map(lambda x: jax.device_put(noise(np.asarray(x)), x.sharding), state.params)
  step = step_lib.jit_train_step(module, Prediction(), KEEP_GRADIENT, rules, state, parts)
  ids = np.random.default_rng(0).integers(1, V, (B, T + 1)).astype(np.int32)
  batch = {'decoder_input_tokens': ids[:, :-1], 'decoder_target_tokens': ids[:, 1:],
           'decoder_loss_weights': np.ones((B, T), np.float32),
           'decoder_segment_ids': np.tile(np.repeat(np.int32([1, 2]), T // 2), (B, 1))}
  state = state_lib.TrainState(state.step, params, state.opt_state, state.rng)
  return jax.device_get(step(state, batch)[0].opt_state)


def difference(name):
  """The largest, and how many leaves were compared."""
  one = gradients(name, Rules().on(MeshConfig(data=1).build(jax.devices()[:1])))
  many = gradients(name, Rules().on(MeshConfig(**CASES[name][2]).build()))
  pairs = list(zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True))
  return {'difference': max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs),
          'leaves': len(pairs)}


if __name__ == '__main__':
  jax.config.update('jax_default_prng_impl', 'rbg')
  print(json.dumps({name: difference(name) for name in CASES}))
