"""What the doctor compares, and how closely: batches, gradients, differences, tolerances."""
from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.data.loader import Loader
from lm.parallel.rules import Rules
from lm.training.state import abstract_state, init_state, TrainState
from lm.training.step import jit_train_step

Batch = Mapping[str, np.ndarray]

# Makes the gradient the optimiser's state, where the real train step leaves it for us to compare.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: params,
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads))


class Skipped(Exception):
  """Why an invariant cannot be checked here."""


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is examined, and the gradients that most invariants compare with.

  config: the user's; `exact` is the same in float32 without dropout.
  rules: on the mesh.
  objective: the user's, which knows the vocabulary.
  shape: rows, and tokens a row.
  """
  config: Any
  loss: Any
  optimizer: optax.GradientTransformation
  rules: Rules
  objective: Any
  shape: tuple[int, int]
  loader: Any
  seed: int

  @property
  def exact(self) -> Any:
    return change(self.config, dtype='float32', param_dtype='float32', products=None,
                  dropout_rate=0.0, attention_dropout_rate=0.0, layer_drop_rate=0.0)

  @functools.cached_property
  def batch(self) -> Batch:
    return self.random_batch(*self.shape)

  def random_batch(self, rows: int, length: int) -> Batch:
    """What the objective makes of documents of random tokens."""
    num_ids = self.config.vocab_size - self.objective.num_extra_ids
    documents = RandomDocuments(num_ids, length, self.seed)
    return Loader(documents, length, rows, self.seed, self.objective).batch(0)

  @functools.cached_property
  def params(self) -> Any:
    """New parameters, on the host."""
    state = init_state(self.exact.build(self.rules), KEEP_GRADIENT, self.rules, self.seed,
                       self.shape[0])
    return jax.device_get(state.params)

  @functools.cached_property
  def usual(self) -> Any:
    """Gradients of the exact config on the whole batch and mesh."""
    return self.gradients()

  def new_state(self, module: Any, optimizer: optax.GradientTransformation,
                rules: Rules, rows: int) -> TrainState:
    """A state of these parameters that a step may consume: no array aliases the host's."""
    rng = np.asarray(jax.random.key_data(jax.random.key(self.seed)))
    opt_state = jax.device_get(jax.jit(optimizer.init)(self.params))
    carry = jax.device_get(module.config.init_carry(rows))
    state = TrainState(np.int32(0), self.params, opt_state, rng, carry)
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding, may_alias=False), state,
                        abstract_state(module, optimizer, rules, rows))

  def gradients(self, config: Any = None, rules: Rules | None = None, batch: Batch | None = None,
                num_microbatches: int = 1) -> Any:
    """Loss and gradients of the real train step, with these changes of the exact config."""
    rules = self.rules if rules is None else rules
    module = (self.exact if config is None else config).build(rules)
    batch = self.batch if batch is None else batch
    state = self.new_state(module, KEEP_GRADIENT, rules, len(next(iter(batch.values()))))
    step = jit_train_step(module, self.loss, KEEP_GRADIENT, rules, state, num_microbatches)
    state, metrics = step(state, batch)
    return jax.device_get({'loss': metrics['loss'], 'gradients': state.opt_state})

  @property
  def tolerance(self) -> float:
    """Of gradients in float32: a sum over tokens of what went through all layers and the head."""
    cfg, (B, T) = self.config, self.shape
    layers = cfg.num_layers * (cfg.d_model + cfg.d_ff + T)
    return tolerance('float32', B * T, layers, cfg.vocab_size)


def tolerance(dtype: Any, *reductions: int) -> float:
  """4 eps(dtype) + 8 eps(float32) sqrt(n), relative to the scale of the result.

  Operands and results are rounded to `dtype`: errors that grow as the result itself does. Sums are
  float32 in every dtype, and the errors of n additions walk at random.

  Args:
    dtype: of the computation.
    reductions: lengths of the sums one after another on the way to a result; n is their sum.
  """
  additions = 8 * float(jnp.finfo('float32').eps) * math.sqrt(sum(reductions))
  return 4 * float(jnp.finfo(dtype).eps) + additions


def difference(tree: Any, expected: Any) -> float:
  """The largest |a - b| of all leaves, each relative to its leaf's largest |b|.

  A leaf's scale is at least 1e-3 of the whole tree's: the gradient of a key's bias, say, is zero
  but for rounding, since softmax does not see it.
  """
  pairs = list(zip(jax.tree.leaves(jax.device_get(tree)), jax.tree.leaves(jax.device_get(expected)),
                   strict=True))
  pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
  floor = 1e-3 * max(np.abs(b).max(initial=0) for _, b in pairs) or 1.0
  errors = [np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), floor) for a, b in pairs]
  return float(np.max(errors))  # np.max, unlike max, lets a NaN through


class RandomDocuments:
  """Documents of random tokens, about four of them to `length` tokens: what packing reads."""

  def __init__(self, num_ids: int, length: int, seed: int):
    rng = np.random.default_rng(seed)
    self.lengths = rng.integers(2, max(length // 2, 3), 256)
    self._tokens = rng.integers(min(3, num_ids - 1), num_ids, int(self.lengths.max()), np.int32)

  def slice(self, index: int, start: int, stop: int) -> np.ndarray:
    """Returns ids [stop - start] of document `index`."""
    return np.roll(self._tokens, index)[start:stop]


def change(config: Any, **changes: Any) -> Any:
  """`dataclasses.replace`, in the trunk where the config is of a head on one."""
  own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  trunks = {name: change(value, **changes) for name, value in own.items()
            if hasattr(value, 'build') and not set(changes) <= set(own)}
  return dataclasses.replace(config, **(trunks or changes))


def pack(batch: Batch) -> dict[str, np.ndarray]:
  """Rows 2i and 2i + 1 laid end to end in row i, as segments of their own.

  Raises:
    Skipped: the rows hold something that there is one of.
  """
  packed = {}
  for name, x in batch.items():
    first, second = x[::2], x[1::2]
    if not name.startswith(('encoder_', 'decoder_', 'masked_')) or x.ndim != 2:
      raise Skipped(f'{name} is one a row, so rows are not packed')
    if name.endswith('_segment_ids') or name == 'decoder_span_ids':
      last = int(max(first.max(), second.max()))
      second = np.where(second > 0, second + last, 0).astype(x.dtype)
    elif name == 'masked_positions':
      second = second + np.int32(batch['encoder_input_tokens'].shape[1])
    packed[name] = np.concatenate([first, second], axis=1)
  return packed
