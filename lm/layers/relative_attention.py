"""Attention to a segment and to a memory of those before it, by relative positions."""
from typing import NamedTuple

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.layers import linear
from lm.layers.cache import Places
from lm.layers.kernels import attend, dropout, Implementation
from lm.layers.linear import Linear
from lm.layers.products import Products
from lm.layers.rolling import attend_rolling, Rolling
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


class RelativeCache(NamedTuple):
  """What decoding keeps of a layer: its last tokens, and W_R R of section 3.3, [X, N, H], of the
  distances 0 .. X - 1: parameters alone make it, so that one token is the first and last to ask."""
  tokens: Rolling
  position: jax.Array | None = None


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
               draws: Draws | None = None, cache: RelativeCache | None = None,
               places: Places | None = None
               ) -> tuple[Float[Array, 'B T D'], RelativeCache | None]:
    """Attends to the memory and to the tokens up to its own; returns that and the cache.

    Args:
      sinusoids_SD: of the distances 0 .. S - 1, of S = M + T; with a cache S is its window.
      biases: u and v.
      memory_BMD: what stands before x, S - T places of each row.
      segment_ids: of queries and keys, which see their own segment only.
      cache: its rows stand at `places`; the new tokens are written behind them. In place of a
        memory and of segments.
    """
    def project(name, inputs):
      return Linear((self.d_model,), (self.num_heads, self.d_head), ('embed', 'heads', 'head_dim'),
                    self.std, products=self.products, name=name)(inputs)

    x_BTD = constrain(x_BTD, self.rules, 'batch', 'length', 'act_embed')
    y = x_BTD if memory_BMD is None else jnp.concatenate([memory_BMD, x_BTD], axis=1)
    inputs = {'query': x_BTD, 'key': y, 'value': y, 'position': sinusoids_SD.astype(x_BTD.dtype)}
    if cache is not None and cache.position is not None:
      del inputs['position']
    projected = {name: checkpoint_name(project(name, x), 'qkv') for name, x in inputs.items()}
    if cache is not None:
      projected = {'position': cache.position} | projected
    u_NH, v_NH = biases.astype(x_BTD.dtype)
    query_BTNH = constrain(projected['query'], self.rules, 'batch', 'length', 'heads', 'head_dim')
    terms = {'query': query_BTNH + u_NH, 'key': projected['key'], 'value': projected['value'],
             'relative_query': query_BTNH + v_NH, 'relative_key': projected['position']}
    if cache is None:
      query_segments, key_segments = (None, None) if segment_ids is None else segment_ids
      memory_length = 0 if memory_BMD is None else memory_BMD.shape[1]
      out_BTNH = attend(self.rules, self.implementation, window=self.window,
                        query_offset=memory_length, query_segment_ids=query_segments,
                        key_segment_ids=key_segments, **terms,
                        **dropout(self.dropout_rate, draws, query_BTNH))
    else:
      out_BTNH, tokens = attend_rolling(self.rules, self.implementation, cache.tokens, places,
                                        scale=None, softcap=None, bias_of=_bias_of(terms), **terms)
      cache = RelativeCache(tokens, projected['position'])
    out = Linear((self.num_heads, self.d_head), (self.d_model,), ('heads', 'head_dim', 'embed'),
                 self.std, products=self.products, name='out')
    return checkpoint_name(out(out_BTNH), 'attention_out'), cache


def _bias_of(terms):
  """What the distance adds to the scores, as a function of it."""
  query_BTNH, position_XNH = terms['relative_query'], terms['relative_key']
  scores_BNTX = jnp.einsum('btnh,xnh->bntx', query_BTNH, position_XNH,
                           preferred_element_type=jnp.float32) * query_BTNH.shape[-1]**-0.5

  def bias_of(distance_BTS):
    distance_BTS = jnp.minimum(distance_BTS, len(position_XNH) - 1)
    return jnp.take_along_axis(scores_BNTX, distance_BTS[:, None], axis=-1)
  return bias_of
