"""What kernels that wait for memory cost: bytes moved, as their block specs say, beside cycles."""
import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from pallas_kernels import tpu_compiler

# Published memory bandwidth of one device, as jax counts devices, a cycle of its nominal clock.
BYTES_PER_CYCLE = {'v4': 585, 'v5e': 546, 'v5p': 1580, 'v6e': 937}


class Traffic(NamedTuple):
  """Bytes of one kernel, over its whole grid."""
  read: int
  written: int


def traffic(function: Callable, *args) -> dict[str, Traffic]:
  """Counts what each kernel of `function(*args)` moves, by the kernel's name.

  A block moves whenever the next step of the grid has another one, and what reaches beyond its
  array does not. Kernels of one name count once: they are the forms of one call for different
  platforms.

  Args:
    function: calls kernels whose operands all have block specs.
    args: trees of arrays or `jax.ShapeDtypeStruct`.
  """
  program = jax.make_jaxpr(function)(*args)
  calls = {call.params['name']: call for call in _calls(program.jaxpr)}
  return {name: _moved(call.params['grid_mapping']) for name, call in calls.items()}


def _calls(jaxpr) -> Iterator:
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'pallas_call':
      yield equation
      continue
    for inner in core.jaxprs_in_params(equation.params):
      yield from _calls(inner)


def _moved(mapping) -> Traffic:
  steps = jnp.meshgrid(*map(jnp.arange, mapping.grid), indexing='ij')
  steps = [axis.reshape(-1) for axis in steps]
  bytes_of = [_bytes_of_operand(block, steps) for block in mapping.block_mappings]
  return Traffic(sum(bytes_of[:mapping.num_inputs]), sum(bytes_of[mapping.num_inputs:]))


def _bytes_of_operand(block, steps) -> int:
  index_map = jax.vmap(core.jaxpr_as_fun(block.index_map_jaxpr), axis_size=steps[0].size)
  indices = jnp.stack(index_map(*steps), -1)
  sizes = jnp.array([getattr(size, 'block_size', 1) for size in block.block_shape])
  within = jnp.clip(jnp.array(block.array_aval.shape) - indices * sizes, 0, sizes)
  is_new = (indices[1:] != indices[:-1]).any(-1)
  elements = within.prod(-1)
  moved = elements[0] + jnp.where(is_new, elements[1:], 0).sum()
  return int(moved) * block.array_aval.dtype.itemsize


def print_table(module: str, cases: dict):
  """Prints cycles of the kernels, of XLA's form of the same, and of moving the bytes.

  Takes --topology from the command line. Cycles are the static schedule's, without waiting.

  Args:
    module: where `cases` is, as a module and a function.
    cases: {f'{name} tpu' or f'{name} reference': (function, arguments)}.
  """
  parser = argparse.ArgumentParser()
  parser.add_argument('--topology', default='v5e:2x2')
  topology = parser.parse_args().topology
  bandwidth = BYTES_PER_CYCLE.get(topology.split(':')[0])
  reports = tpu_compiler.reports(module, list(cases), topology)
  print(f'{topology:42s}{"Pallas":>12s}{"XLA":>12s}{"to move":>12s}{"MiB":>10s}')
  for name in (name.removesuffix(' tpu') for name in cases if name.endswith(' tpu')):
    function, args = cases[f'{name} tpu']
    report, plain = reports[f'{name} tpu'], reports[f'{name} reference']
    if report.refusal:
      print(f'{name:42s} refused: {report.refusal}')
      continue
    kernels = traffic(function, *args)
    moved = sum(map(sum, kernels.values()))
    cycles = sum(count for kernel, count in report.kernels.items()
                 if kernel.split('.')[0] in kernels)
    to_move = f'{moved / bandwidth:,.0f}' if bandwidth else '-'
    print(f'{name:42s}{cycles:12,}{plain.cycles:12,}{to_move:>12s}{moved / 2**20:10.1f}')
