"""What training in few bits needs besides products in them: a scaled loss, rounding without bias,
and state that is no parameter.

float16 loses gradients below 6e-8: the loss is multiplied by a scale that halves when a gradient
overflows and doubles after a while without (arXiv:1710.03740, section 3.2). bfloat16 parameters
lose updates below 1/256 of them: these are rounded up or down with probabilities by the distance,
so that their sum stays right (arXiv:2010.06192).
"""
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.errors import UserError
from lm.parallel.rules import Rules
from lm.training import guards
from pallas_kernels import stochastic_rounding


@dataclasses.dataclass(frozen=True)
class LossScale:
  """A dynamic loss scale (arXiv:1710.03740, section 3.2); `guards.py` has the mechanism.

  initial: of the first step.
  growth_steps: steps without an overflow after which it doubles.
  """
  initial: float = 2.0**15
  growth_steps: int = 2000

  def __post_init__(self):
    if not 0 < self.initial < math.inf:
      raise ValueError(f'initial={self.initial} must be a positive number')
    if self.growth_steps < 1:
      raise ValueError(f'growth_steps={self.growth_steps} must be at least 1')


def apply_updates(params: Any, updates: Any, step: jax.Array) -> Any:
  """`optax.apply_updates`, with stochastic rounding of bfloat16 parameters, other at each step."""
  def one(p, u):
    if p.dtype != jnp.bfloat16:
      return optax.apply_updates(p, u)
    return stochastic_rounding.to_bfloat16(p.astype(jnp.float32) + u.astype(jnp.float32), step)

  return jax.tree.map(one, params, updates)


def prepare(optimizer: optax.GradientTransformation, param_dtype: str,
            loss_scale: LossScale | None = None, guard: guards.Guard | None = None
            ) -> optax.GradientTransformation:
  """The optimiser for parameters of this dtype, a loss that is scaled or not, and a guard or
  none."""
  if param_dtype == 'bfloat16':
    optimizer = in_bfloat16(optimizer)
  return guards.guarded(optimizer, guard, loss_scale)


def in_bfloat16(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """The optimiser with its state in bfloat16, rounded stochastically; it computes in float32."""
  optimizer = optax.with_extra_args_support(optimizer)

  def stored(state, step):
    return jax.tree.map(lambda x: stochastic_rounding.to_bfloat16(x, step)
                        if x.dtype == jnp.float32 and x.ndim else x, state)

  wide = lambda tree: jax.tree.map(
      lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)

  def init(params):
    return jnp.int32(0), stored(optimizer.init(wide(params)), 0)

  def update(grads, state, params=None, **extra):
    step, inner = state
    updates, inner = optimizer.update(wide(grads), wide(inner), wide(params), **extra)
    return updates, (step + 1, stored(inner, step + 1))

  return optax.GradientTransformationExtraArgs(init, update)


def check(config: Any, loss: Any, rules: Rules) -> None:
  """That whoever looks at a parameter's product looks once a step, and sees all of the batch.

  Raises:
    UserError: it does not.
  """
  why = ('the loss compares rows, whose encoder is called more than once a step' if loss.whole_batch
         else 'each stage of a pipeline sees a part of the batch' if rules.shards('layers') > 1
         else None)
  if getattr(config, 'products', None) == 'fp8_delayed' and why:
    raise UserError(f"products='fp8_delayed' keeps what every product saw in a step, and {why}; "
                    "take products='fp8'")


def is_history(path: tuple) -> bool:
  """Whether the leaf is no parameter, but what products saw (`fp8_delayed`): its gradient is its
  next value."""
  return is_history_name(path[-1].key)


def is_history_name(name: str) -> bool:
  """`is_history` by the last name of a path."""
  return name == 'history'


def add_gradients(a: Any, b: Any) -> Any:
  """Of two microbatches; what products saw in both is the larger."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x, y: jnp.maximum(x, y) if is_history(path) else x + y, a, b)


def sum_gradients(grads: Any, axes: tuple[str, ...]) -> Any:
  """Over the devices of mesh axes, inside `jax.shard_map`; of histories the largest."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x: (jax.lax.pmax if is_history(path) else jax.lax.psum)(x, axes), grads)


def split_histories(grads: Any) -> tuple[Any, Any]:
  """The gradients with zeros in place of histories, and the tree to put them back from."""
  plain = jax.tree_util.tree_map_with_path(
      lambda path, x: jnp.zeros_like(x) if is_history(path) else x, grads)
  return plain, grads


def put_histories(params: Any, seen: Any) -> Any:
  """The parameters with the histories of `seen`."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x, y: y if is_history(path) else x, params, seen)
