"""What decoding needs of a model, the same for every family: pure functions of (params, cache).

A row of a cache is one text. What may be done with it: `extend` it by tokens, `take` rows in
another order (beams), `rewind` it to fewer tokens (drafts that were refused).
"""
import dataclasses
import functools
from typing import Any, Literal, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.compression import matrices
from lm.compression.quantize import quantize_matrices
from pallas_kernels import native
from pallas_kernels.quantized_matmul import Quantized
from pallas_kernels.streamed_matmul import Streamed


@dataclasses.dataclass(frozen=True)
class Decoder:
  """A model that continues texts; static under jit.

  Attributes:
    module: from `config.build(rules)`. An encoder-decoder has `encode` and `decode`.
    start_id: the first token of an encoder-decoder's output; else unused.
    cache: `CacheOptions` for `config.init_cache`; None keeps all tokens, exactly.
    weights: 'int8' keeps matrices and embeddings in 8 bits (see `quantize_matrices`).
    layers_on_host: keeps the layers' matrices in the host's memory; each comes to the device when
      its turn is. For models that do not fit, with `scan_layers=True`: unrolled layers may all come
      at once. Caches stay on the device.
  """
  module: nn.Module
  start_id: int = 0
  cache: Any = None
  weights: Optional[Literal['int8']] = None
  layers_on_host: bool = False

  @property
  def has_encoder(self) -> bool:
    return hasattr(self.module, 'decode')

  def prepare(self, params: Any) -> Any:
    """The parameters as all methods here take them; once, not at each step (see `cast_matrices`,
    `streamed`)."""
    params = quantize_matrices(params) if self.weights == 'int8' else params
    params = self.module.config.unstack(cast_matrices(params, self.module.config.dtype))
    if self.layers_on_host:
      return jax.tree_util.tree_map_with_path(_to_host, params)
    return streamed(params)

  def start(self, params: Any, inputs_BT: Int[Array, 'B T'], lengths_B: Int[Array, ' B'],
            num_places: int) -> tuple[Float[Array, 'B V'], Any]:
    """Reads prompts; of an encoder-decoder they are the encoder's.

    Args:
      inputs_BT: prompts, padded behind `lengths_B` tokens with anything.
      num_places: of a row in the cache, prompt included.

    Returns:
      float32 logits of the first new token, and the cache.
    """
    hidden_BTD, cache = self.read(params, inputs_BT, lengths_B, num_places)
    last_B1D = jnp.take_along_axis(hidden_BTD, cache.length_B[:, None, None] - 1, axis=1)
    return self.logits(params, last_B1D)[:, 0], cache

  def read(self, params: Any, inputs_BT: Int[Array, 'B T'], lengths_B: Int[Array, ' B'],
           num_places: int) -> tuple[Float[Array, 'B T D'], Any]:
    """`start`, and in place of logits the hidden states of what stands in the cache."""
    B = inputs_BT.shape[0]
    options = () if self.cache is None else (self.cache,)
    cache, memory = self.module.config.init_cache(B, num_places, *options), ()
    if self.has_encoder:
      segments_BT = (jnp.arange(inputs_BT.shape[1]) < lengths_B[:, None]).astype(jnp.int32)
      batch = {'encoder_input_tokens': inputs_BT, 'encoder_segment_ids': segments_BT}
      memory = self._apply(params, batch, method='encode'), segments_BT
      inputs_BT, lengths_B = self.first(B)
    return self._forward(params, inputs_BT, *memory, cache=cache, new_B=lengths_B)

  def first(self, num_rows: int) -> tuple[Int[Array, 'B 1'], Int[Array, ' B']]:
    """What an encoder-decoder's decoder reads before it writes, and its length."""
    return jnp.full((num_rows, 1), self.start_id, jnp.int32), jnp.ones(num_rows, jnp.int32)

  def extend(self, params: Any, tokens_BT: Int[Array, 'B T'], cache: Any,
             **options: Any) -> tuple[Float[Array, 'B T V'], Any]:
    """Puts T tokens behind each row; returns float32 logits of what follows each, and the cache.

    `options` are the module's own: a GPT's `new_B`, how many of a row's T tokens are no padding,
    and `positions` of these, where the cache does not hold all that is before them.
    """
    hidden_BTD, cache = self.hidden(params, tokens_BT, cache, **options)
    return self.logits(params, hidden_BTD), cache

  def hidden(self, params: Any, tokens_BT: Int[Array, 'B T'], cache: Any,
             **options: Any) -> tuple[Float[Array, 'B T D'], Any]:
    """`extend`, and in place of logits the last hidden states, normalised."""
    return self._forward(params, tokens_BT, cache=cache, **options)

  def logits(self, params: Any, hidden_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
    """float32 scores of what follows these hidden states."""
    return self._apply(params, hidden_BTD, method='logits')

  def take(self, cache: Any, rows_R: Int[Array, ' R']) -> Any:
    """The cache of these rows, in this order; a row may be there more than once."""
    return cache.take(rows_R)

  def rewind(self, cache: Any, length_B: Int[Array, ' B']) -> Any:
    """The cache of the first `length_B` tokens of each row."""
    return dataclasses.replace(cache, length_B=length_B)

  def _apply(self, params, *args, **kwargs):
    return self.module.apply({'params': params}, *args, **kwargs)

  def _forward(self, params, *args, **kwargs):
    method = {'method': 'decode'} if self.has_encoder else {}
    return self._apply(params, *args, **kwargs, **method)


def cast_matrices(params: Any, dtype: str) -> Any:
  """Casts matrices and embeddings to the dtype in which layers compute, as each use of them would.

  A token reads every weight once, so their size is its time. Scales and biases stay as they are:
  norms compute with them in float32, as DoRA does with its magnitudes.
  """
  as_they_are = 'scale', 'bias', 'lora_scale', 'magnitude', 'input_scale'
  return _replaced(params, lambda name, leaf: not _is_product(leaf) and leaf.dtype != dtype and
                   name.rpartition('/')[2] not in as_they_are, lambda old: _cast(old, dtype))


@functools.partial(jax.jit, static_argnums=1)
def _cast(leaves, dtype):
  return jax.tree.map(lambda leaf: leaf.astype(dtype), leaves)


def streamed(params: Any) -> Any:
  """Lays matrices and embeddings on a CPU as they are read; elsewhere, on several devices, and
  where it is traced, the parameters stay as they are."""
  leaves = jax.tree.leaves(params)
  if any(isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array)
         or [device.platform for device in leaf.devices()] != ['cpu'] for leaf in leaves):
    return params
  return _replaced(params, _may_stream, _lay) if native.is_there() else params


