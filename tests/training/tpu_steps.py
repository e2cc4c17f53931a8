"""A train step in each precision, compiled for a TPU: run in a child by test_precision.py, which
reads the last line."""
import json
import os
import re
import sys

from pallas_kernels.tpu_compiler import ENVIRONMENT

os.environ.update(ENVIRONMENT)

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from lm.models.gpt import GPTConfig
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training import precision
from lm.training.losses import Prediction
from lm.training.optimizers import AdamW
from lm.training.state import abstract_state
from lm.training.step import jit_train_step

# int8 and 8-bit floats as the operands of products, by their names in HLO.
EIGHT_BITS = re.compile(r'\b(s8|f8e4m3fn|f8e5m2)\[')
ROWS, LENGTH = 8, 256


def compiled(config, loss_scale, topology):
  """The step over four chips that share the parameters."""
  devices = topologies.get_topology_desc(topology, 'tpu').devices
  rules = Rules().on(MeshConfig(fsdp=4).build(devices))
  module = config.build(rules)
  optimizer = precision.prepare(AdamW().build(10), config.param_dtype, loss_scale)
  state = abstract_state(module, optimizer, rules)
  ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=rules.sharding('batch'))
  weights = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32, sharding=rules.sharding('batch'))
  batch = {'decoder_input_tokens': ids, 'decoder_target_tokens': ids,
           'decoder_loss_weights': weights}
  with jax.set_mesh(rules.mesh):
    return jit_train_step(module, Prediction(), optimizer, rules, state).lower(
        state, batch).compile()


def main(asked: str) -> None:
  """Prints what was found of each [name, fields of the config, has a loss scale, topology]."""
  found = {}
  for name, changes, is_scaled, topology in json.loads(asked):
    config = GPTConfig(vocab_size=512, max_length=LENGTH, d_model=256, num_layers=2, num_heads=2,
                       d_ff=512, positions='rotary', activation='swiglu', norm='rmsnorm',
                       use_bias=False, scan_layers=True, remat='full', **changes)
    step = compiled(config, precision.LossScale() if is_scaled else None, topology)
    memory = step.memory_analysis()
    found[name] = {'state_bytes': memory.argument_size_in_bytes,
                   'peak_bytes': memory.peak_memory_in_bytes,
                   'operands': sorted(set(EIGHT_BITS.findall(step.as_text())))}
  print(json.dumps(found))


if __name__ == '__main__':
  main(sys.argv[1])
