"""What decoding with a GPT keeps from call to call."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of all layers, and how many tokens of each row stand in them.

  length_B: int32 [B].
  layers: a `KVCache`, [L, B, K, S, H], where layers are scanned, else a list of L times [B, K, S,
    H].
  page_table: int32 [B, pages of a row] where the rows share a pool of pages: the token of place p
    is in page `page_table[p // page]`, and `layers` are [L, pages, K, page, H] or a list of L times
    [pages, K, page, H]. Entries behind a row's last page may be any. Else None.
  """
  length_B: Any
  layers: Any
  page_table: Any = None

  @property
  def num_places(self) -> int:
    """Tokens that a row has room for."""
    size = jax.tree.leaves(self.layers)[0].shape[-2]
    return size if self.page_table is None else size * self.page_table.shape[1]

  def take(self, rows_R: Int[Array, ' R']) -> 'Cache':
    """The cache of these rows, in this order; of a pool they then share the pages."""
    if self.page_table is not None:
      return Cache(self.length_B[rows_R], self.layers, self.page_table[rows_R])
    axis = 0 if isinstance(self.layers, list) else 1
    return Cache(self.length_B[rows_R],
                 jax.tree.map(lambda x: jnp.take(x, rows_R, axis=axis), self.layers))
