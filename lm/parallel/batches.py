"""Batches whose rows lie on the devices of all hosts."""
from collections.abc import Mapping
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lm.parallel.rules import Rules, axes_of


@dataclasses.dataclass(frozen=True)
class GlobalBatch:
  """Where the rows of a batch lie: each host reads those that its own devices hold.

  num_rows: of the batch; rows of zeros are added where they do not divide over the devices.
  """
  rules: Rules
  num_rows: int

  @property
  def padded(self) -> int:
    """Rows with those that are added."""
    if self.rules.mesh is None:
      return self.num_rows
    shards = math.prod(self.rules.mesh.shape[axis] for axis in axes_of(self.rules.batch))
    return -(-self.num_rows // shards) * shards

  @property
  def own(self) -> slice:
    """The rows that this host reads; never none, so that every host knows what a row is made of."""
    held = self._held()
    return slice(min(held.start, self.num_rows - 1), min(held.stop, self.num_rows))

  def place(self, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Lays the `own` rows of all hosts together: [padded, ...] arrays over all devices."""
    held = self._held()

    def of(x: np.ndarray) -> jax.Array:
      x = x[:max(0, self.num_rows - held.start)]
      x = np.pad(x, [(0, len(held) - len(x))] + [(0, 0)] * (x.ndim - 1))
      if self.rules.mesh is None:
        return jnp.asarray(x)

      def part(index):
        wanted = range(self.padded)[index[0]]
        return x[wanted.start - held.start:wanted.stop - held.start]
      return jax.make_array_from_callback((self.padded, *x.shape[1:]),
                                          self.rules.sharding('batch'), part)
    return {name: of(x) for name, x in rows.items()}

  def _held(self) -> range:
    """What this host's devices hold of the padded rows, from the first to the last."""
    if self.rules.mesh is None:
      return range(self.num_rows)
    indices = self.rules.sharding('batch').addressable_devices_indices_map((self.padded,))
    parts = [range(self.padded)[index] for index, in indices.values()]
    return range(min(part.start for part in parts), max(part.stop for part in parts))
