"""Encoder-decoder: T5 (arXiv:1910.10683), T5 1.1 and Flan, mT5 (arXiv:2010.11934), UMT5
(arXiv:2304.09151), and their encoder alone."""
import dataclasses
from typing import Any, Literal, NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.errors import UserError
from lm.layers import linear
from lm.layers.attention import Attention
from lm.layers.cache import KVCache, Places
from lm.layers.heads import Scores
from lm.layers.kernels import Implementation
from lm.layers.mlp import MLP, Activation, is_gated
from lm.layers.norms import Norm
from lm.layers.products import Products
from lm.layers.relative_bias import RelativeBias
from lm.layers.stack import first_layers, Remat, Stack, unstack
from lm.models.cache import CacheOptions, init_layers
from lm.parallel import ring
from lm.parallel.rules import Rules, constrain

SCAN_FROM_LAYERS = 16  # shallower stacks compile fast enough unrolled, and run faster


@dataclasses.dataclass(frozen=True)
class T5Config:
  """What the model is. The defaults are T5 1.0 small; T5 1.1, Flan and mT5 differ by
  `activation='geglu'` and `tie_embeddings=False`, UMT5 also by `bias_per_layer`.

  vocab_size: V, tokens of the vocabulary.
  max_length: the longest input and the longest output, in tokens. Only generation stops there:
    relative positions have no end.
  num_layers: of the encoder; num_decoder_layers: of the decoder, None is as many.
  d_head: H; None is d_model / num_heads.
  tie_embeddings: the head is the embedding.
  scale_outputs: the head scores the hidden states times d_model**-0.5; None does where it is tied.
  num_buckets, max_distance: of the relative positions (section 2.1).
  bias_per_layer: every layer has its own relative bias (UMT5); else all share one.
  decoder: False leaves the encoder alone.
  dropout_rate: on embeddings, residual branches, the MLP's hidden layer and the last hidden states.
  attention_dropout_rate: on the probabilities of attention.
  layer_drop_rate: the probability that training leaves a layer out.
  dtype: of activations; norms, softmax and loss are float32.
  param_dtype: of parameters; bfloat16 ones are updated with stochastic rounding.
  products: what the blocks' products with parameters are computed in, where that is not `dtype`.
  attention_implementation: None is the fastest of the platform, 'pallas' its kernel, 'reference'
    XLA's plain form.
  scan_layers: None scans from 16 layers on.
  """
  vocab_size: int = 32128
  max_length: int = 512
  d_model: int = 512
  num_layers: int = 6
  num_decoder_layers: Optional[int] = None
  num_heads: int = 8
  d_head: Optional[int] = None
  d_ff: int = 2048
  activation: Activation = 'relu'
  tie_embeddings: bool = True
  scale_outputs: Optional[bool] = None
  num_buckets: int = 32
  max_distance: int = 128
  bias_per_layer: bool = False
  decoder: bool = True
  norm_epsilon: float = 1e-6
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  layer_drop_rate: float = 0.0
  dtype: Literal['bfloat16', 'float16', 'float32'] = 'bfloat16'
  param_dtype: Literal['float32', 'bfloat16'] = 'float32'
  products: Products = None
  attention_implementation: Implementation = None
  scan_layers: Optional[bool] = None
  remat: Remat = 'none'

  def __post_init__(self):
    for name in ('vocab_size', 'max_length', 'd_model', 'num_layers', 'num_decoder_layers',
                 'num_heads', 'd_head', 'd_ff'):
      if getattr(self, name) is not None and getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
    if self.d_head is None and self.d_model % self.num_heads:
      raise ValueError(f'd_model={self.d_model} is not divisible by num_heads={self.num_heads}; '
                       'set d_head explicitly')
    if self.num_buckets < 4 or self.num_buckets % 2:
      raise ValueError(f'num_buckets={self.num_buckets} must be even and at least 4: half of the '
                       "encoder's are for later keys")
    if self.max_distance <= self.num_buckets // 2:
      raise ValueError(f'max_distance={self.max_distance} must be more than num_buckets / 2 = '
                       f'{self.num_buckets // 2}: the decoder has a bucket for each distance below')
    if not self.decoder and self.num_decoder_layers is not None:
      raise ValueError(f'num_decoder_layers={self.num_decoder_layers} and decoder=False disagree; '
                       'leave one out')
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
  def decoder_layers(self) -> int:
    """Layers of the decoder, 0 where there is none."""
    layers = self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers
    return layers if self.decoder else 0

  @property
  def scanned(self) -> bool:
    deepest = max(self.num_layers, self.decoder_layers)
    return deepest >= SCAN_FROM_LAYERS if self.scan_layers is None else self.scan_layers

  def build(self, rules: Rules = Rules()) -> 'T5':
    """The module of this config, sharded by `rules`."""
    return T5(self, rules)

  def init_cache(self, batch_size: int, max_length: int,
                 options: CacheOptions = CacheOptions()) -> 'Cache':
    """An empty cache for `max_length` tokens of each of `batch_size` outputs.

    What `T5.decode` needs of the inputs enters with the first call, in the dtype of activations.

    Raises:
      UserError: the options forget tokens, and no T5 was trained with a window.
    """
    if options.rolls:
      raise UserError('a T5 sees all of its output; leave rolling and window to other models')
    layers = init_layers(options, self.dtype, batch_size, max_length,
                         (self.num_heads, self.head_dim), [None] * self.decoder_layers,
                         self.scanned)
    layers = list(map(LayerCache, layers)) if isinstance(layers, list) else LayerCache(layers)
    return Cache(jnp.zeros((batch_size,), jnp.int32), layers)

  def init_carry(self, batch_size: int) -> None:
    """Nothing goes from one batch to the next."""

  def unstack(self, params: Any) -> Any:
    """The parameters with unrolled layers as lists: sliced once, not at every turn of a loop."""
    if self.scanned:
      return params
    trunks = {name: params[name] for name in ('encoder', 'decoder') if name in params}
    layers = lambda trunk: {'blocks': {'layers': unstack(trunk['blocks']['layers'])}}
    return {**params, **{name: {**trunk, **layers(trunk)} for name, trunk in trunks.items()}}

  def first_layers(self, params: Any, num_layers: int) -> tuple['T5Config', Any]:
    """The model of the encoder and these layers of the decoder, with the same norm and head behind
    them, and its parameters."""
    config = dataclasses.replace(self, num_decoder_layers=num_layers, scan_layers=self.scanned)
    trunk = params['decoder']
    layers = first_layers(trunk['blocks']['layers'], num_layers)
    return config, {**params, 'decoder': {**trunk, 'blocks': {'layers': layers}}}

  def flops_per_token(self, length: int, target_length: int | None = None) -> int:
    """FLOPs of a training step for each token of an input of `length` tokens, which is what a run
    counts; those of its target are in it.

    6 a matrix parameter and token that meets it, with the head, without embeddings; 12 N H for each
    layer's score, as if every token saw all others (PaLM, arXiv:2204.02311, appendix B).

    Args:
      target_length: tokens; None is what span corruption leaves of the input's text, 15 % in spans
        of 3 tokens: 114 for 512 (arXiv:1910.10683, section 3.3.4).
    """
    # Of n tokens 0.85 n and 0.05 n sentinels are left; 0.15 n and 0.05 n sentinels are the target.
    T = (length - 1) * 2 // 9 + 1 if target_length is None else target_length
    width = self.num_heads * self.head_dim
    projection = self.d_model * width
    mlp = self.d_model * self.d_ff * (3 if is_gated(self.activation) else 2)
    encoder = self.num_layers * length * (6 * (4 * projection + mlp) + 12 * width * length)
    self_and_mlp = T * (6 * (6 * projection + mlp) + 12 * width * (T + length))
    decoder = self.decoder_layers * (self_and_mlp + length * 6 * 2 * projection)
    head = 6 * T * self.d_model * self.vocab_size if self.decoder else 0
    return (encoder + decoder + head) // length


