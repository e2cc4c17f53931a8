"""Pure losses: hidden states and a batch in, (sum, weight) out; divided only after every
microbatch and host is summed, so that accumulated, sharded and whole batches agree."""
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.cross_entropy import cross_entropy


def causal_lm(hidden_BTD: Float[Array, 'B T D'], head_VD: Float[Array, 'V D'],
              batch: Mapping[str, jax.Array]) -> tuple[Float[Array, ''], Float[Array, '']]:
  """Negative log-likelihood of `decoder_target_tokens`, in nats, weighted by
  `decoder_loss_weights`.

  Returns:
    The weighted sum over tokens, and the sum of the weights.
  """
  weights_BT = batch['decoder_loss_weights'].astype(jnp.float32)
  loss = cross_entropy(hidden_BTD, head_VD, batch['decoder_target_tokens'], weights_BT)
  return loss, weights_BT.sum()
