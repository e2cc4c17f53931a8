"""The specification of `cross_entropy`: all the logits at once."""
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Options(NamedTuple):
  """What a program is compiled for: `cross_entropy`'s arguments of these names."""
  softcap: float | None = None
  z_loss: float = 0.0
  label_smoothing: float = 0.0


def cross_entropy(options, hidden_BTD, embedding_VD, bias_V, targets_BT, loss_weights_BT,
                  axis_name=None):
  """sum over tokens of weight * loss, as `api.cross_entropy` writes it."""
  if axis_name is not None:
    embedding_VD = jax.lax.all_gather(embedding_VD, axis_name, tiled=True)
    if bias_V is not None:
      bias_V = jax.lax.all_gather(bias_V, axis_name, tiled=True)
  logits_BTV = jnp.einsum('btd,vd->btv', hidden_BTD, embedding_VD.astype(hidden_BTD.dtype),
                          preferred_element_type=jnp.float32)
  if bias_V is not None:
    logits_BTV += bias_V.astype(jnp.float32)
  if options.softcap is not None:
    logits_BTV = options.softcap * jnp.tanh(logits_BTV / options.softcap)
  lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
  smoothing = options.label_smoothing
  expected_BT = (1 - smoothing) * target_BT + smoothing * logits_BTV.mean(-1)
  losses_BT = lse_BT - expected_BT + options.z_loss * lse_BT**2
  return jnp.sum(losses_BT * loss_weights_BT)
