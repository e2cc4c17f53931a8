"""What small leaves beside a kernel add to its product; `lm/models/adapters.py` puts them there.

A layer goes by the leaves that it finds, so that a model with an adapter is the same function of a
larger tree. K: inputs, N: outputs of the kernel as a matrix, R: rank.
"""
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.layers import products
from lm.parallel.rules import Rules


def low_rank(x: Float[Array, '*rows K'], y: Float[Array, '*rows N'], kernel_KN: Float[Array, 'K N'],
             leaves: Mapping[str, jax.Array], rules: Rules) -> Float[Array, '*rows N']:
  """y = x kernel -> x (kernel + scale A B) (LoRA, arXiv:2106.09685, section 4.1), never multiplying
  A B out.

  With a `magnitude` [N], the columns of that matrix take the norms of the kernel's columns plus
  `magnitude` (DoRA, arXiv:2402.09353, section 4). Gradients do not go through the norms (section
  4.3). `magnitude` is what is added, and not the sum, so that it begins at 0 whatever the kernel.

  leaves: `lora_a` [K, R], `lora_b` [R, N], `lora_scale` [] and perhaps `magnitude`.
  """
  a_KR, b_RN, scale = (leaves[name] for name in ('lora_a', 'lora_b', 'lora_scale'))
  multiply = products.product(None, rules)
  y += multiply(multiply(x, a_KR), b_RN) * scale.astype(y.dtype)
  if 'magnitude' not in leaves:
    return y
  before_N, norm_N = jax.lax.stop_gradient(column_norms(kernel_KN, a_KR, b_RN, scale))
  # Exactly 1 where nothing has been learnt, which a quotient need not be.
  factor_N = 1 + (before_N - norm_N + leaves['magnitude'].astype(jnp.float32)) / norm_N
  return (y.astype(jnp.float32) * factor_N).astype(y.dtype)  # rounded once


def column_norms(kernel_KN: Float[Array, 'K N'], a_KR: Float[Array, 'K R'],
                 b_RN: Float[Array, 'R N'], scale: Float[Array, '']
                 ) -> tuple[Float[Array, ' N'], Float[Array, ' N']]:
  """Norms of the columns of the kernel and of kernel + scale A B, float32; without A B:
  |w + s A b|^2 = |w|^2 + 2 s (w^T A) b + s^2 b^T (A^T A) b of each column."""
  kernel_KN, a_KR, b_RN, scale = (x.astype(jnp.float32) for x in (kernel_KN, a_KR, b_RN, scale))
  dot = lambda x, y: jnp.matmul(x, y, precision='highest')
  before_N = jnp.square(kernel_KN).sum(0)
  crossed_N = (dot(a_KR.T, kernel_KN) * b_RN).sum(0)
  added_N = (dot(dot(a_KR.T, a_KR), b_RN) * b_RN).sum(0)
  return jnp.sqrt(before_N), jnp.sqrt(before_N + 2 * scale * crossed_N + scale**2 * added_N)


def bottleneck(y: Float[Array, '*rows N'], leaves: Mapping[str, jax.Array], rules: Rules
               ) -> Float[Array, '*rows N']:
  """y + relu(y down + bias) up + bias (adapters, arXiv:1902.00751, section 2.1)."""
  down_NR, down_bias_R, up_RN, up_bias_N = (leaves[f'adapter_{name}'] for name in (
      'down', 'down_bias', 'up', 'up_bias'))
  multiply = products.product(None, rules)
  hidden = jax.nn.relu(multiply(y, down_NR) + down_bias_R.astype(y.dtype))
  return y + multiply(hidden, up_RN) + up_bias_N.astype(y.dtype)


def attend_also(out_BTNH: Float[Array, 'B T N H'], lse_BNT: Float[Array, 'B N T'],
                query_BTNH: Float[Array, 'B T N H'], key_PKH: Float[Array, 'P K H'],
                value_PKH: Float[Array, 'P K H'], scale: float | None, softcap: float | None,
                bias: Float[Array, 'B X T P'] | None = None) -> Float[Array, 'B T N H']:
  """Attention to P more keys, which every query sees whatever its segment and place.

  out_BTNH, lse_BNT: of attention to the others, as `flash_attention` returns them; the two are
    merged by their log-sum-exp, so that it is one softmax.
  scale, softcap: of the scores.
  bias: added to them, of all heads or of each; None is none.
  """
  B, T, N, H = query_BTNH.shape
  K = key_PKH.shape[1]
  query_BTKGH = query_BTNH.reshape(B, T, K, N // K, H)
  scores_BKGTP = jnp.einsum('btkgh,pkh->bkgtp', query_BTKGH, key_PKH.astype(query_BTNH.dtype),
                            preferred_element_type=jnp.float32)
  scores_BKGTP *= H**-0.5 if scale is None else scale
  if softcap is not None:
    scores_BKGTP = softcap * jnp.tanh(scores_BKGTP / softcap)
  if bias is not None:
    bias = jnp.broadcast_to(bias, (B, N, *bias.shape[2:]))
    scores_BKGTP += bias.reshape(scores_BKGTP.shape)
  lse_BKGT = lse_BNT.reshape(B, K, N // K, T)
  total_BKGT = jnp.logaddexp(lse_BKGT, jax.nn.logsumexp(scores_BKGTP, -1))
  weights_BKGTP = jnp.exp(scores_BKGTP - total_BKGT[..., None])
  more_BTKGH = jnp.einsum('bkgtp,pkh->btkgh', weights_BKGTP, value_PKH.astype(jnp.float32))
  kept_BTKG = jnp.moveaxis(jnp.exp(lse_BKGT - total_BKGT), 3, 1)
  out_BTKGH = out_BTNH.astype(jnp.float32).reshape(query_BTKGH.shape)
  merged = out_BTKGH * kept_BTKG[..., None] + more_BTKGH
  return merged.reshape(B, T, N, H).astype(out_BTNH.dtype)  # rounded once
