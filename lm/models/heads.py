"""Any trunk with a head: classes of sequences and of tokens, spans, embeddings, two encoders.

A trunk is a config of this folder whose module has `encode`: BERT, GPT, or T5's encoder alone. Its
parameters stand under 'trunk', those of the head beside them, so that a pretrained trunk is put in
by name. A head takes batches with the features of an encoder or of a decoder, whichever its trunk
reads. Each row is one document, or several in segments (`class_weights` [B, K]), each with its
class.
"""
import collections
import dataclasses
import math
from typing import Any, Literal, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from lm.errors import UserError
from lm.layers import heads, linear
from lm.layers.heads import Pooling
from lm.parallel.rules import Rules

_FEATURES = 'input_tokens', 'positions', 'segment_ids', 'token_types', 'embedding_noise'


def _of_trunk(name: str) -> property:
  return property(lambda self: getattr(self.trunk, name), doc=f"The trunk's {name}.")


class _OnTrunk:
  """What the config of a head says of its trunk."""
  vocab_size, max_length, d_model, num_layers, num_heads, kv_heads, head_dim, d_ff = map(
      _of_trunk, ('vocab_size', 'max_length', 'd_model', 'num_layers', 'num_heads', 'kv_heads',
                  'head_dim', 'd_ff'))
  dtype, param_dtype, products, dropout_rate, scan_layers, remat, scanned = map(
      _of_trunk, ('dtype', 'param_dtype', 'products', 'dropout_rate', 'scan_layers', 'remat',
                  'scanned'))
  attention_dropout_rate, attention_implementation = map(
      _of_trunk, ('attention_dropout_rate', 'attention_implementation'))

  def __post_init__(self):
    if not hasattr(self.trunk, 'build'):
      raise ValueError(f'trunk={self.trunk!r} must be the config of a model, as @bert.BERTConfig()')
    if getattr(self.trunk, 'decoder', False):
      raise ValueError('trunk.decoder=True, but a head stands on the encoder; set decoder=False')
    if not 0 <= getattr(self, 'head_dropout_rate', 0) < 1:
      raise ValueError(f'head_dropout_rate={self.head_dropout_rate} must be in [0, 1)')
    if getattr(self, 'pooling', None) == 'pooler' and not getattr(self.trunk, 'pooler', False):
      raise ValueError("pooling='pooler' needs a trunk with a pooler; set pooler=True there, or "
                       "another pooling: 'cls', 'mean' or 'last'")

  def init_carry(self, batch_size: int) -> None:
    """Nothing goes from batch to batch."""
    del batch_size

  def flops_per_token(self, length: int) -> int:
    """FLOPs of a training step for each token, as the trunk counts them with its own head; what
    stands here is far less."""
    return self.trunk.flops_per_token(length)


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(_OnTrunk):
  """Classes of sequences: `outputs` gives 'classes' [B, C], or [B, K, C] of K segments a row.

  pooling: 'pooler' is BERT's tanh(dense(first token)), 'cls' the first token, 'last' the last.
  head_dropout_rate: on what is pooled.
  mixup_alpha: in training, what is pooled of the examples packed into a row, and their targets, are
    mixed by shares of Beta(alpha, alpha); see `layers.heads.mixup`. 0 mixes nothing.
  """
  trunk: Any
  num_classes: int = 2
  pooling: Literal['pooler', 'cls', 'mean', 'last'] = 'cls'
  head_dropout_rate: float = 0.0
  init_std: float = 0.02
  mixup_alpha: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.mixup_alpha < math.inf:
      raise ValueError(f'mixup_alpha={self.mixup_alpha} must be 0, for none, or positive')

  def build(self, rules: Rules = Rules()) -> 'Classifier':
    """The module of this config, sharded by `rules`."""
    return Classifier(self, rules)


