"""What happens at a step that is not as the steps before it: nothing is updated, or the run goes
back to a checkpoint and steps over the data.

Both, and the loss scale of float16, are one wrapper of the optimiser with scalars in its state, so
that they are the same after a restart, on every host, and cost no wait for the devices.
"""
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

# What is a spike in it, by action.
WATCHED = {'skip': 'norm', 'rollback': 'loss'}


@dataclasses.dataclass(frozen=True)
class Guard:
  """What is a spike, and what is done about it.

  A value is a spike when its logarithm lies `deviations` standard deviations above its running
  mean, and the value is `factor` times that mean; what is not finite is one too. The mean and the
  deviation are those of ZClip (arXiv:2504.02507, section 3), of logarithms: a spike counts in them
  with half of the greatest deviation that is none, so that some in a row are still spikes, and a
  level that stays becomes the new one.

  action: 'skip': a step whose gradient's norm is a spike updates nothing. 'rollback': where the
    loss is a spike, the run goes back to a checkpoint and steps over the data since then (PaLM,
    arXiv:2204.02311, section 5.1).
  memory: steps that the running mean reaches back; before as many, only what is not finite is a
    spike.
  limit: skipped steps in a row, or rollbacks in the run, after which it stops.
  steps_back: the checkpoint gone back to is at least so much older than the spike, if one is.
  batches_over: from that checkpoint on that are stepped over; at least up to the spike.
  """
  action: Literal['skip', 'rollback'] = 'skip'
  deviations: float = 6.0
  factor: float = 1.5
  memory: int = 50
  limit: int = 20
  steps_back: int = 100
  batches_over: int = 200

  def __post_init__(self):
    if self.deviations <= 0 or self.factor <= 1:
      raise ValueError(f'deviations={self.deviations} must be above 0 and factor={self.factor} '
                       'above 1, or every other step is a spike')
    for name, least in (('memory', 2), ('limit', 1), ('steps_back', 1), ('batches_over', 1)):
      if getattr(self, name) < least:
        raise ValueError(f'{name}={getattr(self, name)} must be at least {least}')


class Running(NamedTuple):
  """Of logarithms. mean, variance: float32; count: int32, of values so far."""
  mean: jax.Array
  variance: jax.Array
  count: jax.Array


class Scale(NamedTuple):
  """scale: of the next step's loss; good_steps: since it last changed."""
  scale: jax.Array
  good_steps: jax.Array


class GuardedState(NamedTuple):
  """skipped_steps: so far; spikes_in_a_row: up to the last step; running: of what the guard
  watches, by its name; scale: None without a loss scale; inner: of the optimiser."""
  skipped_steps: jax.Array
  spikes_in_a_row: jax.Array
  running: dict[str, Running]
  scale: Scale | None
  inner: Any


def guarded(optimizer: optax.GradientTransformation, guard: Guard | None, loss_scale: Any = None
            ) -> optax.GradientTransformation:
  """The optimiser under a guard, a loss scale (`precision.LossScale`), or both; its update takes
  the loss as `loss`.

  A gradient that is not finite updates nothing, neither parameters nor the optimiser's state, but
  under a rollback, which undoes it. One that overflowed under a loss scale is no reason to go back.
  """
  if guard is None and loss_scale is None:
    return optimizer
  optimizer = optax.with_extra_args_support(optimizer)
  goes_back = guard is not None and guard.action == 'rollback'
  skips = not goes_back or loss_scale is not None

  def init(params):
    return initial(guard, loss_scale)._replace(inner=optimizer.init(params))

  def update(grads, state, params=None, *, loss, **extra):
    norm = optax.tree.norm(grads)
    finite, high, running = jnp.isfinite(norm), False, {}
    for name in state.running:
      high, running[name] = observe(guard, state.running[name], loss if goes_back else norm)
    skip = ~finite if goes_back else ~finite | high
    # An overflow under a loss scale is its own affair.
    spike = high if goes_back and loss_scale is not None else ~finite | high
    updates, inner = optimizer.update(grads, state.inner, params, **extra)
    if skips:
      updates = jax.tree.map(lambda x: jnp.where(skip, 0, x), updates)
      inner = jax.tree.map(lambda new, old: jnp.where(skip, old, new), inner, state.inner)
    return updates, GuardedState(
        state.skipped_steps + (skip if skips else 0),
        jnp.where(spike, state.spikes_in_a_row + 1, 0), running,
        loss_scale and _next_scale(loss_scale, state.scale, finite), inner)

  return optax.GradientTransformationExtraArgs(init, update)


