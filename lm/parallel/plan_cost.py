"""Work and traffic of a traced program on one device, and seconds from the figures of its chip.

PRODUCTS, KERNELS: shares of the data sheet's FLOP/s that compiled steps reach by the compiler's own
estimates, of Llama 2 7B on v5e:16x16; TRAFFIC: how often its HBM bandwidth, since most traffic is
hidden behind products.
"""
from collections.abc import Iterator, Mapping
import dataclasses

from lm.parallel.compile_report import wire_seconds
from lm.parallel.hlo import Collective
from lm.parallel.plan_memory import live_ops
from lm.parallel.plan_program import Op, Program
from lm.parallel.topology import Topology

PRODUCTS, KERNELS, TRAFFIC = 0.9, 0.8, 2.0


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one step on one device.

  flops: of products; kernel_flops: within Pallas kernels.  traffic: bytes to and from HBM.
  collectives: each with its bytes and turns.
  """
  flops: float
  kernel_flops: float
  traffic: float
  collectives: list[Collective]

  def step_seconds(self, mesh: Mapping[str, int], topology: Topology) -> tuple[float, float]:
    """If all communication is hidden behind computation, and if none is."""
    chip = topology.chip
    compute = (self.flops / (PRODUCTS * chip.peak_flops)
               + self.kernel_flops / (KERNELS * chip.peak_flops)
               + self.traffic / (TRAFFIC * chip.hbm_bandwidth))
    network = sum(x.times * wire_seconds(x, mesh, topology) for x in self.collectives)
    return max(compute, network), compute + network

  def bytes_by_axis(self) -> dict[str, int]:
    """Bytes of results of collectives, a step, by 'operation axes'."""
    found = {}
    for x in self.collectives:
      name = f'{x.op} {" ".join(x.axes)}'
      found[name] = found.get(name, 0) + x.bytes * x.times
    return found


def cost(program: Program, mesh: Mapping[str, int]) -> Cost:
  """Adds a program up."""
  flops = kernel_flops = traffic = 0.0
  collectives = []
  for op, times in _all(program, [True] * len(program.outs), 1):
    if op.name == 'pallas_call':
      kernel_flops += times * op.flops
    else:
      flops += times * op.flops
    if op.flops or op.name in ('gather', 'scatter-add', 'scatter_add', 'pallas_call', 'sort'):
      traffic += times * sum(x.bytes for x in (*op.ins, *op.outs))
    if op.moved:
      kind, axes = op.moved
      axes = tuple(axis for axis in axes if mesh.get(axis, 1) > 1)
      if axes:
        collectives.append(Collective(kind, op.outs[0].bytes // op.parts, times, axes, False, ''))
  return Cost(flops, kernel_flops, traffic, collectives)


def _all(program: Program, used: list[bool], times: int) -> Iterator[tuple[Op, int]]:
  """Every operation that is needed, and how often it runs."""
  ops, live = live_ops(program, used)
  for op in ops:
    yield op, times
    if op.name == 'scan':
      inner = [True] * op.num_carry + [x in live for x in op.outs[op.num_carry:]]
      yield from _all(op.body, inner, times * op.times)
