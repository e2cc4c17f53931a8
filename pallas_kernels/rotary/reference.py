"""The specification of `rotary`."""
import jax
import jax.numpy as jnp


def _rotated(x_BTNH, sin_BTH, cos_BTH):
  half = x_BTNH.shape[-1] // 2
  sin, cos = sin_BTH[:, :, None], cos_BTH[:, :, None]
  first, second = x_BTNH[..., :half].astype(jnp.float32), x_BTNH[..., half:].astype(jnp.float32)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x_BTNH.dtype)


def rotary(query_BTNH, key_BTKH, sin, cos):
  """Both rotated, as `api.rotary` writes it."""
  sin, cos = jax.lax.stop_gradient((sin, cos))
  return _rotated(query_BTNH, sin, cos), _rotated(key_BTKH, sin, cos)