class LayerCache(NamedTuple):
  """Of one decoder layer: its tokens so far, and the whole memory, once it has been seen."""
  tokens: KVCache
  memory: KVCache | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What all decoder layers keep, and how many tokens of each row stand in it.

  layers: leaves [L, B, N, S, H] where layers are scanned, else a list of L times [B, N, S, H].
  memory_segment_ids: [B, S] of the inputs, or None.
  """
  length_B: jax.Array
  layers: LayerCache | list[LayerCache]
  memory_segment_ids: jax.Array | None = None

  def take(self, rows_R: Int[Array, ' R']) -> 'Cache':
    """The cache of these rows, in this order."""
    axis, segments = 0 if isinstance(self.layers, list) else 1, self.memory_segment_ids
    return Cache(self.length_B[rows_R],
                 jax.tree.map(lambda x: jnp.take(x, rows_R, axis=axis), self.layers),
                 None if segments is None else segments[rows_R])

  @property
  def has_memory(self) -> bool:
    one = self.layers[0] if isinstance(self.layers, list) else self.layers
    return one.memory is not None


class Rows(NamedTuple):
  """What all blocks of a stack receive beside the hidden states, of the same rows.

  query_segment_ids: [B, T] of the queries in attention to the memory.
  """
  segment_ids: jax.Array | None
  places: Places | None = None
  memory: jax.Array | None = None
  memory_segment_ids: jax.Array | None = None
  query_segment_ids: jax.Array | None = None


def _relative_bias(config: T5Config, causal: bool) -> RelativeBias:
  return RelativeBias(config.num_heads, config.num_buckets, config.max_distance, not causal,
                      config.d_model**-0.5, name='relative_bias')


class Block(nn.Module):
  """Pre-norm block: attention to itself, in the decoder to the memory, and an MLP, each added.

  Weights start as Mesh TensorFlow's: what goes into a product has unit variance, and so have the
  scores, which are not scaled.
  """
  config: T5Config
  rules: Rules
  causal: bool  # the decoder's

  @nn.compact
  def __call__(self, x_BTD: Float[Array, 'B T D'], rows: Rows, distance_bias, cache, per_layer,
               draws):
    """Returns x [B, T, D] and this layer's cache; distance_bias: [N, 2R + 1], or None where each
    layer has its own."""
    cfg, of = self.config, linear.split(draws, 6)
    tokens = None if cache is None else cache.tokens
    if cfg.bias_per_layer:
      distance_bias = _relative_bias(cfg, self.causal)()

    is_zigzag = self.causal and cache is None and ring.is_zigzag(self.rules, x_BTD.shape[1])
    branch_BTD, tokens = self._attention('attention', self.causal)(
        self._norm('attention_norm')(x_BTD), segment_ids=rows.segment_ids,
        distance_bias=distance_bias, cache=tokens, places=rows.places, zigzag=is_zigzag,
        draws=of[4])
    x_BTD = self._add(x_BTD, branch_BTD, of[0])
    if self.causal:
      attention = self._attention('cross_attention', False)
      x_norm_BTD = self._norm('cross_attention_norm')(x_BTD)
      if rows.memory is None:
        memory = _swap(cache.memory)[:2]
      else:
        memory = attention.keys_values(rows.memory)
      branch_BTD, _ = attention(x_norm_BTD, segment_ids=rows.query_segment_ids, memory=memory,
                                memory_segment_ids=rows.memory_segment_ids,
                                draws=of[5])
      x_BTD = self._add(x_BTD, branch_BTD, of[1])
      cache = None if cache is None else LayerCache(tokens, _swap(KVCache(*memory)))
    mlp = MLP(cfg.d_model, cfg.d_ff, cfg.activation, False, cfg.d_model**-0.5, cfg.d_ff**-0.5,
              self.rules, cfg.dropout_rate, cfg.products, name='mlp')
    branch_BTD = mlp(self._norm('mlp_norm')(x_BTD), of[2])
    return self._add(x_BTD, branch_BTD, of[3]), cache

  def _norm(self, name):
    return Norm('rmsnorm', self.config.norm_epsilon, name=name)

  def _attention(self, name, causal):
    cfg = self.config
    return Attention(cfg.d_model, cfg.num_heads, cfg.num_heads, cfg.head_dim, cfg.d_model**-0.5,
                     (cfg.num_heads * cfg.head_dim)**-0.5, self.rules, causal=causal, scale=1.0,
                     query_std=(cfg.d_model * cfg.head_dim)**-0.5,
                     dropout_rate=cfg.attention_dropout_rate,
                     implementation=cfg.attention_implementation, products=cfg.products, name=name)

  def _add(self, x_BTD, branch_BTD, draws):
    x_BTD += linear.dropout(branch_BTD, self.config.dropout_rate, draws)
    return constrain(x_BTD, self.rules, 'batch', 'act_length', 'act_embed')


def _swap(memory: KVCache) -> KVCache:
  """[B, N, S, H], as a cache keeps it so that decoding moves nothing, <-> [B, S, N, H]."""
  return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), memory)


class Trunk(nn.Module):
  """The encoder, or with `causal` the decoder: embedded tokens to hidden states."""
  config: T5Config
  rules: Rules
  causal: bool

  @nn.compact
  def __call__(self, x_BTD: Float[Array, 'B T D'], rows: Rows, layers: Any = None,
               draws: linear.Draws | None = None) -> tuple[Float[Array, 'B T D'], Any]:
    """Returns hidden states, normalised, and each layer's cache, where `layers` has one."""
    cfg = self.config
    num_layers = cfg.decoder_layers if self.causal else cfg.num_layers
    distance_bias = None if cfg.bias_per_layer else _relative_bias(cfg, self.causal)()
    of_embedding, of_layers, of_hidden = linear.split(draws, 3)
    x_BTD = linear.dropout(x_BTD, cfg.dropout_rate, of_embedding)
    x_BTD = constrain(x_BTD, self.rules, 'batch', 'act_length', 'act_embed')
    stack = Stack(lambda rules: Block(cfg, rules, self.causal, parent=None), num_layers,
                  cfg.scanned, cfg.remat, cfg.layer_drop_rate, self.rules, name='blocks')
    x_BTD, layers = stack(x_BTD, rows, distance_bias, layers, (), of_layers)
    x_BTD = Norm('rmsnorm', cfg.norm_epsilon, name='final_norm')(x_BTD)
    return linear.dropout(x_BTD, cfg.dropout_rate, of_hidden), layers


