"""How much of a quantised product the TPU kernel computes at a time: a table, by generation.

`python -m pallas_kernels.quantized_matmul.bench --tune` prints its rows, measured in static cycles.
"""
import math
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import chips
from pallas_kernels.chips import LANES

LARGEST_CHUNK = 1024  # rows of the weights; more makes the program longer, and no faster
LARGEST_INNER = 256
LEAST_ROWS = 32  # a tile of int8
WITHOUT_INT8 = ('v4',)  # the compiler: "Unsupported matmul RHS type on target"


class Blocks(NamedTuple):
  """Rows of x and columns of the weights of a step. The weights are walked in chunks of rows, and
  `inner` rows of x at a time meet a chunk. A step takes at most vmem_bytes."""
  rows: int
  columns: int
  chunk: int
  inner: int
  vmem_bytes: int = 0


# {generation: {rows of x up to: (rows, columns)}}; K and N do not change what a step schedules.
TABLE = {'v5e': {LANES: (LANES, 512), 2048: (2048, 256)}}
TABLE |= {name: TABLE['v5e'] for name in ('v4', 'v5p', 'v6e', 'tpu7x')}


def vmem_bytes(blocks: Blocks, K: int, groups: int, x_dtype, values_dtype) -> int:
  """VMEM that a step needs: its blocks twice, since the next are on their way, its sums, a chunk of
  weights while it is scaled, and what the matrix units return."""
  rows, columns, chunk, inner = blocks[:4]
  x_bytes = jnp.dtype(x_dtype).itemsize
  twice = (rows * K * x_bytes + K * columns * jnp.iinfo(values_dtype).bits // 8
           + 4 * columns * max(groups, 8) + 4 * rows * columns + 4 * LANES * rows)
  return (2 * twice + 4 * rows * columns + chunk * columns * (8 + x_bytes)
          + inner * (4 * columns + x_bytes * chunk))


def find(M: int, K: int, N: int, groups: int, x_dtype, values_dtype, chip: str | None = None
         ) -> Blocks:
  """The blocks of x [M, K] by [K, N]: those tuned for the nearest number of rows, halved until they
  fit, and no larger than the arrays.

  Args:
    chip: None is the TPU in use and, without one, that of the least VMEM, whose blocks fit all.

  Raises:
    NotImplementedError: not even the smallest ones fit.
  """
  chip = chip or chips.generation_or_least()
  tuned = TABLE[chip]
  rows, columns = tuned[min(tuned, key=lambda most: (most < M, most))]
  columns = min(columns, _up(N, LANES))
  group = math.lcm(K // groups if groups > 1 else LANES, LANES)
  chunk = max(size for size in range(group, max(group, LARGEST_CHUNK) + 1, group) if K % size == 0)
  while True:
    inner = _even(M, min(rows, LARGEST_INNER))
    blocks = Blocks(min(max(rows // inner, 1) * inner, _up(M, inner)), columns, chunk, inner)
    need = vmem_bytes(blocks, K, groups, x_dtype, values_dtype)
    if need <= chips.vmem_limit(chip):
      return blocks._replace(vmem_bytes=chips.vmem_limit(chip))
    if max(rows // LEAST_ROWS, columns // LANES) == 1:
      raise NotImplementedError(
          f'K={K} needs {need / 2**20:.1f} MiB of VMEM for {LEAST_ROWS} rows and {LANES} columns; '
          f'a core of {chip} has {chips.VMEM_MIB[chip]}')
    if rows >= columns or columns == LANES:
      rows = min(rows, _up(M, LEAST_ROWS)) // 2 // LEAST_ROWS * LEAST_ROWS or LEAST_ROWS
    else:
      columns = _up(columns // 2, LANES)


def _even(M: int, most: int) -> int:
  """Rows of the fewest equal parts of M of at most `most` rows, in whole tiles; M if it is one."""
  parts = -(-M // most)
  return M if parts == 1 else _up(-(-M // parts), LEAST_ROWS)


def _up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple
