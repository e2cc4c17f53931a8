"""How many keys the TPU kernel of `decode_attention` takes at a time.

One rule serves every generation: what a visit costs beside its keys must be hidden behind the time
that its bytes take, and more bytes than that only lengthen what is read behind a row's last key.
`python -m pallas_kernels.decode_attention.bench --tune` prints the cycles of other sizes.
"""
import functools
import math
from typing import NamedTuple

from pallas_kernels import chips
from pallas_kernels.chips import LANES

BLOCK_BYTES = 2**21  # of keys and values
MOST_KEYS = 2048
SLOTS = 2  # one block is computed while the next is on its way


class Blocks(NamedTuple):
  """Keys of a visit, and keys of a copy: of a page, or of a part of one, so that no more than that
  is read around what a row's queries see."""
  keys: int
  copy: int
  vmem_bytes: int = 0


def vmem_bytes(keys: int, K: int, H: int, itemsize: int, rows: int) -> int:
  """VMEM for the slots of keys and values with their scales, a few heads of a block as operands of
  the matrix unit and their scores, and the queries and running results of all heads."""
  lanes = -(-H // LANES) * LANES
  slots = 2 * SLOTS * K * keys * (_width(H) * itemsize + 4 * (itemsize == 1))
  return slots + 4 * keys * (2 * lanes + 8 * max(rows, 8)) + 12 * 4 * K * max(rows, 8) * lanes


def _width(H: int) -> int:
  """Elements of a key in memory: keys are in lanes if their heads do not fill them."""
  return -(-H // 32) * 32


def find(page: int, capacity: int, K: int, H: int, itemsize: int, rows: int, chip: str) -> Blocks:
  """The blocks of a cache of K heads, whose keys lie in pages of `page`.

  Args:
    capacity: the most keys of a row.
    itemsize: bytes of an element.
    rows: queries that meet a head's keys.
    chip: the generation.

  Raises:
    NotImplementedError: not even the smallest fit.
  """
  keys = BLOCK_BYTES // (2 * K * _width(H) * itemsize)
  keys = max(LANES, min(keys, MOST_KEYS, capacity + LANES - 1))
  keys = 2 ** (keys.bit_length() - 1)
  need = functools.partial(vmem_bytes, K=K, H=H, itemsize=itemsize, rows=rows)
  while need(keys) > chips.vmem_limit(chip):
    if keys == LANES:
      raise NotImplementedError(
          f'{keys} keys of {K} heads of {H} for {rows} queries need {need(keys) / 2**20:.1f} MiB '
          f'of VMEM; a core of {chip} has {chips.VMEM_MIB[chip]}')
    keys //= 2
  return Blocks(keys, math.gcd(page, max(keys // 4, LANES)), chips.vmem_limit(chip))