def initial(guard: Guard | None, loss_scale: Any) -> GuardedState:
  """Of the first step, without an optimiser's."""
  watched = {} if guard is None else {WATCHED[guard.action]: Running(
      jnp.float32(0), jnp.float32(0), jnp.int32(0))}
  scale = loss_scale and Scale(jnp.float32(loss_scale.initial), jnp.int32(0))
  return GuardedState(jnp.int32(0), jnp.int32(0), watched, scale, None)


def as_saved(opt_state: Any, arrays: Iterable[str], scalar: Callable[[Any], Any]) -> Any:
  """The optimiser's state as a checkpoint has it, which may be of another guard than the run's.

  Args:
    opt_state: of the run.
    arrays: the paths that the checkpoint holds.
    scalar: from a dtype to a leaf.
  """
  inner = opt_state.inner if isinstance(opt_state, GuardedState) else opt_state
  if 'opt_state/spikes_in_a_row' not in arrays:
    return inner
  i, f = scalar(jnp.int32), scalar(jnp.float32)
  running = {name: Running(f, f, i) for name in WATCHED.values()
             if f'opt_state/running/{name}/mean' in arrays}
  return GuardedState(i, i, running, Scale(f, i) if 'opt_state/scale/scale' in arrays else None,
                      inner)


def adopt(restored: Any, guard: Guard | None, loss_scale: Any, place: Callable[[Any], Any]) -> Any:
  """What `as_saved` restored, as the run's own state: where its guard is new, it begins.

  Args:
    place: puts scalars where the state lies.
  """
  is_guarded = isinstance(restored, GuardedState)
  if guard is None and loss_scale is None:
    return restored.inner if is_guarded else restored
  new = place(initial(guard, loss_scale))
  if not is_guarded:
    return new._replace(inner=restored)
  scale = new.scale if new.scale is None or restored.scale is None else restored.scale
  return restored._replace(scale=scale, running={
      name: restored.running.get(name, running) for name, running in new.running.items()})


def observe(guard: Guard, running: Running, value: jax.Array) -> tuple[jax.Array, Running]:
  """Whether a value is a spike, and the statistics with it."""
  finite = jnp.isfinite(value)
  x = jnp.log(jnp.maximum(value, jnp.finfo(jnp.float32).tiny))
  deviation = jnp.sqrt(running.variance)
  limit = running.mean + jnp.maximum(guard.deviations * deviation, math.log(guard.factor))
  high = (running.count >= guard.memory) & (x > limit)
  weight = jnp.maximum(1 / (running.count + 1), 1 / guard.memory)
  step = jnp.where(high, (limit - running.mean) / 2, x - running.mean)
  seen = Running(running.mean + weight * step,
                 (1 - weight) * (running.variance + weight * step**2), running.count + 1)
  return high | ~finite, jax.tree.map(lambda new, old: jnp.where(finite, new, old), seen, running)


def _next_scale(config: Any, state: Scale, good: jax.Array) -> Scale:
  """Halved after an overflow, doubled after `growth_steps` without (arXiv:1710.03740, 3.2)."""
  good_steps = jnp.where(good, state.good_steps + 1, 0)
  grows = good_steps >= config.growth_steps
  scale = jnp.where(good, jnp.where(grows, 2 * state.scale, state.scale), state.scale / 2)
  return Scale(jnp.clip(scale, 1, 2.0**126), jnp.where(grows, 0, good_steps))


def loss_scale(opt_state: Any) -> jax.Array | None:
  """What the loss is multiplied by before its gradient is taken; None is nothing."""
  scale = opt_state.scale if isinstance(opt_state, GuardedState) else None
  return None if scale is None else scale.scale


def unless_skipped(before: Any, after: Any, new: Any, old: Any) -> Any:
  """`new`, or `old` where the step between two optimiser states was skipped."""
  if not isinstance(after, GuardedState):
    return new
  skipped = after.skipped_steps > before.skipped_steps
  return jax.tree.map(lambda x, y: jnp.where(skipped, y, x), new, old)


def metrics(opt_state: Any) -> dict[str, jax.Array]:
  """Of the guard and the loss scale, where there is one."""
  if not isinstance(opt_state, GuardedState):
    return {}
  scale = {} if opt_state.scale is None else {'loss_scale': opt_state.scale.scale}
  return {**scale, 'skipped_steps': opt_state.skipped_steps,
          'spikes_in_a_row': opt_state.spikes_in_a_row}
