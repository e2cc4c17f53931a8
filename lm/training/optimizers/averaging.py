"""Averages of the parameters, which are what a run evaluates where its optimiser keeps one."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


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


def evaluated(opt_state: Any, params: Any) -> Any:
  """The average that the state holds, where the parameters lie; else the parameters."""
  kinds = Average, optax.contrib.ScheduleFreeState
  is_average = lambda x: isinstance(x, kinds)
  place = lambda tree: jax.tree.map(lambda x, p: jax.device_put(x, p.sharding), tree, params)
  for node in filter(is_average, jax.tree.leaves(opt_state, is_leaf=is_average)):
    if isinstance(node, Average):
      return place(node.average)
    return schedule_free_average(params, place(node.z), node.b1)
  return params
