"""Which mesh axis shards which logical axis: one value, passed by argument."""
from collections.abc import Callable, Mapping
import dataclasses
import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.errors import UserError

Axes = str | tuple[str, ...] | None


def axes_of(axes: Axes) -> tuple[str, ...]:
  """The mesh axes of a rule, as a tuple."""
  return () if axes is None else (axes,) if isinstance(axes, str) else axes


@dataclasses.dataclass(frozen=True)
class Rules:
  """Logical axis -> mesh axes; `None` replicates.

  Parameters are named by `embed mlp heads kv_heads head_dim vocab position layers norm expert`,
  activations by `batch length act_embed`. The defaults shard the batch over `data` and `fsdp`, and
  parameters and optimiser state over `fsdp` (ZeRO-3, arXiv:1910.02054).
  """
  batch: Axes = ('data', 'fsdp')
  length: Axes = None
  act_embed: Axes = None
  embed: Axes = 'fsdp'
  mlp: Axes = None
  heads: Axes = None
  kv_heads: Axes = None
  head_dim: Axes = None
  vocab: Axes = None
  position: Axes = None
  layers: Axes = None
  norm: Axes = None
  expert: Axes = None
  mesh: Mesh | None = dataclasses.field(default=None, init=False, repr=False)  # set by `on`

  def on(self, mesh: Mesh) -> 'Rules':
    """These rules for the axes of `mesh`."""
    for field in dataclasses.fields(self):
      axes = getattr(self, field.name)
      if field.name == 'mesh':
        continue
      for axis in axes_of(axes):
        if axis not in mesh.axis_names:
          raise UserError(f'Rules.{field.name}={axes!r} names the mesh axis {axis!r}, which is not '
                          f'one of {", ".join(mesh.axis_names)}; use one of those or None')
    rules = dataclasses.replace(self)
    object.__setattr__(rules, 'mesh', mesh)
    return rules

  def spec(self, *names: str | None) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names (`None`: replicated).

    Raises:
      UserError: an unknown name, or two axes of one array on the same mesh axis.
    """
    known = {field.name for field in dataclasses.fields(self)} - {'mesh'}
    for name in names:
      if name is not None and name not in known:
        raise UserError(f'{name!r} is not a logical axis; Rules has {", ".join(sorted(known))}')
    spec = tuple(None if name is None else getattr(self, name) for name in names)
    used = [axis for axes in spec for axis in axes_of(axes)]
    twice = {axis for axis in used if used.count(axis) > 1}
    if twice:
      raise UserError(f'the axes {names} of one array are both sharded over {sorted(twice)[0]!r}; '
                      'a mesh axis can shard one axis of an array, so set one of the rules to None')
    return PartitionSpec(*spec)

  def sharding(self, *names: str | None) -> NamedSharding:
    """The NamedSharding on this mesh of an array with these logical axes."""
    return NamedSharding(self.mesh, self.spec(*names))


def constrain(x: jax.Array, rules: Rules, *names: str | None) -> jax.Array:
  """Fixes the sharding of `x` inside jit; checks the names even where there is one device."""
  spec = rules.spec(*names)
  if len(names) != x.ndim:
    raise ValueError(f'{x.shape} has {x.ndim} axes but {len(names)} names: {names}')
  if rules.mesh is None or rules.mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(rules.mesh, spec))


def per_device(function: Callable, rules: Rules, out_names: tuple[str | None, ...],
               names: Mapping[str, tuple[str | None, ...]], **arrays: jax.Array) -> jax.Array:
  """Calls `function(**arrays)` on each device's part of them, as kernels need it: the compiler does
  not cut a kernel.

  A logical axis that its devices do not divide in every array is whole on each of them; of size 1
  it is whole in its own array.

  Args:
    function: maps parts to the part of the result.
    out_names: logical axes of the result.
    names: those of each array.
  """
  mesh = rules.mesh
  if mesh is None or mesh.size == 1:
    return function(**arrays)
  sizes = {}
  for key, x in arrays.items():
    for name, size in zip(names[key], x.shape):
      sizes.setdefault(name, set()).add(size)
  shards = lambda name: math.prod(mesh.shape[axis] for axis in axes_of(getattr(rules, name)))
  cut = {name for name, found in sizes.items() if name is not None and found != {1}
         and not any(size % shards(name) for size in found - {1})}

  def spec(axes, shape=None):
    return rules.spec(*(name if name in cut and (shape is None or shape[i] > 1) else None
                        for i, name in enumerate(axes)))

  call = jax.shard_map(lambda arrays: function(**arrays), mesh=mesh, check_vma=False,
                       in_specs=({key: spec(names[key], x.shape) for key, x in arrays.items()},),
                       out_specs=spec(out_names))
  return call(arrays)
