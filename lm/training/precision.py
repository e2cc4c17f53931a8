"""What training in few bits needs besides products in them: a scaled loss, rounding without bias,
and state that is no parameter.

float16 loses gradients below 6e-8: the loss is multiplied by a scale that halves when a gradient
overflows and doubles after a while without (arXiv:1710.03740, section 3.2). bfloat16 parameters
lose updates below 1/256 of them: these are rounded up or down with probabilities by the distance,
so that their sum stays right (arXiv:2010.06192).
"""
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.errors import UserError
from lm.parallel.rules import Rules
from pallas_kernels import stochastic_rounding


@dataclasses.dataclass(frozen=True)
class LossScale:
  """A dynamic loss scale (arXiv:1710.03740, section 3.2).

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


class ScaledState(NamedTuple):
  """scale: of the next step's loss; good_steps: without an overflow; skipped_steps: with one."""
  scale: jax.Array
  good_steps: jax.Array
  skipped_steps: jax.Array
  inner: Any


def scaled(optimizer: optax.GradientTransformation, config: LossScale
           ) -> optax.GradientTransformation:
  """The optimiser with a loss scale in its state; a gradient that is not finite updates nothing."""
  optimizer = optax.with_extra_args_support(optimizer)

  def init(params):
    return ScaledState(jnp.float32(config.initial), jnp.int32(0), jnp.int32(0),
                       optimizer.init(params))

  def update(grads, state, params=None, **extra):
    good = jnp.isfinite(optax.tree.norm(grads))
    updates, inner = optimizer.update(grads, state.inner, params, **extra)
    updates = jax.tree.map(lambda x: jnp.where(good, x, 0), updates)
    inner = jax.tree.map(lambda new, old: jnp.where(good, new, old), inner, state.inner)
    good_steps = jnp.where(good, state.good_steps + 1, 0)
    grows = good_steps >= config.growth_steps
    scale = jnp.where(good, jnp.where(grows, 2 * state.scale, state.scale), state.scale / 2)
    return updates, ScaledState(jnp.clip(scale, 1, 2.0**126), jnp.where(grows, 0, good_steps),
                                state.skipped_steps + ~good, inner)

  return optax.GradientTransformationExtraArgs(init, update)


def loss_scale(opt_state: Any) -> jax.Array | None:
  """What the loss is multiplied by before its gradient is taken; None is nothing."""
  return opt_state.scale if isinstance(opt_state, ScaledState) else None


def metrics(opt_state: Any) -> dict[str, jax.Array]:
  """Of the loss scale, where there is one."""
  if not isinstance(opt_state, ScaledState):
    return {}
  return {'loss_scale': opt_state.scale, 'skipped_steps': opt_state.skipped_steps}


def apply_updates(params: Any, updates: Any, step: jax.Array) -> Any:
  """`optax.apply_updates`, with stochastic rounding of bfloat16 parameters, other at each step."""
  def one(p, u):
    if p.dtype != jnp.bfloat16:
      return optax.apply_updates(p, u)
    return stochastic_rounding.to_bfloat16(p.astype(jnp.float32) + u.astype(jnp.float32), step)

  return jax.tree.map(one, params, updates)


def prepare(optimizer: optax.GradientTransformation, param_dtype: str,
            config: LossScale | None) -> optax.GradientTransformation:
  """The optimiser for parameters of this dtype, and a loss that is scaled, or not."""
  if param_dtype == 'bfloat16':
    optimizer = in_bfloat16(optimizer)
  return optimizer if config is None else scaled(optimizer, config)


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
  return path[-1].key == 'history'


def add_gradients(a: Any, b: Any) -> Any:
  """Of two microbatches; what products saw in both is the larger."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x, y: jnp.maximum(x, y) if is_history(path) else x + y, a, b)


def split_histories(grads: Any) -> tuple[Any, Any]:
  """The gradients with zeros in place of histories, and the tree to put them back from."""
  plain = jax.tree_util.tree_map_with_path(
      lambda path, x: jnp.zeros_like(x) if is_history(path) else x, grads)
  return plain, grads


def put_histories(params: Any, seen: Any) -> Any:
  """The parameters with the histories of `seen`."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x, y: y if is_history(path) else x, params, seen)
