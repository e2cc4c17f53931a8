"""MESHES.md: every family on every mesh against one device, and the collectives of its step.

`python tests/parallel/mesh_table.py [FAMILY/MESH ...]` computes these rows, or all, in a child with
8 host devices, and writes them into the table; test_meshes.py holds some to what it computes.
"""
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHILD = pathlib.Path(__file__).with_name('sharded_models.py')
TABLE = pathlib.Path(__file__).with_name('MESHES.md')
COUNTED = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute',
           'largest gathered', 'allowed')
HEAD = '''# One train step on 8 devices is that of one

`python tests/parallel/mesh_table.py` writes this file. Packed rows, remat 'full', two microbatches,
float32, dropout (of attention's probabilities too, but in a ring) and layers left out. The meshes
are named in `sharded_models.py`.

difference: the largest of the loss, its parts, every gradient and the carry, as a share of the
largest element of each. Collectives of the compiled step, whose loops are written once. Largest
gathered: elements of the largest array that an all-gather makes; allowed: of the largest matrix of
a layer that the mesh leaves whole in use, or of a device's part of the activations, or of a
router's probabilities, which XLA:CPU gathers for `top_k`.

'''
COLUMNS = ('family/mesh', 'difference', *COUNTED)


def read() -> dict[str, dict[str, float]]:
  """The rows of the table, {family/mesh: {column: number}}."""
  rows = [[cell.strip() for cell in line.split('|')[1:-1]]
          for line in TABLE.read_text('utf-8').splitlines() if line.startswith('| ')]
  return {name: dict(zip(COLUMNS[1:], map(float, numbers))) for name, *numbers in rows[1:]}


def row_of(found: dict) -> dict[str, float]:
  """The row of what `sharded_models.py` found."""
  of_all = dict.fromkeys(COUNTED, 0) | found['collectives']
  return {'difference': found['difference'], **of_all, 'allowed': found['allowed']}


def write(rows: dict[str, dict[str, float]]):
  """Writes the whole table."""
  cell = lambda row, name: f'{row[name]:.1e}' if name == 'difference' else f'{row[name]:.0f}'
  lines = [COLUMNS, ['---'] * len(COLUMNS),
           *([name, *(cell(row, column) for column in COLUMNS[1:])] for name, row in rows.items())]
  text = ''.join(f'| {" | ".join(line)} |\n' for line in lines)
  TABLE.write_text(HEAD + text.replace('| --- ', '|---'), 'utf-8')


def main():
  """Computes the rows that are asked for, and writes them where they stand."""
  sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
  from conftest import run_child
  from sharded_models import FAMILIES, MESHES
  found = run_child(CHILD, *sys.argv[1:], timeout=None)
  del found['devices']
  rows = read() | {name: row_of(x) for name, x in found.items()}
  names = [f'{family}/{mesh}' for family in FAMILIES for mesh in MESHES]
  write({name: rows[name] for name in names if name in rows})


if __name__ == '__main__':
  main()
