"""A child of test_meshes.py: the step of each family on meshes of 8 host devices, as JSON.

Arguments name the runs, FAMILY/MESH; without any, all are run (`python sharded_models.py`).
"""
import collections
import dataclasses
import functools
import json
import math
import re
import sys
import time

import flax.linen as nn
import jax
import numpy as np

from lm.layers.moe import MoEConfig
from lm.models.bert import BERTConfig
from lm.models.gpt import GPTConfig
from lm.models.t5 import T5Config
from lm.models.transformer_xl import TransformerXLConfig
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules, axes_of
from lm.training import state as state_lib
from lm.training import step as step_lib
from lm.training.losses import Prediction
from lm.training.optimizers import AdamW, Schedule

B, T, V = 16, 16, 48  # rows, tokens a row, tokens of the vocabulary
OPTIMIZER = AdamW(Schedule(kind='constant', warmup_steps=0), b1=0.5, clip_norm=None)
MICROBATCHES = 2
COLLECTIVE = re.compile(r'= (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|'
                        r'collective-permute)(?:-start)?\(')

SMALL = dict(vocab_size=V, max_length=T, d_model=16, num_layers=2, num_heads=8, d_ff=32,
             dtype='float32', scan_layers=True, remat='full',
             attention_implementation='reference', dropout_rate=0.1, attention_dropout_rate=0.1,
             layer_drop_rate=0.2)
LLAMA = dict(num_kv_heads=2, norm='rmsnorm', positions='rotary', activation='swiglu',
             use_bias=False, tie_embeddings=False, init_std=0.2)
FAMILIES = {
    'gpt': GPTConfig(**SMALL, **LLAMA, attention_pattern='GL', window=5),
    'moe': GPTConfig(**SMALL, **LLAMA, moe=MoEConfig(num_experts=8, num_selected=2, d_ff=16)),
    'bert': BERTConfig(**SMALL, init_std=0.2),
    't5': T5Config(**SMALL, num_buckets=4, max_distance=8, activation='geglu'),
    'transformer_xl': TransformerXLConfig(**SMALL, memory_length=16, init_std=0.2),
}

ALL_TO_ALL = {'attention': 'all_to_all'}
MESHES = {  # name: axes, changes of the rules
    'slice': (dict(slice=8, data=1), {}),
    'data': (dict(data=8), {}),
    'fsdp': (dict(data=1, fsdp=8), {}),
    'zero1': (dict(data=1, fsdp=8), dict(embed=None, opt_embed='fsdp')),
    'expert': (dict(data=1, expert=8), {}),
    'sequence': (dict(data=1, sequence=8), {}),
    'all_to_all': (dict(data=1, sequence=8), ALL_TO_ALL),
    'tensor': (dict(data=1, tensor=8), {}),
    'slice data fsdp': (dict(slice=2, data=2, fsdp=2), {}),
    'fsdp tensor': (dict(data=1, fsdp=2, tensor=4), {}),
    'fsdp sequence': (dict(data=1, fsdp=4, sequence=2), {}),
    'sequence tensor': (dict(data=1, sequence=2, tensor=4), {}),
    'all_to_all tensor': (dict(data=1, sequence=2, tensor=4), ALL_TO_ALL),
    'fsdp sequence tensor': (dict(data=1, fsdp=2, sequence=2, tensor=2), {}),
    'data all_to_all tensor': (dict(data=2, sequence=2, tensor=2), ALL_TO_ALL),
    'fsdp expert': (dict(data=1, fsdp=2, expert=4), {}),
    'expert sequence tensor': (dict(data=1, expert=2, sequence=2, tensor=2), {}),
    'slice fsdp tensor': (dict(slice=2, data=1, fsdp=2, tensor=2), {}),
    'fsdp expert tensor': (dict(data=1, fsdp=2, expert=2, tensor=2), {}),
}


def batch(family):
  """Rows of two packed texts and padding, of unequal weight; of Transformer-XL, streams."""
  rng = np.random.default_rng(0)
  ends, place = rng.integers(3, 12, (B, 1)), np.arange(T)
  segments = np.where(place < ends, 1, np.where(place < 14, 2, 0)).astype(np.int32)
  tokens = lambda *shape: rng.integers(1, V, shape).astype(np.int32)
  weights = lambda *shape: rng.choice([0, 1, 2], shape).astype(np.float32)
  decoder = {'decoder_input_tokens': tokens(B, T), 'decoder_target_tokens': tokens(B, T),
             'decoder_loss_weights': weights(B, T) * (segments > 0)}
  if family == 'transformer_xl':
    return decoder | {'decoder_restart': rng.integers(0, 2, B).astype(np.int32)}
  positions = np.where(segments == 2, place - ends, place).astype(np.int32)
  decoder |= {'decoder_segment_ids': segments, 'decoder_positions': positions}
  encoder = {'encoder_input_tokens': tokens(B, T), 'encoder_segment_ids': segments}
  if family == 't5':
    del decoder['decoder_positions']
    return encoder | decoder
  if family == 'bert':
    return encoder | {
        'encoder_positions': positions, 'encoder_token_types': (positions % 2).astype(np.int32),
        'masked_positions': rng.integers(0, 14, (B, 4)).astype(np.int32),
        'masked_target_tokens': tokens(B, 4), 'masked_loss_weights': weights(B, 4),
        'class_labels': rng.integers(0, 2, B).astype(np.int32)}
  return decoder


def drops_scores(rules):
  """Not in a ring, which draws the dropout of its probabilities by the parts that devices have."""
  return rules.attention != 'ring' or rules.shards('length') == 1


