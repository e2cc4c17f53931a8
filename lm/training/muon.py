"""Muon's update, with its products on the matrix unit.

Not optax.contrib.muon: that orthogonalises in float32 by forms that XLA:CPU runs at a few GFLOP/s, so a
small model's step took three times as long; in bfloat16 products, as its author proposes, it is a tenth.
"""
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pallas_kernels.matmul import cpu
from pallas_kernels.platform import by_platform, cpu_has_bfloat16_units

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from Jordan et al. 2024
ITERATIONS = 5


def is_matrix(params: Any) -> Any:
  """True for the blocks' kernels, [layers, inputs..., outputs...]; embeddings and the rest are AdamW's."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', params)


def _iterate(dot, dot_t, x_LMN: jax.Array) -> jax.Array:
  """Newton-Schulz: drives the singular values of each x [M, N], M <= N, towards 1."""
  a, b, c = COEFFICIENTS
  for _ in range(ITERATIONS):
    gram_LMM = dot_t(x_LMN, x_LMN)
    square_LMM = dot(gram_LMM.astype(jnp.bfloat16), gram_LMM.astype(jnp.bfloat16))
    polynomial_LMM = (b * gram_LMM + c * square_LMM).astype(jnp.bfloat16)
    x_LMN = (a * x_LMN.astype(jnp.float32) + dot(polynomial_LMM, x_LMN)).astype(jnp.bfloat16)
  return x_LMN


def _plain(x_LMN: jax.Array) -> jax.Array:
  einsum = lambda spec: lambda a, b: jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
  return _iterate(einsum('lmk,lkn->lmn'), einsum('lmk,lnk->lmn'), x_LMN)


def _on_cpu(x_LMN: jax.Array) -> jax.Array:
  return _iterate(cpu.dot, cpu.dot_t, cpu.row_major(x_LMN))


def orthogonalize(x_LMN: jax.Array) -> jax.Array:
  """The nearest orthogonal matrix to each x [M, N], roughly: singular values come out in 0.7 to 1.2."""
  wide = x_LMN if x_LMN.shape[1] <= x_LMN.shape[2] else x_LMN.mT
  wide = wide / (jnp.linalg.norm(wide, axis=(1, 2), keepdims=True) + 1e-7)
  wide = wide.astype(jnp.bfloat16)
  wide = by_platform(_on_cpu, _plain, wide) if cpu_has_bfloat16_units() else _plain(wide)
  return (wide if x_LMN.shape[1] <= x_LMN.shape[2] else wide.mT).astype(x_LMN.dtype)


def scale_by_orthogonal_momentum(beta: float) -> optax.GradientTransformation:
  """Nesterov momentum, orthogonalised, times 0.2 sqrt(max(M, N)).

  That factor gives each element the size of AdamW's updates (arXiv:2502.16982, section 2.2), so one
  learning rate and decay serve both.
  """
  def update(updates, state, params=None):
    del params
    momentum = jax.tree.map(lambda m, g: beta * m + g, state.trace, updates)
    updates = jax.tree_util.tree_map_with_path(
        lambda path, m, g: _direction(path[-2].key, beta * m + g), momentum, updates)
    return updates, optax.TraceState(momentum)

  return optax.GradientTransformation(
      lambda params: optax.TraceState(jax.tree.map(jnp.zeros_like, params)), update)


def _direction(name: str, x: jax.Array) -> jax.Array:
  num_inputs = 2 if name == 'out' else 1  # attention's output contracts heads and head_dim
  rows = 1
  for size in x.shape[1:1 + num_inputs]:
    rows *= size
  x_LMN = x.reshape(x.shape[0], rows, -1)
  scale = 0.2 * max(x_LMN.shape[1:])**0.5
  return (scale * orthogonalize(x_LMN)).reshape(x.shape)