@dataclasses.dataclass(frozen=True)
class TaggerConfig(_OnTrunk):
  """Classes of tokens: `outputs` gives 'tags' [B, T, C]."""
  trunk: Any
  num_classes: int = 2
  head_dropout_rate: float = 0.0
  init_std: float = 0.02

  def build(self, rules: Rules = Rules()) -> 'Tagger':
    """The module of this config, sharded by `rules`."""
    return Tagger(self, rules)


@dataclasses.dataclass(frozen=True)
class SpanConfig(_OnTrunk):
  """The first and the last token of an answer: `outputs` gives 'starts' and 'ends' [B, T]."""
  trunk: Any
  head_dropout_rate: float = 0.0
  init_std: float = 0.02

  def build(self, rules: Rules = Rules()) -> 'SpanExtractor':
    """The module of this config, sharded by `rules`."""
    return SpanExtractor(self, rules)


@dataclasses.dataclass(frozen=True)
class EmbedderConfig(_OnTrunk):
  """One vector for each text: `outputs` gives 'embeddings' of queries, documents and negatives.

  d_out: dimensions of a projection; None for none.
  normalize: to unit length.
  """
  trunk: Any
  pooling: Pooling = 'mean'
  d_out: Optional[int] = None
  normalize: bool = True
  init_std: float = 0.02

  def build(self, rules: Rules = Rules()) -> 'Embedder':
    """The module of this config, sharded by `rules`."""
    return Embedder(self, rules)


@dataclasses.dataclass(frozen=True)
class DualEncoderConfig(_OnTrunk):
  """Two embedders, or one for both sides, and a temperature.

  query, document: embedders of each side; `document=None` shares the query's.
  temperature: where a learned one starts; None leaves it to the loss. What is learned is the log of
    the scale 1 / temperature, which stays at most 100 (CLIP, arXiv:2103.00020, sections 2.3, 2.5).
  """
  query: EmbedderConfig
  document: Optional[EmbedderConfig] = None
  temperature: Optional[float] = None

  def __post_init__(self):
    if self.temperature is not None and not 0.01 <= self.temperature:
      raise ValueError(f'temperature={self.temperature} must be at least 0.01, where its learning '
                       'ends')
    widths = [side.d_out or side.d_model for side in (self.query, self.document or self.query)]
    if widths[0] != widths[1]:
      raise ValueError(f'queries have {widths[0]} dimensions and documents {widths[1]}; set the '
                       'same d_out for both')

  @property
  def trunk(self) -> Any:
    """Of the queries; it stands for both in whatever asks for sizes."""
    return self.query.trunk

  def build(self, rules: Rules = Rules()) -> 'DualEncoder':
    """The module of this config, sharded by `rules`."""
    return DualEncoder(self, rules)


class _Head(nn.Module):
  """A trunk with a head of its hidden states."""
  config: Any
  rules: Rules

  def setup(self):
    self.trunk = self.config.trunk.build(self.rules)
    self.head = self.make_head()

  def make_head(self) -> nn.Module:
    """Logits of classes; another head overrides this."""
    cfg = self.config
    return heads.Classifier(cfg.d_model, cfg.num_classes, cfg.init_std, cfg.head_dropout_rate)

  def initialize(self):
    """Touches every parameter: what `init` runs."""
    self.trunk.initialize()
    self.outputs({'encoder_input_tokens': jnp.zeros((1, 1), jnp.int32)})

  def hidden(self, batch, draws):
    """Hidden states [B, T, D], the segment of each token [B, T], 0 of padding, and draws for the
    head."""
    prefix = 'encoder' if 'encoder_input_tokens' in batch else 'decoder'
    features = {f'{side}_{name}': batch[f'{prefix}_{name}'] for side in ('encoder', 'decoder')
                for name in _FEATURES if f'{prefix}_{name}' in batch}
    of_trunk, of_head = linear.split(draws, 2)
    hidden_BTD = self.trunk.encode(features, of_trunk)
    segment_ids = features.get('encoder_segment_ids', jnp.ones(hidden_BTD.shape[:2], jnp.int32))
    return hidden_BTD, segment_ids, of_head


