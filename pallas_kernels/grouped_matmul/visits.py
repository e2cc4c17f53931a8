"""Which pairs of a tile of rows and a group the kernels visit."""
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp


class Visits(NamedTuple):
  """Which tile and group each step of the grid takes; steps behind the last one repeat it.

  tile, group: int32 [steps].  start, end: int32 [groups], rows of each group.  count: int32 [1].
  """
  tile: jax.Array
  group: jax.Array
  start: jax.Array
  end: jax.Array
  count: jax.Array


def visits(sizes_P, M: int, rows: int, visits_empty: bool) -> Visits:
  """Lists the pairs of a tile and a group that share rows, in order.

  visits_empty: whether a group without rows is visited once, with any tile.
  """
  end = jnp.cumsum(sizes_P, dtype=jnp.int32)
  start, tiles = end - sizes_P, pl.cdiv(M, rows)
  first = jnp.minimum(start // rows, tiles - 1)
  number = jnp.where(sizes_P > 0, (end - 1) // rows - first + 1, int(visits_empty))
  behind = jnp.cumsum(number, dtype=jnp.int32)
  step = jnp.minimum(jnp.arange(tiles + len(sizes_P), dtype=jnp.int32), behind[-1] - 1)
  group = jnp.searchsorted(behind, step, side='right').astype(jnp.int32)
  tile = first[group] + step - (behind - number)[group]
  return Visits(tile, group, start, end, behind[-1:])
