"""Where a token stands."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.platform import by_platform


class Rotation(NamedTuple):
  """Sines and cosines of every token's angles, float32 [B, T, H / 2]; computed once for all
  layers."""
  sin: jax.Array
  cos: jax.Array


def rotation(positions_BT: Int[Array, 'B T'], d_head: int, theta: float) -> Rotation:
  """The angles positions * theta**(-2i/H) for i < H/2 (RoPE, arXiv:2104.09864, section 3.2.2).

  Angles are float32: bfloat16 cannot tell position 257 from 256.
  """
  half = d_head // 2
  frequency_H = theta**(-jnp.arange(half, dtype=jnp.float32) / half)
  angle_BTH = positions_BT[..., None].astype(jnp.float32) * frequency_H
  elsewhere = lambda angle: (jnp.sin(angle), jnp.cos(angle))
  return Rotation(*by_platform(_in_a_loop, elsewhere, angle_BTH))


def _in_a_loop(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sine and cosine in a loop of two turns, the one thing that XLA:CPU does not fuse through.

  Otherwise it computes them again for every head of every layer: a fifth of a small model's step.
  An optimization_barrier is gone by the time it fuses.
  """
  one = lambda _, is_cos: (None, jnp.where(is_cos, jnp.cos(angle), jnp.sin(angle)))
  sin, cos = jax.lax.scan(one, None, jnp.array([False, True]))[1]
  return sin, cos


def rotary(x_BTNH: Float[Array, 'B T N H'], by: Rotation) -> Float[Array, 'B T N H']:
  """Rotates the pairs (i, i + H/2) of every head.

  The halves are paired as in GPT-NeoX and Llama, not neighbours as in the paper: the same up to an
  order of the dimensions.
  """
  half = x_BTNH.shape[-1] // 2
  sin, cos = by.sin[:, :, None], by.cos[:, :, None]
  first, second = x_BTNH[..., :half].astype(jnp.float32), x_BTNH[..., half:].astype(jnp.float32)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x_BTNH.dtype)
