"""T5's positions: a learned bias of the scores for each head and each range of distances."""
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
  def __call__(self, num_queries: int, num_keys: int, offset: Int[Array, ' B'] | None = None
               ) -> Float[Array, '#B N T S']:
    """The bias of T queries and S keys, float32, for all rows alike or with an offset for each.

    Args:
      offset: place of the first query among the keys (a cache's length); None is 0.
    """
    table_PN = self.param('embedding', normal(self.std, 'position', 'heads'),
                          (self.num_buckets, self.num_heads))

    def buckets(distance):
      return relative_buckets(distance, self.num_buckets, self.max_distance, self.bidirectional)

    if offset is None:
      distance = np.arange(1 - num_queries, num_keys)
      return _diagonals(table_PN[buckets(distance)].T, num_queries)[None]
    places_BT1 = (offset[:, None] + jnp.arange(num_queries))[..., None]
    reach = self.max_distance
    distance = jnp.clip(jnp.arange(num_keys) - places_BT1, -reach, reach)
    bucket_BTS = jnp.asarray(buckets(np.arange(-reach, reach + 1)))[distance + reach]
    return table_PN[bucket_BTS].transpose(0, 3, 1, 2)


def _diagonals(values_NX: Float[Array, 'N X'], num_queries: int) -> Float[Array, 'N T S']:
  """out[n, t, s] = values[n, s - t + T - 1], for X = T + S - 1.

  Rows one longer than they are read move by one place each. Its gradient is a sum over T, where
  that of looking up T x S buckets is as many scattered additions.
  """
  N, X = values_NX.shape
  T = num_queries
  rows = jnp.broadcast_to(jnp.pad(values_NX, ((0, 0), (0, 1)))[:, None], (N, T, X + 1))
  return rows.reshape(N, T * (X + 1))[:, :T * X].reshape(N, T, X)[:, :, T - 1:]
