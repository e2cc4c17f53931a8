"""What the kernels must know of the TPU that they are compiled for."""
import jax

LANES = 128
VMEM_MIB = {'v4': 16, 'v5e': 128, 'v5p': 64, 'v6e': 128, 'tpu7x': 64}  # of a core, libtpu 0.0.42.1
_KINDS = {'TPU v4': 'v4', 'TPU v5 lite': 'v5e', 'TPU v5': 'v5p', 'TPU v6 lite': 'v6e',
          'TPU7x': 'tpu7x'}


def generation() -> str | None:
  """The TPU of the mesh in use (`jax.set_mesh`), or of this machine; None where neither is one."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return _KINDS.get(device.device_kind if device else jax.devices()[0].device_kind)


def generation_or_least() -> str:
  """`generation`, or the one with the least VMEM, whose blocks fit all."""
  return generation() or 'v4'


def vmem_limit(chip: str) -> int:
  """Bytes of VMEM that a kernel may take; the compiler keeps the rest."""
  return 15 * VMEM_MIB[chip] * 2**20 // 16
