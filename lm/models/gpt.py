"""Decoder-only transformer: GPT-2 (Radford et al. 2019) to Llama (arXiv:2302.13971), by its
config."""
import dataclasses
import functools
from typing import Any, Literal, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.layers import linear
from lm.layers import positions as positions_lib
from lm.layers.attention import Attention, KVCache
from lm.layers.mlp import MLP
from lm.layers.norms import Norm
from lm.layers.stack import Remat, Stack, unstack
from lm.parallel.rules import Rules, constrain

SCAN_FROM_LAYERS = 16  # shallower stacks compile fast enough unrolled, and run faster


@dataclasses.dataclass(frozen=True)
class GPTConfig:
  """What the model is. The defaults are GPT-2 124M; Llama differs by `norm`, `positions`,
  `activation`, `num_kv_heads`, `use_bias=False` and `tie_embeddings=False`.

  vocab_size: V, tokens of the vocabulary.
  max_length: the longest sequence, in tokens (the context).
  num_kv_heads: K, key-value heads; None is `num_heads`, 1 is multi-query attention.
  d_head: H; None is d_model / num_heads.
  rope_theta: base of rotary positions.
  init_std: standard deviation of initial weights; residual projections get it / sqrt(2 num_layers).
  dropout_rate: on the embedding and on both residual branches.
  dtype: of activations; parameters, norms, softmax and loss are float32.
  scan_layers: None scans from 16 layers on.
  """
  vocab_size: int = 50257
  max_length: int = 1024
  d_model: int = 768
  num_layers: int = 12
  num_heads: int = 12
  num_kv_heads: Optional[int] = None
  d_head: Optional[int] = None
  d_ff: int = 3072
  norm: Literal['layernorm', 'rmsnorm'] = 'layernorm'
  norm_epsilon: float = 1e-5
  positions: Literal['learned', 'rotary'] = 'learned'
  rope_theta: float = 10000.0
  activation: Literal['gelu', 'swiglu'] = 'gelu'
  use_bias: bool = True
  tie_embeddings: bool = True
  dropout_rate: float = 0.0
  init_std: float = 0.02
  dtype: Literal['bfloat16', 'float32'] = 'bfloat16'
  scan_layers: Optional[bool] = None
  remat: Remat = 'none'

  def __post_init__(self):
    for name in ('vocab_size', 'max_length', 'd_model', 'num_layers', 'num_heads', 'd_ff'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
    if self.d_head is None and self.d_model % self.num_heads:
      raise ValueError(f'd_model={self.d_model} is not divisible by num_heads={self.num_heads}; '
                       'set d_head explicitly')
    if self.num_heads % self.kv_heads:
      raise ValueError(f'num_heads={self.num_heads} is not divisible by '
                       f'num_kv_heads={self.num_kv_heads}; each key-value head serves equally many')
    if self.positions == 'rotary' and self.head_dim % 2:
      raise ValueError(f'd_head={self.head_dim} is odd; rotary positions rotate pairs, so make '
                       'it even')
    if not 0 <= self.dropout_rate < 1:
      raise ValueError(f'dropout_rate={self.dropout_rate} must be in [0, 1)')

  @property
  def kv_heads(self) -> int:
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  @property
  def head_dim(self) -> int:
    return self.d_model // self.num_heads if self.d_head is None else self.d_head

  @property
  def scanned(self) -> bool:
    return self.num_layers >= SCAN_FROM_LAYERS if self.scan_layers is None else self.scan_layers

  def build(self, rules: Rules = Rules()) -> 'GPT':
    """The module of this config, sharded by `rules`."""
    return GPT(self, rules)

  def init_cache(self, batch_size: int, max_length: int) -> 'Cache':
    """An empty cache for `max_length` tokens of each of `batch_size` sequences."""
    shape = batch_size, self.kv_heads, max_length, self.head_dim
    if self.scanned:
      layers = KVCache(*jnp.zeros((2, self.num_layers, *shape), self.dtype))
    else:
      layers = [KVCache(*jnp.zeros((2, *shape), self.dtype)) for _ in range(self.num_layers)]
    return Cache(jnp.zeros((batch_size,), jnp.int32), layers)

  def unstack(self, params: Any) -> Any:
    """The parameters with unrolled layers as a list: sliced once, not at every turn of a loop."""
    if self.scanned:
      return params
    return {**params, 'blocks': {'layers': unstack(params['blocks']['layers'])}}

  def flops_per_token(self, length: int) -> int:
    """FLOPs of a training step for each token of a sequence of `length` tokens.

    6 a matrix parameter, with the head, without embeddings; 12 L N H length for all scores and
    sums, as if every token saw all others (the convention of PaLM, arXiv:2204.02311, appendix B).
    """
    heads = self.head_dim * (2 * self.num_heads + 2 * self.kv_heads)
    mlp = self.d_ff * (3 if self.activation == 'swiglu' else 2)
    matrices = self.num_layers * self.d_model * (heads + mlp) + self.d_model * self.vocab_size
    return 6 * matrices + 12 * self.num_layers * self.num_heads * self.head_dim * length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of all layers, and how many tokens of each row stand in them.

  layers: [L, B, K, S, H] where layers are scanned, else a list of L times [B, K, S, H].
  """
  length_B: jax.Array
  layers: KVCache | list[KVCache]


class Block(nn.Module):
  """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""
  config: GPTConfig
  rules: Rules

  @nn.compact
  def __call__(self, x_BTD: Float[Array, 'B T D'], shared, per_layer):
    """Returns x [B, T, D] and this layer's cache."""
    cfg = self.config
    rotation, segment_ids_BT, cache_length_B = shared
    cache, rng = per_layer
    rngs = (None, None) if rng is None else jax.random.split(rng)
    out_std = cfg.init_std / (2 * cfg.num_layers)**0.5  # GPT-2: L blocks add 2L branches
    norm = functools.partial(Norm, cfg.norm, cfg.norm_epsilon, cfg.use_bias)
    attention = Attention(cfg.d_model, cfg.num_heads, cfg.kv_heads, cfg.head_dim, cfg.use_bias,
                          cfg.init_std, out_std, self.rules, name='attention')
    mlp = MLP(cfg.d_model, cfg.d_ff, cfg.activation, cfg.use_bias, cfg.init_std, out_std,
              self.rules, name='mlp')

    branch_BTD, cache = attention(norm(name='attention_norm')(x_BTD), rotation, segment_ids_BT,
                                  cache, cache_length_B)
    x_BTD += linear.dropout(branch_BTD, cfg.dropout_rate, rngs[0])
    x_BTD = constrain(x_BTD, self.rules, 'batch', 'length', 'act_embed')
    branch_BTD = mlp(norm(name='mlp_norm')(x_BTD))
    x_BTD += linear.dropout(branch_BTD, cfg.dropout_rate, rngs[1])
    return constrain(x_BTD, self.rules, 'batch', 'length', 'act_embed'), cache


class GPT(nn.Module):
  """Tokens to hidden states; `logits` and `head` turn those into scores of the next token."""
  config: GPTConfig
  rules: Rules

  def setup(self):
    cfg = self.config
    shape = cfg.vocab_size, cfg.d_model
    self.token_embedding = self.param('token_embedding',
                                      linear.normal(cfg.init_std, 'vocab', 'embed'), shape)
    if cfg.positions == 'learned':
      self.position_embedding = self.param('position_embedding',
                                           linear.normal(cfg.init_std, 'position', 'embed'),
                                           (cfg.max_length, cfg.d_model))
    if not cfg.tie_embeddings:
      self.output_embedding = self.param('output_embedding',
                                         linear.normal(cfg.init_std, 'vocab', 'embed'), shape)
    self.blocks = Stack(lambda: Block(cfg, self.rules, parent=None), cfg.num_layers, cfg.scanned,
                        cfg.remat)
    self.final_norm = Norm(cfg.norm, cfg.norm_epsilon, cfg.use_bias)

  def __call__(self, tokens_BT: Int[Array, 'B T'], positions: Int[Array, 'B T'] | None = None,
               segment_ids: Int[Array, 'B T'] | None = None, cache: Cache | None = None,
               dropout_rng: jax.Array | None = None) -> tuple[Float[Array, 'B T D'], Cache | None]:
    """The last hidden states, normalised, and the cache with these tokens.

    Args:
      tokens_BT: inputs: `decoder_input_tokens` of a batch.
      positions: of each token in its document; None counts from the cache's length.
      segment_ids: a token sees only its own segment (packing); None for one document a row.
      cache: from `GPTConfig.init_cache` or an earlier call; None to attend within these tokens.
        It must have room for T more: what is written past its end replaces its last tokens.
      dropout_rng: a key turns dropout on.
    """
    cfg = self.config
    B, T = tokens_BT.shape
    if cfg.positions == 'learned' and T > cfg.max_length:
      raise ValueError(f'{T} tokens are longer than the context max_length={cfg.max_length}; '
                       'learned positions end there')
    if cache is not None and segment_ids is not None:
      raise ValueError('segment_ids pack documents for training; with a cache each row is one '
                       'document, so leave them out')
    length_B = None if cache is None else cache.length_B
    if positions is None:
      positions = jnp.arange(T) + (0 if cache is None else length_B[:, None])
      positions = jnp.broadcast_to(positions, (B, T))
    x_BTD = linear.embed(self.token_embedding, tokens_BT, cfg.dtype)
    rotation = None
    if cfg.positions == 'learned':
      x_BTD += linear.embed(self.position_embedding, positions, cfg.dtype)
    else:
      rotation = positions_lib.rotation(positions, cfg.head_dim, cfg.rope_theta)
    rngs = None
    if dropout_rng is not None and cfg.dropout_rate:
      first, rest = jax.random.split(dropout_rng)
      x_BTD = linear.dropout(x_BTD, cfg.dropout_rate, first)
      rngs = jax.random.split(rest, cfg.num_layers)
    x_BTD = constrain(x_BTD, self.rules, 'batch', 'length', 'act_embed')
    shared = rotation, segment_ids, length_B
    x_BTD, layers = self.blocks(x_BTD, shared, (None if cache is None else cache.layers, rngs))
    if cache is not None:
      cache = Cache(length_B + T, layers)
    return self.final_norm(x_BTD), cache

  def head(self) -> Float[Array, 'V D']:
    """The matrix whose rows score the tokens."""
    return self.token_embedding if self.config.tie_embeddings else self.output_embedding

  def logits(self, hidden_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
    """Scores of the next token, float32."""
    return linear.logits(hidden_BTD, self.head())
