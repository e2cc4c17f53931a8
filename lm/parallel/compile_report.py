"""What a compiled train step will need: memory, time and money, from the compiler's own figures.

Nothing here was ever compared with a chip: cycles are the compiler's estimates, those of kernels
the bundles that it scheduled, bandwidths from data sheets. Hence ranges. Where the compiler states
no cycles (GPUs, CPUs), computing takes at least what products or memory take at the data sheet's
rates, and at most both.
"""
from collections.abc import Iterable, Mapping
import json
import math
import pathlib
from typing import Any

import numpy as np

from lm.parallel.hlo import Collective, Module
from lm.parallel.topology import Topology

PRICES = pathlib.Path(__file__).with_name('prices.json')
MOST_BUFFERS = 20


def make(module: Module, facts: Mapping[str, Any], kernels: Mapping[str, int], topology: Topology,
         num_tokens: float | None) -> dict[str, Any]:
  """The report of a compiled step, as what `--json` holds.

  Args:
    facts: of the step: `parameters`, `parameter_bytes`, `optimizer_bytes`, `peak_bytes`, `mesh`,
      `tokens` of a step, `flops_per_token`, and `bubble` where there are stages.
    kernels: static cycles of one call of each Pallas kernel.
    num_tokens: of the whole training; None is 20 a parameter (arXiv:2203.15556).
  """
  chip, mesh = topology.chip, facts['mesh']
  devices = math.prod(mesh.values())
  collectives = module.collectives(mesh)
  by_loop = module.estimated_cycles()
  called = [(name, kernels.get(kernel_of(name, kernels)), times)
            for name, _, times in module.kernels()]
  kernel_cycles = sum((cycles or 0) * times for name, cycles, times in called)
  network = sum(x.times * wire_seconds(x, mesh, topology) for x in collectives)
  model_flops, flops = facts['flops_per_token'] * facts['tokens'], module.flops()
  products, traffic = max(flops, model_flops / devices) / chip.peak_flops, module.traffic()
  memory_seconds = traffic / chip.hbm_bandwidth
  if chip.clock_hz:
    least = most = (sum(by_loop.values()) + kernel_cycles) / chip.clock_hz
  else:
    least, most = max(products, memory_seconds), products + memory_seconds
  low, high = max(least, network), most + network
  share = lambda seconds: model_flops / (devices * chip.peak_flops * seconds)
  result = {
      'topology': {'name': topology.name, 'slices': topology.num_slices, 'devices': devices,
                   'mesh': {axis: size for axis, size in mesh.items() if size > 1}},
      'parameters': facts['parameters'], 'tokens_per_step': facts['tokens'],
      'hbm_peak_bytes': facts['peak_bytes'], 'hbm_limit_bytes': chip.hbm_bytes,
      'hbm_bytes': memory(facts, module.stacked_bytes()),
      'largest_buffers': [
          {'bytes': size, 'shape': instruction.shape[:80], 'loop': loop, 'name': instruction.name,
           'operation': instruction.op_name, 'source': module.source(instruction)}
          for size, instruction, loop in module.buffers()[:MOST_BUFFERS]],
      'estimated_cycles': sum(by_loop.values()), 'estimated_cycles_by_loop': by_loop,
      'kernels': [{'name': name, 'cycles': cycles, 'times': times}
                  for name, cycles, times in called],
      'kernel_cycles': kernel_cycles,
      'collectives': [_describe(x, mesh, topology) for x in collectives],
      'collective_bytes': _totals(collectives),
      'bubble': facts.get('bubble'),
      'model_flops': model_flops, 'compiled_flops': flops * devices, 'hbm_traffic_bytes': traffic,
      'roofline_seconds': {'products': products, 'memory': memory_seconds, 'network': network,
                           'compiled': most},
      'step_seconds': [low, high], 'mfu': [share(high), share(low)],
      'tokens_per_second': [facts['tokens'] / high, facts['tokens'] / low],
      **{key: facts[key] for key in ('trace_seconds', 'compile_seconds') if key in facts},
  }
  return result | training(result, topology, num_tokens)


def kernel_of(name: str, kernels: Iterable[str]) -> str | None:
  """Which of some kernels a module calls; one that is differentiated is jvp_NAME_ there."""
  return max((kernel for kernel in kernels if kernel in name), key=len, default=None)


def memory(facts: Mapping[str, Any], activations: int) -> dict[str, int]:
  """Bytes of HBM on each device by kind; what has no other name is temporary."""
  kinds = {'parameters': facts['parameter_bytes'], 'optimizer': facts['optimizer_bytes'],
           'gradients': facts['parameter_bytes'], 'activations': activations}
  return kinds | {'temporaries': max(0, facts['peak_bytes'] - sum(kinds.values()))}


