"""The feed-forward half of a block."""
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.layers.linear import Linear
from lm.parallel.rules import Rules, constrain


@jax.checkpoint  # keeps x alone for the backward pass, not its float32 intermediates
def _gelu(x: jax.Array) -> jax.Array:
  """GELU in GPT-2's tanh form (arXiv:1606.08415, section 2), in float32, rounded once."""
  return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


@jax.checkpoint
def _swiglu(x: jax.Array, y: jax.Array) -> jax.Array:
  """silu(x) * y, likewise."""
  return (jax.nn.silu(x.astype(jnp.float32)) * y.astype(jnp.float32)).astype(x.dtype)


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
      hidden_BTF = _swiglu(up('wi_0'), up('wi_1'))
    else:
      hidden_BTF = _gelu(up('wi'))
    hidden_BTF = constrain(hidden_BTF, self.rules, 'batch', 'length', 'mlp')
    return Linear((self.d_ff,), (self.d_model,), ('mlp', 'embed'), self.out_std, self.use_bias,
                  name='wo')(hidden_BTF)
