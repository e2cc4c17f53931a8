"""What the kernels must know of the TPU or GPU that they are compiled for."""
import jax

LANES = 128
VMEM_MIB = {'v4': 16, 'v5e': 128, 'v5p': 64, 'v6e': 128, 'tpu7x': 64}  # of a core, libtpu 0.0.42.1
KINDS = {'v4': 'TPU v4', 'v5e': 'TPU v5 lite', 'v5p': 'TPU v5', 'v6e': 'TPU v6 lite',
         'tpu7x': 'TPU7x'}  # as JAX names devices


def _device_kind() -> str:
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.device_kind if device else jax.devices()[0].device_kind


def generation() -> str | None:
  """The TPU of the mesh in use (`jax.set_mesh`), or of this machine; None where neither is one."""
  kind = _device_kind()
  return next((chip for chip, name in KINDS.items() if name == kind), None)


def generation_or_least() -> str:
  """`generation`, or the one with the least VMEM, whose blocks fit all."""
  return generation() or 'v4'


def vmem_limit(chip: str) -> int:
  """Bytes of VMEM that a kernel may take; the compiler keeps the rest."""
  return 15 * VMEM_MIB[chip] * 2**20 // 16


def card() -> str | None:
  """The class of the NVIDIA GPU of the mesh in use, or of this machine: 'h100' or, of all others,
  'a100'; None where neither is one."""
  kind = _device_kind()
  if 'NVIDIA' not in kind:
    return None
  return 'h100' if any(name in kind for name in ('H100', 'H200', 'GH200', 'B200')) else 'a100'


def card_or_least() -> str:
  """`card`, or the one with the least shared memory, whose tiles fit both."""
  return card() or 'a100'
