"""The specification of `streamed_matmul`, and its form for many rows and other platforms."""
import jax
import jax.numpy as jnp
import jax.numpy as jnp

from pallas_kernels.matmul import dot
from pallas_kernels.quantized_matmul import quantized_matmul


def matmul(x_MK: jax.Array, values_NK: jax.Array, scales_N: jax.Array | None) -> jax.Array:
  """float32 [M, N]: x (values * scales)^T, multiplied in the dtype of x."""
  if scales_N is None:
    return dot(x_MK, values_NK.astype(x_MK.dtype), transpose_b=True)
  return quantized_matmul(x_MK, values_NK, scales_N, dtype=jnp.float32, transposed=True)


def rows(values_NK: jax.Array, rows: jax.Array) -> jax.Array:
  """[..., K] of `rows` [...]."""
  return jnp.take(values_NK, rows, axis=0)
