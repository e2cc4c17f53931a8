"""Metrics of held-out rows, computed by all devices of all hosts."""
from collections.abc import Callable
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.data.loader import Loader
from lm.errors import UserError
from lm.parallel.batches import GlobalBatch
from lm.parallel.distributed import Hosts
from lm.training.losses import target_counts
from lm.training.state import carry_shardings
from lm.training.step import Loss, evaluate_batch


class HeldOut:
  """The means of a loss's metrics over one epoch of rows.

  Each row counts once, whatever the batch, the mesh and the number of hosts: what fills the last
  batch, or is added to divide over the devices, has weight 0. A loss that compares the rows of a
  batch takes whole batches alone.

  Args:
    module: its rules say where rows and parameters lie.
    hosts: who compute together; all call it.
    max_batches: at most, from the first; None for all.
    with_unigrams: adds `unigram_entropy`, in nats: the loss of who knows how often each target
      occurs here, and nothing else.

  Raises:
    UserError: the rows of a batch that are compared do not divide over the devices.
  """

  def __init__(self, module: nn.Module, loss: Loss, loader: Loader, hosts: Hosts = Hosts(),
               max_batches: int | None = None, with_unigrams: bool = False):
    rules, steps = module.rules, loader.steps_per_epoch
    self._rows = GlobalBatch(rules, loader.batch_size)
    if loss.whole_batch and self._rows.padded != loader.batch_size:
      raise UserError(f'batch_size={loader.batch_size} does not divide over the devices that share '
                      'its rows, which this loss compares with one another; the nearest that does '
                      f'is {self._rows.padded}')
    self.num_batches = max(1, int(steps)) if loss.whole_batch else math.ceil(steps)
    self.num_batches = min(self.num_batches, max_batches or self.num_batches)
    self._loader, self._num_rows = loader, round(steps * loader.batch_size)
    carry = functools.partial(module.config.init_carry, self._rows.padded)
    score = functools.partial(_score, module, loss, with_unigrams)
    over_mesh, of_rows = {}, {}
    if rules.mesh is not None:  # sums that every host can read
      of_rows = {'out_shardings': carry_shardings(module)}
      over_mesh = {'out_shardings': (rules.sharding(), rules.sharding(), carry_shardings(module))}
    self._init_carry = jax.jit(carry, **of_rows)
    self._score = hosts.same_program(jax.jit(score, **over_mesh))

  def __call__(self, params: Any, after_batch: Callable[[], Any] = lambda: None
               ) -> dict[str, float]:
    """The means under these parameters; calls `after_batch` after each batch."""
    size, carry, sums, counts = self._rows.num_rows, self._init_carry(), {}, 0
    for i in range(self.num_batches):
      batch = self._rows.place(self._loader.batch(i, self._rows.own))
      counting = np.int32(min(size, self._num_rows - i * size))
      metrics, found, carry = self._score(params, batch, counting, carry)
      for name, pair in metrics.items():
        sums[name] = sums.get(name, 0) + np.array(jax.device_get(pair), np.float64)
      counts = counts + np.array(found, np.float64)
      after_batch()
    means = {name: float(total / max(weight, 1)) for name, (total, weight) in sums.items()}
    if counts.size:
      share = counts[counts > 0] / counts.sum()
      means['unigram_entropy'] = float(-(share * np.log(share)).sum())
    return means


def _score(module, loss, with_unigrams, params, batch, num_rows, carry):
  """Metrics of the first `num_rows` rows, how often each target occurs (or nothing), and what the
  next batch needs."""
  if not loss.whole_batch:
    batch = loss.of_rows(batch, jnp.arange(len(next(iter(batch.values())))) < num_rows)
  metrics, carry = evaluate_batch(module, loss, params, batch, carry)
  counts = target_counts(batch, module.config.vocab_size if with_unigrams else 0)
  return metrics, counts, carry
