"""One config an optimiser; `Optimizer` has what all of them share."""
import dataclasses
from typing import ClassVar, Literal, Optional

import optax

from lm.training.optimizers import averaging, mixout, muon, paths, soap, sophia
from lm.training.optimizers.paths import Group
from lm.training.optimizers.quantized import quantized
from lm.training.optimizers.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """From gradients to updates, in this order:

    clipping -> direction (by the class) -> + weight_decay * parameter -> times the learning rate

  weight_decay: as above, hence times the learning rate, as in optax and PyTorch.
  clip_norm: the largest global norm of a gradient; None does not clip.
  clip_units: the largest norm of a unit's gradient, as a share of its weights' (AGC,
    arXiv:2102.06171); None does not clip.
  groups: patterns of paths, with their shares of learning rate and weight decay. The first that
    matches a parameter counts; one that none matches is an error.
  layer_decay: the learning rate of a layer is so many times that of the layer above it.
  average_decay: also keeps an average of the parameters, which then is what is evaluated; None does
    not.
  state_bits: 8 keeps moments in 8 bits (arXiv:2110.02861).
  mixout: the share of the kernels' numbers with which a step computes as they were before training
    (arXiv:1909.11299, whose choice is 0.7 to 0.9); a copy of them is kept. 0 for none.
  """
  schedule: Schedule = Schedule()
  weight_decay: float = 0.1
  clip_norm: Optional[float] = 1.0
  clip_units: Optional[float] = None
  groups: tuple[Group, ...] = paths.GROUPS
  layer_decay: float = 1.0
  average_decay: Optional[float] = None
  state_bits: Literal[8, 32] = 32
  mixout: float = 0.0

  # Under muP the update of a block's kernel shrinks by width**-width_power; None: no such rule.
  width_power: ClassVar[Optional[float]] = None

  def __post_init__(self):
    for name in ('b1', 'b2', 'momentum', 'decay', 'average_decay', 'mixout'):
      value = getattr(self, name, None)
      if value is not None and not 0 <= value < 1:
        raise ValueError(f'{name}={value} must be in [0, 1)')
    if self.weight_decay < 0:
      raise ValueError(f'weight_decay={self.weight_decay} must not be negative')
    for name in ('clip_norm', 'clip_units'):
      value = getattr(self, name)
      if value is not None and value <= 0:
        raise ValueError(f'{name}={value} must be greater than 0; None does not clip')
    if not 0 < self.layer_decay <= 1:
      raise ValueError(f'layer_decay={self.layer_decay} must be in (0, 1]; 1 is the same for all')
    for name in ('every', 'block_size'):
      if getattr(self, name, 1) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')

  def direction(self) -> optax.GradientTransformation:
    """What is this optimiser's own: from gradients to what the step goes against."""
    raise TypeError(f'{type(self).__name__} is no optimiser by itself; take one of its subclasses')

  def after_decay(self) -> Optional[optax.GradientTransformation]:
    """What the direction and the decay together go through."""
    return None

  def averaged(self, inner: optax.GradientTransformation, rate: optax.Schedule
               ) -> optax.GradientTransformation:
    """The whole step, and the average of the parameters that it keeps."""
    if self.average_decay is None:
      return inner
    return optax.chain(inner, averaging.keep_average(self.average_decay))

  def is_frozen(self, path: str) -> bool:
    """Whether the parameter of this path keeps its values, since its group has the rate 0."""
    return paths.first_match(self.groups, path).rate == 0

  def build(self, num_steps: int, width: float = 1.0) -> optax.GradientTransformation:
    """The optax chain of a run of `num_steps` steps.

    Args:
      width: of the model, as a multiple of that for which the learning rate was chosen (muP,
        arXiv:2203.03466, table 8). Weight decay stays what it is at any width.

    Raises:
      ValueError: this optimiser has no rule for another width.
    """
    if width != 1 and self.width_power is None:
      raise ValueError(f'base_width makes this model {width:g} times as wide, and '
                       f'{type(self).__name__} has no rule for that; take AdamW, Adam, Lion, '
                       'RMSprop, Adagrad or Muon, or leave base_width out')
    factor = None if width == 1 else width ** -self.width_power
    rate = self.schedule.build(num_steps)
    direction = self.direction()
    inner = [quantized(direction) if self.state_bits == 8 else direction,
             paths.add_decay(self.weight_decay, self.groups, factor)]
    inner += [self.after_decay()] if self.after_decay() else []
    if self.layer_decay != 1 or any(group.rate != 1 for group in self.groups):
      inner.append(paths.scale_by_place(self.groups, self.layer_decay))
    step = self.averaged(optax.chain(*inner, optax.scale_by_learning_rate(rate)), rate)
    clips = [mixout.mixout(self.mixout)] if self.mixout else []
    clips += [optax.clip_by_global_norm(self.clip_norm)] if self.clip_norm else []
    clips += [paths.clip_units(self.clip_units)] if self.clip_units else []
    return optax.chain(*clips, step) if clips else step


