"""How large a part the kernels take at a time.

All numbers are the same on every generation: the kernels wait for memory, and what the compiler
schedules depends on the chunk alone, of which larger ones are faster by static cycles (bench.py)
until register spills begin.
"""
import math
from typing import NamedTuple

from pallas_kernels.chips import LANES

BLOCK_BYTES = 2**19  # of an array: long enough to hide a grid step, short enough to overlap
BLOCK_COLUMNS = 1024
CHUNK_ELEMENTS = 2**15
CHUNK_COLUMNS = 512
LEAST_ROWS = 16  # a tile of bfloat16


class Blocks(NamedTuple):
  """A grid step's rows and columns, and those of a chunk, which is in registers together and
  divides it."""
  rows: int
  columns: int
  chunk_rows: int
  chunk_columns: int


def block_sizes(M: int, F: int, itemsize: int) -> Blocks:
  """The blocks for arrays [M, F]."""
  columns = min(BLOCK_COLUMNS, -(-F // LANES) * LANES)
  chunk_columns = math.gcd(CHUNK_COLUMNS, columns)
  power_of_two = lambda x: 2 ** (x.bit_length() - 1)
  rows = power_of_two(min(BLOCK_BYTES // (columns * itemsize), M + LEAST_ROWS - 1))
  return Blocks(rows, columns, min(rows, CHUNK_ELEMENTS // chunk_columns), chunk_columns)
