"""A child of test_preference.py, and what both share: DPO on a mesh and on one device."""
import json
import pathlib
import sys

import jax
import jax.numpy as jnp

from lm.data import examples, vocabularies
from lm.evaluation import reference
from lm.models.gpt import GPTConfig
from lm.parallel.batches import GlobalBatch
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training.optimizers import Schedule, SGD
from lm.training.preference import DPO
from lm.training.state import init_state
from lm.training.step import jit_train_step

LENGTH, ROWS = 160, 16
MODEL = GPTConfig(vocab_size=259, max_length=LENGTH, d_model=16, num_layers=1, num_heads=2, d_ff=32,
                  dtype='float32', init_std=0.3, positions='rotary')
PAIRS = [{'prompt': f'say {i}', 'chosen': 'a' * (i % 5 + 1), 'rejected': 'b' * (i % 3 + 1)}
         for i in range(60)]


def task_of(cache_dir, **changes):
  """The pairs, written beside the cache."""
  path = pathlib.Path(cache_dir).parent / 'pairs.jsonl'
  path.write_text(''.join(json.dumps(pair) + '\n' for pair in PAIRS))
  return examples.ExampleTask(
      examples.Files(str(path), held_out=0.3), examples.Preference(), form='preference',
      chat_template='plain', vocabulary=vocabularies.VocabularyConfig(kind='byte'),
      cache_dir=str(cache_dir), **changes)


def step_of(prepared, devices, num_microbatches):
  """References of the parameters, then one step whose references are others'."""
  rules = Rules().on(MeshConfig(data=devices).build(jax.devices()[:devices]))
  module, optimizer = MODEL.build(rules), SGD(Schedule('constant', 0.1, 0)).build(10)
  state = init_state(module, optimizer, rules, 0)
  before = jax.device_get(state.params)
  found = reference.logps(module, state.params, prepared, 'train', LENGTH, ROWS, progress=False)
  prepared.references['train'][:] = 1.1 * found[:, ::-1]
  batch = GlobalBatch(rules, ROWS).place(prepared.loader('train', LENGTH, ROWS, seed=0).batch(0))
  step = jit_train_step(module, DPO(), optimizer, rules, state, num_microbatches)
  state, metrics = step(state, batch)
  moved = sum(float(jnp.abs(x - y).sum()) for x, y in zip(
      jax.tree.leaves(jax.device_get(state.params)), jax.tree.leaves(before)))
  return {'references': found.tolist(), 'loss': float(metrics['loss']),
          'grad_norm': float(metrics['grad_norm']), 'moved': moved}


def main(cache_dir):
  prepared = task_of(cache_dir).prepare(progress=False)
  cases = {'alone': (1, 1), 'devices and microbatches': (8, 2)}
  print(json.dumps({name: step_of(prepared, *case) for name, case in cases.items()}))


if __name__ == '__main__':
  main(*sys.argv[1:])
