"""Decoder with a memory of the segments before (Transformer-XL, arXiv:1901.02860)."""
import dataclasses
from typing import Any, Literal, NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.errors import UserError
from lm.layers import linear
from lm.layers.adaptive import AdaptiveEmbedding, AdaptiveScores
from lm.layers.cache import Places
from lm.layers.heads import Scores
from lm.layers.kernels import Implementation
from lm.layers.mlp import MLP
from lm.layers.norms import Norm
from lm.layers.products import Products
from lm.layers.relative_attention import (HeadBiases, RelativeAttention, RelativeCache,
                                          sinusoids)
from lm.layers.rolling import Rolling
from lm.layers.stack import Remat, Stack, unstack
from lm.models.cache import CacheOptions
from lm.parallel.rules import Rules, constrain

SCAN_FROM_LAYERS = 16  # shallower stacks compile fast enough unrolled, and run faster


@dataclasses.dataclass(frozen=True)
class TransformerXLConfig:
  """What the model is. The defaults are the 12 layers of enwik8 (41M).

  vocab_size: V, tokens of the vocabulary.
  max_length: tokens of a segment. Positions are relative, so nothing ends there.
  memory_length: M, hidden states of each layer that go from one segment to the next; at evaluation
    it may be longer than it was in training (section 3.2).
  d_head: H; None is d_model / num_heads.
  same_length: every token sees exactly M tokens, its own included; else also all of its segment.
  clamp_length: distances beyond it count as it; None for none.
  untie_biases: each layer has its own u and v; else all share one.
  cutoffs: tokens at which the vocabulary's clusters begin (`AdaptiveEmbedding`); empty for a plain
    softmax. Tokens must be in order of frequency.
  div_val: cluster i has d_model / div_val**i dimensions.
  init_std: standard deviation of initial weights.
  dropout_rate: on embeddings of tokens and places, both residual branches, the MLP's hidden layer
    and the last hidden states.
  attention_dropout_rate: on the probabilities of attention.
  layer_drop_rate: the probability that training leaves a layer out.
  dtype: of activations; norms, softmax and loss are float32.
  param_dtype: of parameters; bfloat16 ones are updated with stochastic rounding.
  products: what the blocks' products with parameters are computed in, where that is not `dtype`.
  attention_implementation: None is the fastest of the platform, 'pallas' its kernel, 'reference'
    XLA's plain form.
  scan_layers: None scans from 16 layers on.
  """
  vocab_size: int = 204
  max_length: int = 512
  memory_length: int = 512
  d_model: int = 512
  num_layers: int = 12
  num_heads: int = 8
  d_head: Optional[int] = None
  d_ff: int = 2048
  same_length: bool = False
  clamp_length: Optional[int] = None
  untie_biases: bool = False
  cutoffs: tuple[int, ...] = ()
  div_val: int = 1
  norm_epsilon: float = 1e-5
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  layer_drop_rate: float = 0.0
  init_std: float = 0.02
  dtype: Literal['bfloat16', 'float16', 'float32'] = 'bfloat16'
  param_dtype: Literal['float32', 'bfloat16'] = 'float32'
  products: Products = None
  attention_implementation: Implementation = None
  scan_layers: Optional[bool] = None
  remat: Remat = 'none'

  def __post_init__(self):
    for name in ('vocab_size', 'max_length', 'memory_length', 'd_model', 'num_layers', 'num_heads',
                 'd_head', 'd_ff', 'clamp_length', 'div_val'):
      if getattr(self, name) is not None and getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
    if self.d_head is None and self.d_model % self.num_heads:
      raise ValueError(f'd_model={self.d_model} is not divisible by num_heads={self.num_heads}; '
                       'set d_head explicitly')
    if self.d_model % 2:
      raise ValueError(f'd_model={self.d_model} is odd; places are pairs of sine and cosine, so '
                       'make it even')
    ends = (0, *self.cutoffs, self.vocab_size)
    if any(end <= start for start, end in zip(ends, ends[1:])):
      raise ValueError(f'cutoffs={self.cutoffs} must rise and lie between 0 and vocab_size='
                       f'{self.vocab_size}')
    if self.div_val > 1 and not self.cutoffs:
      raise ValueError(f'div_val={self.div_val} narrows clusters, and without cutoffs there are '
                       'none; set cutoffs or leave div_val at 1')
    if self.d_model % self.div_val**len(self.cutoffs):
      raise ValueError(f'd_model={self.d_model} does not divide by div_val={self.div_val} for each '
                       f'of {len(self.cutoffs)} cutoffs')
    for name in ('dropout_rate', 'attention_dropout_rate', 'layer_drop_rate'):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be in [0, 1)')

  @property
  def kv_heads(self) -> int:
    return self.num_heads

  @property
  def head_dim(self) -> int:
    return self.d_model // self.num_heads if self.d_head is None else self.d_head

  @property
  def scanned(self) -> bool:
    return self.num_layers >= SCAN_FROM_LAYERS if self.scan_layers is None else self.scan_layers

  def build(self, rules: Rules = Rules()) -> 'TransformerXL':
    """The module of this config, sharded by `rules`."""
    return TransformerXL(self, rules)

  def init_carry(self, batch_size: int) -> 'Memory':
    """An empty memory of each of `batch_size` rows."""
    shape = batch_size, self.num_layers, self.memory_length, self.d_model
    return Memory(jnp.zeros(shape, self.dtype), jnp.zeros((batch_size,), jnp.int32))

  @property
  def window(self) -> int:
    """Tokens that one sees in decoding, its own included: the M before it in every layer, as where
    the published model is evaluated token by token (section 3.3, eval_tgt_len 1)."""
    return self.memory_length + (0 if self.same_length else 1)

  def init_cache(self, batch_size: int, max_length: int,
                 options: CacheOptions = CacheOptions()) -> 'Cache':
    """An empty cache for each of `batch_size` texts of `max_length` tokens.

    It holds keys and values of the last `window` tokens, however long a text becomes. A row takes
    back at most 31 tokens.

    Raises:
      UserError: another window than the memory's is asked for.
    """
    if options.window is not None:
      raise UserError(f'window={options.window} is for models that see all of a text; set '
                      f'memory_length={self.memory_length} to what this one is to see')
    shape, dtype = (batch_size, self.num_heads, self.head_dim), options.dtype or self.dtype
    window = min(self.window, max_length)
    if self.scanned:
      layers = RelativeCache(Rolling.zeros((self.num_layers, *shape), dtype, window))
    else:
      layers = [RelativeCache(Rolling.zeros(shape, dtype, window)) for _ in range(self.num_layers)]
    return Cache(jnp.zeros((batch_size,), jnp.int32), layers)

  def unstack(self, params: Any) -> Any:
    """The parameters with unrolled layers as a list: sliced once, not at every turn of a loop."""
    if self.scanned:
      return params
    return {**params, 'blocks': {'layers': unstack(params['blocks']['layers'])}}

  def flops_per_token(self, length: int) -> int:
    """FLOPs of a training step for each token of a segment of `length` tokens.

    6 a matrix parameter that meets every token, with the head, without embeddings; 18 N H for each
    layer's score of a token, memory and segment alike: with its content, with its place, and sums.
    """
    width = self.num_heads * self.head_dim
    matrices = self.num_layers * self.d_model * (4 * width + 2 * self.d_ff)
    matrices += self.d_model * self.vocab_size
    return 6 * matrices + 18 * self.num_layers * width * (self.memory_length + length)