def _may_stream(name, leaf):
  if isinstance(leaf, Streamed):
    return False
  is_quantized = isinstance(leaf, Quantized)
  values = leaf.values if is_quantized else leaf
  if values.dtype not in ('float32', 'bfloat16', 'int8'):
    return False
  one = matrices.matrix_of(name, values)
  in_groups = is_quantized and one is not None and leaf.scales.size * one.K != values.size
  return matrices.is_embedding(name) or one is not None and not in_groups


@jax.jit
def _lay(leaves):
  def lay(name, leaf):
    values, scales = (leaf.values, leaf.scales) if isinstance(leaf, Quantized) else (leaf, None)
    if matrices.is_embedding(name):
      return Streamed(values, scales)
    one = matrices.matrix_of(name, values)
    return Streamed(one.flat(values).mT.reshape(*one.stack, one.N, one.K),
                    None if scales is None else scales.reshape(*one.stack, one.N))
  return {name: lay(name, leaf) for name, leaf in leaves.items()}


def _replaced(params, is_meant, change):
  """The parameters with the leaves that are meant changed, all at once, as a dict by their names;
  of parameters that are prepared none is."""
  leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_product)
  named = {matrices.name_of(path): leaf for path, leaf in leaves}
  old = {name: leaf for name, leaf in named.items() if is_meant(name, leaf)}
  return tree.unflatten((named | change(old)).values()) if old else params


def _to_host(path, leaf):
  """A layer's matrix in the memory of its devices' host; vectors and others as they are."""
  keys = [getattr(key, 'key', None) for key in path]
  is_stacked = 'layers' in keys and None not in keys
  if 'layers' not in keys or leaf.ndim - is_stacked < 2:
    return leaf
  return jax.device_put(leaf, leaf.sharding.with_memory_kind('pinned_host'))


def _is_product(x):
  return isinstance(x, Quantized | Streamed)
