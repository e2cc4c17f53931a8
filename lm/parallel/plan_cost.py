"""Work and traffic of a traced program on one device, and seconds from the figures of its chip.

A fusion of the compiler (`plan_arrays.py`) takes the time of its products or of its traffic to and
from HBM, whichever is longer; one without products also cycles for every vector of elements that
goes through its registers. A kernel takes the time of its products, or of its other operations. The
shares of the data sheet's figures, and those cycles, are fitted to what the compiler itself
estimates of the steps in PLAN.md, none of which was ever timed on a chip.
"""
from collections.abc import Iterator, Mapping
import dataclasses

from lm.parallel.compile_report import wire_seconds
from lm.parallel.hlo import Collective
from lm.parallel.plan_arrays import Arrays, Fusion
from lm.parallel.plan_program import Program
from lm.parallel.topology import Topology

PRODUCTS, TRAFFIC = 0.95, 0.5  # of FLOP/s, and of HBM's bytes a second
VECTOR, CYCLES = 1024, 8.0  # elements in a register of vectors, and cycles of a core for each
KERNEL_PRODUCTS, KERNEL_VECTORS = 0.85, 4.5  # of FLOP/s, and vectors in a cycle
CORES = {'v4': 2, 'v5p': 2}  # of a device; the compiler's cycles of a kernel are those of one


@dataclasses.dataclass(frozen=True)
class Work:
  """Of one fusion or kernel, in all its turns.

  flops: of products.  traffic: bytes to and from HBM.  elements: of a fusion without products, the
  most that it reads or writes of one array; of a kernel, all that other operations go through.
  """
  is_kernel: bool
  flops: float
  traffic: float
  elements: float

  def seconds(self, topology: Topology) -> float:
    """On a chip of the topology."""
    chip, cores = topology.chip, CORES.get(topology.generation, 1)
    vectors = self.elements / VECTOR / chip.clock_hz
    if self.is_kernel:
      return max(self.flops * cores / (KERNEL_PRODUCTS * chip.peak_flops), vectors / KERNEL_VECTORS)
    traffic = self.traffic / (TRAFFIC * chip.hbm_bandwidth) + CYCLES * vectors / cores
    return max(self.flops / (PRODUCTS * chip.peak_flops), traffic)


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one step on one device: work, and collectives with their bytes and turns."""
  work: list[Work]
  collectives: list[Collective]

  @property
  def flops(self) -> float:
    """Of products, those in kernels too."""
    return sum(x.flops for x in self.work)

  def step_seconds(self, mesh: Mapping[str, int], topology: Topology) -> tuple[float, float]:
    """If all communication is hidden behind computation, and if none is."""
    compute = sum(x.seconds(topology) for x in self.work)
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
  work, collectives = [], []
  for arrays, times in _levels(Arrays(program, [True] * len(program.outs)), 1):
    work += [_work(fusion, times) for fusion in arrays.fusions()]
    for op in arrays.ops:
      axes = tuple(axis for axis in (op.moved or ((), ()))[1] if mesh.get(axis, 1) > 1)
      if axes:
        size = op.outs[0].bytes // op.parts
        collectives.append(Collective(op.moved[0], size, times, axes, False, ''))
  return Cost(work, collectives)


def _work(fusion: Fusion, times: int) -> Work:
  is_kernel, arrays = fusion.name == 'pallas_call', (*fusion.reads, *fusion.writes)
  elements = (fusion.products[0].elements if is_kernel else 0 if fusion.products else
              max((x.bytes / x.itemsize for x in arrays if x.itemsize), default=0))
  return Work(is_kernel, times * sum(op.flops for op in fusion.products),
              times * sum(x.bytes for x in arrays), times * elements)


def _levels(arrays: Arrays, times: int) -> Iterator[tuple[Arrays, int]]:
  """A program and the bodies of its loops, each with how often it runs."""
  yield arrays, times
  for op in arrays.ops:
    if op.name == 'scan':
      yield from _levels(arrays.body(op), times * op.times)
