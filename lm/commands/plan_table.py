"""The table of lm/parallel/MEMORY.md: memory as `lm plan` estimates it, and as the compiler has it.

    python -m lm.commands.plan_table

estimates every row again and compiles, one at a time, those that are not in the table; `--compile`
with words compiles the rows that have them all once more.
"""
import argparse
import dataclasses
import json
import pathlib
import tempfile

from lm import run
from lm.commands import compile as compile_command
from lm.commands.plan_search import estimate
from lm.parallel.mesh import MeshConfig
from lm.parallel.topology import Topology

PATH = pathlib.Path(__file__).parents[1] / 'parallel' / 'MEMORY.md'
HEADS = ('model', 'topology', 'mesh', 'sharded over', 'batch x length', 'remat', 'parts',
         'compiled MiB', 'estimated MiB', 'estimated / compiled')
FAMILIES = {'bert': 'bert.BERTConfig', 't5': 't5.T5Config'}
OBJECTIVES = {'bert': ('masked_lm', 30522, 1), 't5': ('span_corruption', 32128, 100)}
_HEADER = '''# Memory of train steps: estimated, and compiled

The peak of HBM on a device, by the TPU compiler and by the estimate of `lm plan`, which traces the
step and compiles nothing. AdamW, float32 parameters, bfloat16 activations, layers in a loop.
Written by `python -m lm.commands.plan_table`.

'''


@dataclasses.dataclass(frozen=True)
class Point:
  """A step: the model of a gin file with other `sizes` of its config, and how it is run."""
  model: str
  topology: str
  mesh: dict[str, int]
  batch: int
  length: int
  remat: str
  parts: int = 1
  embed: tuple[str, ...] | None = ('fsdp',)
  opt_embed: str | None = None
  vocab: int | None = None
  sizes: dict[str, int] = dataclasses.field(default_factory=dict)
  options: tuple[str, ...] = ()

  def cells(self) -> tuple[str, ...]:
    """The first columns of its row, which name it."""
    sizes = ''.join(f', {name.rpartition(".")[2]} {size}' for name, size in self.sizes.items())
    options = ''.join(f', {option}' for option in self.options)
    mesh = ' x '.join(f'{axis} {size}' for axis, size in self.mesh.items())
    over = ' x '.join(self.embed or ()) or (f'optimiser: {self.opt_embed}' if self.opt_embed
                                            else '')
    return (self.model + sizes + options, self.topology, mesh, over,
            f'{self.batch} x {self.length}', self.remat, f'{self.parts}')

  def gin(self) -> tuple[list[str], list[tuple[str, str]]]:
    """Files and bindings."""
    family = self.model.partition('_')[0]
    objective, vocab, extra = OBJECTIVES.get(family, ('causal_lm', 32000, 0))
    config = FAMILIES.get(family, 'gpt.GPTConfig')
    mesh = dataclasses.asdict(MeshConfig(data=1)) | self.mesh
    values = {'VOCAB_SIZE': self.vocab or vocab, 'EXTRA_IDS': extra, 'BATCH_SIZE': self.batch,
              'SEQUENCE_LENGTH': self.length, 'loop.TrainConfig.num_microbatches': self.parts,
              'loop.TrainConfig.tpu_options': self.options, f'{config}.remat': self.remat,
              f'{config}.scan_layers': True, 'rules.Rules.embed': self.embed,
              'rules.Rules.opt_embed': self.opt_embed,
              **{f'mesh.MeshConfig.{axis}': size for axis, size in mesh.items()},
              **{name if '.' in name else f'{config}.{name}': size
                 for name, size in self.sizes.items()}}
    files = [f'gin/models/{self.model}.gin', f'gin/objectives/{objective}.gin',
             'gin/optim/adamw.gin', 'gin/runs/pretrain.gin', 'gin/mesh/zero1.gin']
    return files, [(name, repr(value)) for name, value in values.items()]

  def estimated(self) -> int:
    """Bytes by the estimate."""
    experiment = run.open_experiment(*self.gin(), None)
    return estimate(experiment, Topology.parse(self.topology)).peak_bytes

  def compiled(self) -> int:
    """Bytes by the compiler, in minutes."""
    files, bindings = self.gin()
    with tempfile.TemporaryDirectory() as folder:
      facts = compile_command.ask({
          'gin_files': files, 'bindings': bindings, 'run_dir': None, 'topology': self.topology,
          'num_slices': 1, 'folder': folder, 'options': {}, 'save': None, 'kernels': False},
                                  'facts.json')
    return facts['peak_bytes']


TORUS = ('data', 'fsdp')
POINTS = (
    Point('bert_base', 'v5e:2x2', dict(fsdp=4), 64, 512, 'none'),
    Point('bert_medium', 'v5e:2x2', dict(fsdp=4), 512, 512, 'full'),
    Point('bert_large', 'v5e:2x4', dict(fsdp=8), 64, 512, 'none', sizes={'num_layers': 4}),
    Point('t5_small', 'v5e:2x4', dict(fsdp=8), 1024, 512, 'full'),
    Point('smollm2_135m', 'v5e:2x4', dict(fsdp=8), 128, 2048, 'full', vocab=49152),
    Point('tinyllama_1_1b', 'v5e:4x4', dict(fsdp=16), 32, 2048, 'full', embed=None,
          opt_embed='fsdp', sizes={'num_layers': 4}),
    Point('mixtral_8x7b', 'v5e:2x4', dict(fsdp=8), 64, 2048, 'full', sizes={
        'num_layers': 16, 'd_model': 1024, 'num_heads': 8, 'moe.MoEConfig.d_ff': 3584}),
    Point('llama2_7b', 'v5e:4x4', dict(data=4, fsdp=4), 16, 4096, 'full', embed=TORUS),
    Point('llama2_7b', 'v5e:16x16', dict(data=16, fsdp=16), 256, 4096, 'full', embed=TORUS,
          options=('xla_tpu_scoped_vmem_limit_kib=65536',)),
)


def read() -> dict[tuple[str, ...], tuple[int, int]]:
  """(compiled, estimated) MiB of each row of the file, by its first cells."""
  found = {}
  for line in PATH.read_text().splitlines() if PATH.exists() else ():
    cells = tuple(cell.strip() for cell in line.strip('|').split('|'))
    if len(cells) == len(HEADS) and cells[-3].replace(',', '').isdigit():
      found[cells[:-3]] = tuple(int(cell.replace(',', '')) for cell in cells[-3:-1])
  return found


def write(rows: dict[tuple[str, ...], tuple[int, int]]):
  """Writes what `read` returns."""
  lines = [f'| {" | ".join(HEADS)} |', f'|{"---|" * 7}{"--:|" * 3}']
  lines += [f'| {" | ".join(cells)} | {compiled:,} | {estimated:,} | {estimated / compiled:.3f} |'
            for cells, (compiled, estimated) in rows.items()]
  PATH.write_text(_HEADER + '\n'.join(lines) + '\n')


def main():
  """Reads the command line, estimates and compiles."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--compile', nargs='+', default=[], metavar='WORD')
  words, before, rows = parser.parse_args().compile, read(), {}
  for point in POINTS:
    cells = point.cells()
    chosen = words and all(word in ' '.join(cells) for word in words)
    compiled = before[cells][0] if cells in before and not chosen else point.compiled() >> 20
    rows[cells] = compiled, point.estimated() >> 20
    print(json.dumps(cells), *rows[cells], flush=True)
    write(before | rows if point is not POINTS[-1] else rows)


if __name__ == '__main__':
  main()
