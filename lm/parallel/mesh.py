"""The mesh of devices, from the sizes of its axes."""
import dataclasses

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
import numpy as np

from lm.errors import UserError


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis, of which any may be 1; -1 takes all that are left.

  Neighbours along the last axes are the nearest devices: those axes talk the most. What an axis
  shards is said by `Rules`; by its defaults

  slice: slices of a pod, each with its part of the batch; only they talk over the slow network
    between slices (DCN).
  data: copies of the model, each with its part of the batch.
  stage: the layers of a stack, through which parts of the batch follow each other (GPipe,
    arXiv:1811.06965), and outside of them the batch.
  fsdp: the batch and the parameters are both sharded (ZeRO-3, arXiv:1910.02054).
  expert: the batch, and the experts of a mixture (GShard, arXiv:2006.16668).
  sequence: the length of each sequence (context parallelism: ring attention, arXiv:2310.01889).
  tensor: heads, hidden layers and the vocabulary (Megatron, arXiv:1909.08053), and between blocks
    the length (arXiv:2205.05198, section 4.2.2).
  """
  slice: int = 1
  data: int = -1
  stage: int = 1
  fsdp: int = 1
  expert: int = 1
  sequence: int = 1
  tensor: int = 1

  def __post_init__(self):
    sizes = dataclasses.asdict(self)
    if list(sizes.values()).count(-1) > 1:
      raise ValueError(f'mesh {sizes} has more than one -1; at most one axis takes what is left')
    for axis, size in sizes.items():
      if size < 1 and size != -1:
        raise ValueError(f'mesh axis {axis}={size} must be at least 1, or -1 for all that are left')

  def sizes(self, num_devices: int) -> dict[str, int]:
    """Devices along each axis, of this many.

    Raises:
      UserError: they do not divide; it names the axis and the nearest sizes that do.
    """
    sizes, left = dataclasses.asdict(self), num_devices
    for axis, size in sizes.items():
      if size == -1:
        continue
      if left % size:
        works = [n for n in range(1, left + 1) if left % n == 0]
        near = [f'{n}' for n in (*[n for n in works if n < size][-1:],
                                 *[n for n in works if n > size][:1])]
        others = '' if left == num_devices else f', of {num_devices}, that the axes before it leave'
        raise UserError(f'mesh axis {axis}={size} does not divide the {left} devices{others}; the '
                        f'nearest that does is {" or ".join(near)}')
      left //= size
    if -1 not in sizes.values() and left > 1:
      axis = max(sizes, key=sizes.get)
      raise UserError(f'mesh axis {axis}={sizes[axis]} leaves {num_devices - num_devices // left} '
                      f'of {num_devices} devices without work; set it to {sizes[axis] * left}, or '
                      'to -1 for all that are left')
    return {axis: left if size == -1 else size for axis, size in sizes.items()}

  def build(self, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices (or those given), with axes of this order and size."""
    devices = jax.devices() if devices is None else devices
    sizes = self.sizes(len(devices))
    shape, slices = tuple(sizes.values()), {getattr(d, 'slice_index', 0) for d in devices}
    if len(slices) == 1:
      grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif len(slices) == sizes['slice']:
      between = shape[0], *[1] * len(shape[1:])
      grid = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), between, devices,
                                                  allow_split_physical_axes=True)
    else:
      raise UserError(f'mesh axis slice={sizes["slice"]} and the devices are in {len(slices)} '
                      f'slices, which no other axis should cross; set it to {len(slices)}')
    return Mesh(np.asarray(grid), tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))
