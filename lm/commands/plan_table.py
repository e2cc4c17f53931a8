"""The table of lm/parallel/PLAN.md: steps as `lm plan` estimates them, and as the compiler does.

    python -m lm.commands.plan_table

estimates every row again and compiles, one at a time, those that are not in the table; `--compile`
with words compiles the rows that have them all once more.
"""
import argparse
from collections.abc import Sequence
import dataclasses
import json
import pathlib
from typing import NamedTuple

from lm import run
from lm.commands import compile as compile_command
from lm.commands.plan_search import estimate
from lm.parallel.mesh import MeshConfig
from lm.parallel.topology import Topology

PATH = pathlib.Path(__file__).parents[1] / 'parallel' / 'PLAN.md'
HEADS = ('model', 'topology', 'mesh', 'sharded over', 'batch x length', 'remat', 'parts',
         'compiled MiB', 'estimated MiB', 'estimated / compiled', 'compiled ms', 'estimated ms',
         'estimated / compiled')
NAMES = 7  # columns that name a row
FAMILIES = {'bert': 'bert.BERTConfig', 't5': 't5.T5Config',
            'transformer': 'transformer_xl.TransformerXLConfig'}
OBJECTIVES = {'bert': ('masked_lm', 30522, 1), 't5': ('span_corruption', 32128, 100)}
_HEADER = '''# Train steps: estimated, and compiled

The peak of HBM on a device and the time of a step, by the TPU compiler and by the estimates of
`lm plan`, which traces the step and compiles nothing. AdamW, float32 parameters, bfloat16
activations, layers in a loop. Written by `python -m lm.commands.plan_table`.

- Memory is within MIB % of the compiler's.
- Time is halfway between all communication hidden and none. It is within LARGEST % of what
  `lm compile` reports, half of the rows within TYPICAL %: that is the compiler's own cycles, those
  of its kernels, and the network's share by data sheets. Neither was ever compared with a chip, and
  the five figures of `plan_cost.py` were fitted to rows of this table.

'''


class Figures(NamedTuple):
  """Of a step: the peak of HBM on a device, and its time, halfway between all communication hidden
  and none."""
  mib: int
  milliseconds: float

  @classmethod
  def of(cls, peak_bytes: int, step_seconds: Sequence[float]) -> 'Figures':
    """From bytes and the range of the seconds, as the table shows them."""
    return cls(peak_bytes >> 20, round(500 * sum(step_seconds), 1))


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

  def estimated(self) -> Figures:
    """By the estimate."""
    experiment = run.open_experiment(*self.gin(), None)
    found = estimate(experiment, Topology.parse(self.topology))
    return Figures.of(found.peak_bytes, found.step_seconds)

  def compiled(self) -> Figures:
    """By the compiler, in minutes."""
    files, bindings = self.gin()
    args = argparse.Namespace(gin_file=files, run_dir=None, topology=self.topology, num_slices=1,
                              tokens=None)
    found = compile_command.report(args, bindings, run.open_experiment(files, bindings, None),
                                   Topology.parse(self.topology), {})
    return Figures.of(found['hbm_peak_bytes'], found['step_seconds'])


