"""The terms of the scores by distance for XLA:CPU, block by block: no T x S array of them."""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import positions
from pallas_kernels.matmul.cpu import dot, dot_t, row_major, transpose


class ByDistance:
  """The terms by distance of a call, and the sums of their gradients, for one block at a time:
  (first query, end of queries, first key, end of keys)."""

  def __init__(self, options, terms, T: int, S: int, offset: jax.Array | None):
    self.scale, self.T = options.scale, T
    self.query_BNTH = None
    if terms.relative_query is not None:
      self.query_BNTH = row_major(jnp.swapaxes(terms.relative_query, 1, 2))

    def diagonals(bias, key_XNH):
      if bias is not None:
        at_zero = bias.shape[1] // 2 - options.query_offset
        bias = positions.diagonals(bias.astype(jnp.float32), at_zero, T, S, offset)
      if key_XNH is not None:
        key = jnp.flip(jnp.swapaxes(key_XNH, 0, 1), 1)
        at_zero = key.shape[1] - 1 - options.query_offset
        key_XNH = positions.diagonals(key, at_zero, T, S, offset, 1)
      return bias, key_XNH

    # [1 or B, N, T + S - 1] and [1 or B, N, T + S - 1, H]
    self.diagonals, self.to_tables = jax.vjp(diagonals, terms.distance_bias, terms.relative_key)
    self.gradients = list(jax.tree.map(jnp.zeros_like, self.diagonals))
    self.dquery = []

  def scores(self, block) -> jax.Array | None:
    """The sum of the terms, float32 [1 or B, N, t, s], if there are any."""
    near, query = self._operands(block)
    return _scores(self.scale, block[1] - block[0], near, query) if jax.tree.leaves(near) else None

  def add_gradients(self, block, dscores: jax.Array):
    """Adds what a block gives, from float32 [B, N, t, s]."""
    near, query = self._operands(block)
    if not jax.tree.leaves(near):
      return
    scores = functools.partial(_scores, self.scale, block[1] - block[0])
    added, pull = jax.vjp(scores, near, query)
    parts, dquery = pull(dscores if added.shape[0] > 1 else sum_of_rows(dscores))
    window = self._window(block)
    self.gradients = [x if part is None else x.at[:, :, window].add(part)
                      for x, part in zip(self.gradients, parts)]
    self.dquery.append(dquery)

  def of_terms(self):
    """The gradients of distance_bias, relative_query and relative_key."""
    bias, key = self.to_tables(tuple(self.gradients))
    if self.query_BNTH is None:
      return bias, None, key
    return bias, jnp.swapaxes(jnp.concatenate(self.dquery, 2), 1, 2), key

  def _window(self, block):
    start, end, first, last = block
    return slice(first - end + self.T, last - start + self.T - 1)

  def _operands(self, block):
    near = tuple(None if x is None else x[:, :, self._window(block)] for x in self.diagonals)
    return near, None if self.query_BNTH is None else self.query_BNTH[:, :, block[0]:block[1]]


def _scores(scale, rows, near, query):
  bias, key = near
  terms = [] if bias is None else [positions.toeplitz(bias, rows)]
  if key is not None:
    key = jnp.broadcast_to(key, (*query.shape[:2], *key.shape[2:]))
    terms.append(positions.skewed(_products(query, key)) * scale)
  return sum(terms)


def sum_of_rows(x: jax.Array) -> jax.Array:
  """Sums over axis 0, kept, by a product: as a sum XLA:CPU needs half of a backward pass for it."""
  return (jnp.ones((1, x.shape[0])) @ x.reshape(x.shape[0], -1)).reshape(1, *x.shape[1:])


@jax.custom_vjp
def _products(query, key):
  """query [..., M, H] times the transpose of key [..., X, H], in float32 [..., M, X]."""
  return dot_t(query, key)


def _products_backward(operands, g):
  query, key = operands
  g = row_major(g.astype(query.dtype))
  return dot(g, key).astype(query.dtype), dot(transpose(g), query).astype(key.dtype)


_products.defvjp(lambda query, key: (_products(query, key), (query, key)), _products_backward)
