"""Cross entropy of a linear head, whose logits exist only one block of tokens at a time."""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.cross_entropy import blocks, reference


def cross_entropy(hidden: jax.Array, embedding: jax.Array, targets: jax.Array,
                  loss_weights: jax.Array, *, implementation: str | None = None) -> jax.Array:
  """Sums weight * (logsumexp_v(logits[v]) - logits[target]) with logits[v] = hidden . embedding[v].

  Exact, in float32, without a [B, T, V] array in either pass: since nothing follows a loss, its
  gradient is computed block by block in the forward pass, beside the logits it needs, and only
  scaled in the backward pass (as in Liger Kernel, arXiv:2410.10989, section 3.2): three products
  instead of the four of recomputation.

  Args:
    hidden: [B, T, D], bfloat16 or float32: the last layer's output.
    embedding: [V, D], the head, cast to the dtype of `hidden`.
    targets: int32 [B, T], each in [0, V).
    loss_weights: float32 [B, T]; tokens of weight 0 do not count. They are data: their gradient is
      not computed, it is zero.
    implementation: None, 'reference' (all logits at once) or 'blocks'.

  Returns:
    The float32 sum of losses in nats; divide by the sum of the weights for the mean.
  """
  if hidden.shape[:2] != targets.shape or targets.shape != loss_weights.shape:
    raise ValueError(f'hidden {hidden.shape}, targets {targets.shape} and loss_weights '
                     f'{loss_weights.shape} must be [B, T, D], [B, T] and [B, T]')
  if implementation == 'reference':
    return reference.cross_entropy(hidden, embedding, targets, loss_weights)
  if implementation not in (None, 'blocks'):
    raise ValueError(f"implementation={implementation!r} must be None, 'reference' or 'blocks'")
  return _cross_entropy(hidden, embedding, targets, loss_weights)


def token_losses(hidden: jax.Array, embedding: jax.Array, targets: jax.Array) -> jax.Array:
  """The losses of `cross_entropy` one by one, float32 [B, T] in nats; not to be differentiated."""
  losses_BT1 = _by_platform(blocks.losses, None, hidden, embedding, targets,
                            jnp.zeros(targets.shape, jnp.float32))[1]
  return losses_BT1[..., 0]


def _scan(body, start, hidden, embedding, targets, loss_weights):
  """Scans `body` over blocks of tokens, cut along T so that B stays sharded as it is."""
  B, T = targets.shape
  length = -(-T // blocks.NUM_BLOCKS)
  short = length * blocks.NUM_BLOCKS - T

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2))  # padding weighs 0
    x = x.reshape(B, blocks.NUM_BLOCKS, length, *x.shape[2:]).swapaxes(0, 1)
    return x.reshape(blocks.NUM_BLOCKS, B * length, *x.shape[3:])

  body = functools.partial(body, embedding.astype(hidden.dtype))
  carry, tokens = jax.lax.scan(body, start, (cut(hidden), cut(targets), cut(loss_weights)))
  tokens = tokens.reshape(blocks.NUM_BLOCKS, B, length, tokens.shape[-1]).swapaxes(0, 1)
  return carry, tokens.reshape(B, -1, tokens.shape[-1])[:, :T]


def _by_platform(block, start, *args):
  plain = functools.partial(_scan, functools.partial(block, blocks.PLAIN), start)
  if args[0].dtype != jnp.bfloat16 or not platform.cpu_has_bfloat16_units():
    return plain(*args)
  on_cpu = functools.partial(_scan, functools.partial(block, blocks.MATRIX_UNIT), start)
  return platform.by_platform(on_cpu, plain, *args)


@jax.custom_vjp
def _cross_entropy(hidden, embedding, targets, loss_weights):
  return jnp.vdot(token_losses(hidden, embedding, targets), loss_weights)


def _forward(hidden, embedding, targets, loss_weights):
  start = jnp.float32(0), jnp.zeros(embedding.T.shape, jnp.float32)
  (total, dembedding_DV), dhidden = _by_platform(blocks.loss_and_gradients, start, hidden,
                                                 embedding, targets, loss_weights)
  return total, (dhidden, dembedding_DV.T.astype(embedding.dtype), targets)


def _backward(gradients, g):
  dhidden, dembedding, targets = gradients
  return ((dhidden * g).astype(dhidden.dtype), (dembedding * g).astype(dembedding.dtype),
          jnp.zeros(targets.shape, jax.dtypes.float0), jnp.zeros(targets.shape, jnp.float32))


_cross_entropy.defvjp(_forward, _backward)
