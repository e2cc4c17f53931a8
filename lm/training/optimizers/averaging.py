"""Averages of the parameters, which are what a run evaluates where its optimiser keeps one."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.training.optimizers.paths import names_of


class Average(NamedTuple):
  """average: of the parameters after each update, in their dtypes and shardings."""
  average: Any


def keep_average(decay: float) -> optax.GradientTransformation:
  """Keeps decay * average + (1 - decay) * parameters; stands last in a chain.

  It starts at the initial parameters. Its memory is 1 / (1 - decay) steps: choose it well below
  the run's.
  """
  def update(updates, state, params):
    after = optax.apply_updates(params, updates)
    return updates, Average(optax.incremental_update(after, state.average, 1 - decay))

  return optax.GradientTransformation(
      lambda params: Average(jax.tree.map(jnp.copy, params)), update)


def schedule_free_average(params: Any, z: Any, b1: Any) -> Any:
  """What schedule-free learning evaluates, of the parameters at which it takes gradients."""
  return jax.tree.map(lambda y, z: (y - (1 - b1) * z) / b1, params, z)


_KINDS = Average, optax.contrib.ScheduleFreeState


def _kept(opt_state: Any) -> list[Any]:
  """The states of optimisers that keep an average; there is one at most."""
  is_average = lambda x: isinstance(x, _KINDS)
  return list(filter(is_average, jax.tree.leaves(opt_state, is_leaf=is_average)))


def is_kept(opt_state: Any) -> bool:
  """Whether the state holds an average."""
  return bool(_kept(opt_state))


def evaluated(opt_state: Any, params: Any) -> Any:
  """The average that the state holds, where the parameters lie; else the parameters, as are those
  that do not train."""
  if not is_kept(opt_state):
    return params
  node, = _kept(opt_state)
  tree = node.average if isinstance(node, Average) else node.z
  kept = {names_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}

  def one(path, param):
    leaf = kept.get(names_of(path))
    if leaf is None:
      return param
    leaf = jax.device_put(leaf, param.sharding)
    return leaf if isinstance(node, Average) else schedule_free_average(param, leaf, node.b1)

  return jax.tree_util.tree_map_with_path(one, params)