def wire_seconds(collective: Collective, mesh: Mapping[str, int], topology: Topology) -> float:
  """Seconds that one collective needs of the network, if it uses every direction of it well."""
  axes = tuple(mesh) if '?' in collective.axes else collective.axes
  size = math.prod(mesh[axis] for axis in axes)
  share = {'all-gather': 1 - 1 / size, 'all-to-all': 1 - 1 / size,
           'all-reduce': 2 - 2 / size, 'reduce-scatter': size - 1}
  ids = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
  group = ids[tuple(slice(None) if axis in axes else 0 for axis in mesh)].ravel()
  domains = len(set((group // topology.domain).tolist()))
  sides, used = sorted(topology.sides, reverse=True), 1
  if topology.chip.platform == 'tpu':
    while used < len(sides) and math.prod(sides[:used]) < size:
      used += 1
  bandwidth = topology.chip.link_bandwidth * used
  if domains > 1:  # all devices of the group in a slice, or a host, send a part of the same
    bandwidth = min(bandwidth, topology.chip.network_bandwidth * size / domains)
  return collective.bytes * share.get(collective.op, 1) / bandwidth


def training(result: Mapping[str, Any], topology: Topology, num_tokens: float | None
             ) -> dict[str, Any]:
  """Days and money of a whole training."""
  tokens = num_tokens or 20 * result['parameters']
  days = [tokens / rate / 86400 for rate in reversed(result['tokens_per_second'])]
  prices = json.loads(PRICES.read_text())
  price = prices['device_hour'].get(topology.generation)
  money = price and [24 * day * price * result['topology']['devices'] for day in days]
  return {'training_tokens': tokens, 'training_days': days, 'training_money': money,
          'currency': prices['currency']}


def _totals(collectives):
  totals = {}
  for x in collectives:
    totals[x.op] = totals.get(x.op, 0) + x.bytes * x.times
  return totals


def _describe(collective, mesh, topology):
  return {'op': collective.op, 'bytes': collective.bytes, 'times': collective.times,
          'axes': list(collective.axes), 'overlapped': collective.overlapped,
          'seconds': collective.times * wire_seconds(collective, mesh, topology),
          'operation': collective.op_name}


def rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """(name, value) of what `lm compile` prints."""
  mib, span = lambda size: f'{size / 2**20:,.0f} MiB', lambda pair, form: ' to '.join(
      form.format(x) for x in pair)
  topology = result['topology']
  mesh = ' x '.join(f'{axis} {size}' for axis, size in topology['mesh'].items()) or 'one device'
  slices = f' x {topology["slices"]} slices' if topology['slices'] > 1 else ''
  lines = [('topology', f'{topology["name"]}{slices}, {topology["devices"]} devices: {mesh}'),
           ('HBM a device', f'{mib(result["hbm_peak_bytes"])} at the peak, of '
                            f'{mib(result["hbm_limit_bytes"])}')]
  lines += [(f'  {kind}', mib(size)) for kind, size in result['hbm_bytes'].items()]
  if result['estimated_cycles']:
    lines.append(('cycles', f'{result["estimated_cycles"]:,} estimated by the compiler, and '
                            f'{result["kernel_cycles"]:,} of kernels, if they never wait'))
  if result['bubble'] is not None:
    lines.append(('bubble', f'{100 * result["bubble"]:.1f} % of the ticks, in which a stage has no '
                            'work; its cycles are counted'))
  roofline = ', '.join(f'{name} {1e3 * seconds:,.3g} ms'
                       for name, seconds in result['roofline_seconds'].items())
  lines += [('roofline', f'{roofline}, each alone'),
            ('HBM traffic', mib(result['hbm_traffic_bytes'])),
            ('FLOPs', f'{result["model_flops"]:.3e} of the model, {result["compiled_flops"]:.3e} '
                      'compiled (recomputed ones too, kernels aside)')]
  lines += [(f'  {op}', mib(size)) for op, size in result['collective_bytes'].items()]
  lines += [('step', span([1e3 * x for x in result['step_seconds']], '{:,.5g}') + ' ms, estimated'),
            ('MFU', span([100 * x for x in result['mfu']], '{:.1f}') + ' %'),
            ('tokens/s', span(result['tokens_per_second'], '{:,.0f}')),
            ('training', f'{result["training_tokens"]:.3g} tokens in '
                         f'{span(result["training_days"], "{:.1f}")} days')]
  if result['training_money']:
    lines.append(('money', span(result['training_money'], '{:,.0f}') + f' {result["currency"]}'))
  return lines
