"""Attention: projections, positions, cache, and the kernel."""
from collections.abc import Callable
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lm.errors import UserError
from lm.layers import adapted
from lm.layers import cache as caches
from lm.layers.cache import KVCache, Places
from lm.layers.kernels import attend, attend_to_cache, dropout, Implementation
from lm.layers.linear import Linear
from lm.layers.positions import Rotation, rotary
from lm.layers.products import Products
from lm.layers.relative_bias import of_distances
from lm.layers.rolling import attend_rolling, Rolling
from lm.parallel.rules import Rules, constrain
from pallas_kernels.dropout import Draws


class Paths(NamedTuple):
  """Texts that share beginnings: the T tokens of a row form trees, and its S places hold every path
  from a root to a leaf, one behind another.

  A token comes to the same on all of its paths, so that what is computed of one token alone (all
  but attention) is computed once.

  tokens: int32 [B, S], which of the T tokens stands at a place.
  segment_ids: int32 [B, S], of each path; 0 where padded.
  places: int32 [B, T], one of the places of each token.
  """
  tokens: jax.Array
  segment_ids: jax.Array
  places: jax.Array


class Attention(nn.Module):
  """Multi-head attention, of a sequence to itself or to a memory, with grouped key-value heads
  (arXiv:2305.13245).

  std, out_std: standard deviations of the initial projections in and out; query_std: of the
    query's, where it differs.
  use_bias, out_bias: of the projections in, and of the one out.
  causal: a token sees itself and those before it; else all of its segment.
  window: a token sees those nearer than this many places (arXiv:2310.06825, section 2).
  scale: of the scores; None is H**-0.5.
  softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118, section 2).
  qk_norm: makes the norm of each head's query and key (Qwen 3, Gemma 3).
  dropout_rate: of the probabilities, on when it is called with draws.
  implementation: of the kernel.
  products: what projections are computed in.
  """
  d_model: int
  num_heads: int
  num_kv_heads: int
  d_head: int
  std: float
  out_std: float
  rules: Rules
  query_std: float | None = None
  use_bias: bool = False
  out_bias: bool = False
  causal: bool = True
  window: int | None = None
  scale: float | None = None
  softcap: float | None = None
  qk_norm: Callable[[], nn.Module] | None = None
  dropout_rate: float = 0.0
  implementation: Implementation = None
  products: Products = None

  def setup(self):
    def project(heads, axis, std):
      return Linear((self.d_model,), (heads, self.d_head), ('embed', axis, 'head_dim'), std,
                    self.use_bias, self.rules, self.products)

    few = self._shares_heads
    self.query = project(self.num_heads, 'heads', self.query_std or self.std)
    self.key = project(self.num_kv_heads, None if few else 'kv_heads', self.std)
    self.value = project(self.num_kv_heads, None if few else 'kv_heads', self.std)
    self.out = Linear((self.num_heads, self.d_head), (self.d_model,),
                      ('heads', 'head_dim', 'embed'), self.out_std, self.out_bias,
                      self.rules, self.products)
    if self.qk_norm is not None:
      self.query_norm, self.key_norm = self.qk_norm(), self.qk_norm()

  @property
  def _shares_heads(self):
    """Whether devices that are more than key-value heads hold them all; `attend` repeats them."""
    return self.num_kv_heads % self.rules.shards('kv_heads') > 0

  def keys_values(self, x_BSD: Float[Array, 'B S D'], rotation: Rotation | None = None
                  ) -> tuple[Float[Array, 'B S K H'], Float[Array, 'B S K H']]:
    """What queries attend to; of a memory that is attended to again and again, computed once."""
    x_BSD = constrain(x_BSD, self.rules, 'batch', 'length', 'act_embed')
    key_BSKH = self.key(x_BSD)
    key_BSKH = key_BSKH if self.qk_norm is None else self.key_norm(key_BSKH)
    key_BSKH = key_BSKH if rotation is None else rotary(key_BSKH, rotation)
    return tuple(checkpoint_name(x, 'qkv') for x in (key_BSKH, self.value(x_BSD)))

  def __call__(self, x_BTD: Float[Array, 'B T D'], *, rotation: Rotation | None = None,
               segment_ids: Int[Array, 'B T'] | None = None,
               distance_bias: Float[Array, 'N X'] | None = None,
               prefix: Bool[Array, 'B T'] | None = None, cache: KVCache | Rolling | None = None,
               places: Places | None = None,
               is_local: Bool[Array, ''] | None = None,
               memory: tuple[Float[Array, 'B S K H'], Float[Array, 'B S K H']] | None = None,
               memory_segment_ids: Int[Array, 'B S'] | None = None,
               learned: KVCache | None = None, draws: Draws | None = None, zigzag: bool = False,
               paths: Paths | None = None, shift: Rotation | None = None
               ) -> tuple[Float[Array, 'B T D'], KVCache | Rolling | None]:
    """Attends to itself, to a cache, or to a memory.

    Args:
      x_BTD: where queries, and without a memory keys and values, come from.
      rotation: turns queries and keys; None leaves positions to the embedding or the bias.
      segment_ids: a token sees its own segment only.
      distance_bias: added to the scores, see `flash_attention`.
      prefix: which tokens all of their segment may see, though attention is causal (prefix LM).
      cache: its rows stand at `places`; the T new tokens are written behind them and attend to all.
      is_local: whether this layer keeps to the window, in stacks where some do; None: if it has
        one.
      memory: keys and values of another sequence, from `keys_values`, and its segments.
      learned: keys and values [1, K, P, H] that every query sees too; None: the `prefix_key` and
        `prefix_value` [P, K, H] of an adapter, if there is one.
      zigzag: whether the tokens are in the order of `lm.parallel.ring.zigzag`.
      paths: of trees of tokens, in place of `segment_ids`: a token sees those before it on its
        path. Not with a cache, a memory or a prefix.
      shift: see `attend_rolling`, for a `Rolling` cache.

    Returns:
      [B, T, D], and the cache with the new tokens.
    """
    # Gathered once for all of its products, where devices have parts of it between blocks.
    x_BTD = constrain(x_BTD, self.rules, 'batch', 'length', 'act_embed')
    query_BTNH = self.query(x_BTD)
    query_BTNH = query_BTNH if self.qk_norm is None else self.query_norm(query_BTNH)
    query_BTNH = query_BTNH if rotation is None else rotary(query_BTNH, rotation)
    query_BTNH = constrain(query_BTNH, self.rules, 'batch', 'length', 'heads', 'head_dim')
    query_BTNH = checkpoint_name(query_BTNH, 'qkv')
    if memory is None:
      memory, memory_segment_ids = self.keys_values(x_BTD, rotation), segment_ids
    if paths is not None:
      query_BTNH, *memory = (_take(x, paths.tokens) for x in (query_BTNH, *memory))
      segment_ids = memory_segment_ids = paths.segment_ids
    learned = self._learned() if learned is None else tuple(
        jnp.swapaxes(x[0], 0, 1) for x in learned[:2])
    if isinstance(cache, Rolling):
      if learned is not None or prefix is not None:
        raise UserError('a rolling cache forgets what all tokens see: learnt keys (PrefixTuning, '
                        'PromptTuning) and prefixes; decode with CacheOptions() instead')
      out_BTNH, cache = self._roll(query_BTNH, *memory, cache, places, distance_bias, shift)
      return self._project(out_BTNH), cache
    options = {'query': query_BTNH, 'scale': self.scale, 'softcap': self.softcap}
    T, length = x_BTD.shape[1], None if cache is None else places.length
    if cache is not None:
      cache = self._constrained(caches.write(
          cache, places, *memory, is_cut=self.rules.is_cut), places)
    if cache is not None and T <= caches.LONGEST_STEP and learned is None and prefix is None:
      one = functools.partial(attend_to_cache, self.rules, lengths=length + T,
                              bias=_bias_of_cache(distance_bias, cache, places, T),
                              page_table=places.page_table, **cache._asdict(), **options)
    else:
      key, value = memory if cache is None else caches.read(cache, places, query_BTNH.dtype)
      one = functools.partial(
          attend, self.rules, self.implementation, zigzag, key=key, value=value,
          causal=self.causal, prefix=prefix, query_offset=length,
          query_segment_ids=segment_ids, key_segment_ids=memory_segment_ids,
          distance_bias=distance_bias, **options,
          **({} if learned is None else {'return_lse': True}),
          **dropout(self.dropout_rate, draws, query_BTNH))
    if is_local is None or self.window is None:
      out_BTNH = one(window=self.window)
    else:  # both windows are static, so that neither computes what it masks
      out_BTNH = jax.lax.cond(is_local, lambda: one(window=self.window), lambda: one(window=None))
    if learned is not None:
      out_BTNH = adapted.attend_also(*out_BTNH, query_BTNH, *learned, self.scale, self.softcap)
    if paths is not None:
      out_BTNH = _take(out_BTNH, paths.places)
    return self._project(out_BTNH), cache

  def _project(self, out_BTNH):
    return checkpoint_name(jax.lax.optimization_barrier(self.out(out_BTNH)), 'attention_out')

  def _roll(self, query_BTNH, key_BTKH, value_BTKH, cache, places, distance_bias, shift):
    """Attention to a cache of a window."""
    terms, bias_of = {}, None
    if distance_bias is not None:
      bias_of = functools.partial(of_distances, distance_bias)
      terms = {'distance_bias': distance_bias}
    out_BTNH, cache = attend_rolling(
        self.rules, self.implementation, cache, places, query=query_BTNH, key=key_BTKH,
        value=value_BTKH, scale=self.scale, softcap=self.softcap, bias_of=bias_of, shift=shift,
        **terms)
    return out_BTNH, self._constrained(cache, places)

  def _constrained(self, cache, places):
    """The cache with its rows, or all of a pool, and heads on their devices."""
    heads = None if self._shares_heads else 'kv_heads'
    rows = 'batch' if places.page_table is None else None
    return jax.tree.map(lambda x: constrain(x, self.rules, rows, heads, *(None,) * (x.ndim - 2)),
                        cache)

  def _learned(self):
    """An adapter's keys and values, if there are any."""
    leaves = self.variables.get('params', {})
    return (leaves['prefix_key'], leaves['prefix_value']) if 'prefix_key' in leaves else None


def _bias_of_cache(distance_bias, cache, places, T):
  """What T new tokens add to their scores with all keys of a cache, if they add anything."""
  if distance_bias is None:
    return None
  return of_distances(distance_bias, places.of(T)[..., None] - jnp.arange(
      caches.num_keys(cache, places)))


def _take(x_BTNH, places_BS):
  """[B, T, N, H] at places [B, S] of the T."""
  return jnp.take_along_axis(x_BTNH, places_BS[..., None, None], axis=1)
