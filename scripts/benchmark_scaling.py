"""How a train step grows with devices, depth and chips, by the figures of the compilers.

  python scripts/benchmark_scaling.py                       # all, some ten minutes
  python scripts/benchmark_scaling.py strong weak           # 1, 2, 4, 8 devices of this machine
  python scripts/benchmark_scaling.py layers chips          # chips needs the extra `tpu`

Strong: 16 rows over all devices; weak: 2 rows each. Nothing is timed but the compiler: FLOPs (of
products), bytes that collectives move and peak memory of each device are read from the program.
layers: trace and compile seconds of a scanned stack, against an unrolled one. chips: the same of
one program for 64 to 4096 chips of v5p, whose peak memory says what more chips save.

Seen on two busy cores: 64, 256, 1024 and 4096 chips of v5p trace in 2.0, 3.6, 2.9 and 4.0 s and
compile in 10, 22, 18 and 20 s, with a peak of 12.3, 10.6, 10.5 and 10.5 MiB a chip. Weak: FLOPs a
device stay on 1, 2, 4 and 8 of fsdp (1.000 of one), 76, 74 and 73 MiB are exchanged, and the peak
falls from 120 to 69, 44 and 33 MiB.
"""
import argparse
import contextlib
import io
import json
import pathlib
import tempfile

from lm import main

MODEL = {'gpt.GPTConfig.d_model': 256, 'gpt.GPTConfig.num_layers': 4, 'gpt.GPTConfig.num_heads': 8,
         'gpt.GPTConfig.d_ff': 1024, 'gpt.GPTConfig.scan_layers': True, 'VOCAB_SIZE': 4096,
         'SEQUENCE_LENGTH': 256, 'BATCH_SIZE': 16, 'loop.TrainConfig.tpu_options': (),
         'mesh.MeshConfig.data': 1, 'mesh.MeshConfig.fsdp': 1, 'gpt.GPTConfig.remat': "'full'"}
ROW = '{:>8} {:>8} {:>14} {:>8} {:>14} {:>10}'


def compiled(topology: str, **changes) -> dict:
  """What `lm compile --json` writes of the model with these bindings changed."""
  bindings = MODEL | {name.replace('__', '.'): value for name, value in changes.items()}
  with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    path = pathlib.Path(folder, 'report.json')
    status = main.main(['compile', '--gin_file=gin/experiments/gpt_7b.gin', f'--json={path}',
                        f'--topology={topology}',
                        *(f'--gin.{name}={value}' for name, value in bindings.items())])
    if status:
      raise SystemExit(status)
    return json.loads(path.read_text())


def scaling(rows_of: callable):
  """A table of the axes of the mesh and 1 to 8 devices, of as many rows as `rows_of` says."""
  print(ROW.format('axis', 'devices', 'GFLOP/device', 'of one', 'MiB exchanged', 'peak MiB'))
  one = None
  for axis in ('fsdp', 'tensor', 'sequence'):
    for count in (1, 2, 4, 8):
      if count == 1 and one:
        continue
      result = compiled(f'cpu:{count}', BATCH_SIZE=rows_of(count),
                        **{f'mesh__MeshConfig__{axis}': count})
      flops = result['compiled_flops'] / count / 1e9
      one = one or flops
      exchanged = sum(result['collective_bytes'].values()) / 2**20
      print(ROW.format(axis if count > 1 else '-', count, f'{flops:.3f}', f'{flops / one:.3f}',
                       f'{exchanged:.2f}', f'{result["hbm_peak_bytes"] / 2**20:.1f}'), flush=True)


def strong():
  """The same 16 rows on more devices: FLOPs of each should fall as 1 / devices."""
  scaling(lambda count: 16)


def weak():
  """2 rows a device: FLOPs of each should stay."""
  scaling(lambda count: 2 * count)


def layers():
  """Seconds of tracing and compiling against depth."""
  print(ROW.format('layers', 'scan', 'trace s', '', 'compile s', ''))
  for scan, depths in ((True, (2, 8, 32, 96)), (False, (2, 8, 32))):
    for depth in depths:
      result = compiled('cpu:8', gpt__GPTConfig__num_layers=depth, mesh__MeshConfig__fsdp=8,
                        gpt__GPTConfig__scan_layers=scan)
      print(ROW.format(depth, str(scan), f'{result["trace_seconds"]:.2f}', '',
                       f'{result["compile_seconds"]:.2f}', ''), flush=True)


def chips():
  """Seconds of tracing and compiling, and memory, against chips; a row of the batch each."""
  print(ROW.format('chips', 'fsdp', 'trace s', '', 'compile s', 'peak MiB'))
  for grid, count in (('4x4x4', 64), ('4x8x8', 256), ('8x8x16', 1024), ('16x16x16', 4096)):
    result = compiled(f'v5p:{grid}', BATCH_SIZE=count, mesh__MeshConfig__data=count // 64,
                      mesh__MeshConfig__fsdp=64, rules__Rules__embed="'fsdp'")
    print(ROW.format(count, 64, f'{result["trace_seconds"]:.2f}', '',
                     f'{result["compile_seconds"]:.2f}',
                     f'{result["hbm_peak_bytes"] / 2**20:.1f}'), flush=True)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  tables = {table.__name__: table for table in (strong, weak, layers, chips)}
  parser.add_argument('tables', nargs='*', metavar='TABLE', help=', '.join(tables))
  for chosen in parser.parse_args().tables or tables:
    print(f'\n{chosen}: {tables[chosen].__doc__}')
    tables[chosen]()
