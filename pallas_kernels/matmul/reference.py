"""The specification of `matmul`, and the form that TPU and GPU compile best."""
import jax
import jax.numpy as jnp


def product(x_MK: jax.Array, w_KN: jax.Array) -> jax.Array:
  """y = x w, accumulated in float32, in the dtype of x."""
  y_MN = jnp.einsum('mk,kn->mn', x_MK, w_KN.astype(x_MK.dtype), preferred_element_type=jnp.float32)
  return y_MN.astype(x_MK.dtype)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """a [..., M, K] b [..., K, N] in float32."""
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def dot_t(a: jax.Array, b: jax.Array) -> jax.Array:
  """a [..., M, K] b^T [..., N, K] in float32."""
  return jnp.matmul(a, b.mT, preferred_element_type=jnp.float32)


def gradients(x_MK: jax.Array, w_KN: jax.Array, g_MN: jax.Array) -> tuple[jax.Array, jax.Array]:
  """dx = g w^T and dw = x^T g for the cotangent g of y."""
  dx_MK = jnp.einsum('mn,kn->mk', g_MN, w_KN.astype(g_MN.dtype), preferred_element_type=jnp.float32)
  dw_KN = jnp.einsum('mk,mn->kn', x_MK, g_MN, preferred_element_type=jnp.float32)
  return dx_MK.astype(x_MK.dtype), dw_KN.astype(w_KN.dtype)
