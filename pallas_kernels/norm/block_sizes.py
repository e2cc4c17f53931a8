"""How many rows the kernels take at a time.

Both numbers are the same on every generation. The kernels wait for memory, and what the compiler
schedules depends on `chunk` alone: by static cycles (bench.py) more rows at a time are faster on
each generation, since the sums along a row have long latencies, until register spills fill VMEM.
"""
BLOCK_BYTES = 2**19  # of an array: long enough to hide a grid step, short enough to overlap
CHUNK_ELEMENTS = 2**17
LEAST_ROWS = 16  # a tile of bfloat16
LARGEST_D = 2**14


def _power_of_two(x: int) -> int:
  """The largest power of two of those up to x, but at least LEAST_ROWS."""
  return max(LEAST_ROWS, 2 ** (max(x, 1).bit_length() - 1))


def block_sizes(M: int, D: int, itemsize: int) -> tuple[int, int]:
  """(rows of a grid step, rows that are in registers together), the second divides the first."""
  rows = _power_of_two(min(BLOCK_BYTES // (D * itemsize), M + LEAST_ROWS - 1))
  return rows, min(rows, _power_of_two(min(128, CHUNK_ELEMENTS // D)))
