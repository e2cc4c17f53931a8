"""Which probabilities dropout keeps: a function of a seed, the place of a query and the index of a
key, so that every implementation, pass and block draws the same ones, and none has to keep them.

Random words are a hash of these counters (counter-based generators: Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011): the `lowbias32` mixer of Wellons, "Prospecting for hash
functions" (nullprogram.com, 2018), in 32-bit operations that every vector unit has. Seeds, places
and keys are mixed each on its own first, so that a block of scores costs half of a mix.
"""
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
  kept = _mixed(words) >= round(rate * 2**32) - 2**31
  return jnp.where(kept, jnp.float32(1 / (1 - rate)), jnp.float32(0))


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
