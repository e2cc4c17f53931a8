"""Where a token stands."""
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary(x_BTNH: Float[Array, 'B T N H'], positions_BT: Int[Array, 'B T'],
           theta: float) -> Float[Array, 'B T N H']:
  """Rotates the pairs (i, i + H/2) by the angle positions * theta**(-2i/H) (RoPE, arXiv:2104.09864).

  The halves are paired as in GPT-NeoX and Llama, not neighbours as in the paper: the same up to an
  order of the dimensions. Angles are float32: bfloat16 cannot tell position 257 from 256.
  """
  half = x_BTNH.shape[-1] // 2
  frequency_H = theta**(-jnp.arange(half, dtype=jnp.float32) / half)
  angle_BTH = positions_BT[..., None].astype(jnp.float32) * frequency_H
  sin, cos = jnp.sin(angle_BTH)[:, :, None], jnp.cos(angle_BTH)[:, :, None]
  first, second = x_BTNH[..., :half].astype(jnp.float32), x_BTNH[..., half:].astype(jnp.float32)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x_BTNH.dtype)