class Classifier(_Head):
  """Classes of sequences."""

  def outputs(self, batch: dict[str, jax.Array], draws: linear.Draws | None = None,
              carry: None = None) -> tuple[dict[str, Any], None]:
    """What a loss scores: 'classes', float32 logits for `class_labels`: [B, C], or [B, K, C] where
    the batch has `class_weights` [B, K] of segments 1..K; and after mixup 'mixed', the partner and
    the share of each."""
    hidden_BTD, segment_ids_BT, draws = self.hidden(batch, draws)
    pooling = self.config.pooling
    kind = 'cls' if pooling == 'pooler' else pooling
    is_packed = batch.get('class_weights', segment_ids_BT[:, 0]).ndim == 2
    if is_packed:
      pooled = heads.pool_segments(hidden_BTD, segment_ids_BT, batch['class_weights'].shape[1],
                                   kind)
    else:
      pooled = heads.pool(hidden_BTD, segment_ids_BT > 0, kind)
    if pooling == 'pooler':
      pooled = self.trunk.pooled(pooled.astype(hidden_BTD.dtype))
    outputs = {}
    if self.config.mixup_alpha and draws is not None:
      if not is_packed or pooled.shape[1] < 2:
        raise UserError(f'mixup_alpha={self.config.mixup_alpha} mixes the examples of a row, and '
                        'here each row has one; set packed=True and a longer sequence_length, or '
                        'mixup_alpha=0')
      draws, of_mixup = linear.split(draws, 2)
      pooled, outputs['mixed'] = heads.mixup(pooled, batch['class_weights'] > 0,
                                             self.config.mixup_alpha, of_mixup)
    return outputs | {'classes': self.head(pooled, draws)}, carry


class Tagger(_Head):
  """Classes of tokens."""

  def outputs(self, batch: dict[str, jax.Array], draws: linear.Draws | None = None,
              carry: None = None) -> tuple[dict[str, Any], None]:
    """What a loss scores: 'tags', float32 logits [B, T, C] for `tag_labels` with `tag_weights`."""
    hidden_BTD, _, draws = self.hidden(batch, draws)
    return {'tags': self.head(hidden_BTD, draws)}, carry


class SpanExtractor(_Head):
  """The first and the last token of an answer."""

  def make_head(self):
    """[B, T, D] -> [B, T] twice."""
    cfg = self.config
    return heads.SpanExtraction(cfg.d_model, cfg.init_std, cfg.head_dropout_rate)

  def outputs(self, batch: dict[str, jax.Array], draws: linear.Draws | None = None,
              carry: None = None) -> tuple[dict[str, Any], None]:
    """What a loss scores: 'starts' and 'ends', float32 logits [B, T]; of padding -1e9."""
    hidden_BTD, segment_ids_BT, draws = self.hidden(batch, draws)
    starts_BT, ends_BT = self.head(hidden_BTD, segment_ids_BT > 0, draws)
    return {'starts': starts_BT, 'ends': ends_BT}, carry


class Embedder(_Head):
  """Texts to vectors."""

  def make_head(self):
    """[B, T, D] -> [B, d_out]."""
    cfg = self.config
    return heads.PooledEmbedding(cfg.d_model, cfg.pooling, cfg.init_std, cfg.d_out, cfg.normalize)

  def initialize(self):
    """Touches every parameter: what `init` runs."""
    self.trunk.initialize()
    self(jnp.ones((1, 1), jnp.int32))

  def __call__(self, tokens_BT: Int[Array, 'B T'], draws: linear.Draws | None = None
               ) -> Float[Array, 'B E']:
    """Vectors of rows of tokens; 0s behind the last other token of a row are padding."""
    places = jnp.arange(tokens_BT.shape[1])
    length_B1 = jnp.max((tokens_BT != 0) * (places + 1), axis=1, keepdims=True)
    is_text = places < length_B1
    batch = {'encoder_input_tokens': tokens_BT, 'encoder_segment_ids': is_text.astype(jnp.int32)}
    return self.head(*self.hidden(batch, draws)[:2])

  def of_pairs(self, batch: dict[str, jax.Array], draws: linear.Draws | None
               ) -> dict[str, Float[Array, 'B K E']]:
    """Vectors of packed pairs: segments 1, 3, ... of a row are queries, 2, 4, ... documents."""
    num_segments = 2 * batch['pair_values'].shape[1]
    vectors_BSE = self.head(*self.hidden(batch, draws)[:2], num_segments)
    return {'query': vectors_BSE[:, ::2], 'document': vectors_BSE[:, 1::2]}

  def outputs(self, batch: dict[str, jax.Array], draws: linear.Draws | None = None,
              carry: None = None) -> tuple[dict[str, Any], None]:
    """What a loss scores: 'embeddings', as of a `DualEncoder` without a temperature."""
    return {'embeddings': _embeddings(self, self, batch, draws)}, carry


