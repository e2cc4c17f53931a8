"""What dropout keeps: a function of a seed, of a place and of a key, so that every implementation,
pass, block and device draws the same, and none has to keep it. Of attention's probabilities the
place is the query's and the key the key's; of activations they are the token's and the column.

Random words are a hash of these counters (counter-based generators: Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011): the `lowbias32` mixer of Wellons, "Prospecting for hash
functions" (nullprogram.com, 2018), in 32-bit operations that every vector unit has. Seeds, places
and keys are mixed each on its own first, so that a block of scores costs half of a mix.
"""
from __future__ import annotations

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp

_MULTIPLIERS = 0x7feb352d, 0x846ca68b - 2**32


def of_seeds(seeds: jax.Array) -> jax.Array:
  """int32 words of uint32 seeds."""
  return _word(lax.bitcast_convert_type(seeds, jnp.int32))


def of_places(places: jax.Array) -> jax.Array:
  """int32 words of the places of queries."""
  return _word(2 * places)


def of_keys(keys: jax.Array) -> jax.Array:
  """int32 words of the indices of keys, none of which is a place's."""
  return _word(2 * keys + 1)


def of_words(rate: float, words: jax.Array) -> jax.Array:
  """What probabilities are multiplied by, float32, given the exclusive or of the three kinds of
  words: 0 with probability `rate`, and 1 / (1 - rate)."""
  return jnp.where(keeps(rate, words), jnp.float32(1 / (1 - rate)), jnp.float32(0))


def keeps(rate: float, words: jax.Array) -> jax.Array:
  """False with probability `rate`, for each exclusive or of the three kinds of words."""
  return _mixed(words) >= round(rate * 2**32) - 2**31


def factors(rate: float, seeds_BN: jax.Array, places_BT: jax.Array, keys_S: jax.Array) -> jax.Array:
  """What the probabilities of queries at `places` and of `keys` are multiplied by, float32
  [B, N, T, S]."""
  words = of_places(places_BT)[:, None, :, None] ^ of_keys(keys_S)
  return of_words(rate, words ^ of_seeds(seeds_BN)[:, :, None, None])


def _mixed(words):
  """The inner steps of `lowbias32`. Its first shift would do nothing to an exclusive or of mixed
  words, and its last leaves the high bits, which decide in `of_words`."""
  words = words * _MULTIPLIERS[0]
  return (words ^ lax.shift_right_logical(words, 15)) * _MULTIPLIERS[1]


def _word(counters):
  mixed = _mixed(counters ^ lax.shift_right_logical(counters, 16))
  return mixed ^ lax.shift_right_logical(mixed, 16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
  """Where a model draws its dropout from: streams of random words.

  A row's stream is its own: what is drawn for it does not depend on the rows beside it, on how
  batch and layers are cut into microbatches, stages and devices, or on what is computed again.

  rows: uint32 [B], a stream for each row.
  batch: uint32 [], of what all rows share; None where only rows are.
  places: int32 [B, T], of each token in its row where that is not its index.
  """
  rows: jax.Array
  batch: jax.Array | None = None
  places: jax.Array | None = None

  @classmethod
  def of(cls, rng: jax.Array, num_rows: int) -> Draws:
    """Streams of a batch, from a key of `jax.random`."""
    of_rows, of_batch = jax.random.split(rng)
    return cls(jax.random.bits(of_rows, (num_rows,)), jax.random.bits(of_batch))

  def fold(self, index: int | jax.Array) -> Draws:
    """Other streams, for each index others."""
    step = jnp.uint32(0x9e3779b9) * (jnp.asarray(index).astype(jnp.uint32) + jnp.uint32(1))
    fold = lambda x: None if x is None else lax.bitcast_convert_type(of_seeds(x + step), jnp.uint32)
    return dataclasses.replace(self, rows=fold(self.rows), batch=fold(self.batch))

  def split(self, count: int) -> tuple[Draws, ...]:
    """So many of them."""
    return tuple(self.fold(i) for i in range(count))

  def each(self, count: int) -> jax.Array:
    """uint32 [B, count]: streams within each row, such as of the heads of attention."""
    words = of_seeds(self.rows)[:, None] ^ of_keys(jnp.arange(count))
    return lax.bitcast_convert_type(words, jnp.uint32)

  def dropout(self, x: jax.Array, rate: float) -> jax.Array:
    """x [B, D] or [B, T, D], elements zeroed with probability `rate` and the others divided by
    1 - rate."""
    if rate == 0:
      return x
    words = of_seeds(self.rows)[:, None] ^ of_keys(jnp.arange(x.shape[-1]))
    if x.ndim == 3:
      places = jnp.arange(x.shape[1]) if self.places is None else self.places
      words = of_places(places)[..., None] ^ words[:, None]
    return _dropped(x, rate, words)

  def dropout_of_all(self, x: jax.Array, rate: float) -> jax.Array:
    """The same of x [S, D], which all rows share."""
    if rate == 0:
      return x
    words = of_places(jnp.arange(len(x)))[:, None] ^ of_keys(jnp.arange(x.shape[-1]))
    return _dropped(x, rate, words ^ of_seeds(self.batch))

  def kept_layers(self, rate: float, count: int) -> jax.Array:
    """Boolean [count], False with probability `rate`; the same for all rows."""
    return keeps(rate, of_seeds(self.batch) ^ of_keys(jnp.arange(count)))


def _dropped(x, rate, words):
  return jnp.where(keeps(rate, words), x * jnp.asarray(1 / (1 - rate), x.dtype), 0)
