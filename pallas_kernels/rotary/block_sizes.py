"""How many tokens the kernel takes at a time.

The same on every generation: the kernel waits for memory, and what the compiler schedules depends
on the chunk alone.
"""
BLOCK_BYTES = 2**19  # of the queries: long enough to hide a grid step, short enough to overlap
LARGEST_WIDTH = 2**15
CHUNK_TOKENS = 16  # a tile of bfloat16, which is in registers together


def block_size(T: int, width: int, itemsize: int) -> int:
  """Tokens of a grid step, for `width` numbers a token; a multiple of CHUNK_TOKENS."""
  most = min(BLOCK_BYTES // (width * itemsize), T + CHUNK_TOKENS - 1)
  return max(1, most // CHUNK_TOKENS) * CHUNK_TOKENS
