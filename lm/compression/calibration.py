"""What the inputs of every linear layer are like on the batches of a task.

The layers say it themselves: a leaf `seen` beside a kernel has it as its gradient
(`lm/layers/observed.py`), so that one mechanism serves every family, scanned or not, with any head.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any, Literal, NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from lm.compression import matrices, Model
from lm.data.examples import ExampleTask
from lm.data.tasks import TextTask
from lm.training import checkpoint_io

Statistic = Literal['count', 'magnitudes', 'squares', 'largest', 'moments', 'curvature']
SEEN = 'seen'


@dataclasses.dataclass(frozen=True)
class Data:
  """What a model is calibrated on.

  task: texts, or labelled examples in the form that the model answers; None is the run's own.
  split: of the task.
  num_rows: of so many tokens as the run's sequence_length.
  batch_size: rows at a time.
  seed: decides which.
  """
  task: Optional[TextTask | ExampleTask] = None
  split: Literal['train', 'validation'] = 'train'
  num_rows: int = 128
  sequence_length: Optional[int] = None
  batch_size: int = 8
  seed: int = 0

  def __post_init__(self):
    for name in ('num_rows', 'sequence_length', 'batch_size'):
      if getattr(self, name) is not None and getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')


class Inputs(NamedTuple):
  """What a linear layer was given, summed over all rows that count: tokens, but no padding, nor
  tokens whose output nothing uses. None: not asked for. L is 1 without stacked layers.

  count: rows, [L].
  magnitudes: sums of |x_k|, [L, K].
  squares: sums of x_k^2, [L, K]: their roots are Wanda's norms.
  largest: the largest |x_k|, [L, K]. Of a layer that one batch meets twice (the two sides of a dual
    encoder) the sum of both.
  moments: sums of x^T x, [L, K, K]: half of GPTQ's and SparseGPT's Hessian.
  curvature: moments whose rows weigh what the loss depends on their outputs, [L, K, K], see
    `lm/layers/observed.py`.
  """
  count: np.ndarray
  magnitudes: np.ndarray | None = None
  squares: np.ndarray | None = None
  largest: np.ndarray | None = None
  moments: np.ndarray | None = None
  curvature: np.ndarray | None = None


class Calibration:
  """Batches, and what layers make of them.

  Args:
    load: gives the loader of batches; called once, when the first is asked for.
    num_batches: how many are taken of it.
  """

  def __init__(self, load: Callable[[], Any], num_batches: int):
    self._load, self.num_batches = load, num_batches

  @functools.cached_property
  def _loader(self) -> Any:
    return self._load()

  def batches(self) -> Iterator[Mapping[str, np.ndarray]]:
    """The batches, as training would take them: the same at each call."""
    for step in range(self.num_batches):
      yield self._loader.batch(step)

  def inputs(self, model: Model, statistics: Sequence[Statistic],
             targets: Sequence[str] = ('.*',)) -> dict[str, Inputs]:
    """What the linear layers of a model are given, by the paths of their kernels.

    A layer whose output no loss of these batches depends on (a pooler of a masked LM) has count 0.
    It costs two forward passes and, of moments or curvature, about another.

    Args:
      model: its kernels are floats.
      targets: patterns of whole paths of kernels, all others are left out: moments take 4 K^2
        bytes a layer.
    """
    chosen = {path: one for path, one in matrices.kernels(model.params).items()
              if any(re.fullmatch(target, path) for target in targets)}
    names = dict.fromkeys(['count', *statistics])
    probes = {path: {name: jnp.zeros((*one.stack, *_SHAPES[name](one.K))) for name in names}
              for path, one in chosen.items()}
    observe, carry, sums = _observer(model), None, None
    for batch in tqdm.tqdm(self.batches(), 'calibrate', self.num_batches, unit=' batches'):
      if carry is None:
        carry = model.config.init_carry(len(next(iter(batch.values()))))
      found, carry = observe(model.params, probes, batch, carry)
      sums = jax.block_until_ready(found if sums is None else _add(sums, found))
    sums = jax.tree.map(np.asarray, sums)
    shaped = lambda x, one, name: x.reshape(-1, *_SHAPES[name](one.K))
    return {path: Inputs(**{name: shaped(x, chosen[path], name) for name, x in found.items()})
            for path, found in sums.items()}


_SHAPES = {'count': lambda K: (), 'moments': lambda K: (K, K), 'curvature': lambda K: (K, K),
           **dict.fromkeys(['magnitudes', 'squares', 'largest'], lambda K: (K,))}


@jax.jit
def _add(sums, found):
  join = lambda name, a, b: jnp.maximum(a, b) if name == 'largest' else a + b
  return {path: {name: join(name, x, found[path][name]) for name, x in own.items()}
          for path, own in sums.items()}


def _observer(model: Model) -> Callable[..., Any]:
  """(params, probes, batch, carry) -> what the probes saw, and the next carry."""
  module, loss = model.module, model.experiment.loss.plain

  def score(probes, params, batch, carry):
    leaves = {f'{path.removesuffix(matrices.KERNEL)}{SEEN}/{name}': x
              for path, own in probes.items() for name, x in own.items()}
    params = checkpoint_io.nest({**checkpoint_io.flatten(params), **leaves})
    outputs, carry = module.apply({'params': params}, batch, None, carry, method='outputs')
    return sum(jax.tree.leaves(loss(outputs, batch))), carry

  gradient = jax.jit(jax.grad(score, has_aux=True))
  return lambda params, probes, batch, carry: gradient(probes, params, batch, carry)
