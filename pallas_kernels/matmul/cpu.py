"""Products in the one form that XLA:CPU hands to the CPU's matrix unit (AMX, AVX-512 BF16).

A dot reaches it when both operands are bfloat16, the result is float32, the contraction is over the
last axis of the left operand, and the left operand is row-major in memory; any other form runs 2
to 5 times slower, as float32. Autodiff leaves that form twice (a float32 cotangent; x^T g
contracts the first axis), hence the gradients written out here.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

# Parts whose operands and float32 results stay in the caches: a tenth of a step at d_model 512.
PART = 2**20     # elements of a part of the result
MIN_ROWS = 512   # of a part
MAX_PARTS = 8    # but never more of them, for the sake of compile time
LONG = 4096      # a contraction over more is summed in parts


def row_major(x: jax.Array) -> jax.Array:
  """Fixes the order in memory to that of the axes, which XLA would otherwise choose."""
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def transpose(x: jax.Array) -> jax.Array:
  """Swaps the last two axes by moving elements; a plain `.mT` is folded into the dot as a
  layout."""
  return row_major(jnp.swapaxes(x, -1, -2))


def transpose_apart(x: jax.Array) -> jax.Array:
  """`transpose` in a pass of its own: fused with what makes or uses x, once for each user, it takes
  five times as long."""
  return lax.optimization_barrier(transpose(lax.optimization_barrier(x)))


def _for_one_row(product):
  """The product with a row of zeros below a single row: of one row alone XLA:CPU computes a product
  in bfloat16 in float32, of matrices that it converts, at up to a 20th of the speed."""
  @functools.wraps(product)
  def padded(a, b):
    if a.shape[-2] != 1:
      return product(a, b)
    two_rows = lax.optimization_barrier(jnp.concatenate([a, jnp.zeros_like(a)], -2))
    return product(two_rows, b)[..., :1, :]
  return padded


@_for_one_row
def dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """a [..., M, K] times b [..., K, N] in float32 [..., M, N]; leading axes are batched."""
  if a.shape[-1] > LONG:
    return sum(dot(row_major(a[..., k:k + LONG]), b[..., k:k + LONG, :])
               for k in range(0, a.shape[-1], LONG))
  batch = tuple(range(a.ndim - 2))
  dimensions = (((a.ndim - 1,), (b.ndim - 2,)), (batch, batch))
  return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


@_for_one_row
def dot_t(a: jax.Array, b: jax.Array) -> jax.Array:
  """a [..., M, K] times the transpose of b [..., N, K] in float32 [..., M, N]."""
  batch = tuple(range(a.ndim - 2))
  dimensions = (((a.ndim - 1,), (b.ndim - 1,)), (batch, batch))
  return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _dot_by_rows(a_MK: jax.Array, b_KN: jax.Array) -> jax.Array:
  """`dot`, rounded to the dtype of `a` part by part."""
  M, N = a_MK.shape[0], b_KN.shape[1]
  count = max(1, min(-(-M * N // PART), -(-M // MIN_ROWS), MAX_PARTS))
  size = 64 * max(1, -(-M // (64 * count)))  # equal parts of whole tiles
  parts = [dot(row_major(a_MK[m:m + size]), b_KN).astype(a_MK.dtype)
           for m in range(0, max(M, 1), size)]
  return jnp.concatenate(parts)


def product(x: jax.Array, w_KN: jax.Array) -> jax.Array:
  """`reference.product`."""
  y_MN = _dot_by_rows(x.reshape(-1, x.shape[-1]), w_KN.astype(x.dtype))
  return y_MN.reshape(*x.shape[:-1], w_KN.shape[1])


def gradients(x: jax.Array, w_KN: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`reference.gradients`."""
  x_MK, g_MN = x.reshape(-1, x.shape[-1]), row_major(g.reshape(-1, g.shape[-1]))
  dx_MK = _dot_by_rows(g_MN, transpose(w_KN.astype(g_MN.dtype)))
  if x_MK.shape[1] > g_MN.shape[1]:  # Moves the narrower operand: 1.6 times faster at 2048 x 512.
    dw_KN = transpose_apart(dot(transpose(g_MN), row_major(x_MK)))
  else:
    dw_KN = dot(transpose(x_MK), g_MN)
  return dx_MK.reshape(x.shape), dw_KN.astype(w_KN.dtype)
