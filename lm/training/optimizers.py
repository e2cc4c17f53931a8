"""Optimisers and schedules, through optax."""
import dataclasses
from typing import Literal, Optional

import jax
import jax.numpy as jnp
import optax

from lm.training import muon as muon_lib


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Learning rate by step: linear warm-up to `learning_rate`, then the named decay.

  cosine: half a cosine to `end_factor * learning_rate` at the last step (arXiv:1608.03983).
  linear: a line to the same.
  rsqrt: learning_rate * sqrt(warmup_steps / step) (arXiv:1910.10683, section 3.1.2).
  wsd: constant, then over the last `decay_fraction` of the steps a line down (arXiv:2405.18392).
  constant: none.
  """
  kind: Literal['cosine', 'linear', 'rsqrt', 'wsd', 'constant'] = 'cosine'
  learning_rate: float = 3e-4
  warmup_steps: int = 100
  end_factor: float = 0.1
  decay_fraction: float = 0.2

  def __post_init__(self):
    if self.learning_rate <= 0:
      raise ValueError(f'learning_rate={self.learning_rate} must be greater than 0')
    if self.warmup_steps < 0:
      raise ValueError(f'warmup_steps={self.warmup_steps} must not be negative')
    if not 0 <= self.end_factor <= 1:
      raise ValueError(f'end_factor={self.end_factor} must be in [0, 1]: a share of learning_rate')
    if not 0 < self.decay_fraction <= 1:
      raise ValueError(f'decay_fraction={self.decay_fraction} must be in (0, 1]: a share of the '
                       'steps')

  def build(self, num_steps: int) -> optax.Schedule:
    """The schedule of a run of `num_steps` steps; its step 0 is the first update."""
    warmup = min(self.warmup_steps, num_steps)
    after, peak, end = num_steps - warmup, self.learning_rate, self.end_factor * self.learning_rate
    if self.kind == 'cosine':
      decay = optax.cosine_decay_schedule(peak, max(after, 1), self.end_factor)
    elif self.kind == 'linear':
      decay = optax.linear_schedule(peak, end, max(after, 1))
    elif self.kind == 'rsqrt':
      start = max(warmup, 1)
      decay = lambda step: peak * (start / jnp.maximum(step + start, 1))**0.5  # < 1 only in warm-up
    elif self.kind == 'wsd':
      cooldown = min(round(self.decay_fraction * num_steps), after)
      decay = optax.linear_schedule(peak, end, max(cooldown, 1), after - cooldown)
    else:
      decay = optax.constant_schedule(peak)
    # Starts at peak / (warmup + 1), not at 0: a step of learning rate 0 would teach nothing.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, max(warmup, 1))
    return optax.join_schedules([rise, decay], [warmup])


def _check(config: 'AdamW | Muon'):
  for name in ('b1', 'b2', 'momentum'):
    if not 0 <= getattr(config, name, 0) < 1:
      raise ValueError(f'{name}={getattr(config, name)} must be in [0, 1)')
  if config.weight_decay < 0:
    raise ValueError(f'weight_decay={config.weight_decay} must not be negative')
  if config.clip_norm is not None and config.clip_norm <= 0:
    raise ValueError(f'clip_norm={config.clip_norm} must be greater than 0; None does not clip')


@dataclasses.dataclass(frozen=True)
class AdamW:
  """AdamW (arXiv:1711.05101) after clipping the gradient to a global norm.

  weight_decay: applies to matrices only (parameters of two or more axes, the layer axis aside),
    scaled by the learning rate as in optax and PyTorch.
  clip_norm: the largest global norm of a gradient; None does not clip.
  """
  schedule: Schedule = Schedule()
  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: Optional[float] = 1.0

  __post_init__ = _check

  def build(self, num_steps: int) -> optax.GradientTransformation:
    """The optax chain of a run of `num_steps` steps."""
    adamw = optax.adamw(self.schedule.build(num_steps), self.b1, self.b2, self.epsilon,
                        weight_decay=self.weight_decay, mask=decayed)
    return adamw if self.clip_norm is None else optax.chain(
        optax.clip_by_global_norm(self.clip_norm), adamw)


@dataclasses.dataclass(frozen=True)
class Muon:
  """Muon (Jordan et al. 2024; arXiv:2502.16982) for the blocks' matrices, AdamW for all else.

  momentum: of Muon; b1, b2: of AdamW. weight_decay and clip_norm: as in `AdamW`.
  """
  schedule: Schedule = Schedule()
  momentum: float = 0.95
  b1: float = 0.9
  b2: float = 0.95
  weight_decay: float = 0.1
  clip_norm: Optional[float] = 1.0

  __post_init__ = _check

  def build(self, num_steps: int) -> optax.GradientTransformation:
    """The optax chain of a run of `num_steps` steps."""
    schedule = self.schedule.build(num_steps)
    muon = optax.chain(muon_lib.scale_by_orthogonal_momentum(self.momentum),
                       optax.add_decayed_weights(self.weight_decay),
                       optax.scale_by_learning_rate(schedule))
    adamw = optax.adamw(schedule, self.b1, self.b2, weight_decay=self.weight_decay, mask=decayed)
    both = optax.partition({True: muon, False: adamw}, muon_lib.is_matrix)
    return both if self.clip_norm is None else optax.chain(
        optax.clip_by_global_norm(self.clip_norm), both)


def decayed(params):
  """True for matrices and embeddings; False for biases, scales and anything else of one axis a
  layer."""
  is_matrix = lambda path, _: path[-1].key not in ('bias', 'scale')
  return jax.tree_util.tree_map_with_path(is_matrix, params)