class Memory(NamedTuple):
  """The inputs of each layer before, [B, L, M, D], and how many of the last places each row fills,
  int32 [B]."""
  hidden: jax.Array
  filled: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What all layers keep of the tokens before, and how many of them each row has had.

  length_B: int32 [B].
  layers: a `RelativeCache`, [L, B, N, S, H], where layers are scanned, else a list of L.
  """
  length_B: Any
  layers: Any

  def take(self, rows_R: Int[Array, ' R']) -> 'Cache':
    """The cache of these rows, in this order."""
    axis = 0 if isinstance(self.layers, list) else 1
    is_layer = lambda x: isinstance(x, RelativeCache)
    rows = lambda layer: layer._replace(tokens=jax.tree.map(
        lambda x: jnp.take(x, rows_R, axis=axis), layer.tokens))
    return Cache(self.length_B[rows_R], jax.tree.map(rows, self.layers, is_leaf=is_layer))


class Block(nn.Module):
  """norm(x + attention(x)), then norm(x + mlp(x))."""
  config: TransformerXLConfig
  rules: Rules

  @nn.compact
  def __call__(self, x_BTD: Float[Array, 'B T D'], rows, shared, memory_BMD, per_layer, draws):
    """Returns x [B, T, D], and the layer's next memory [B, M, D], or its cache in the place of
    that."""
    cfg, (segment_ids, places), cache = self.config, rows, None
    if places is not None:
      cache, memory_BMD = memory_BMD, None
    sinusoids_SD, biases = shared
    of_attention, of_hidden, of_mlp, of_scores = linear.split(draws, 4)
    norm = lambda name: Norm('layernorm', cfg.norm_epsilon, True, name=name)
    drop = lambda x, draws: linear.dropout(x, cfg.dropout_rate, draws)
    window = cfg.memory_length if cfg.same_length else None
    attention = RelativeAttention(cfg.d_model, cfg.num_heads, cfg.head_dim, cfg.init_std,
                                  self.rules, window, cfg.attention_dropout_rate,
                                  cfg.attention_implementation, cfg.products, name='attention')
    mlp = MLP(cfg.d_model, cfg.d_ff, 'relu', True, cfg.init_std, cfg.init_std, self.rules,
              cfg.dropout_rate, cfg.products, name='mlp')
    if cfg.untie_biases:
      biases = HeadBiases(cfg.num_heads, cfg.head_dim, cfg.init_std, name='head_biases')()

    memory = None
    if memory_BMD is not None:  # no gradient goes from one segment to those before (section 3.2)
      memory_BMD = jax.lax.stop_gradient(memory_BMD)
      memory = jnp.concatenate([memory_BMD, jax.lax.stop_gradient(x_BTD)], 1)
      memory = memory[:, -cfg.memory_length:]
    branch_BTD, cache = attention(x_BTD, sinusoids_SD, biases, memory_BMD, segment_ids, of_scores,
                                  cache, places)
    x_BTD = norm('attention_norm')(x_BTD + drop(branch_BTD, of_attention))
    x_BTD = constrain(x_BTD, self.rules, 'batch', 'act_length', 'act_embed')
    x_BTD = norm('mlp_norm')(x_BTD + drop(mlp(x_BTD, of_hidden), of_mlp))
    x_BTD = constrain(x_BTD, self.rules, 'batch', 'act_length', 'act_embed')
    return x_BTD, memory if cache is None else cache


class TransformerXL(nn.Module):
  """Tokens and a memory to hidden states and the next memory."""
  config: TransformerXLConfig
  rules: Rules

  def setup(self):
    cfg = self.config
    if cfg.cutoffs:
      self.adaptive = AdaptiveEmbedding(cfg.vocab_size, cfg.d_model, cfg.cutoffs, cfg.div_val,
                                        cfg.init_std, self.rules)
    else:
      self.token_embedding = self.param('token_embedding', linear.normal(
          cfg.init_std, 'vocab', 'embed'), (cfg.vocab_size, cfg.d_model))
      self.bias = self.param('bias', nn.with_partitioning(nn.initializers.zeros, ('vocab',)),
                             (cfg.vocab_size,))
    if not cfg.untie_biases:
      self.head_biases = HeadBiases(cfg.num_heads, cfg.head_dim, cfg.init_std)
    self.blocks = Stack(lambda rules: Block(cfg, rules, parent=None), cfg.num_layers, cfg.scanned,
                        cfg.remat, cfg.layer_drop_rate, self.rules)

  def __call__(self, tokens_BT: Int[Array, 'B T'], memory: Memory | None = None,
               segment_ids: Int[Array, 'B T'] | None = None, draws: linear.Draws | None = None,
               cache: Cache | None = None, new_B: Int[Array, ' B'] | None = None
               ) -> tuple[Float[Array, 'B T D'], Memory | Cache | None]:
    """The last hidden states, and the memory, or the cache, with these tokens.

    Args:
      tokens_BT: a segment: `decoder_input_tokens` of a batch.
      memory: from `TransformerXLConfig.init_carry` or an earlier call, with as many places as the
        config has; None to attend within these tokens, and to remember none.
      segment_ids: a token sees only its own segment (packing); not with a memory, whose rows are
        one stream each.
      draws: turn dropout on.
      cache: from `TransformerXLConfig.init_cache` or an earlier call, in the place of a memory:
        each token sees the `window` up to its own, however the text is cut.
      new_B: how many tokens of each row the cache gets; those behind are padding. None: all T.
    """
    cfg = self.config
    B, T = tokens_BT.shape
    if cache is not None and not (memory is None and segment_ids is None):
      raise ValueError('with a cache each row is one text, which the cache remembers; leave memory '
                       'and segment_ids out')
    if memory is not None and segment_ids is not None:
      raise ValueError('segment_ids pack texts that know nothing of each other; with a memory each '
                       'row is one stream, so leave them out')
    M = 0 if memory is None else cfg.memory_length
    if memory is not None and memory.hidden.shape[2] != M:
      raise ValueError(f'the memory has {memory.hidden.shape[2]} places and memory_length={M}; '
                       "make it with this config's init_carry")
    of_tokens, of_distances, of_layers, of_hidden = linear.split(draws, 4)
    layers = None if cache is None else cache.layers
    first = layers[0] if isinstance(layers, list) else layers
    distance_S = jnp.arange(M + T if cache is None else first.tokens.window)
    if cfg.clamp_length is not None:
      distance_S = jnp.minimum(distance_S, cfg.clamp_length)
    sinusoids_SD = sinusoids(distance_S, cfg.d_model)
    if draws is not None:
      sinusoids_SD = of_distances.dropout_of_all(sinusoids_SD, cfg.dropout_rate)
    x_BTD = linear.dropout(self._embed(tokens_BT), cfg.dropout_rate, of_tokens)
    x_BTD = constrain(x_BTD, self.rules, 'batch', 'act_length', 'act_embed')

    hidden, pairs = None, None if segment_ids is None else (segment_ids, segment_ids)
    if memory is not None:
      hidden = jnp.swapaxes(memory.hidden, 0, 1)
      stands_BM = jnp.arange(M) >= M - memory.filled[:, None]
      ones_BT = jnp.ones((B, T), jnp.int32)
      pairs = ones_BT, jnp.concatenate([stands_BM.astype(jnp.int32), ones_BT], axis=1)
    shared = sinusoids_SD, None if cfg.untie_biases else self.head_biases()
    places = None if cache is None else Places(cache.length_B, new_B)
    x_BTD, layers = self.blocks(x_BTD, (pairs, places), shared,
                                hidden if cache is None else layers, (), of_layers)
    if cache is not None:
      return x_BTD, Cache(cache.length_B + (T if new_B is None else new_B), layers)
    if memory is not None:
      hidden = jnp.swapaxes(layers, 0, 1) if cfg.scanned else jnp.stack(layers, axis=1)
      memory = Memory(hidden, jnp.minimum(memory.filled + T, M))
    return linear.dropout(x_BTD, cfg.dropout_rate, of_hidden), memory

  def carry_shardings(self) -> Memory:
    """Of the memory: devices that share the length of a row share that of its memory."""
    return Memory(self.rules.sharding('batch', None, 'length', None), self.rules.sharding('batch'))

  def _embed(self, tokens_BT):
    cfg = self.config
    x_BTD = self.adaptive(tokens_BT, cfg.dtype) if cfg.cutoffs else linear.embed(
        self.token_embedding, tokens_BT, cfg.dtype, self.rules)
    return x_BTD * jnp.asarray(cfg.d_model**0.5, x_BTD.dtype)

  def initialize(self):
    """Touches every parameter: what `init` runs."""
    self.scores(self(jnp.zeros((1, 1), jnp.int32))[0])

  def encode(self, batch: dict[str, jax.Array], draws: linear.Draws | None = None
             ) -> Float[Array, 'B T D']:
    """The hidden states of `decoder_input_tokens`, for a head of another kind; without memory."""
    return self(batch['decoder_input_tokens'], None, batch.get('decoder_segment_ids'),
                draws)[0]

  def outputs(self, batch: dict[str, jax.Array], draws: linear.Draws | None = None,
              carry: Memory | None = None) -> tuple[dict[str, Any], Memory | None]:
    """What a loss scores: `tokens` for `decoder_target_tokens`, and the next memory.

    Rows of a batch with `decoder_restart` [B] go on with their memory, but for those where it is 1;
    their documents see each other, as published. Rows of another batch know no other row, and their
    segments no other segment.
    """
    tokens_BT, restart_B = batch['decoder_input_tokens'], batch.get('decoder_restart')
    if carry is None or restart_B is None:
      hidden_BTD, _ = self(tokens_BT, None, batch.get('decoder_segment_ids'), draws)
    else:
      carry = carry._replace(filled=jnp.where(restart_B == 1, 0, carry.filled))
      hidden_BTD, carry = self(tokens_BT, carry, None, draws)
    return {'tokens': self.scores(hidden_BTD)}, carry

  def scores(self, hidden_BTD: Float[Array, 'B T D']) -> Scores | AdaptiveScores:
    """What scores the next token."""
    if self.config.cutoffs:
      return self.adaptive.scores(hidden_BTD)
    return Scores(hidden_BTD, self.token_embedding, self.bias, rules=self.rules)

  def head(self) -> linear.Table:
    """The matrix whose rows score the tokens, beside their bias.

    Raises:
      ValueError: the vocabulary has clusters, each with a matrix of its own.
    """
    if self.config.cutoffs:
      raise ValueError(f'cutoffs={self.config.cutoffs} give each cluster a matrix of its own; take '
                       '`scores`')
    return self.token_embedding

  def logits(self, hidden_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
    """Scores of the next token, float32; log probabilities where the vocabulary has clusters."""
    scores = self.scores(hidden_BTD)
    return scores.log_probs() if self.config.cutoffs else scores.logits()