class T5(nn.Module):
  """Tokens in and tokens out to hidden states; `logits` turns those into scores of the next."""
  config: T5Config
  rules: Rules

  def setup(self):
    cfg = self.config
    shape = cfg.vocab_size, cfg.d_model
    self.token_embedding = self.param('token_embedding', linear.normal(1.0, 'vocab', 'embed'),
                                      shape)
    self.encoder = Trunk(cfg, self.rules, causal=False)
    if cfg.decoder:
      self.decoder = Trunk(cfg, self.rules, causal=True)
      if not cfg.tie_embeddings:
        std = cfg.d_model**-0.5
        self.output_embedding = self.param('output_embedding',
                                           linear.normal(std, 'vocab', 'embed'), shape)

  def __call__(self, encoder_tokens: Int[Array, 'B S'], decoder_tokens: Int[Array, 'B T'],
               encoder_segment_ids: Int[Array, 'B S'] | None = None,
               decoder_segment_ids: Int[Array, 'B T'] | None = None,
               draws: linear.Draws | None = None,
               encoder_noise: Float[Array, 'B S D'] | None = None) -> Float[Array, 'B T D']:
    """The decoder's hidden states, normalised.

    Takes no positions: documents are packed one behind another, so that the distance within one is
    the distance within the row.

    Args:
      encoder_tokens: `encoder_input_tokens` of a batch.
      decoder_tokens: `decoder_input_tokens`, the targets one place later.
      encoder_segment_ids: a token sees only its own segment (packing, padding); None for one
        input a row.
      decoder_segment_ids: a token sees only its own segment of both; None for one output a row,
        to segment 1.
      draws: turn dropout on.
      encoder_noise: is added to the embeddings of the encoder's tokens.
    """
    of_encoder, of_decoder = linear.split(draws, 2)
    memory_BSD = self._encode(encoder_tokens, encoder_segment_ids, of_encoder, encoder_noise)
    return self.decode(decoder_tokens, memory_BSD, encoder_segment_ids, decoder_segment_ids,
                       draws=of_decoder)[0]

  def _encode(self, tokens_BT, segment_ids, draws, noise_BTD=None):
    x_BTD = linear.embed(self.token_embedding, tokens_BT, self.config.dtype, self.rules, noise_BTD)
    return self.encoder(x_BTD, Rows(segment_ids), draws=draws)[0]

  def encode(self, batch: dict[str, jax.Array], draws: linear.Draws | None = None
             ) -> Float[Array, 'B S D']:
    """The encoder's hidden states of `encoder_input_tokens`: the decoder's memory, or for a
    head."""
    return self._encode(batch['encoder_input_tokens'], batch.get('encoder_segment_ids'), draws,
                        batch.get('encoder_embedding_noise'))

  def decode(self, tokens_BT: Int[Array, 'B T'], memory_BSD: Float[Array, 'B S D'] | None = None,
             memory_segment_ids: Int[Array, 'B S'] | None = None,
             segment_ids: Int[Array, 'B T'] | None = None, cache: Cache | None = None,
             draws: linear.Draws | None = None, new_B: Int[Array, ' B'] | None = None
             ) -> tuple[Float[Array, 'B T D'], Cache | None]:
    """The decoder's hidden states, normalised, and the cache with these tokens.

    Args:
      tokens_BT: the first is 0, the id of padding.
      memory_BSD: what `encode` gives. With a cache only for the first call, which leaves its keys
        and values there.
      memory_segment_ids: the encoder's.
      segment_ids: as `decoder_segment_ids` of a call; with a cache None.
      cache: from `T5Config.init_cache` or an earlier call, with room for T more tokens.
      draws: turn dropout on.
      new_B: how many tokens of each row the cache gets; those behind are padding. None: all T.
    """
    if cache is not None and segment_ids is not None:
      raise ValueError('segment_ids pack outputs for training; with a cache each row is one '
                       'output, so leave them out')
    if memory_BSD is None:
      if cache is None or not cache.has_memory:
        raise ValueError('the decoder has no memory; give what `encode` returns with the first '
                         'call of a cache, and with every call without one')
      memory_segment_ids = cache.memory_segment_ids
    query_segment_ids = segment_ids
    if memory_segment_ids is None:
      query_segment_ids = None
    elif segment_ids is None:
      query_segment_ids = jnp.ones_like(tokens_BT)
    is_zigzag = cache is None and ring.is_zigzag(self.rules, tokens_BT.shape[1])
    if is_zigzag:
      tokens_BT, segment_ids, query_segment_ids = jax.tree.map(
          lambda x: ring.zigzag(x, self.rules), (tokens_BT, segment_ids, query_segment_ids))
    if is_zigzag and draws is not None:
      places = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
      draws = dataclasses.replace(draws, places=ring.zigzag(places, self.rules))
    length_B = None if cache is None else cache.length_B
    places = None if cache is None else Places(length_B, new_B)
    rows = Rows(segment_ids, places, memory_BSD, memory_segment_ids, query_segment_ids)
    x_BTD = linear.embed(self.token_embedding, tokens_BT, self.config.dtype, self.rules)
    hidden_BTD, layers = self.decoder(x_BTD, rows, None if cache is None else cache.layers,
                                      draws)
    if is_zigzag:
      hidden_BTD = ring.unzigzag(hidden_BTD, self.rules)
    if cache is not None:
      length_B = length_B + (tokens_BT.shape[1] if new_B is None else new_B)
      cache = Cache(length_B, layers, memory_segment_ids)
    return hidden_BTD, cache

  def initialize(self):
    """Touches every parameter: what `init` runs."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    self(tokens, tokens) if self.config.decoder else self._encode(tokens, None, None)

  def outputs(self, batch: dict[str, jax.Array], draws: linear.Draws | None = None,
              carry: None = None) -> tuple[dict[str, Any], None]:
    """What a loss scores: `tokens` for `decoder_target_tokens`.

    Raises:
      ValueError: the model has no decoder.
    """
    if not self.config.decoder:
      raise ValueError('decoder=False leaves an encoder, which scores no tokens; put a head on '
                       'what `encode` gives, or set decoder=True')
    hidden_BTD = self(batch['encoder_input_tokens'], batch['decoder_input_tokens'],
                      batch.get('encoder_segment_ids'), batch.get('decoder_segment_ids'),
                      draws, batch.get('encoder_embedding_noise'))
    scores = Scores(self._scaled(hidden_BTD), self.head(), rules=self.rules)
    return {'tokens': scores}, carry

  def _scaled(self, hidden_BTD):
    cfg = self.config
    if not (cfg.tie_embeddings if cfg.scale_outputs is None else cfg.scale_outputs):
      return hidden_BTD
    return hidden_BTD * jnp.asarray(cfg.d_model**-0.5, hidden_BTD.dtype)

  def head(self) -> linear.Table:
    """The matrix whose rows score the tokens."""
    return self.token_embedding if self.config.tie_embeddings else self.output_embedding

  def logits(self, hidden_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
    """Scores of the next token, float32."""
    return linear.logits(self._scaled(hidden_BTD), self.head())
