"""How much of a grouped product the TPU kernels compute at a time: a table, by generation.

`python -m pallas_kernels.grouped_matmul.bench --tune` prints its rows, measured in static cycles.
"""
from typing import NamedTuple

from pallas_kernels import chips
from pallas_kernels.chips import LANES

LARGEST_CHUNK = 1024  # of a contraction; more makes the program longer, and no faster
LEAST_ROWS = 32
PARTS = 4  # tiles of rows of a group at least, while they have LANES: two may be cut by its ends


class Blocks(NamedTuple):
  """Rows of a tile and columns of the result. In the pass 'product' a step has all of their
  contraction and walks it in chunks; in 'weights' `chunk` is the rows of the result. A step takes
  at most vmem_bytes."""
  rows: int
  columns: int
  chunk: int
  vmem_bytes: int = 0


# {generation: {pass: (rows, columns, chunk)}}, of bfloat16.
TABLE = {'v5e': {'product': (256, 1024, 1024), 'weights': (512, 1024, 1024)}}
TABLE |= {name: TABLE['v5e'] for name in ('v4', 'v5p', 'v6e', 'tpu7x')}


def vmem_bytes(name: str, blocks: Blocks, K: int, itemsize: int) -> int:
  """VMEM that a step needs: its blocks twice, since the next are on their way, its sums and what
  the matrix units return; K is the contraction of 'product'."""
  rows, columns, chunk = blocks[:3]
  if name == 'product':
    twice = itemsize * (rows * K + K * columns + rows * columns)
    return 2 * twice + 8 * rows * columns + itemsize * chunk * (rows + columns)
  twice = itemsize * rows * (chunk + columns) + 4 * chunk * columns
  return 2 * twice + 8 * chunk * columns + 4 * rows * (chunk + columns)


def find(name: str, M: int, K: int, N: int, groups: int, itemsize: int, chip: str | None = None
         ) -> Blocks:
  """The blocks of [M, K] by [K, N] ('product') or of [K, M] by [M, N] ('weights'): those of the
  table, halved until they fit, with fewer rows for small groups, and no larger than the arrays.

  Raises:
    NotImplementedError: not even the smallest ones fit.
  """
  chip = chip or chips.generation_or_least()
  rows, columns, chunk = TABLE[chip][name]
  rows = min(rows, max(LANES, _up(M // (PARTS * groups), LANES)), _up(M, LEAST_ROWS))
  columns = min(columns, _up(N, LANES))
  while True:
    if name == 'weights':
      size = min(chunk, _up(K, LANES))
    else:
      size = next((size for size in range(LARGEST_CHUNK, 0, -LANES) if K % size == 0), K)
    blocks = Blocks(rows, columns, size)
    need = vmem_bytes(name, blocks, K, itemsize)
    if need <= chips.vmem_limit(chip):
      return blocks._replace(vmem_bytes=chips.vmem_limit(chip))
    if max(rows // LEAST_ROWS, columns // LANES) == 1:
      raise NotImplementedError(
          f'a contraction of {K} needs {need / 2**20:.1f} MiB of VMEM for {rows} rows and '
          f'{columns} columns; a core of {chip} has {chips.VMEM_MIB[chip]}')
    if columns > max(rows, LANES) or rows == LEAST_ROWS:
      columns = _up(columns // 2, LANES)
    else:
      rows = _up(rows // 2, LEAST_ROWS)


def _up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple
