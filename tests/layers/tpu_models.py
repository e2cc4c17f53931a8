"""What test_kernels.py has compiled in a child process: a model's gradient on a mesh of TPUs."""
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import topologies

from lm.layers.moe import MoEConfig
from lm.models.gpt import GPTConfig
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training.losses import Prediction
from pallas_kernels.tpu_compiler import TOPOLOGIES

BATCH, LENGTH = 4, 256
CONFIG = GPTConfig(
    vocab_size=128, max_length=LENGTH, d_model=128, num_layers=1, num_heads=4, num_kv_heads=2,
    moe=MoEConfig(num_experts=4, num_selected=1, d_ff=128), positions='rotary', activation='swiglu')


def rules():
  """Rows and experts over one axis of a 2 x 2 mesh of TPUs, heads and hidden layers over the
  other."""
  topology = topologies.get_topology_desc(TOPOLOGIES['v5e'], 'tpu')
  return Rules().on(MeshConfig(data=1, expert=2, tensor=2).build(topology.devices))


def gradient(config, where):
  """The gradient of a packed batch, and its arguments."""
  module, loss = config.build(where), Prediction()

  def total(params, batch):
    outputs, _ = module.apply({'params': params}, batch, method='outputs')
    return loss(outputs, batch)['tokens']

  tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=where.sharding('batch'))
  weights = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.float32, sharding=where.sharding('batch'))
  names = ['decoder_input_tokens', 'decoder_target_tokens', 'decoder_segment_ids']
  batch = dict.fromkeys(names, tokens) | {'decoder_loss_weights': weights}
  boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), method='initialize')['params'])
  params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.value.shape, x.value.dtype,
                                     sharding=where.sharding(*x.names)),
      boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
  return jax.grad(total), (params, batch)


def cases():
  """Experts and grouped queries, rows and heads cut."""
  return {'gpt': gradient(CONFIG, rules())}