def _matrices(transform: optax.GradientTransformation, b1: float, b2: float,
              epsilon: float = 1e-8) -> optax.GradientTransformation:
  """A transformation of the kernels of blocks and heads, and Adam of the rest."""
  return optax.partition({True: transform, False: optax.scale_by_adam(b1, b2, epsilon)},
                         paths.is_matrix)


@dataclasses.dataclass(frozen=True)
class SGD(Optimizer):
  """Gradient descent, with momentum (Polyak's, or Nesterov's, arXiv:1212.0901) unless that is 0."""
  weight_decay: float = 0.0
  momentum: float = 0.9
  nesterov: bool = False

  def direction(self) -> optax.GradientTransformation:
    """The momentum, a sum and not a mean, as in PyTorch."""
    return optax.trace(self.momentum, self.nesterov) if self.momentum else optax.identity()


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
  """AdamW (arXiv:1711.05101)."""
  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = 1e-8

  width_power = 1.0

  def direction(self) -> optax.GradientTransformation:
    """Adam's."""
    return optax.scale_by_adam(self.b1, self.b2, self.epsilon)


@dataclasses.dataclass(frozen=True)
class Adam(AdamW):
  """Adam (arXiv:1412.6980) with its author's b2, and without weight decay."""
  weight_decay: float = 0.0
  b2: float = 0.999


@dataclasses.dataclass(frozen=True)
class Adagrad(Optimizer):
  """Adagrad (Duchi et al. 2011): over the root of the sum of all squared gradients so far."""
  weight_decay: float = 0.0
  initial: float = 0.1
  epsilon: float = 1e-7

  width_power = 1.0

  def direction(self) -> optax.GradientTransformation:
    """The gradient over the root."""
    return optax.scale_by_rss(self.initial, self.epsilon)


@dataclasses.dataclass(frozen=True)
class RMSprop(Optimizer):
  """RMSprop (Hinton 2012), in PyTorch's form: epsilon is added to the root."""
  weight_decay: float = 0.0
  decay: float = 0.99
  epsilon: float = 1e-8
  momentum: float = 0.0

  width_power = 1.0

  def direction(self) -> optax.GradientTransformation:
    """The gradient over its root mean square, with momentum unless that is 0."""
    scaled = optax.scale_by_rms(self.decay, self.epsilon, eps_in_sqrt=False)
    return optax.chain(scaled, optax.trace(self.momentum)) if self.momentum else scaled


@dataclasses.dataclass(frozen=True)
class Adafactor(Optimizer):
  """Adafactor (arXiv:1804.04235) as T5 has it: no momentum, steps relative to the parameter's size.

  Second moments of a matrix are a row and a column, where both of its sides have
  `min_size_to_factor`. The matrices are those of single layers, heads merged.

  clip_rms: the largest root mean square of a matrix's update.
  min_scale: the least size of a parameter.
  """
  weight_decay: float = 0.0
  clip_norm: Optional[float] = None
  decay_power: float = 0.8
  clip_rms: float = 1.0
  min_scale: float = 1e-3
  min_size_to_factor: int = 128

  def direction(self) -> optax.GradientTransformation:
    """Of each matrix by itself."""
    return paths.per_matrix(optax.chain(
        optax.scale_by_factored_rms(decay_rate=self.decay_power,
                                    min_dim_size_to_factor=self.min_size_to_factor),
        optax.clip_by_block_rms(self.clip_rms), optax.scale_by_param_block_rms(self.min_scale)))


@dataclasses.dataclass(frozen=True)
class Lion(Optimizer):
  """Lion (arXiv:2302.06675): the sign of a momentum. A third to a tenth of AdamW's learning rate,
  and as many times its weight decay."""
  weight_decay: float = 1.0
  b1: float = 0.9
  b2: float = 0.99

  width_power = 1.0

  def direction(self) -> optax.GradientTransformation:
    """Ones."""
    return optax.scale_by_lion(self.b1, self.b2)


