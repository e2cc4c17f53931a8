"""What blocks name, so that a policy may keep it."""
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lm.errors import UserError
from lm.layers import stack
from lm.layers.moe import MoEConfig
from lm.models.bert import BERTConfig
from lm.models.gpt import GPTConfig
from lm.models.t5 import T5Config
from lm.models.transformer_xl import TransformerXLConfig
from lm.training.losses import Prediction

B, T = 2, 8
SMALL = dict(vocab_size=16, max_length=T, d_model=16, num_layers=2, num_heads=2, d_ff=32,
             scan_layers=True, attention_implementation='reference')
EXPERTS = dict(num_experts=4, num_selected=2, d_ff=16)
FAMILIES = {
    'gpt': GPTConfig(**SMALL, positions='rotary', activation='swiglu', use_bias=False),
    'dropless': GPTConfig(**SMALL, moe=MoEConfig(**EXPERTS)),
    'capacity': GPTConfig(**SMALL, moe=MoEConfig(**EXPERTS, capacity_factor=1.0)),
    'bert': BERTConfig(**SMALL),
    't5': T5Config(**SMALL, num_buckets=4, max_distance=8),
    'transformer_xl': TransformerXLConfig(**SMALL, memory_length=T),
}


def program(family, remat):
  """The gradient of a step as text, before any compiler has seen it."""
  module = dataclasses.replace(FAMILIES[family], remat=remat).build()
  tokens, weights = jnp.ones((B, T), jnp.int32), jnp.ones((B, T))
  decoder = {'decoder_input_tokens': tokens, 'decoder_target_tokens': tokens,
             'decoder_loss_weights': weights}
  encoder = {'encoder_input_tokens': tokens, 'encoder_segment_ids': tokens}
  masked = {'masked_positions': tokens, 'masked_target_tokens': tokens,
            'masked_loss_weights': weights, 'encoder_positions': tokens,
            'encoder_token_types': tokens, 'class_labels': tokens[:, 0]}
  batch = {'bert': encoder | masked, 't5': encoder | decoder,
           'transformer_xl': decoder | {'decoder_restart': tokens[:, 0]}}.get(family, decoder)
  params = jax.eval_shape(lambda: module.init(jax.random.key(0), method='initialize')['params'])
  carry = module.config.init_carry(B)

  def score(params):
    outputs, _ = module.apply({'params': params}, batch, None, carry, method='outputs')
    return sum(Prediction()(outputs, batch).values())

  return jax.jit(jax.grad(score)).lower(params).as_text()


@pytest.mark.parametrize('family', FAMILIES)
def test_a_policy_that_keeps_all_that_is_named_multiplies_nothing_twice(family):
  nothing_twice, kept = (program(family, remat).count('dot_general')
                         for remat in ('none', '+'.join(stack.NAMED)))
  assert kept == nothing_twice


def test_a_policy_of_what_no_block_names_is_refused():
  with pytest.raises(UserError, match='queries'):
    stack.policy('qkv+queries')
