"""What decoding keeps from call to call, and how."""
from collections.abc import Sequence
import dataclasses
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lm.errors import UserError
from lm.layers.cache import KVCache
from lm.layers.rolling import Rolling, SLACK
from lm.parallel.rules import Rules


@dataclasses.dataclass(frozen=True)
class CacheOptions:
  """How much of a text a cache keeps, and how exactly. The defaults keep all of it, exactly.

  dtype: of keys and values; None is that of the model's activations. 8 bits take a scale a key and
    value, 4 bytes for each head's d_head.
  rolling: layers that keep to a window hold no more than that. A row then takes back (`rewind`) at
    most 31 tokens.
  window: tokens that layers without a window keep to, so that a text of any length takes the same
    memory and time; None is all.
  num_sinks: first tokens of the text that these layers keep too (StreamingLLM, arXiv:2309.17453,
    section 3.2: 4 keep a model trained without windows fluent).
  """
  dtype: Optional[Literal['int8', 'float8_e4m3fn']] = None
  rolling: bool = False
  window: Optional[int] = None
  num_sinks: int = 0

  def __post_init__(self):
    if self.window is not None and self.window < 1:
      raise ValueError(f'window={self.window} must be at least 1 token, or None for all')
    if self.num_sinks < 0 or self.num_sinks and self.window is None:
      raise ValueError(f'num_sinks={self.num_sinks} are kept beside a window={self.window}; give '
                       'both, and no negative number')

  @property
  def rolls(self) -> bool:
    """Whether anything is forgotten."""
    return self.rolling or self.window is not None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of all layers, and how many tokens of each row stand in them.

  length_B: int32 [B].
  layers: a `KVCache`, [L, B, K, S, H], where layers are scanned, else a list of L times [B, K, S,
    H]; where layers forget, a `Rolling`.
  page_table: int32 [B, pages of a row] where the rows share a pool of pages: the token of place p
    is in page `page_table[p // page]`, and `layers` are [L, pages, K, page, H] or a list of L times
    [pages, K, page, H]. Entries behind a row's last page may be any. Else None.
  """
  length_B: Any
  layers: Any
  page_table: Any = None

  @property
  def reach(self) -> int:
    """The longest distance of two tokens that see each other."""
    size = max(x.kept.key.shape[-2] + x.num_sinks if isinstance(x, Rolling) else x.key.shape[-2]
               for x in self.kinds)
    return size if self.page_table is None else size * self.page_table.shape[1]

  @property
  def kinds(self) -> Sequence[KVCache | Rolling]:
    """The caches of the layers, or the one of all."""
    return self.layers if isinstance(self.layers, list) else [self.layers]

  def shardings(self, rules: Rules) -> 'Cache':
    """How it lies on a mesh: rows, but not pages, as batches do, and heads where they divide."""
    rows = None if self.page_table is not None else 'batch'

    def of(kept):
      before, heads = kept.key.ndim - 4, kept.key.shape[-3]
      names = *(None,) * before, rows, None if heads % rules.shards('kv_heads') else 'kv_heads'
      return jax.tree.map(lambda x: rules.sharding(*names, *(None,) * (x.ndim - len(names))), kept)

    layers = jax.tree.map(of, self.layers, is_leaf=lambda x: isinstance(x, KVCache))
    table = None if self.page_table is None else rules.sharding('batch', None)
    return Cache(rules.sharding('batch'), layers, table)

  def take(self, rows_R: Int[Array, ' R']) -> 'Cache':
    """The cache of these rows, in this order; of a pool they then share the pages."""
    if self.page_table is not None:
      return Cache(self.length_B[rows_R], self.layers, self.page_table[rows_R])
    axis = 0 if isinstance(self.layers, list) else 1
    return Cache(self.length_B[rows_R],
                 jax.tree.map(lambda x: jnp.take(x, rows_R, axis=axis), self.layers))


def init_layers(options: CacheOptions, dtype: str, num_rows: int, num_places: int,
                heads: tuple[int, int], windows: Sequence[int | None], scanned: bool
                ) -> KVCache | Rolling | list[KVCache | Rolling]:
  """Empty caches of layers, as `Cache.layers` has them.

  Args:
    dtype: of the model's activations.
    heads: K and H.
    windows: of each layer, None where it sees all.

  Raises:
    UserError: scanned layers are not all alike.
  """
  def one(window, *stacked):
    if window:  # which attention itself masks
      kept, num_sinks, slack = window if options.rolling else None, 0, SLACK
    else:
      kept, num_sinks, slack = options.window, options.num_sinks, 0
    shape = *stacked, num_rows, heads[0]
    if kept is None or num_places <= num_sinks + kept + slack:
      return KVCache.zeros((*shape, num_places, heads[1]), options.dtype or dtype)
    return Rolling.zeros((*shape, heads[1]), options.dtype or dtype, kept, num_sinks)

  if not scanned:
    return [one(window) for window in windows]
  if len(set(windows)) > 1 and options.rolls:
    raise UserError('scan_layers=True runs one program for all layers, and their caches differ '
                    'where only some forget; set scan_layers=False')
  return one(windows[0] if len(set(windows)) == 1 else None, len(windows))
