"""A child of test_parallel.py: one train step on several meshes of 8 host devices, as JSON."""
import dataclasses
import json

import jax
import numpy as np

from lm.data.loader import Loader
from lm.models.gpt import GPTConfig
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training import state as state_lib
from lm.training import step as step_lib
from lm.training.losses import Prediction
from lm.training.optimizers import AdamW, Schedule
from lm.training.validation import HeldOut

CONFIG = GPTConfig(vocab_size=40, max_length=16, d_model=16, num_layers=2, num_heads=4, d_ff=24,
                   num_kv_heads=2, norm='rmsnorm', positions='rotary', activation='swiglu',
                   use_bias=False, tie_embeddings=False, init_std=0.1, dtype='float32',
                   scan_layers=True)
# Without clipping, the first moment after the first step is (1 - b1) times the gradient.
OPTIMIZER = AdamW(Schedule(kind='constant', warmup_steps=0), b1=0.5, clip_norm=None)

# name: mesh axes, devices, microbatches, changes of the model, whether initialised there
RUNS = {
    'one': (dict(data=1), 1, 1, {}, True),
    'data': (dict(data=8), 8, 1, {}, False),
    'fsdp': (dict(data=1, fsdp=8), 8, 1, {}, True),
    'both': (dict(data=2, fsdp=4), 8, 2, {'remat': 'full', 'scan_layers': False}, True),
    'torus': (dict(data=2, fsdp=4), 8, 2, {'remat': 'qkv+attention+attention_out+mlp_in'}, True),
    'one_bf16': (dict(data=1), 1, 1, {'dtype': 'bfloat16'}, False),
    'both_bf16': (dict(data=2, fsdp=4), 8, 1, {'dtype': 'bfloat16'}, False),
}
RULES = {'torus': Rules(embed=('data', 'fsdp'))}  # and the optimiser in the host's memory


def packed_batch():
  """16 rows of two packed documents and padding, with rows of unequal weight."""
  rng = np.random.default_rng(0)
  ends = rng.integers(3, 12, (16, 1))
  place = np.arange(14)
  segments = np.where(place < ends, 1, np.where(place < 12, 2, 0)).astype(np.int32)
  weights = (segments > 0) * rng.choice([0, 1], (16, 14))
  return {'decoder_input_tokens': rng.integers(1, 40, (16, 14)).astype(np.int32),
          'decoder_target_tokens': rng.integers(1, 40, (16, 14)).astype(np.int32),
          'decoder_loss_weights': weights.astype(np.float32),
          'decoder_segment_ids': segments,
          'decoder_positions': np.where(segments == 2, place - ends, place).astype(np.int32)}


def run(name, start, axes, devices, microbatches, changes, initialise):
  """Facts of one step from a state that is made here, or from `start` put here."""
  rules = RULES.get(name, Rules()).on(MeshConfig(**axes).build(jax.devices()[:devices]))
  module, optimizer = dataclasses.replace(CONFIG, **changes).build(rules), OPTIMIZER.build(10)
  if initialise:
    state = state_lib.init_state(module, optimizer, rules, seed=3,
                                 offload_optimizer=name == 'torus')
  else:
    shapes = state_lib.abstract_state(module, optimizer, rules)
    state = jax.device_put(start, jax.tree.map(lambda x: x.sharding, shapes))
  init = jax.tree.map(np.array, state)  # copies: the step donates its state
  batch = jax.device_put(packed_batch(), rules.sharding('batch', 'length'))
  bytes_of = lambda tree, device: sum(shard.data.nbytes for x in jax.tree.leaves(tree)
                                      for shard in x.addressable_shards if shard.device == device)
  held = [bytes_of((state.params, state.opt_state), device) for device in jax.devices()[:devices]]
  before = state
  step = step_lib.jit_train_step(module, Prediction(), optimizer, rules, state, microbatches)
  state, metrics = step(state, batch)
  same = jax.tree.all(jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim),
                                   before, state))
  moments = state.opt_state[0].mu
  return {'loss': float(metrics['loss']), 'weight': float(metrics['weight']), 'init': init,
          'grads': jax.tree.map(np.asarray, moments), 'held': held, 'same': same,
          'donated': all(x.is_deleted() for x in jax.tree.leaves(before.params))}


class Rows:
  """Five rows of an epoch, and others behind them."""
  rows = packed_batch()

  def __len__(self):
    return 5

  def __getitem__(self, row):
    return {name: x[row] for name, x in self.rows.items()}


def held_out(params, axes, devices, batch_size):
  """The loss of the five rows."""
  rules = Rules().on(MeshConfig(**axes).build(jax.devices()[:devices]))
  loader = Loader.of_rows(Rows(), batch_size)
  return HeldOut(CONFIG.build(rules), Prediction(), loader)(params)['loss']


def difference(tree, other):
  """The largest difference of two trees, as a share of each leaf's largest value."""
  shares = jax.tree.map(lambda x, y: np.abs(x - y).max() / np.abs(y).max(), tree, other)
  return float(max(jax.tree.leaves(shares)))


def main():
  results = {}
  for name, arguments in RUNS.items():
    results[name] = run(name, results and results['one']['init'], *arguments)
  out = {'devices': jax.device_count()}
  for name, result in results.items():
    one = results['one_bf16' if name.endswith('bf16') else 'one']
    equal = jax.tree.map(np.array_equal, result['init'].params, one['init'].params)
    out[name] = {'loss': result['loss'], 'one_loss': one['loss'],
                 'gradient_difference': difference(result['grads'], one['grads']),
                 'same_weight': result['weight'] == one['weight'],
                 'same_init': bool(jax.tree.all(equal)), 'bytes_per_device': result['held'],
                 'same_shardings': bool(result['same']), 'donated': bool(result['donated'])}
  params = results['one']['init'].params
  out['held_out'] = [held_out(params, dict(data=2, fsdp=4), 8, 3), held_out(
      params, dict(data=1), 1, 5)]
  print(json.dumps(out))


if __name__ == '__main__':
  main()
