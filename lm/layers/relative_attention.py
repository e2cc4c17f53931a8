"""Attention to a segment and to a memory of those before it, by relative positions."""
import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.layers import linear
from lm.layers.kernels import attend, dropout, Implementation
from lm.layers.linear import Linear
from lm.layers.products import Products
from lm.parallel.rules import Rules, constrain
from pallas_kernels.dropout import Draws


def sinusoids(distance_S: Int[Array, ' S'], d_model: int) -> Float[Array, 'S D']:
  """R of section 3.3: sines, then cosines, of distance * 10000**(-2i/D) for i < D/2, float32."""
  frequency = 10000.0**(-jnp.arange(0, d_model, 2, dtype=jnp.float32) / d_model)
  angle = distance_S[:, None].astype(jnp.float32) * frequency
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class HeadBiases(nn.Module):
  """Owns u and v of section 3.3, [2, N, H]: what every query adds towards contents and places."""
  num_heads: int
  d_head: int
  std: float

  @nn.compact
  def __call__(self) -> Float[Array, '2 N H']:
    """u and v."""
    return self.param('bias', linear.normal(self.std, None, 'heads', 'head_dim'),
                      (2, self.num_heads, self.d_head))


class RelativeAttention(nn.Module):
  """Multi-head attention whose scores know the distance of two tokens, not their places
  (Transformer-XL, arXiv:1901.02860, section 3.3):

    score[t, s] = ((query[t] + u) . key[s] + (query[t] + v) . position[t - s]) / sqrt(H)

  with position = R W_R, of sinusoids R. Without biases in the projections.

  window: keys that a query sees at most, its own included; None is all.
  dropout_rate: of the probabilities, on when it is called with draws.
  implementation: of the kernel.
  products: what projections are computed in.
  """
  d_model: int
  num_heads: int
  d_head: int
  std: float
  rules: Rules
  window: int | None = None
  dropout_rate: float = 0.0
  implementation: Implementation = None
  products: Products = None

  @nn.compact
  def __call__(self, x_BTD: Float[Array, 'B T D'], sinusoids_SD: Float[Array, 'S D'],
               biases: Float[Array, '2 N H'], memory_BMD: Float[Array, 'B M D'] | None = None,
               segment_ids: tuple[Int[Array, 'B T'], Int[Array, 'B S']] | None = None,
               draws: Draws | None = None
               ) -> Float[Array, 'B T D']:
    """Attends to the memory and to the tokens up to its own.

    Args:
      sinusoids_SD: of the distances 0 .. S - 1, of S = M + T.
      biases: u and v.
      memory_BMD: what stands before x, S - T places of each row.
      segment_ids: of queries and keys, which see their own segment only.
    """
    def project(name, inputs):
      return Linear((self.d_model,), (self.num_heads, self.d_head), ('embed', 'heads', 'head_dim'),
                    self.std, products=self.products, name=name)(inputs)

    x_BTD = constrain(x_BTD, self.rules, 'batch', 'length', 'act_embed')
    y = x_BTD if memory_BMD is None else jnp.concatenate([memory_BMD, x_BTD], axis=1)
    inputs = {'query': x_BTD, 'key': y, 'value': y, 'position': sinusoids_SD.astype(x_BTD.dtype)}
    query_BTNH, key_BSNH, value_BSNH, position_SNH = (
        checkpoint_name(project(name, x), 'qkv') for name, x in inputs.items())
    u_NH, v_NH = biases.astype(x_BTD.dtype)
    query_BTNH = constrain(query_BTNH, self.rules, 'batch', 'length', 'heads', 'head_dim')
    query_segments, key_segments = (None, None) if segment_ids is None else segment_ids
    memory_length = 0 if memory_BMD is None else memory_BMD.shape[1]
    out_BTNH = attend(self.rules, self.implementation, query=query_BTNH + u_NH, key=key_BSNH,
                      value=value_BSNH, window=self.window, relative_query=query_BTNH + v_NH,
                      relative_key=position_SNH, query_offset=memory_length,
                      query_segment_ids=query_segments, key_segment_ids=key_segments,
                      **dropout(self.dropout_rate, draws, query_BTNH))
    out = Linear((self.num_heads, self.d_head), (self.d_model,), ('heads', 'head_dim', 'embed'),
                 self.std, products=self.products, name='out')
    return checkpoint_name(out(out_BTNH), 'attention_out')
