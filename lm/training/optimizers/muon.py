"""Muon's update, with its products on the matrix unit.

Not optax.contrib.muon: it orthogonalises in float32, and with it a small model's step took about
three times as long on a CPU. Here the products are bfloat16, as its author proposes,
in the platform's form.
"""
import jax
import jax.numpy as jnp
import optax

from lm.training.optimizers.paths import as_matrices
from pallas_kernels.matmul import dot

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from Jordan et al. 2024
ITERATIONS = 5


def orthogonalize(x_LMN: jax.Array) -> jax.Array:
  """The nearest orthogonal matrix to each x [M, N], roughly: its singular values come to 0.7 ..
  1.2.

  Newton-Schulz on the wide one of x and its transpose; products in bfloat16, sums in float32.
  """
  a, b, c = COEFFICIENTS
  is_wide = x_LMN.shape[1] <= x_LMN.shape[2]
  x = x_LMN if is_wide else x_LMN.mT
  x = (x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7)).astype(jnp.bfloat16)
  for _ in range(ITERATIONS):
    gram = dot(x, x, transpose_b=True)
    rounded = gram.astype(jnp.bfloat16)
    polynomial = (b * gram + c * dot(rounded, rounded)).astype(jnp.bfloat16)
    x = (a * x.astype(jnp.float32) + dot(polynomial, x)).astype(jnp.bfloat16)
  return (x if is_wide else x.mT).astype(x_LMN.dtype)


def scale_by_orthogonal_momentum(beta: float) -> optax.GradientTransformation:
  """Nesterov momentum, orthogonalised, times 0.2 sqrt(max(M, N)).

  That factor gives each element the size of AdamW's updates (arXiv:2502.16982, section 2.2), so one
  learning rate and decay serve both.
  """
  def update(updates, state, params=None):
    del params
    momentum = jax.tree.map(lambda m, g: beta * m + g, state.trace, updates)
    updates = jax.tree_util.tree_map_with_path(
        lambda path, m, g: _direction(as_matrices(path, beta * m + g)).reshape(g.shape), momentum,
        updates)
    return updates, optax.TraceState(momentum)

  return optax.GradientTransformation(
      lambda params: optax.TraceState(jax.tree.map(jnp.zeros_like, params)), update)


def _direction(x_LMN: jax.Array) -> jax.Array:
  return 0.2 * max(x_LMN.shape[1:])**0.5 * orthogonalize(x_LMN)
