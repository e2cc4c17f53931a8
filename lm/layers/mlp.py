"""The feed-forward half of a block."""
import functools
from typing import Literal

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.layers import linear
from lm.layers.linear import Linear
from lm.layers.products import Products
from lm.parallel.rules import Rules, constrain
from pallas_kernels.dropout import Draws

Activation = Literal['gelu', 'gelu_exact', 'relu', 'swiglu', 'geglu', 'geglu_exact']

# 'gelu' is GPT-2's tanh form (arXiv:1606.08415, section 2), 'gelu_exact' BERT's with erf.
_FUNCTIONS = {'gelu': functools.partial(jax.nn.gelu, approximate=True), 'relu': jax.nn.relu,
              'gelu_exact': functools.partial(jax.nn.gelu, approximate=False)}
# Gated units (arXiv:2002.05202, section 2): the function of the first half times the second.
_GATES = {'swiglu': jax.nn.silu, 'geglu': _FUNCTIONS['gelu'],
          'geglu_exact': _FUNCTIONS['gelu_exact']}


def is_gated(activation: Activation) -> bool:
  """Whether the unit has two matrices in, `wi_0` and `wi_1`, instead of one."""
  return activation in _GATES


@functools.partial(jax.checkpoint, static_argnums=0)  # keeps its inputs alone for the backward pass
def activate(activation: Activation, *inputs: jax.Array) -> jax.Array:
  """f(x), or f(x) * y of a gated unit; in float32, rounded once."""
  x, *gate = (array.astype(jnp.float32) for array in inputs)
  y = _GATES[activation](x) * gate[0] if gate else _FUNCTIONS[activation](x)
  return y.astype(inputs[0].dtype)


class MLP(nn.Module):
  """wo(f(wi(x))), or of a gated unit wo(f(wi_0(x)) * wi_1(x)).

  dropout_rate: of the hidden layer (T5), on when it is called with draws.
  products: what both products are computed in.
  """
  d_model: int
  d_ff: int
  activation: Activation
  use_bias: bool
  std: float
  out_std: float
  rules: Rules
  dropout_rate: float = 0.0
  products: Products = None

  @nn.compact
  def __call__(self, x_BTD: Float[Array, 'B T D'],
               draws: Draws | None = None) -> Float[Array, 'B T D']:
    """[B, T, D] -> [B, T, D]."""
    names = ('wi_0', 'wi_1') if is_gated(self.activation) else ('wi',)
    x_BTD = constrain(x_BTD, self.rules, 'batch', 'length', 'act_embed')  # gathered once for both
    x_BTD = jax.lax.optimization_barrier(x_BTD)  # the norm, once for both matrices
    up = [Linear((self.d_model,), (self.d_ff,), ('embed', 'mlp'), self.std, self.use_bias,
                 self.rules, self.products, name=name)(x_BTD) for name in names]
    up = [checkpoint_name(x, 'mlp_in') for x in linear.keep_gradient_whole(up)]
    hidden_BTF = checkpoint_name(activate(self.activation, *up), 'mlp_hidden')
    hidden_BTF = linear.dropout(hidden_BTF, self.dropout_rate, draws)
    hidden_BTF = constrain(hidden_BTF, self.rules, 'batch', 'length', 'mlp')
    wo = Linear((self.d_ff,), (self.d_model,), ('mlp', 'embed'), self.out_std, self.use_bias,
                self.rules, self.products, name='wo')
    return checkpoint_name(wo(hidden_BTF), 'mlp_out')
