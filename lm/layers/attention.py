"""Self-attention: projections, positions, cache, and the kernel."""
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.layers.linear import Linear
from lm.layers.positions import Rotation, rotary
from lm.parallel.rules import Rules, constrain
from pallas_kernels.flash_attention import decode_attention, flash_attention


class KVCache(NamedTuple):
  """Keys and values so far, [B, K, S, H] each: heads first, as decoding reads them."""
  key: jax.Array
  value: jax.Array


class Attention(nn.Module):
  """Multi-head attention with grouped key-value heads (arXiv:2305.13245) and optional rotary
  positions.

  std, out_std: standard deviations of the initial projections in and out.
  """
  d_model: int
  num_heads: int
  num_kv_heads: int
  d_head: int
  use_bias: bool
  std: float
  out_std: float
  rules: Rules

  @nn.compact
  def __call__(self, x_BTD: Float[Array, 'B T D'], rotation: Rotation | None = None,
               segment_ids_BT: Int[Array, 'B T'] | None = None, cache: KVCache | None = None,
               cache_length_B: Int[Array, ' B'] | None = None
               ) -> tuple[Float[Array, 'B T D'], KVCache | None]:
    """Each token attends to itself and those before it in its segment, and to the cache.

    `rotation` turns queries and keys; None leaves positions to the embedding.
    With a cache of `cache_length_B` tokens, the T new ones are written behind them and attend to
    all.
    """
    def project(name, heads, axis):
      return Linear((self.d_model,), (heads, self.d_head), ('embed', axis, 'head_dim'), self.std,
                    self.use_bias, name=name)(x_BTD)

    query_BTNH = project('query', self.num_heads, 'heads')
    key_BSKH = project('key', self.num_kv_heads, 'kv_heads')
    value_BSKH = project('value', self.num_kv_heads, 'kv_heads')
    if rotation is not None:
      query_BTNH, key_BSKH = rotary(query_BTNH, rotation), rotary(key_BSKH, rotation)
    query_BTNH = constrain(query_BTNH, self.rules, 'batch', 'length', 'heads', 'head_dim')
    if cache is not None:
      cache = KVCache(_write(cache.key, key_BSKH, cache_length_B),
                      _write(cache.value, value_BSKH, cache_length_B))
    if cache is not None and x_BTD.shape[1] == 1:
      out_BTNH = decode_attention(query_BTNH, *cache, cache_length_B + 1)
    else:
      if cache is not None:
        key_BSKH, value_BSKH = (jnp.swapaxes(x, 1, 2) for x in cache)
      out_BTNH = flash_attention(query_BTNH, key_BSKH, value_BSKH, causal=True,
                                 query_offset=cache_length_B, query_segment_ids=segment_ids_BT,
                                 key_segment_ids=segment_ids_BT)
    y_BTD = Linear((self.num_heads, self.d_head), (self.d_model,), ('heads', 'head_dim', 'embed'),
                   self.out_std, self.use_bias, name='out')(out_BTNH)
    return y_BTD, cache


def _write(cache_BKSH, new_BTKH, start_B):
  """Writes the new rows behind the `start_B` rows that stand."""
  new_BKTH = jnp.swapaxes(new_BTKH, 1, 2).astype(cache_BKSH.dtype)
  update = lambda cache, new, start: jax.lax.dynamic_update_slice(cache, new, (0, start, 0))
  return jax.vmap(update)(cache_BKSH, new_BKTH, start_B)
