"""Learning rates by step."""
import dataclasses
from typing import Literal, Optional

import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Learning rate by step: linear warm-up to `learning_rate`, then the named decay.

  cosine: half a cosine to `end_factor * learning_rate` at the last step (arXiv:1608.03983).
  cyclic: `num_cycles` of these, each from the peak (the same, section 3, without lengthening).
  linear: a line to the same.
  polynomial: the remaining share of the steps to the power `power`, to the same.
  rsqrt: learning_rate * sqrt(warmup_steps / step) (arXiv:1910.10683, section 3.1.2).
  wsd: constant, then over the last `decay_fraction` of the steps a line down (arXiv:2405.18392).
  constant: none.

  warmup_share: of all steps, in place of `warmup_steps`.
  cooldown_from: from this step on, a line from the rate that it has to `end_factor` of it at the
    last step, for schedules that do not end by themselves: constant, wsd, rsqrt. A run goes on from
    its checkpoint of that step as if it had been meant to: copy the run, raise NUM_STEPS, set this.
  """
  kind: Literal['constant', 'linear', 'cosine', 'cyclic', 'polynomial', 'rsqrt', 'wsd'] = 'cosine'
  learning_rate: float = 3e-4
  warmup_steps: int = 100
  end_factor: float = 0.1
  decay_fraction: float = 0.2
  power: float = 2.0
  num_cycles: int = 4
  cooldown_from: Optional[int] = None
  warmup_share: Optional[float] = None

  def __post_init__(self):
    for name in ('learning_rate', 'power'):
      if getattr(self, name) <= 0:
        raise ValueError(f'{name}={getattr(self, name)} must be greater than 0')
    if self.warmup_steps < 0:
      raise ValueError(f'warmup_steps={self.warmup_steps} must not be negative')
    if self.warmup_share is not None and not 0 <= self.warmup_share <= 1:
      raise ValueError(f'warmup_share={self.warmup_share} must be in [0, 1]: a share of the steps')
    if not 0 <= self.end_factor <= 1:
      raise ValueError(f'end_factor={self.end_factor} must be in [0, 1]: a share of learning_rate')
    if not 0 < self.decay_fraction <= 1:
      raise ValueError(f'decay_fraction={self.decay_fraction} must be in (0, 1]: a share of the '
                       'steps')
    if self.num_cycles < 1:
      raise ValueError(f'num_cycles={self.num_cycles} must be at least 1')
    if self.cooldown_from is not None and self.kind not in ('constant', 'wsd', 'rsqrt'):
      raise ValueError(f'cooldown_from={self.cooldown_from} ends a schedule that has no end of its '
                       f'own, and {self.kind} has one; use constant, wsd or rsqrt, or leave it out')

  def build(self, num_steps: int) -> optax.Schedule:
    """The schedule of a run of `num_steps` steps; its step 0 is the first update.

    Raises:
      ValueError: the cool-down begins where the run ends, or in the warm-up.
    """
    warmup = (min(self.warmup_steps, num_steps) if self.warmup_share is None else
              round(self.warmup_share * num_steps))
    peak = self.learning_rate
    decay = self._decay(num_steps, warmup, num_steps - warmup)
    # Starts at peak / (warmup + 1), not at 0: a step of learning rate 0 would teach nothing.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, max(warmup, 1))
    rate, start = optax.join_schedules([rise, decay], [warmup]), self.cooldown_from
    if start is None:
      return rate
    if not warmup <= start < num_steps:
      raise ValueError(f'cooldown_from={start} must be a step from the end of the warm-up, '
                       f'{warmup}, to the one before the last, {num_steps - 1}')
    share = optax.linear_schedule(1.0, self.end_factor, num_steps - start, start)
    return lambda step: rate(jnp.minimum(step, start)) * share(step)

  def _decay(self, num_steps: int, warmup: int, after: int) -> optax.Schedule:
    """From the step after the warm-up on."""
    peak, end = self.learning_rate, self.end_factor * self.learning_rate
    if self.kind == 'cosine':
      return optax.cosine_decay_schedule(peak, max(after, 1), self.end_factor)
    if self.kind == 'cyclic':
      ends = [after * i // self.num_cycles for i in range(1, self.num_cycles + 1)]
      lengths = [end - start for start, end in zip([0, *ends], ends)]
      return optax.join_schedules([optax.cosine_decay_schedule(peak, max(n, 1), self.end_factor)
                                   for n in lengths], ends[:-1])
    if self.kind == 'linear':
      return optax.linear_schedule(peak, end, max(after, 1))
    if self.kind == 'polynomial':
      return optax.polynomial_schedule(peak, end, self.power, max(after, 1))
    if self.kind == 'rsqrt':
      start = max(warmup, 1)
      return lambda step: peak * (start / jnp.maximum(step + start, 1))**0.5  # < 1 only in warm-up
    if self.kind == 'wsd' and self.cooldown_from is None:
      cooldown = min(round(self.decay_fraction * num_steps), after)
      return optax.linear_schedule(peak, end, max(cooldown, 1), after - cooldown)
    return optax.constant_schedule(peak)
