"""What a layer's attention keeps of the tokens before: keys and values, by rows or in pages."""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import native, platform
from pallas_kernels.decode_attention import put_tokens, quantize

# New tokens of a row that meet the cache where it stands; more of them are worth a copy of it.
LONGEST_STEP = 8
MOST_UPDATES = 128  # of a pool, that a TPU's program spells out


class KVCache(NamedTuple):
  """Keys and values so far, [B, K, S, H] each: heads first, as decoding reads them. Where rows have
  a page table, a pool of pages of tokens, [pages, K, page, H].

  key_scale, value_scale: float32 [B, K, S] of keys and values of 8 bits (`quantize`), else None.
  """
  key: jax.Array
  value: jax.Array
  key_scale: jax.Array | None = None
  value_scale: jax.Array | None = None

  @classmethod
  def zeros(cls, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> 'KVCache':
    """An empty cache of this shape, [..., H]."""
    scales = [jnp.zeros(shape[:-1]) for _ in range(2)] if jnp.dtype(dtype).itemsize == 1 else []
    return cls(*(jnp.zeros(shape, dtype) for _ in range(2)), *scales)


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

  def of(self, T: int) -> Int[Array, 'B T']:
    """The places of T new tokens."""
    return self.length[:, None] + jnp.arange(T)

  def are_real(self, T: int) -> jax.Array:
    """Which of them are tokens, boolean [B, T]."""
    new = jnp.full_like(self.length, T) if self.new is None else self.new
    return jnp.arange(T) < new[:, None]


def num_keys(cache: KVCache, places: Places) -> int:
  """Tokens that a row has room for."""
  pages = 1 if places.page_table is None else places.page_table.shape[1]
  return pages * cache.key.shape[2]


def entries(cache: KVCache, key_BTKH: Float[Array, 'B T K H'], value_BTKH: Float[Array, 'B T K H']
            ) -> KVCache:
  """New keys and values as the cache keeps them, [B, T, K, H]; scales [B, T, K]."""
  if cache.key_scale is None:
    return KVCache(key_BTKH.astype(cache.key.dtype), value_BTKH.astype(cache.key.dtype))
  (key, key_scale), (value, value_scale) = (
      quantize(x, cache.key.dtype) for x in (key_BTKH, value_BTKH))
  return KVCache(key, value, key_scale, value_scale)


def values_of(kept: KVCache, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
  """The keys and values that entries of any shape stand for."""
  if kept.key_scale is None:
    return kept.key.astype(dtype), kept.value.astype(dtype)
  return tuple((x.astype(jnp.float32) * scale[..., None]).astype(dtype)
               for x, scale in zip(kept[:2], kept[2:]))


def write(cache: KVCache, places: Places, key_BTKH: Float[Array, 'B T K H'],
          value_BTKH: Float[Array, 'B T K H'], is_cut: bool = False) -> KVCache:
  """Puts the new tokens behind those that stand; `is_cut` says that devices share the cache.

  A cache by rows may get padding too, behind the length, where the next token takes its place. In a
  pool it is not written, nor is what is past the page table's end.
  """
  T, new = key_BTKH.shape[1], entries(cache, key_BTKH, value_BTKH)
  if places.page_table is not None:
    return scatter(cache, *_addresses(cache, places, T), new, in_pages=True, is_cut=is_cut)
  if T > LONGEST_STEP:
    update = jax.vmap(lambda old, x, start: jax.lax.dynamic_update_slice_in_dim(
        old, jnp.swapaxes(x, 0, 1), start, axis=1))
    return jax.tree.map(lambda old, x: update(old, x, places.length), cache, new)
  place_BT = places.of(T)
  return scatter(cache, jnp.broadcast_to(jnp.arange(place_BT.shape[0])[:, None], place_BT.shape),
                 place_BT, new, is_cut=is_cut)


def scatter(cache: KVCache, rows_BT: Int[Array, 'B T'], places_BT: Int[Array, 'B T'], new: KVCache,
            in_pages: bool = False, is_cut: bool = False) -> KVCache:
  """Writes new entries to a place of a row, or page, each; where there is no such place, nowhere.
  """
  plain = functools.partial(_scatter, in_pages=in_pages)
  is_exported = not all(isinstance(size, int) for size in (*rows_BT.shape, *cache.key.shape))
  if is_cut or is_exported or rows_BT.size > MOST_UPDATES or not native.is_there():
    return plain(cache, rows_BT, places_BT, new)
  on_cpu = lambda cache, rows, places, new: jax.tree.map(
      lambda old, x: put_tokens(old, rows, places, x), cache, new)
  return platform.by_platform(on_cpu, plain, cache, rows_BT, places_BT, new)


def _scatter(cache, rows_BT, places_BT, new, in_pages):
  if rows_BT.size == 1:
    # XLA:CPU would fuse a single update into each of its readers, and each would do it on a copy of
    # the cache: seven times the time of a token. Two updates, of the same place, stand alone.
    rows_BT, places_BT, new = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1),
                                           (rows_BT, places_BT, new))
  put = lambda old, x: old.at[rows_BT, :, places_BT].set(x, mode='drop')
  move = functools.partial(platform.move, put)
  if not in_pages or rows_BT.size > MOST_UPDATES:
    return jax.tree.map(move, cache, new)
  tpu = functools.partial(_put_one_by_one, rows_BT.reshape(-1), places_BT.reshape(-1))
  return jax.tree.map(lambda old, x: platform.by_platform(move, move, old, x, tpu=tpu), cache, new)


def _put_one_by_one(rows, places, old, new):
  """`scatter` of one array on a TPU. XLA's own scatter wants a token's heads side by side, as no
  kernel reads them: in a loop of steps all of a pool goes to that layout and back at each. In a
  loop of updates it does too, so there is none."""
  for row, place, x in zip(rows, places, new.reshape(-1, *new.shape[2:])):
    at = row, 0, place, *[0] * (old.ndim - 3)
    x = jnp.expand_dims(x, (0, 2))
    fits = (row < old.shape[0]) & (place < old.shape[2])
    x = jnp.where(fits, x, jax.lax.dynamic_slice(old, at, x.shape))
    old = jax.lax.dynamic_update_slice(old, x, at)
  return old


def read(cache: KVCache, places: Places, dtype: jax.typing.DTypeLike
         ) -> tuple[Float[Array, 'B S K H'], Float[Array, 'B S K H']]:
  """The keys and values of all places of each row, side by side."""
  def rows(x):
    if places.page_table is None:
      return jnp.swapaxes(x, 1, 2)
    x = jnp.swapaxes(x[places.page_table], 2, 3)  # [B, pages of a row, page, K, ...]
    return x.reshape(x.shape[0], -1, *x.shape[3:])

  return values_of(jax.tree.map(rows, cache), dtype)


def _addresses(cache, places, T):
  """The page and the place within it of each new token, [B, T]; a page past the pool's last for
  what is not to be written."""
  table_BP, num_pages, page = places.page_table, *cache.key.shape[:3:2]
  place_BT = places.of(T)
  is_real_BT = places.are_real(T) & (place_BT < table_BP.shape[1] * page)
  pages_BT = jnp.take_along_axis(table_BP, place_BT // page, axis=1, mode='clip')
  return jnp.where(is_real_BT, pages_BT, num_pages), place_BT % page
