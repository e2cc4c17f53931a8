"""Chips that need not be there: their figures, and devices to compile for."""
import dataclasses
import functools
import importlib.util
import math
import os
import re
import timeit
from typing import Any

import jax
from jax.experimental import topologies
import numpy as np

from lm.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Figures of one device, as jax counts devices.

  platform: 'tpu', 'cuda' or 'cpu'.
  hbm_bytes: what a program may have, as the compiler states it, or the card.
  hbm_bandwidth: bytes a second (data sheet).
  peak_flops: of bfloat16 products, a second (data sheet).
  link_bandwidth: bytes a second that leave it along one dimension of a TPU's network, or to the
    other GPUs of its host.
  network_bandwidth: bytes a second of one device to other slices, or hosts of GPUs.
  clock_hz: of the compiler's cycles, so that its estimate of a large product is that of the sheet;
    of tpu7x an assumption; 0 where the compiler states no cycles.
  """
  platform: str
  hbm_bytes: int
  hbm_bandwidth: float
  peak_flops: float
  link_bandwidth: float
  network_bandwidth: float
  clock_hz: float = 0.0


DCN = 6.25e9  # a TPU host's 200 Gbit/s over 4 chips
CHIPS = {
    'v4': Chip('tpu', int(30.75 * GIB), 1228e9, 275e12, 90e9, DCN, 1.05e9),
    'v5e': Chip('tpu', int(15.75 * GIB), 819e9, 197e12, 90e9, DCN, 1.5e9),
    'v5p': Chip('tpu', int(95.74 * GIB), 2765e9, 459e12, 180e9, DCN, 1.75e9),
    'v6e': Chip('tpu', int(31.25 * GIB), 1640e9, 918e12, 180e9, DCN, 1.75e9),
    'tpu7x': Chip('tpu', int(94.75 * GIB), 3690e9, 1153.5e12, 180e9, DCN, 1.9e9),
    'h100': Chip('cuda', int(79.1 * GIB), 3352e9, 989e12, 450e9, 50e9),
    'a100': Chip('cuda', int(79.1 * GIB), 2039e9, 312e12, 300e9, 25e9),
}
# What the CUDA compiler must know of a card that is not there (XLA's GpuTargetConfigProto).
CARDS = {
    'h100': dict(name='NVIDIA H100 80GB HBM3', cores=132, shared_core=233472, shared_block=232448,
                 l2=52428800, ghz=1.98, memory=84978434048, major=9),
    'a100': dict(name='NVIDIA A100-SXM4-80GB', cores=108, shared_core=167936, shared_block=166912,
                 l2=41943040, ghz=1.41, memory=84974239744, major=8),
}


@functools.cache
def this_machine(num_devices: int) -> Chip:
  """One of as many CPU devices that share this machine: its memory, and what NumPy reaches of
  float32 products and copies."""
  share = lambda seconds, work: work / seconds / num_devices
  x, y = np.ones((1024, 1024), np.float32), np.ones(2**25, np.uint8)
  product = min(timeit.repeat(lambda: x @ x, number=1, repeat=5))
  copied = share(min(timeit.repeat(y.copy, number=1, repeat=5)), 2 * y.size)
  memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  return Chip('cpu', memory // num_devices, copied, share(product, 2 * 1024**3), copied, copied)


@dataclasses.dataclass(frozen=True)
class Topology:
  """`generation:AxB` or `generation:AxBxC` TPUs, as often as there are slices; `generation:HxG`
  GPUs, G of them in each of H hosts, or `generation:G`; `cpu:N`, N devices of this machine."""
  generation: str
  sides: tuple[int, ...]
  num_slices: int = 1

  @classmethod
  def parse(cls, name: str, num_slices: int = 1) -> 'Topology':
    """The topology of a name such as 'v5e:16x16' or 'v5p:4x4x4'.

    Raises:
      UserError: it is no name of one.
    """
    found = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)', name)
    if not found or found[1] not in (*CHIPS, 'cpu'):
      raise UserError(f'--topology={name} is no topology; write chips and their grid, such as '
                      f'v5e:16x16 or v5p:4x4x4, hosts and GPUs, such as h100:4x8, or cpu:8; the '
                      f'chips are {", ".join(CHIPS)}')
    if num_slices < 1:
      raise UserError(f'--num_slices={num_slices} must be at least 1')
    return cls(found[1], tuple(int(side) for side in found[2].split('x')), num_slices)

  @property
  def name(self) -> str:
    return f'{self.generation}:{"x".join(map(str, self.sides))}'

  @property
  def chip(self) -> Chip:
    return CHIPS.get(self.generation) or this_machine(math.prod(self.sides))

  @property
  def domain(self) -> int:
    """Devices that reach one another by their links: of a slice, or of a host with GPUs."""
    return self.sides[-1] if self.chip.platform == 'cuda' else math.prod(self.sides)

  def devices(self) -> list[Any]:
    """All devices. Call it in a process with `tpu_compiler.ENVIRONMENT`: the compiler ends some
    that ask for what it does not know.

    Raises:
      UserError: the compiler is not installed, or has no such topology.
    """
    if self.generation == 'cpu':
      jax.config.update('jax_num_cpu_devices', math.prod(self.sides))
      return jax.devices('cpu')
    package, extra = {'tpu': ('libtpu', "'lm[tpu]'"), 'cuda': (
        'jax_plugins.xla_cuda12', "'jax-cuda12-plugin[with-cuda]'")}[self.chip.platform]
    if importlib.util.find_spec(package) is None:
      raise UserError(f'compiling for {self.generation} needs {package}, which is not installed; '
                      f'pip install {extra}')
    try:
      return list(self._describe().devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
      raise UserError(f'the compiler knows no topology {self.name}: '
                      f'{str(error).splitlines()[0]}') from error

  def _describe(self):
    if self.chip.platform == 'cuda':
      hosts = math.prod(self.sides[:-1])
      return topologies.get_topology_desc(
          self.generation, 'cuda', target_config=_target(**CARDS[self.generation]),
          topology=f'{self.num_slices}x{hosts}x{self.sides[-1]}')
    options = {'num_slices': self.num_slices} if self.num_slices > 1 else {}
    if self.generation == 'v4':
      options['chip_config_name'] = 'megacore'  # one device a chip
    if math.prod(self.sides) == 1:
      options['chips_per_host_bounds'] = (1, 1, 1)
    return topologies.get_topology_desc(self.name, 'tpu', **options)


def _target(name: str, cores: int, shared_core: int, shared_block: int, l2: int, ghz: float,
            memory: int, major: int) -> str:
  """A text of XLA's GpuTargetConfigProto."""
  return f"""
      gpu_device_info {{
        cuda_compute_capability {{ major: {major} minor: 0 }}
        core_count: {cores} fpus_per_core: {128 if major > 8 else 64} threads_per_warp: 32
        threads_per_block_limit: 1024 threads_per_core_limit: 2048
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared_block}
        shared_memory_per_core: {shared_core} l2_cache_size: {l2}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: {3352320000000 if major > 8 else 2039000000000}
        clock_rate_ghz: {ghz} device_memory_size: {memory}
      }}
      platform_name: "CUDA" device_description_str: "{name}"
      dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 9 }}"""
