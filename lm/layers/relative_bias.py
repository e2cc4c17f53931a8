"""Biases of the scores by distance: T5's, learned for each range of distances, and ALiBi's."""
import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from lm.layers.linear import normal


def relative_buckets(distance: np.ndarray, num_buckets: int, max_distance: int,
                     bidirectional: bool) -> np.ndarray:
  """Which bucket a distance falls into (arXiv:1910.10683, section 2.1).

  Half of the buckets hold one distance each, the others ranges that grow logarithmically up to
  `max_distance`, and the last one all beyond. The logarithms are float32 as in Mesh TensorFlow,
  whose roundings decide where a range ends, and numpy's, so that no compiler reorders them.

  Args:
    distance: int, any shape: the key's place less the query's.
    bidirectional: later keys have half of the buckets; else they all share the first, for a mask
      to hide.

  Returns:
    int32 in [0, num_buckets).
  """
  half = num_buckets // 2 if bidirectional else num_buckets
  later = half * (distance > 0) if bidirectional else 0
  away = np.abs(distance) if bidirectional else np.maximum(-distance, 0)
  exact = half // 2
  octaves = np.log(np.maximum(away, exact).astype(np.float32) / np.float32(exact))
  octaves /= np.float32(math.log(max_distance / exact))
  ranges = exact + (octaves * np.float32(half - exact)).astype(np.int32)
  return (later + np.where(away < exact, away, np.minimum(ranges, half - 1))).astype(np.int32)


class RelativeBias(nn.Module):
  """Owns a number for each bucket of distances and each head, float32 [P, N].

  num_buckets: P, at least 4.  max_distance: in tokens; see `relative_buckets`.
  """
  num_heads: int
  num_buckets: int
  max_distance: int
  bidirectional: bool
  std: float

  @nn.compact
  def __call__(self) -> Float[Array, 'N X']:
    """The bias of each head at the distances from -max_distance to max_distance, float32: the
    `distance_bias` of attention."""
    table_PN = self.param('embedding', normal(self.std, 'position', 'heads'),
                          (self.num_buckets, self.num_heads))
    distance = np.arange(-self.max_distance, self.max_distance + 1)
    buckets = relative_buckets(distance, self.num_buckets, self.max_distance, self.bidirectional)
    return table_PN[buckets].T


def alibi(num_heads: int, reach: int) -> Float[Array, 'N X']:
  """The `distance_bias` of ALiBi (arXiv:2108.12409, section 3), float32: distances from -reach to
  reach, times -slope.

  Slopes are 2**(-8 i / N) for i = 1 .. N. Where N is no power of 2, those of the next lower one
  come first, then every other one of twice as many heads.

  Args:
    num_heads: N.
    reach: the longest distance; farther keys count as this far.
  """
  power = 2**int(math.log2(num_heads))
  slopes = [2.0**(-8 * i / power) for i in range(1, power + 1)]
  slopes += [2.0**(-4 * i / power) for i in range(1, 2 * (num_heads - power), 2)]
  return -jnp.outer(jnp.asarray(slopes, jnp.float32), abs(jnp.arange(-reach, reach + 1)))


def of_distances(distance_bias_NX: Float[Array, 'N X'], distance_BTS: Int[Array, 'B T S']
                 ) -> Float[Array, 'B N T S']:
  """The bias of queries and keys: how far the key stands before the query, negative behind it."""
  reach = distance_bias_NX.shape[1] // 2
  return distance_bias_NX[:, reach - jnp.clip(distance_BTS, -reach, reach)].swapaxes(0, 1)
