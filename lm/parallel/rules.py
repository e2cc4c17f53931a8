"""Which mesh axis shards which logical axis: one value, passed by argument."""
from collections.abc import Callable, Collection, Mapping
import dataclasses
import math
from typing import Any, Literal, Optional

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.errors import UserError

Axes = str | tuple[str, ...] | None


def axes_of(axes: Axes) -> tuple[str, ...]:
  """The mesh axes of a rule, as a tuple."""
  return () if axes is None else (axes,) if isinstance(axes, str) else axes


@dataclasses.dataclass(frozen=True)
class Rules:
  """Logical axis -> mesh axes; `None` replicates.

  Parameters are named by `embed mlp heads kv_heads head_dim vocab position layers norm expert`,
  activations by `batch length act_length act_embed`: `act_length` is the length between blocks, in
  norms and residuals, `length` the one in them. The defaults are what `MeshConfig` says of its
  axes.

  opt_embed: `embed` of the optimiser's state, where parameters have None (ZeRO-1).
  attention: how queries meet keys of other devices, where the length is sharded: keys go round a
    ring (arXiv:2310.01889), or an all-to-all gives each device whole rows of some heads (Ulysses,
    arXiv:2309.14509).
  pipeline_microbatches: parts of a batch, or of one of a step's microbatches, that follow each
    other through the stages, which are the devices over which `layers` are cut; None is a row of
    each device at a time. M parts in R turns leave S stages idle in (S - 1) / (M R + S - 1) of the
    ticks.
  pipeline_turns: R, how often a part goes round all stages, which then have every S-th group of
    layers (the circular schedule, arXiv:2104.04473, section 2.2).
  """
  batch: Axes = ('slice', 'data', 'fsdp', 'expert', 'stage')
  length: Axes = 'sequence'
  act_length: Axes = ('sequence', 'tensor')
  act_embed: Axes = None
  embed: Axes = 'fsdp'
  opt_embed: Axes = None
  mlp: Axes = 'tensor'
  heads: Axes = 'tensor'
  kv_heads: Axes = 'tensor'
  head_dim: Axes = None
  vocab: Axes = 'tensor'
  position: Axes = None
  layers: Axes = 'stage'
  norm: Axes = None
  expert: Axes = 'expert'
  attention: Literal['ring', 'all_to_all'] = 'ring'
  pipeline_microbatches: Optional[int] = None
  pipeline_turns: int = 1
  mesh: Mesh | None = dataclasses.field(default=None, init=False, repr=False)  # set by `on`

  @property
  def is_cut(self) -> bool:
    """Whether there are several devices, over which the compiler cuts what is no kernel's."""
    return self.mesh is not None and self.mesh.size > 1

  @classmethod
  def names(cls) -> tuple[str, ...]:
    """The logical axes."""
    return tuple(field.name for field in dataclasses.fields(cls)
                 if field.name not in ('attention', 'mesh', 'pipeline_microbatches',
                                       'pipeline_turns'))

  def on(self, mesh: Mesh) -> 'Rules':
    """These rules for the axes of `mesh`.

    Raises:
      UserError: a rule names an axis that the mesh has not, or one axis twice.
    """
    for name in self.names():
      axes = axes_of(getattr(self, name))
      for axis in axes:
        if axis not in mesh.axis_names:
          raise UserError(f'Rules.{name}={getattr(self, name)!r} names the mesh axis {axis!r}, '
                          f'which is not one of {", ".join(mesh.axis_names)}; use one of those or '
                          'None')
        if axes.count(axis) > 1:
          raise UserError(f'Rules.{name}={axes!r} names the mesh axis {axis!r} twice; once is '
                          'enough')
    rules = dataclasses.replace(self)
    object.__setattr__(rules, 'mesh', mesh)
    return rules

  def inside(self, manual: Collection[str]) -> 'Rules':
    """These rules in `jax.shard_map` over the axes `manual`, which there shard nothing more."""
    rules = dataclasses.replace(self, **{
        name: tuple(axis for axis in axes_of(getattr(self, name)) if axis not in manual) or None
        for name in self.names()})
    mesh = jax.sharding.get_abstract_mesh()
    object.__setattr__(rules, 'mesh', mesh if set(mesh.axis_names) - set(manual) else None)
    return rules

  def spec(self, *names: str | None) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names (`None`: replicated).

    Raises:
      UserError: an unknown name, or two axes of one array on the same mesh axis.
    """
    for name in names:
      if name is not None and name not in self.names():
        raise UserError(f'{name!r} is not a logical axis; Rules has '
                        f'{", ".join(sorted(self.names()))}')
    spec = tuple(None if name is None else getattr(self, name) for name in names)
    used = [axis for axes in spec for axis in axes_of(axes)]
    twice = {axis for axis in used if used.count(axis) > 1}
    if twice:
      raise UserError(f'the axes {names} of one array are both sharded over {sorted(twice)[0]!r}; '
                      'a mesh axis can shard one axis of an array, so set one of the rules to None')
    return PartitionSpec(*spec)

  def shards(self, name: str | None) -> int:
    """Parts into which the devices cut this logical axis."""
    if self.mesh is None or name is None:
      return 1
    return math.prod(self.mesh.shape[axis] for axis in axes_of(getattr(self, name)))

  def sharding(self, *names: str | None) -> NamedSharding:
    """The NamedSharding on this mesh of an array with these logical axes."""
    return NamedSharding(self.mesh, self.spec(*names))


def constrain(x: jax.Array, rules: Rules, *names: str | None) -> jax.Array:
  """Fixes the sharding of `x` inside jit; checks the names even where there is one device."""
  spec = rules.spec(*names)
  if len(names) != x.ndim:
    raise ValueError(f'{x.shape} has {x.ndim} axes but {len(names)} names: {names}')
  if not rules.is_cut:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(rules.mesh, spec))


def per_device(function: Callable, rules: Rules,
               out_names: tuple[str | None, ...] | list[tuple[str | None, ...]],
               names: Mapping[str, tuple[str | None, ...]], **arrays: jax.Array) -> Any:
  """Calls `function(**arrays)` on each device's part of them, as kernels need it: the compiler does
  not cut a kernel.

  A logical axis that its devices do not divide in every array is whole on each of them; of size 1
  it is whole in its own array.

  Args:
    function: maps parts to the part of the result.
    out_names: logical axes of the result; a list of them where there are several.
    names: those of each array.
  """
  mesh = rules.mesh
  if not rules.is_cut:
    return function(**arrays)
  sizes = {}
  for key, x in arrays.items():
    for name, size in zip(names[key], x.shape):
      sizes.setdefault(name, set()).add(size)
  cut = {name for name, found in sizes.items() if name is not None and found != {1}
         and not any(size % rules.shards(name) for size in found - {1})}

  def spec(axes, shape=None):
    return rules.spec(*(name if name in cut and (shape is None or shape[i] > 1) else None
                        for i, name in enumerate(axes)))

  out = list(map(spec, out_names)) if isinstance(out_names, list) else spec(out_names)
  call = shard_map(lambda arrays: function(**arrays), rules, out,
                   {key: spec(names[key], x.shape) for key, x in arrays.items()})
  return call(arrays)


def shard_map(function: Callable, rules: Rules, out_specs: Any, *in_specs: Any) -> Callable:
  """`jax.shard_map` over all mesh axes, but for those over which it is called already."""
  mesh = rules.mesh
  axes = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual}
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs,
                       axis_names=axes, check_vma=False)
