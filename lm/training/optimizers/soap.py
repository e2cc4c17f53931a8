"""SOAP: Adam in the eigenbasis of Shampoo's preconditioners (arXiv:2409.11321, algorithm 3)."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.training.optimizers.paths import axes_of, as_matrices


class Factors(NamedTuple):
  """Of each block [M, N] of a matrix: averages of G G^T and G^T G, and their eigenvectors.

  left, left_basis: [..., M, M]; right, right_basis: [..., N, N]. The axes before are the
  parameter's own, each with its number of blocks (of merged axes the first has them all), so that
  the preconditioners of a parameter shard as it does.
  """
  left: jax.Array
  right: jax.Array
  left_basis: jax.Array
  right_basis: jax.Array


class SoapState(NamedTuple):
  """mu and nu are the moments of Adam: of the gradient, and of the squared rotated gradient."""
  count: jax.Array
  mu: Any
  nu: Any
  factors: Any


def _part(size: int, largest: int) -> int:
  """The largest divisor of `size` up to `largest`."""
  return max(n for n in range(1, min(size, largest) + 1) if size % n == 0)


def _cut(path, x, block_size):
  """A parameter as blocks [L, m, n, M, N], and the axes of them that `Factors` has."""
  stacked, inputs = axes_of(path, x.ndim)
  x_LMN = as_matrices(path, x)
  L, M, N = x_LMN.shape
  rows, columns = (_part(size, block_size) for size in (M, N))
  blocks = x_LMN.reshape(L, M // rows, rows, N // columns, columns).swapaxes(2, 3)
  outputs = x.ndim - stacked - inputs
  axes = (*x.shape[:stacked], M // rows, *[1] * (inputs - 1), N // columns, *[1] * (outputs - 1))
  return blocks, axes


def _join(blocks, shape):
  """The inverse of `_cut`."""
  return blocks.swapaxes(2, 3).reshape(shape)


def _product(spec, *operands):
  return jnp.einsum(spec, *operands, precision='highest')


def _rotate(x, left, right):
  return _product('...ab,...ac,...bd->...cd', x, left, right)


def _rotate_back(x, left, right):
  return _product('...cd,...ac,...bd->...ab', x, left, right)


def _turned(gram, basis):
  """One power iteration towards the eigenvectors of `gram`, ordered by their eigenvalues as the
  basis so far has them; and that order."""
  turned = _product('...ab,...bc->...ac', gram, basis)
  values = (basis * turned).sum(-2)
  order = jnp.argsort(-values, axis=-1)
  turned = jnp.take_along_axis(turned, order[..., None, :], axis=-1)
  return jnp.linalg.qr(turned)[0], order


def _refreshed(first, factors, nu):
  """New bases, and the second moments in their order."""
  def begin():
    basis = lambda gram: jnp.linalg.eigh(gram)[1][..., ::-1]
    return basis(factors.left), basis(factors.right), nu

  def turn():
    left, rows = _turned(factors.left, factors.left_basis)
    right, columns = _turned(factors.right, factors.right_basis)
    ordered = jnp.take_along_axis(nu, rows[..., :, None], axis=-2)
    return left, right, jnp.take_along_axis(ordered, columns[..., None, :], axis=-1)

  left, right, nu = jax.lax.cond(first, begin, turn)
  return factors._replace(left_basis=left, right_basis=right), nu


def scale_by_soap(b1: float, b2: float, epsilon: float, block_size: int, every: int
                  ) -> optax.GradientTransformation:
  """Adam, rotated. Matrices are cut into blocks of at most block_size x block_size, each with
  preconditioners of its own; those average the gradient's products with b2.

  As in the author's code the first gradient only begins the preconditioners, and moves nothing.

  Args:
    every: steps between two updates of the eigenvectors.
  """
  def begin(path, p):
    blocks, axes = _cut(path, p, block_size)
    M, N = blocks.shape[-2:]
    eye = lambda n: jnp.broadcast_to(jnp.eye(n, dtype=jnp.float32), (*axes, n, n))
    return Factors(jnp.zeros((*axes, M, M)), jnp.zeros((*axes, N, N)), eye(M), eye(N))

  def init(params):
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return SoapState(jnp.zeros((), jnp.int32), zeros(), zeros(),
                     jax.tree_util.tree_map_with_path(begin, params))

  def one(count, path, g, mu, nu, factors):
    g_blocks, _ = _cut(path, g, block_size)
    lead = g_blocks.shape[:3]
    flat = Factors(*(x.reshape(*lead, *x.shape[-2:]) for x in factors))
    bases = flat.left_basis, flat.right_basis
    started = count > 0
    nu_blocks = _cut(path, nu, block_size)[0]
    mu = jnp.where(started, b1 * mu + (1 - b1) * g, mu)
    square = jnp.square(_rotate(g_blocks, *bases))
    nu_blocks = jnp.where(started, b2 * nu_blocks + (1 - b2) * square, nu_blocks)
    power = jnp.maximum(count, 1).astype(jnp.float32)
    direction = _rotate(_cut(path, mu, block_size)[0], *bases) / (1 - b1**power)
    direction /= jnp.sqrt(nu_blocks / (1 - b2**power)) + epsilon
    direction = jnp.where(started, _rotate_back(direction, *bases), 0)
    flat = flat._replace(
        left=b2 * flat.left + (1 - b2) * _product('...ab,...cb->...ac', g_blocks, g_blocks),
        right=b2 * flat.right + (1 - b2) * _product('...ab,...ac->...bc', g_blocks, g_blocks))
    flat, nu_blocks = jax.lax.cond(
        count % every == 0, lambda: _refreshed(~started, flat, nu_blocks),
        lambda: (flat, nu_blocks))
    factors = Factors(*(new.reshape(old.shape) for new, old in zip(flat, factors)))
    return _join(direction, g.shape), mu, _join(nu_blocks, g.shape), factors

  def update(updates, state, params=None):
    del params
    leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
    columns = [treedef.flatten_up_to(tree) for tree in (state.mu, state.nu, state.factors)]
    done = [one(state.count, path, g, *rest) for (path, g), *rest in zip(leaves, *columns)]
    direction, mu, nu, factors = map(treedef.unflatten, zip(*done))
    return direction, SoapState(state.count + 1, mu, nu, factors)

  return optax.GradientTransformation(init, update)
