"""The state of training: one pytree, made in its shardings."""
from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from lm.errors import UserError
from lm.parallel.rules import Rules, axes_of
from lm.training import precision, trainable
from lm.training.optimizers.paths import names_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """step: int32, updates done; params; opt_state: of optax; rng: the run's key, folded with the
  step; carry: what a batch needs of the one before it (Transformer-XL's memory), else None."""
  step: jax.Array
  params: Any
  opt_state: Any
  rng: jax.Array
  carry: Any = None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # so that shapes and values share one trace
def _init(module: nn.Module, optimizer: optax.GradientTransformation, batch_size: int, seed: int):
  params_rng, rng = jax.random.split(jax.random.key(seed))
  boxed = _init_params(module, params_rng)
  params = nn.meta.unbox(boxed)
  return boxed, TrainState(jnp.int32(0), params, _init_optimizer(module, optimizer, params),
                           jax.random.key_data(rng), module.config.init_carry(batch_size))


def _init_optimizer(module, optimizer, params):
  """The optimiser's state of those parameters that train."""
  parts = trainable.split(module, params)
  opt_state = optimizer.init(parts.own)
  trainable.check(parts, opt_state)
  return opt_state


def _init_params(module, rng):
  """Boxed parameters, in the dtype of their config; histories of products stay float32."""
  boxed = module.init(rng, method='initialize')['params']
  dtype = module.config.param_dtype
  if dtype == 'float32':
    return boxed
  return jax.tree_util.tree_map_with_path(
      lambda path, x: x if precision.is_history(path[:-1]) else x.astype(dtype), boxed)


def abstract_state(module: nn.Module, optimizer: optax.GradientTransformation, rules: Rules,
                   batch_size: int = 1, offload_optimizer: bool = False) -> TrainState:
  """Shapes, dtypes and shardings of the state, without computing any of it.

  Optimiser state of a parameter's shape, or of as many axes or more (scales, preconditioners of
  blocks), takes the parameter's sharding axis by axis, where the sizes divide, but for `opt_embed`
  where `embed` is replicated (ZeRO-1, arXiv:1910.02054); the rest is replicated, but for the carry
  of `batch_size` rows. With `offload_optimizer` its arrays are in the memory of the
  host.

  Raises:
    UserError: a parameter whose axes have no names, or names that `rules` do not know, or share a
      mesh axis, or do not divide over it.
  """
  boxed, state = jax.eval_shape(lambda: _init(module, optimizer, batch_size, 0))
  shardings = _param_shardings(boxed, rules)
  replicated = NamedSharding(rules.mesh, PartitionSpec())
  opt_rules = rules if rules.embed else dataclasses.replace(rules, embed=rules.opt_embed).on(
      rules.mesh)
  opt_shardings = _like_params(state.opt_state, state.params, _param_shardings(boxed, opt_rules),
                               replicated)
  if offload_optimizer:
    opt_shardings = jax.tree.map(
        lambda x, sharding: sharding.with_memory_kind('pinned_host') if x.ndim else sharding,
        state.opt_state, opt_shardings)
  all_shardings = TrainState(replicated, shardings, opt_shardings, replicated,
                             carry_shardings(module))
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state,
                      all_shardings)


def carry_shardings(module: nn.Module) -> Any:
  """Of what a batch needs of the one before it; None where that is nothing."""
  return module.carry_shardings() if hasattr(module, 'carry_shardings') else None


def _param_shardings(boxed: Any, rules: Rules) -> Any:
  """Of each parameter, by the logical names of its axes."""
  is_leaf = lambda x: isinstance(x, nn.Partitioned)
  names = jax.tree_util.tree_map_with_path(_axis_names, boxed, is_leaf=is_leaf)
  return jax.tree_util.tree_map_with_path(
      lambda path, x, names: _fitting(rules.sharding(*names), path, x.shape),
      nn.meta.unbox(boxed), names)


def _axis_names(path: tuple, boxed: Any) -> tuple[str | None, ...]:
  """The logical names of a parameter's axes."""
  if not isinstance(boxed, nn.Partitioned):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    raise UserError(f'{name} has shape {boxed.shape} and no names for its axes, so no rule says '
                    'how to shard it; initialise it by nn.with_partitioning, with None for an axis '
                    'that every device holds')
  return boxed.names


def _fitting(sharding: NamedSharding, path: tuple, shape: tuple[int, ...]) -> NamedSharding:
  """The sharding, if the shape divides over its devices."""
  for size, axes in zip(shape, sharding.spec):
    axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
    devices = math.prod(sharding.mesh.shape[axis] for axis in axes)
    if size % devices:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise UserError(f'{name} has shape {shape}, and {size} does not divide over the {devices} '
                      f'devices of mesh axis {", ".join(axes)}; change the size or the mesh')
  return sharding


def abstract_params(module: nn.Module, where: jax.Device | Rules) -> Any:
  """Shapes and dtypes of the parameters alone, on one device or as rules shard them: what
  evaluation and inference need."""
  boxed = jax.eval_shape(lambda: _init_params(module, jax.random.key(0)))
  params = nn.meta.unbox(boxed)
  if isinstance(where, Rules):
    shardings = _param_shardings(boxed, where)
  else:
    shardings = jax.tree.map(lambda _: SingleDeviceSharding(where), params)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params,
                      shardings)


def _like_params(opt_state: Any, params: Any, shardings: Any, otherwise: NamedSharding) -> Any:
  """Gives each leaf of an optimiser's state the sharding of the parameter whose path ends its own.

  Its first axes are the parameter's, whole or in blocks; one that does not divide is replicated.
  """
  by_path = {names_of(path): (x.ndim, sharding) for (path, x), sharding in
             zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings))}

  def of(path, leaf):
    names = names_of(path)
    found = [by_path[names[i:]] for i in range(len(names)) if names[i:] in by_path]
    if not found or leaf.ndim < found[0][0]:
      return otherwise
    sharding = found[0][1]
    fits = [axes if size % math.prod(sharding.mesh.shape[axis] for axis in axes_of(axes)) == 0
            else None for size, axes in zip(leaf.shape, sharding.spec)]
    return NamedSharding(sharding.mesh, PartitionSpec(*fits))

  return jax.tree_util.tree_map_with_path(of, opt_state)


def init_state(module: nn.Module, optimizer: optax.GradientTransformation, rules: Rules,
               seed: int, batch_size: int = 1, offload_optimizer: bool = False,
               initial: Callable[[Any], Any] | None = None) -> TrainState:
  """A new state, each array made in its own sharding: no device ever holds all of it.

  Args:
    initial: from new parameters to those that the state, and what the optimiser keeps of them,
      begins with; it may give up what it is given.
  """
  abstract = abstract_state(module, optimizer, rules, batch_size, offload_optimizer)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  init = lambda seed: _init(module, optimizer, batch_size, seed)[1]
  if initial is None:
    return jax.jit(init, out_shardings=shardings)(seed)
  without = lambda state: dataclasses.replace(state, opt_state=None)
  state = jax.jit(lambda seed: without(init(seed)), out_shardings=without(shardings))(seed)
  params = initial(state.params)
  init_optimizer = functools.partial(_init_optimizer, module, optimizer)
  opt_state = jax.jit(init_optimizer, out_shardings=shardings.opt_state)(params)
  return dataclasses.replace(state, params=params, opt_state=opt_state)