@dataclasses.dataclass(frozen=True)
class LAMB(Optimizer):
  """LAMB (arXiv:1904.00962): Adam's direction and the decay, as long as the matrix itself.

  The lengths are those of single layers.
  """
  weight_decay: float = 0.01
  b1: float = 0.9
  b2: float = 0.999
  epsilon: float = 1e-6

  def direction(self) -> optax.GradientTransformation:
    """Adam's."""
    return optax.scale_by_adam(self.b1, self.b2, self.epsilon)

  def after_decay(self) -> optax.GradientTransformation:
    """The ratio of the lengths."""
    return paths.per_matrix(optax.scale_by_trust_ratio())


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
  """Muon (Jordan et al. 2024; arXiv:2502.16982) for kernels of blocks and heads, else AdamW.

  momentum: of Muon; b1, b2: of AdamW.
  """
  momentum: float = 0.95
  b1: float = 0.9
  b2: float = 0.95

  width_power = 0.5  # its update's spectral norm grows by the root of the width, see `muon.py`

  def direction(self) -> optax.GradientTransformation:
    """The orthogonal matrix nearest to the momentum."""
    return _matrices(muon.scale_by_orthogonal_momentum(self.momentum), self.b1, self.b2)


@dataclasses.dataclass(frozen=True)
class Sophia(Optimizer):
  """Sophia-G (arXiv:2305.14342): momentum over the curvature, each number clipped to 1.

  The curvature is the Gauss-Newton-Bartlett estimate: another gradient every so many steps, of
  tokens that the model predicts. For losses of tokens.

  gamma: times the curvature: the smaller, the more numbers are clipped.
  every: steps between two estimates.
  """
  b1: float = 0.965
  b2: float = 0.99
  epsilon: float = 1e-15
  gamma: float = 0.05
  every: int = 10

  def direction(self) -> optax.GradientTransformation:
    """Newton's, where that is short."""
    return optax.contrib.sophia(
        -1.0, self.b1, self.b2, self.epsilon, weight_decay=0.0, gamma=self.gamma,
        update_interval=self.every, hessian_diagonal_fn=sophia.gauss_newton_bartlett())


@dataclasses.dataclass(frozen=True)
class SOAP(Optimizer):
  """SOAP (arXiv:2409.11321) for kernels of blocks and heads, AdamW for the rest.

  every: steps between two updates of the eigenvectors.
  block_size: the largest side of a block that has a preconditioner of its own. Devices that share a
    matrix compute the blocks of their parts, if the blocks divide over them.
  """
  b1: float = 0.95
  b2: float = 0.95
  epsilon: float = 1e-8
  every: int = 10
  block_size: int = 256

  def direction(self) -> optax.GradientTransformation:
    """Adam's in the eigenbasis."""
    rotated = soap.scale_by_soap(self.b1, self.b2, self.epsilon, self.block_size, self.every)
    return _matrices(rotated, self.b1, self.b2, self.epsilon)


@dataclasses.dataclass(frozen=True)
class ScheduleFree(Optimizer):
  """AdamW without a schedule (arXiv:2405.15682): an average in place of momentum and decay.

  Wants a constant schedule after its warm-up. Evaluates the average.

  b1: the weight of the average in the parameters at which gradients are taken.
  """
  b1: float = 0.9
  b2: float = 0.999
  epsilon: float = 1e-8

  def __post_init__(self):
    super().__post_init__()
    if self.average_decay is not None:
      raise ValueError(f'average_decay={self.average_decay} would average once more what '
                       'ScheduleFree averages; leave it out')
    if self.b1 == 0:
      raise ValueError('b1=0 leaves the average out of the parameters, from which it is computed; '
                       'it must be in (0, 1)')

  def direction(self) -> optax.GradientTransformation:
    """Adam's without momentum."""
    return optax.scale_by_rms(self.b2, self.epsilon, eps_in_sqrt=False, bias_correction=True)

  def averaged(self, inner: optax.GradientTransformation, rate: optax.Schedule
               ) -> optax.GradientTransformation:
    """Interpolates and averages."""
    return optax.contrib.schedule_free(inner, rate, self.b1)
