"""Rounding up or down with probabilities by the distance, so that the mean is the number itself.

The random bits are a hash of each number and of its place: no key goes through the model, and they
are the same however a program is scanned, recomputed, or cut over devices.
"""
import jax
from jax import lax
import jax.numpy as jnp


def to_int8(x: jax.Array) -> jax.Array:
  """int8 of float32 in [-127, 127]."""
  uniform = (random_bits(x) >> 8).astype(jnp.float32) * 2.0**-24  # in [0, 1)
  return jnp.clip(jnp.floor(x + uniform), -127, 127).astype(jnp.int8)


def to_bfloat16(x: jax.Array, salt: jax.Array | int) -> jax.Array:
  """bfloat16 of float32: one of its two neighbours.

  Args:
    salt: integer, such as the step, where the same numbers may come again.
  """
  bits = lax.bitcast_convert_type(x, jnp.uint32) + (random_bits(x, salt) & 0xFFFF)
  rounded = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def random_bits(x: jax.Array, salt: jax.Array | int = 0) -> jax.Array:
  """uint32 of the shape of float32 x."""
  place = jnp.asarray(salt, jnp.uint32) * jnp.uint32(0x9E3779B9)
  for axis, size in enumerate(x.shape):
    place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return _mix(lax.bitcast_convert_type(x, jnp.uint32) ^ _mix(place))


def _mix(bits):
  """The finaliser of MurmurHash3 (Appleby 2011): every bit in changes every bit out half of the
  time."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
  return bits ^ (bits >> 16)
