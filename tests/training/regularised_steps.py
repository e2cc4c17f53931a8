"""Steps with mixout and with adversarial noise, on any devices; a child of
test_regularised_steps.py prints them as JSON."""
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.models.bert import BERTConfig
from lm.models.heads import ClassifierConfig
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training.losses import Prediction
from lm.training.optimizers import SGD, Schedule
from lm.training.state import init_state
from lm.training.step import jit_train_step

CONFIG = ClassifierConfig(BERTConfig(
    vocab_size=30, max_length=12, d_model=16, num_layers=1, num_heads=4, d_ff=24, pooler=False,
    sentence_classes=0, masked_lm=False, dtype='float32', init_std=0.2, dropout_rate=0.1,
    scan_layers=True), num_classes=3)
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: params,
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads))
EPSILON = 0.5


def batch():
  """16 rows of one text each, padded."""
  rng = np.random.default_rng(0)
  segments = (np.arange(12) < rng.integers(4, 13, (16, 1))).astype(np.int32)
  return {'encoder_input_tokens': rng.integers(1, 30, (16, 12)).astype(np.int32) * segments,
          'encoder_segment_ids': segments,
          'class_labels': rng.integers(0, 3, 16).astype(np.int32)}


def start(mesh, optimizer):
  """Rules, module and state on a mesh."""
  rules = Rules().on(MeshConfig(**mesh).build(jax.devices()[:int(np.prod(list(mesh.values())))]))
  module = CONFIG.build(rules)
  return rules, module, init_state(module, optimizer, rules, 3)


@functools.cache
def adversarial():
  """(gradients by leaf, metrics) of one step."""
  rules, module, state = start({'data': 1}, KEEP_GRADIENT)
  step = jit_train_step(module, Prediction(adversarial=EPSILON), KEEP_GRADIENT, rules, state)
  state, metrics = step(state, batch())
  metrics.pop('norms')
  return jax.device_get((state.opt_state, metrics))


def trained(mesh, num_microbatches=1):
  """Parameters after some steps of gradient descent with both."""
  optimizer = SGD(Schedule(kind='constant', learning_rate=0.3, warmup_steps=0), clip_norm=None,
                  momentum=0.0, mixout=0.7).build(10)
  rules, module, state = start(mesh, optimizer)
  step = jit_train_step(module, Prediction(adversarial=EPSILON), optimizer, rules, state,
                        num_microbatches)
  for _ in range(3):
    state, _ = step(state, batch())
  return [np.asarray(x, np.float64).ravel()[::7].tolist() for x in jax.tree.leaves(state.params)]


if __name__ == '__main__':
  print(json.dumps([trained(mesh, 2) for mesh in ({'data': 2, 'fsdp': 4}, {'data': 8})]))
