"""What a layer's attention keeps of the tokens before: keys and values, by rows or in pages."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class KVCache(NamedTuple):
  """Keys and values so far, [B, K, S, H] each: heads first, as decoding reads them. Where rows have
  a page table, a pool of pages of tokens, [pages, K, page, H]."""
  key: jax.Array
  value: jax.Array


class Places(NamedTuple):
  """Where the tokens of each row stand in a cache.

  length: int32 [B], tokens before the new ones.
  new: int32 [B], how many of the T new ones are tokens; those behind are padding. None: all.
  page_table: int32 [B, pages of a row], where the rows share a pool: the token of place p is in
    page `page_table[p // page]`. None: a cache by rows.
  """
  length: jax.Array
  new: jax.Array | None = None
  page_table: jax.Array | None = None


def num_keys(cache: KVCache, places: Places) -> int:
  """Tokens that a row has room for."""
  pages = 1 if places.page_table is None else places.page_table.shape[1]
  return pages * cache.key.shape[2]


def write(cache: KVCache, places: Places, key_BTKH: Float[Array, 'B T K H'],
          value_BTKH: Float[Array, 'B T K H']) -> KVCache:
  """Puts the new tokens behind those that stand.

  By rows, padding is written too: behind the length, where the next token takes its place. In a
  pool it is not written, nor is what is past the page table's end.
  """
  new = KVCache(key_BTKH, value_BTKH)
  if places.page_table is None:
    return jax.tree.map(lambda old, x: _write_rows(old, x, places.length), cache, new)
  pages_BT, offsets_BT = _addresses(cache, places, key_BTKH.shape[1])
  return jax.tree.map(lambda pool, x: pool.at[pages_BT, :, offsets_BT].set(
      x.astype(pool.dtype), mode='drop'), cache, new)


def read(cache: KVCache, places: Places, dtype: jax.typing.DTypeLike
         ) -> tuple[Float[Array, 'B S K H'], Float[Array, 'B S K H']]:
  """The keys and values of all places of each row, side by side."""
  def rows(x):
    if places.page_table is None:
      return jnp.swapaxes(x, 1, 2).astype(dtype)
    x = jnp.swapaxes(x[places.page_table], 2, 3)  # [B, pages of a row, page, K, H]
    return x.reshape(len(x), -1, *x.shape[3:]).astype(dtype)

  return rows(cache.key), rows(cache.value)


def _write_rows(cache_BKSH, new_BTKH, start_B: Int[Array, ' B']):
  new_BKTH = jnp.swapaxes(new_BTKH, 1, 2).astype(cache_BKSH.dtype)
  if new_BTKH.shape[:2] == (1, 1):
    # XLA:CPU would fuse one update into each of its readers, and each of them would do it on a copy
    # of the cache: seven times the time of a token. Two updates, of the same place, are a loop.
    two = jnp.concatenate([start_B, start_B])
    return cache_BKSH.at[0, :, two].set(new_BTKH[:, 0], mode='drop')
  update = lambda cache, new, start: jax.lax.dynamic_update_slice(cache, new, (0, start, 0))
  return jax.vmap(update)(cache_BKSH, new_BKTH, start_B)


def _addresses(cache, places, T):
  """The page and the place within it of each new token, [B, T]; a page past the pool's last for
  what is not to be written."""
  table_BP, num_pages, page = places.page_table, *cache.key.shape[:3:2]
  place_BT = places.length[:, None] + jnp.arange(T)
  is_real_BT = place_BT < table_BP.shape[1] * page
  if places.new is not None:
    is_real_BT &= jnp.arange(T) < places.new[:, None]
  pages_BT = jnp.take_along_axis(table_BP, place_BT // page, axis=1, mode='clip')
  return jnp.where(is_real_BT, pages_BT, num_pages), place_BT % page
