"""The specification of `grouped_matmul` and its gradients."""
import jax
from jax import lax
import jax.numpy as jnp

ROWS = lax.RaggedDotDimensionNumbers(  # the contraction is over the rows of a group
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[])


def _precision(x):
  return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def product(x_MK: jax.Array, w_PKN: jax.Array, sizes_P: jax.Array) -> jax.Array:
  """Rows of group p times w[p], [M, N]."""
  return lax.ragged_dot(x_MK, w_PKN.astype(x_MK.dtype), sizes_P, precision=_precision(x_MK),
                        preferred_element_type=jnp.float32).astype(x_MK.dtype)


def gradients(x_MK, w_PKN, sizes_P, dy_MN):
  """The gradients of x and of w, each in its dtype."""
  dw_PKN = lax.ragged_dot_general(x_MK, dy_MN, sizes_P, ROWS, precision=_precision(x_MK),
                                  preferred_element_type=jnp.float32)
  return product(dy_MN, w_PKN.swapaxes(1, 2), sizes_P), dw_PKN.astype(w_PKN.dtype)
