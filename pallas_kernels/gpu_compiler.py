"""What Triton and ptxas make of a Pallas kernel, without a GPU.

`kernels` needs jax alone. `compiled` needs jax's CUDA plugin (jax-cuda12-plugin, jax-cuda12-pjrt)
for Triton's compiler and nvidia-cuda-nvcc-cu12 for ptxas, and no driver.
"""
import importlib.util
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax._src.interpreters import mlir
from jax._src.lib import triton
from jax._src.lib.mlir import ir

# {card: (compute capability, bytes of shared memory that a program may take)}
CARDS = {'a100': ('8.0', 163 * 2**10), 'h100': ('9.0', 227 * 2**10)}


class Kernel(NamedTuple):
  """One call of a Triton kernel: its name, grid, warps, stages of its loops, and Triton IR."""
  name: str
  grid: tuple[int, int, int]
  warps: int
  stages: int
  bytecode: bytes

  def text(self) -> str:
    """The Triton IR in words: `tt.dot`, `scf.for`, ..."""
    context = mlir.JaxIrContext()
    triton.dialect.register_dialect(context)
    context.append_dialect_registry(mlir.upstream_dialects)
    context.load_all_available_dialects()
    with context:
      return str(ir.Module.parse(self.bytecode))


class Report(NamedTuple):
  """What a compiled kernel takes: bytes of shared memory of a program, registers of a thread and
  the bytes of them that a thread keeps in memory instead."""
  shared_bytes: int
  registers: int
  spilled_bytes: int


def kernels(function: Callable, *args) -> list[Kernel]:
  """The Triton kernels of a program for an NVIDIA GPU, in the order of their calls.

  Args:
    function: calls Pallas kernels.
    args: trees of arrays or `jax.ShapeDtypeStruct`.
  """
  lowered = jax.jit(function).trace(*args).lower(lowering_platforms=('cuda',))
  found = []

  def look(op):
    if op.name == 'stablehlo.custom_call' and 'triton' in str(op.attributes['call_target_name']):
      config = {x.name: x.attr for x in op.attributes['mhlo.backend_config']}
      found.append(Kernel(config['name'].value,
                          tuple(config[f'grid_{axis}'].value for axis in 'xyz'),
                          config['num_warps'].value, config['num_stages'].value,
                          config['ir'].value_bytes))
    return ir.WalkResult.ADVANCE

  lowered.compiler_ir('stablehlo').operation.walk(look)
  return found


def _ptxas() -> pathlib.Path | None:
  package = importlib.util.find_spec('nvidia.cuda_nvcc') if importlib.util.find_spec(
      'nvidia') else None
  return package and pathlib.Path(package.submodule_search_locations[0], 'bin', 'ptxas')


def can_compile() -> bool:
  """Whether what `compiled` needs is installed."""
  jax.devices()  # loads the plugins
  return triton.has_compilation_handler('CUDA') and _ptxas() is not None


def compiled(kernel: Kernel, card: str) -> Report:
  """Compiles a kernel for a card of CARDS."""
  made = triton.compile('CUDA', kernel.bytecode, CARDS[card][0], num_warps=kernel.warps,
                        num_ctas=1, num_stages=kernel.stages)
  target = re.search(r'\.target (\w+)', made.asm).group(1)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'kernel.ptx')
    path.write_text(made.asm)
    said = subprocess.run([_ptxas(), '-v', '-arch', target, path, '-o', path.with_suffix('.cubin')],
                          capture_output=True, text=True, check=True).stderr
  number = lambda pattern: int(re.search(pattern, said).group(1))
  return Report(made.smem_bytes, number(r'Used (\d+) registers'),
                number(r'(\d+) bytes spill stores'))
