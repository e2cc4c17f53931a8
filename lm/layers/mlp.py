"""The feed-forward half of a block."""
from typing import Literal

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from lm.layers.linear import Linear
from lm.parallel.rules import Rules, constrain


class MLP(nn.Module):
  """wo(gelu(wi(x))), or SwiGLU: wo(silu(wi_0(x)) * wi_1(x)) (arXiv:2002.05202, equation 6)."""
  d_model: int
  d_ff: int
  activation: Literal['gelu', 'swiglu']
  use_bias: bool
  std: float
  out_std: float
  rules: Rules

  @nn.compact
  def __call__(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    """[B, T, D] -> [B, T, D]."""
    def up(name):
      return Linear((self.d_model,), (self.d_ff,), ('embed', 'mlp'), self.std, self.use_bias,
                    name=name)(x_BTD)

    if self.activation == 'swiglu':
      hidden_BTF = jax.nn.silu(up('wi_0')) * up('wi_1')
    else:
      hidden_BTF = jax.nn.gelu(up('wi'), approximate=True)  # GPT-2's tanh form
    hidden_BTF = constrain(hidden_BTF, self.rules, 'batch', 'length', 'mlp')
    return Linear((self.d_ff,), (self.d_model,), ('mlp', 'embed'), self.out_std, self.use_bias,
                  name='wo')(hidden_BTF)
