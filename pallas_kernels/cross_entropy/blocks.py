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
LARGE = 2**25   # logits: 128 MiB


class Products(NamedTuple):
  """dot: a [M, K] b [K, N];  dot_t: a [M, K] b^T [N, K];  t_dot: a^T [K, M] b [K, N];  all float32
  [M, N];  transpose: a^T, where t_dot is None: then elements are to be moved apart from products.
  """
  dot: Callable
  dot_t: Callable
  t_dot: Callable | None
  transpose: Callable | None


class Head(NamedTuple):
  """The linear head: embedding [V, D] in the dtype of hidden, and bias [V] or None."""
  embedding: jax.Array
  bias: jax.Array | None


def _einsum(spec: str) -> Callable:
  return lambda a, b: jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


PLAIN = Products(_einsum('mk,kn->mn'), _einsum('mk,nk->mn'), None, jnp.transpose)
MATRIX_UNIT = Products(cpu.dot, cpu.dot_t, None, cpu.transpose)
TPU = Products(_einsum('mk,kn->mn'), _einsum('mk,nk->mn'), _einsum('km,kn->mn'), None)


def number(B: int, T: int, D: int, V: int) -> int:
  """Blocks that T is cut into: at most NUM_BLOCKS.

  A block of fewer than D tokens would move more of the embedding's gradient, [D, V], than of its
  own logits, which is worth it where these are LARGE; a cut that pads T by more than a sixteenth
  would multiply zeros.
  """
  most = max(1, min(NUM_BLOCKS, max(B * T // D, B * T * V // LARGE)))
  return next(n for n in range(most, 0, -1) if -T % n <= T // 16)


class Vocabulary(NamedTuple):
  """The part of the vocabulary that a device has.

  index_M: each target's place in it; out of it where another device has the target.
  size: of the whole.
  axis_name: of the mesh, or None where one device has all.
  """
  index_M: jax.Array
  size: int
  axis_name: str | tuple[str, ...] | None

  def sum(self, x: jax.Array) -> jax.Array:
    """Over the devices."""
    return x if self.axis_name is None else jax.lax.psum(x, self.axis_name)

  def max(self, x: jax.Array) -> jax.Array:
    """Over the devices."""
    return x if self.axis_name is None else jax.lax.pmax(x, self.axis_name)


def _vocabulary(head, targets_M, axis_name):
  V = len(head.embedding)
  if axis_name is None:
    return Vocabulary(targets_M, V, None)
  first = jax.lax.axis_index(axis_name) * V
  return Vocabulary(targets_M - first, V * jax.lax.psum(1, axis_name), axis_name)


def _logits(options, products, hidden_MD, head):
  """Float32 [M, V]."""
  logits_MV = products.dot_t(hidden_MD, head.embedding)
  if head.bias is not None:
    logits_MV += head.bias.astype(jnp.float32)
  if options.softcap is not None:
    logits_MV = options.softcap * jnp.tanh(logits_MV / options.softcap)
  return logits_MV


def _softmax_parts(options, logits_MV, vocabulary):
  """exp(logits - largest), its sum, their log-sum-exp and the losses, each [M, V or 1]."""
  largest_M1 = vocabulary.max(logits_MV.max(-1, keepdims=True))
  exps_MV = jnp.exp(logits_MV - largest_M1)
  sums_M1 = vocabulary.sum(exps_MV.sum(-1, keepdims=True))
  lse_M1 = largest_M1 + jnp.log(sums_M1)
  expected_M1 = vocabulary.sum(_expected(logits_MV, vocabulary))
  if options.label_smoothing:
    mean_M1 = vocabulary.sum(logits_MV.sum(-1, keepdims=True)) / vocabulary.size
    expected_M1 += options.label_smoothing * (mean_M1 - expected_M1)
  losses_M1 = lse_M1 - expected_M1
  if options.z_loss:
    losses_M1 += options.z_loss * jnp.square(lse_M1)
  return exps_MV, sums_M1, lse_M1, losses_M1


def _expected(logits_MV, vocabulary):
  """The logit of each target, [M, 1]; 0 where another device has it."""
  index_M1 = vocabulary.index_M[:, None]
  if vocabulary.axis_name is None:
    return jnp.take_along_axis(logits_MV, index_M1, axis=-1)
  V = logits_MV.shape[1]
  here_M1 = jnp.take_along_axis(logits_MV, jnp.clip(index_M1, 0, V - 1), axis=-1)
  return jnp.where((index_M1 >= 0) & (index_M1 < V), here_M1, 0)


def losses(options, products, axis_name, head, carry, block):
  """Returns one block's losses, unweighted, and whether each target is the argmax, both [M, 1]."""
  hidden_MD, targets_M, _ = block
  vocabulary = _vocabulary(head, targets_M, axis_name)
  logits_MV = _logits(options, products, hidden_MD, head)
  losses_M1 = _softmax_parts(options, logits_MV, vocabulary)[-1]
  best_M1 = jnp.argmax(logits_MV, -1, keepdims=True)
  if axis_name is None:
    return carry, (losses_M1, best_M1 == targets_M[:, None])
  best_M1 += (targets_M - vocabulary.index_M)[:, None]
  largest_M1 = logits_MV.max(-1, keepdims=True)
  is_best_M1 = largest_M1 == vocabulary.max(largest_M1)
  first_M1 = -vocabulary.max(jnp.where(is_best_M1, -best_M1, -vocabulary.size))
  return carry, (losses_M1, first_M1 == targets_M[:, None])


def loss_and_gradients(options, products, axis_name, head, carry, block, *, is_only):
  """Adds one block's loss and gradients of the head to the carry; returns that of its hidden.

  Without `t_dot` the gradient of the embedding is summed transposed, [D, V]: hidden^T dlogits moves
  [M, D] elements into place, and the sum of all blocks is transposed once. Of an only block,
  dlogits^T hidden moves [M, V] elements of half the size instead, in half the time. Of a part of
  the vocabulary, all are its gradients: that of hidden is to be summed over the devices of
  `axis_name`.
  """
  hidden_MD, targets_M, weights_M = block
  total, dembedding, dbias_V = carry
  logits_MV = _logits(options, products, hidden_MD, head)
  vocabulary = _vocabulary(head, targets_M, axis_name)
  exps_MV, sums_M1, lse_M1, losses_M1 = _softmax_parts(options, logits_MV, vocabulary)
  smoothing = options.label_smoothing
  wanted_MV = jnp.arange(exps_MV.shape[1]) == vocabulary.index_M[:, None]
  if smoothing:
    wanted_MV = (1 - smoothing) * wanted_MV + smoothing / vocabulary.size
  probs_MV = exps_MV / sums_M1
  if options.z_loss:
    probs_MV *= 1 + 2 * options.z_loss * lse_M1
  dlogits_MV = weights_M[:, None] * (probs_MV - wanted_MV)
  if options.softcap is not None:
    dlogits_MV *= 1 - jnp.square(logits_MV / options.softcap)
  if dbias_V is not None:
    # A product, since XLA:CPU needs ten times as long for a sum over rows.
    dbias_V += jnp.einsum('mv,m->v', dlogits_MV, jnp.ones_like(weights_M), precision='highest')
  dlogits_MV = dlogits_MV.astype(hidden_MD.dtype)
  dhidden_MD = products.dot(dlogits_MV, head.embedding).astype(hidden_MD.dtype)
  if products.t_dot is not None:
    dembedding += products.t_dot(jax.lax.optimization_barrier(dlogits_MV), hidden_MD)
  elif is_only:
    # Without the barrier XLA computes dlogits again for the transpose, in the order of that.
    dlogits_VM = products.transpose(jax.lax.optimization_barrier(dlogits_MV))
    dembedding += products.dot(dlogits_VM, hidden_MD)
  else:
    dembedding += products.dot(products.transpose(hidden_MD), dlogits_MV)
  return (total + jnp.vdot(losses_M1[:, 0], weights_M), dembedding, dbias_V), dhidden_MD
