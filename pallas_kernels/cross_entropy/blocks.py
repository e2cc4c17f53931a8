"""`reference.cross_entropy` over blocks of tokens, with the gradient computed beside the loss.

`Products` names the three products of a block in a platform's best form, on matrices [rows,
columns].
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.matmul import cpu

NUM_BLOCKS = 4  # a quarter of the logits at a time; smaller products are slower


class Products(NamedTuple):
  """dot: a [M, K] b [K, N];  dot_t: a [M, K] b^T [N, K];  both float32 [M, N];  transpose: a^T."""
  dot: Callable
  dot_t: Callable
  transpose: Callable


def _einsum(spec: str) -> Callable:
  return lambda a, b: jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


PLAIN = Products(_einsum('mk,kn->mn'), _einsum('mk,nk->mn'), jnp.transpose)
MATRIX_UNIT = Products(cpu.dot, cpu.dot_t, cpu.transpose)


def _softmax_parts(products, hidden_MD, embedding_VD, targets_M):
  """exp(logits - largest), its sum, and logsumexp - target logit, each [M, V or 1]."""
  logits_MV = products.dot_t(hidden_MD, embedding_VD)
  largest_M1 = logits_MV.max(-1, keepdims=True)
  exps_MV = jnp.exp(logits_MV - largest_M1)
  sums_M1 = exps_MV.sum(-1, keepdims=True)
  target_M1 = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1)
  return exps_MV, sums_M1, largest_M1 + jnp.log(sums_M1) - target_M1


def losses(products, embedding_VD, carry, block):
  """Returns one block's losses [M], unweighted."""
  hidden_MD, targets_M, _ = block
  _, _, losses_M1 = _softmax_parts(products, hidden_MD, embedding_VD, targets_M)
  return carry, losses_M1


def loss_and_gradients(products, embedding_VD, carry, block):
  """Adds one block's loss and gradient of the embedding to the carry; returns that of its hidden.

  The gradient of the embedding is summed transposed: hidden^T dlogits moves [M, D] elements into
  place, dlogits^T hidden would move [M, V] of them.
  """
  hidden_MD, targets_M, weights_M = block
  total, dembedding_DV = carry
  exps_MV, sums_M1, losses_M1 = _softmax_parts(products, hidden_MD, embedding_VD, targets_M)
  is_target_MV = jnp.arange(exps_MV.shape[1]) == targets_M[:, None]
  dlogits_MV = weights_M[:, None] * (exps_MV / sums_M1 - is_target_MV)
  dlogits_MV = dlogits_MV.astype(hidden_MD.dtype)
  dhidden_MD = products.dot(dlogits_MV, embedding_VD).astype(hidden_MD.dtype)
  dembedding_DV += products.dot(products.transpose(hidden_MD), dlogits_MV)
  return (total + jnp.vdot(losses_M1[:, 0], weights_M), dembedding_DV), dhidden_MD
