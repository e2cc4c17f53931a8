"""The train step: pure in (state, batch), whatever the mesh and the number of microbatches."""
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from lm.parallel.rules import Rules
from lm.training import losses
from lm.training.state import TrainState

Batch = Mapping[str, jax.Array]


def batch_loss(module: nn.Module, params: Any, batch: Batch,
               dropout_rng: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Sum of the losses of a batch and of its weights."""
  variables = {'params': params}
  hidden_BTD, _ = module.apply(variables, batch['decoder_input_tokens'],
                               batch['decoder_positions'], batch['decoder_segment_ids'],
                               dropout_rng=dropout_rng)
  return losses.causal_lm(hidden_BTD, module.apply(variables, method='head'), batch)


def _summed_gradients(module, params, batch, rng, num_microbatches):
  """Loss, weight and gradient, each summed over the batch; one microbatch in memory at a time."""
  value_and_grad = jax.value_and_grad(lambda p, *args: batch_loss(module, p, *args), has_aux=True)
  if num_microbatches == 1:
    (loss, weight), grads = value_and_grad(params, batch, rng)
    return loss, weight, grads

  def add(sums, inputs):
    (loss, weight), grads = value_and_grad(params, *inputs)
    return jax.tree.map(jnp.add, sums, (loss, weight, grads)), None

  # Every num_microbatches-th row, so that each microbatch is spread over the same devices as the
  # batch.
  cut = lambda x: x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1)
  zeros = jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
  rngs = jax.random.split(rng, num_microbatches)
  return jax.lax.scan(add, zeros, (jax.tree.map(cut, dict(batch)), rngs))[0]


def train_step(module: nn.Module, optimizer: optax.GradientTransformation, num_microbatches: int,
               state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update.

  Args:
    num_microbatches: the batch is computed in this many parts, their gradients summed.
    batch: [B, T] arrays; B is a multiple of num_microbatches.

  Returns:
    The next state, and float32 scalars: `loss` (nats a token, before the update), `grad_norm`, and
    `weight` (tokens that counted).
  """
  rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
  loss, weight, grads = _summed_gradients(module, state.params, batch, rng, num_microbatches)
  mean = lambda total: total / jnp.where(weight > 0, weight, 1)  # no token counts: 0, not NaN
  grads = jax.tree.map(mean, grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {'loss': mean(loss), 'grad_norm': optax.tree.norm(grads), 'weight': weight}
  return TrainState(state.step + 1, params, opt_state, state.rng), metrics


def jit_train_step(module: nn.Module, optimizer: optax.GradientTransformation, rules: Rules,
                   state: TrainState, num_microbatches: int = 1) -> Callable:
  """`train_step` compiled for the shardings of `state` (arrays or ShapeDtypeStructs), which it
  donates."""
  shardings = jax.tree.map(lambda x: x.sharding, state)
  by_rows = rules.sharding('batch', 'length')

  def step(state, batch):
    return train_step(module, optimizer, num_microbatches, state, batch)

  return jax.jit(step, donate_argnums=0, in_shardings=(shardings, by_rows),
                 out_shardings=(shardings, rules.sharding()))
