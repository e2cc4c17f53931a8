"""The rows of a model of any family, over its cache: a T5, a Transformer-XL."""
from collections.abc import Sequence
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
import numpy as np

from lm.inference.decoder import Decoder
from lm.inference.prompts import bucket_of, buckets, SHORTEST_BUCKET


class ModelRows:
  """Texts in the rows of one cache, each with room for the model's context.

  A program reads a prompt of up to so many tokens, for a few sizes, and one program reads a token
  of each row.

  Attributes:
    num_rows, vocab_size, max_length, has_encoder, chunk: see `rows.Rows`; prompts are read whole.
  """

  def __init__(self, module: Any, params: Any, num_rows: int, max_length: int):
    """module: the model, or a `Decoder` of it. num_rows: texts at once."""
    decoder = Decoder(module) if isinstance(module, nn.Module) else module
    self._decoder, self._params = decoder, decoder.prepare(params)
    self.num_rows, self.max_length = num_rows, max_length
    # The end of a prompt is beyond the context of an encoder-decoder.
    self.chunk = max_length + decoder.has_encoder
    self.has_encoder, self.vocab_size = decoder.has_encoder, decoder.module.config.vocab_size
    # Of each array of the cache the axis of rows, or None: where its shape depends on their number.
    shapes = lambda B: [x.shape for x in jax.eval_shape(
        lambda: jax.tree.leaves(self._start(*self._blank(B))[1]))]
    self._axes = tuple(next((i for i, size in enumerate(one) if size != two[i]), None)
                       for one, two in zip(shapes(1), shapes(2)))
    self._cache = _empty(decoder, max_length, self._params, *self._blank(num_rows))

  def warm_up(self):
    """See `Rows`."""
    for size in self._sizes():
      self.read(0, np.zeros(size, np.int32), 1)
    self.extend([0], [0])

  def read(self, row: int, tokens: np.ndarray, num_new: int) -> np.ndarray:
    """See `Rows`."""
    del num_new
    size = bucket_of(len(tokens), *self._bounds)
    inputs_1T = np.zeros((1, size), np.int32)
    inputs_1T[0, :len(tokens)] = tokens
    logits_1V, new = self._start(inputs_1T, np.full(1, len(tokens), np.int32))
    self._cache = _put(self._axes, self._cache, new, np.int32(row))
    return np.asarray(logits_1V)[0]

  def extend(self, rows: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """See `Rows`."""
    token_B, goes_on_B = np.zeros(self.num_rows, np.int32), np.zeros(self.num_rows, bool)
    token_B[rows], goes_on_B[rows] = tokens, True
    logits_BV, self._cache = _extend(self._decoder, self._params, self._cache, token_B, goes_on_B)
    return np.asarray(logits_BV)[list(rows)]

  def drop(self, row: int):
    """See `Rows`."""

  @property
  def _bounds(self):
    return min(SHORTEST_BUCKET, self.chunk), self.chunk, 2

  def _sizes(self):
    return buckets(*self._bounds)

  def _blank(self, count):
    """Prompts of the greatest length, and their lengths."""
    return np.zeros((count, self.chunk), np.int32), np.ones(count, np.int32)

  def _start(self, inputs_BT, lengths_B):
    return _start(self._decoder, self.max_length, self._params, inputs_BT, lengths_B)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(decoder, num_places, params, inputs_BT, lengths_B):
  return decoder.start(params, inputs_BT, lengths_B, num_places)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty(decoder, num_places, params, inputs_BT, lengths_B):
  cache = decoder.start(params, inputs_BT, lengths_B, num_places)[1]
  return jax.tree.map(jnp.zeros_like, cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _put(axes, cache, new, row):
  """The cache with a row of its own; what is shorter of that, an encoder's memory, is padded."""
  def put(axis, old, x):
    if axis is None:
      return x
    pads = [(0, 0 if i == axis else size - x.shape[i]) for i, size in enumerate(old.shape)]
    return lax.dynamic_update_slice_in_dim(old, jnp.pad(x, pads), row, axis)

  leaves, tree = jax.tree.flatten(cache)
  return tree.unflatten(map(put, axes, leaves, jax.tree.leaves(new)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend(decoder, params, cache, token_B, goes_on_B):
  """Logits [B, V] behind a token of each row; rows that do not go on stay as they are."""
  logits_B1V, longer = decoder.extend(params, token_B[:, None], cache)
  return logits_B1V[:, 0], decoder.rewind(
      longer, jnp.where(goes_on_B, longer.length_B, cache.length_B))