TORUS, BEST = ('data', 'fsdp'), 'qkv+attention+attention_out+mlp_in'
SMALL_MIXTURE = {'d_model': 1024, 'num_heads': 8, 'moe.MoEConfig.d_ff': 3584}
POINTS = (
    Point('bert_base', 'v5e:2x2', dict(fsdp=4), 64, 512, 'none'),
    Point('bert_medium', 'v5e:2x2', dict(fsdp=4), 512, 512, 'full'),
    Point('bert_medium', 'v5e:2x2', dict(data=4), 128, 512, 'none', embed=None),
    Point('bert_base', 'v4:2x2x2', dict(data=2, fsdp=2, tensor=2), 256, 512, 'full',
          sizes={'num_layers': 4}),
    Point('bert_large', 'v5e:2x4', dict(fsdp=8), 64, 512, 'none', sizes={'num_layers': 4}),
    Point('bert_large', 'v6e:2x4', dict(fsdp=8), 256, 512, BEST, sizes={'num_layers': 4}),
    Point('t5_small', 'v5e:2x4', dict(fsdp=8), 1024, 512, 'full'),
    Point('t5_small', 'v6e:2x2', dict(fsdp=2, tensor=2), 256, 512, 'none'),
    Point('t5_1_1_base', 'v5p:2x2x1', dict(fsdp=4), 256, 512, 'full', parts=4,
          sizes={'num_layers': 4}),
    Point('transformer_xl_enwik8_12l', 'v5e:2x2', dict(fsdp=4), 64, 512, 'none', vocab=320),
    Point('gpt2', 'v5e:2x4', dict(data=2, tensor=4), 32, 1024, 'none', embed=None, vocab=50304,
          sizes={'num_layers': 4}),
    Point('smollm2_135m', 'v6e:2x2', dict(fsdp=4), 64, 2048, 'dots', vocab=49152,
          sizes={'num_layers': 6}),
    Point('tinyllama_1_1b', 'v5e:2x4', dict(fsdp=8), 64, 2048, 'none', parts=4, embed=None,
          opt_embed='fsdp', sizes={'num_layers': 4}),
    Point('tinyllama_1_1b', 'v4:2x2x1', dict(fsdp=4), 64, 2048, 'full', parts=2,
          sizes={'num_layers': 4}),
    Point('tinyllama_1_1b', 'v6e:2x4', dict(fsdp=4, sequence=2), 16, 8192, 'full',
          sizes={'num_layers': 4, 'max_length': 8192}),
    Point('llama3_2_1b', 'v5p:2x2x1', dict(fsdp=2, tensor=2), 32, 2048, 'attention+mlp_in',
          vocab=32000, sizes={'num_layers': 4}),
    Point('mixtral_8x7b', 'v5e:2x4', dict(fsdp=4, expert=2), 64, 2048, 'full',
          sizes={'num_layers': 4} | SMALL_MIXTURE),
    *(Point('llama2_7b', 'v5e:16x16', dict(data=16, fsdp=16), 256, 4096, remat, embed=TORUS,
            options=('xla_tpu_scoped_vmem_limit_kib=65536',))
      for remat in ('full', 'attention', BEST)),
)


def read() -> dict[tuple[str, ...], tuple[Figures, Figures]]:
  """(compiled, estimated) of each row of the file, by its first cells."""
  found = {}
  for line in PATH.read_text().splitlines() if PATH.exists() else ():
    cells = tuple(cell.strip().replace(',', '') for cell in line.strip('|').split('|'))
    if len(cells) == len(HEADS) and cells[NAMES].isdigit():
      names = tuple(cell.strip() for cell in line.strip('|').split('|'))[:NAMES]
      found[names] = tuple(Figures(int(cells[i]), float(cells[i + 3]))
                           for i in (NAMES, NAMES + 1))
  return found


def write(rows: dict[tuple[str, ...], tuple[Figures, Figures]]):
  """Writes what `read` returns."""
  lines = [f'| {" | ".join(HEADS)} |', f'|{"---|" * NAMES}{"--:|" * (len(HEADS) - NAMES)}']
  for cells, (compiled, estimated) in rows.items():
    pairs = zip(('{:,}', '{:,.1f}'), compiled, estimated)
    figures = ' | '.join(f'{form.format(x)} | {form.format(y)} | {y / x:.3f}'
                         for form, x, y in pairs)
    lines.append(f'| {" | ".join(cells)} | {figures} |')
  mib, off = (sorted(abs(estimated[i] / compiled[i] - 1) for compiled, estimated in rows.values())
              for i in range(2))
  header = _HEADER
  for word, share in (('MIB', mib[-1]), ('LARGEST', off[-1]), ('TYPICAL', off[len(off) // 2])):
    header = header.replace(word, f'{100 * share:.0f}')
  PATH.write_text(header + '\n'.join(lines) + '\n')


def main():
  """Reads the command line, estimates and compiles."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--compile', nargs='+', default=[], metavar='WORD')
  words, before, rows = parser.parse_args().compile, read(), {}
  for point in POINTS:
    cells = point.cells()
    chosen = words and all(word in ' '.join(cells) for word in words)
    compiled = before[cells][0] if cells in before and not chosen else point.compiled()
    rows[cells] = compiled, point.estimated()
    print(json.dumps(cells), *rows[cells], flush=True)
    write(before | rows if point is not POINTS[-1] else rows)


if __name__ == '__main__':
  main()
