"""Adversarial training of texts: embeddings are moved to where the loss is worse (FGM)."""
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm.training import precision

NOISE = 'embedding_noise'  # a feature that models add to what they look up for their input tokens


def gradient(score: Callable[..., Any], epsilon: float, d_model: int) -> Callable[..., Any]:
  """`jax.grad(score, has_aux=True)` of the loss and of the adversarial loss together.

  The second is the loss where the embeddings s of each example are s + epsilon g / |g|, g being the
  loss's gradient in s (arXiv:1605.07725, equations 7 and 8). Departs from the paper: embeddings are
  not normalised, so epsilon is in units of those that the model has. Of examples packed in a row
  each has a norm of its own. Both passes have the same dropout.

  Args:
    score: (params, batch, draws, carry) -> (loss, (means, carry)).
  """
  def both(params, batch, draws, carry):
    name, segment_ids, shape = _of_input(batch)
    at = lambda params, noise: score(params, {**batch, name: noise}, draws, carry)
    clean, (means, after) = jax.grad(at, argnums=(0, 1), has_aux=True)(
        params, jnp.zeros((*shape, d_model)))
    noise = epsilon * _unit(clean[1], segment_ids)
    moved, (more, _) = jax.grad(at, has_aux=True)(params, noise)
    means = {**means, 'adversarial': more['loss'], 'loss': means['loss'] + more['loss']}
    return precision.add_gradients(clean[0], moved), (means, after)

  return both


def _of_input(batch: Mapping[str, jax.Array]):
  """The feature of the noise, the segments of the input tokens, and their shape [B, T]."""
  prefix = 'encoder' if 'encoder_input_tokens' in batch else 'decoder'
  shape = batch[f'{prefix}_input_tokens'].shape
  segments = batch.get(f'{prefix}_segment_ids')
  return f'{prefix}_{NOISE}', jnp.ones(shape, jnp.int32) if segments is None else segments, shape


def _unit(g_BTD: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
  """The gradients of each segment of a row, of norm 1."""
  B, T, _ = g_BTD.shape
  square_BT = jnp.square(g_BTD).sum(-1)
  rows_B1 = jnp.arange(B)[:, None]
  sums = jnp.zeros((B, T + 1)).at[rows_B1, segment_ids_BT].add(square_BT)[rows_B1, segment_ids_BT]
  return g_BTD * jnp.where(sums > 0, jax.lax.rsqrt(jnp.where(sums > 0, sums, 1)), 0)[..., None]