def lowered(family, rules, drops_scores=True):
  """The step, and the abstract state and batch that it takes."""
  config = FAMILIES[family]
  if not drops_scores:
    config = dataclasses.replace(config, attention_dropout_rate=0.0)
  module, optimizer = config.build(rules), OPTIMIZER.build(10)
  state = state_lib.abstract_state(module, optimizer, rules, B)
  features = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rules.sharding(
      'batch')), batch(family))
  step = step_lib.jit_train_step(module, Prediction(z_loss=1e-3), optimizer, rules, state,
                                 MICROBATCHES)
  return step, state, features


def start(family, abstract):
  """A state of random numbers, the same on every mesh; Transformer-XL's memory stands half."""
  rng = np.random.default_rng(1)

  def draw(path, x):
    name = jax.tree_util.keystr(path)
    if x.dtype == np.float32 and not name.startswith('.opt_state'):
      value = 0.2 * rng.normal(size=x.shape) + ('scale' in name)
    else:
      value = np.full(x.shape, 7 if 'filled' in name else 0)
    return jax.device_put(value.astype(x.dtype), x.sharding)
  return jax.tree_util.tree_map_with_path(draw, abstract)


@functools.cache
def reference(family, drops_scores):
  return run(family, Rules().on(MeshConfig().build(jax.devices()[:1])), drops_scores)[0]


def run(family, rules, drops_scores):
  """Loss, its parts, gradients by the first moment, and the carry, of one step; and its program."""
  step, abstract, features = lowered(family, rules, drops_scores)
  compiled = step.lower(abstract, features).compile()
  features = jax.device_put(batch(family), rules.sharding('batch'))
  state, metrics = compiled(start(family, abstract), features)
  # Adam's first update is the gradient's sign: it says nothing of how near two gradients are.
  metrics['norms'] = {name: x for name, x in metrics['norms'].items() if 'update' not in name}
  results = jax.tree.map(np.asarray, (metrics, state.opt_state[0].mu, state.carry))
  return results, compiled.as_text()


def collectives(program):
  """How often each collective stands in a program, whose loops are written once, the elements of
  the largest array that an all-gather makes of several, and how many reductions are in loops."""
  count, largest = collections.Counter(), 0
  for shape, name in COLLECTIVE.findall(program):
    count[name] += 1
    sizes = [math.prod(map(int, sizes.split(',') if sizes else [])) for sizes in
             re.findall(r'\[([\d,]*)\]', shape)]
    largest = max(largest, *sizes) if name == 'all-gather' else largest
  looped = [line for line in program.splitlines()
            if re.search(r' (all-reduce|reduce-scatter)', line) and 'while/body' in line]
  return {**count, 'largest gathered': largest, 'reduced in loops': len(looped)}


def allowed(family, rules):
  """The most elements that an all-gather may make on a device: a matrix of one layer (of all of
  them where each device updates a part, ZeRO-1), but for what mesh axes cut that do not cut the
  batch; or the activations of the device's rows and length; or the router's probabilities of all
  rows, which XLA:CPU gathers for `top_k` (a TPU does not)."""
  rows = set(axes_of(rules.batch))
  module = FAMILIES[family].build(rules)
  boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), method='initialize')['params'])

  def elements(x):
    kept = [axis for name, axes in zip(x.names, rules.spec(*x.names)) for axis in axes_of(axes)
            if axis not in rows or name == 'expert']
    layers = x.value.shape[0] if 'layers' in x.names and not rules.opt_embed else 1
    return x.value.size // layers // math.prod(rules.mesh.shape[axis] for axis in kept)

  activations = B // MICROBATCHES * T * SMALL['d_model'] // (
      rules.shards('batch') * rules.shards('length'))
  router = B // MICROBATCHES * T * FAMILIES['moe'].moe.num_experts if family == 'moe' else 0
  is_leaf = lambda x: isinstance(x, nn.Partitioned)
  return max(activations, router, *map(elements, jax.tree.leaves(boxed, is_leaf=is_leaf)))


def difference(tree, other):
  """The largest difference of two trees, as a share of each leaf's largest value.

  A leaf whose values should all be 0, as the gradient of a key's bias, has a hundredth of the
  largest of all leaves.
  """
  largest = lambda x: np.abs(x).max(initial=0)
  least = 1e-2 * max(map(largest, jax.tree.leaves(other[1])))
  shares = jax.tree.map(lambda x, y: largest(x - y) / max(largest(y), least), tree, other)
  return float(max(jax.tree.leaves(shares)))


def rules_of(name):
  axes, changes = MESHES[name]
  return Rules(**changes).on(MeshConfig(**axes).build())


def results(names):
  """What `test_meshes.py` asks of each FAMILY/MESH."""
  found = {'devices': jax.device_count()}
  for name in names:
    family, mesh = name.split('/')
    begin, rules = time.process_time(), rules_of(mesh)
    want = reference(family, drops_scores(rules))
    ready = time.process_time()
    got, program = run(family, rules, drops_scores(rules))
    found[name] = {'difference': difference(got, want), 'collectives': collectives(program),
                   'allowed': allowed(family, rules)}
    print(f'{name}: {found[name]}, {time.process_time() - ready:.1f} s, and one device '
          f'{ready - begin:.1f} s', file=sys.stderr, flush=True)
  return found


def main():
  names = [f'{family}/{mesh}' for family in FAMILIES for mesh in MESHES]
  print(json.dumps(results(sys.argv[1:] or names)))


if __name__ == '__main__':
  main()