class DualEncoder(nn.Module):
  """Queries and documents to vectors of one space."""
  config: DualEncoderConfig
  rules: Rules

  def setup(self):
    cfg = self.config
    self.query = cfg.query.build(self.rules)
    if cfg.document is not None:
      self.document = cfg.document.build(self.rules)
    if cfg.temperature is not None:
      start = nn.initializers.constant(-math.log(cfg.temperature))
      self.scale = self.param('scale', nn.with_partitioning(start, ()), ())

  def initialize(self):
    """Touches every parameter: what `init` runs."""
    self.query.initialize()
    if self.config.document is not None:
      self.document.initialize()

  def outputs(self, batch: dict[str, jax.Array], draws: linear.Draws | None = None,
              carry: None = None) -> tuple[dict[str, Any], None]:
    """What a loss scores: 'embeddings', float32 {'query': [B, E], 'document': [B, E], 'negative':
    [B, n, E]} of `query_tokens`, `document_tokens` and, if there are any, `negative_tokens`; and
    the learned 'temperature'."""
    document = self.query if self.config.document is None else self.document
    outputs = {'embeddings': _embeddings(self.query, document, batch, draws)}
    if self.config.temperature is not None:
      above = jax.lax.stop_gradient(jnp.maximum(self.scale - math.log(100), 0))  # can come back
      outputs['temperature'] = jnp.exp(above - self.scale)
    return outputs, carry


def _embeddings(query: Embedder, document: Embedder, batch: dict[str, jax.Array],
                draws: linear.Draws | None) -> dict[str, jax.Array]:
  """Vectors of all sides; those of one encoder and one length are computed in one call.

  Raises:
    UserError: rows hold packed pairs and each side has an encoder of its own.
  """
  if 'encoder_input_tokens' in batch:
    if query is not document:
      raise UserError('a row of packed pairs is read by one encoder, and this model has one for '
                      'each side; bind examples.ExampleTask.packed=False')
    return query.of_pairs(batch, draws)
  sides = {'query': batch['query_tokens'][:, None], 'document': batch['document_tokens'][:, None]}
  if 'negative_tokens' in batch:
    sides['negative'] = batch['negative_tokens']
  calls = collections.defaultdict(list)
  for name, tokens in sides.items():
    calls[name != 'query' or query is document, tokens.shape[-1]].append(name)
  vectors, streams = {}, linear.split(draws, len(calls))
  for ((is_document, length), names), of_call in zip(calls.items(), streams):
    # Joined within each row of the batch, so that no row leaves its device.
    rows = jnp.concatenate([sides[name] for name in names], axis=1)
    if of_call is not None:
      of_call = dataclasses.replace(of_call, rows=of_call.each(rows.shape[1]).reshape(-1))
    joint = (document if is_document else query)(rows.reshape(-1, length), of_call)
    ends = np.cumsum([sides[name].shape[1] for name in names])[:-1]
    vectors.update(zip(names, jnp.split(joint.reshape(*rows.shape[:2], -1), ends, axis=1)))
  return {name: x if name == 'negative' else x[:, 0] for name, x in vectors.items()}
