"""The specification of `cross_entropy`: all the logits at once."""
import jax
import jax.numpy as jnp


def cross_entropy(hidden_BTD, embedding_VD, targets_BT, loss_weights_BT):
  """sum over tokens of weight * (logsumexp_v(logits[v]) - logits[target])."""
  logits_BTV = jnp.einsum('btd,vd->btv', hidden_BTD, embedding_VD.astype(hidden_BTD.dtype),
                          preferred_element_type=jnp.float32)
  target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
  return jnp.sum((jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT) * loss_weights_BT)
