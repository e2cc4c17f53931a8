"""Optimiser state in 8 bits, a scale for each block of numbers (arXiv:2110.02861).

The code is the paper's dynamic tree (section 2.1): a decimal exponent of seven, and a fraction that
has the more bits the larger the exponent; here in closed form, so that it fuses into the update
instead of being looked up. Second moments have no sign and, as in arXiv:2309.01507 (section 4.1),
no zero: one that rounded to it would divide by epsilon alone. Departs from bitsandbytes: a block
lies along the last axis of its parameter, so that codes shard as the parameter does; and the
largest number of a block has the code of its neighbours, not one of its own.
"""
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.training.optimizers.paths import names_of

BLOCK = 256  # numbers that share a scale, where the last axis divides into as many
LEAST_BLOCK = 32  # with shorter ones, scales would take more than they save
LEAST_SIZE = 4096  # smaller arrays stay as they are, as in bitsandbytes
DECADES = 7
_UNSIGNED = 'nu', 'sum_of_squares'  # optax's names of second moments


class Quantized(NamedTuple):
  """codes: int8, or uint8 of numbers >= 0, of the array's shape; scales: float32, of blocks."""
  codes: jax.Array
  scales: jax.Array


def quantize(x: jax.Array, signed: bool) -> Quantized:
  """The nearest code of each number, given the largest of its block."""
  block = math.gcd(x.shape[-1], BLOCK)
  blocks = x.reshape(*x.shape[:-1], -1, block)
  scales = jnp.abs(blocks).max(-1) / _value(jnp.int32(127 if signed else 254), signed)
  size = jnp.abs(blocks) / jnp.where(scales > 0, scales, 1)[..., None]
  powers = 10.0 ** jnp.arange(1 - DECADES, 0, dtype=jnp.float32)  # 1e-6 .. 0.1
  exponent = (size[..., None] >= powers).sum(-1)
  bins = jnp.left_shift(1, exponent + (0 if signed else 1))
  top = 10.0 ** (exponent - (DECADES - 1)).astype(jnp.float32)  # of this exponent's decade
  place = jnp.clip(jnp.floor((size / top - 0.1) / 0.9 * bins), 0, bins - 1).astype(jnp.int32)
  least = (_value(jnp.int32(0), signed) + _value(jnp.int32(1), signed)) / 2
  codes = jnp.where(size < least, 0, bins + place - (0 if signed else 1))
  codes = jnp.where(blocks < 0, -codes, codes) if signed else codes
  return Quantized(codes.reshape(x.shape).astype(jnp.int8 if signed else jnp.uint8), scales)


def _value(code: jax.Array, signed: bool) -> jax.Array:
  """Of codes >= 0: the middle of its part of its decade; the largest is 1, less half a part."""
  place = code + (0 if signed else 1)
  exponent = 31 - jax.lax.clz(jnp.maximum(place, 1)) - (0 if signed else 1)
  bins = jnp.left_shift(1, exponent + (0 if signed else 1))
  top = 10.0 ** (exponent - (DECADES - 1)).astype(jnp.float32)
  value = top * (0.1 + 0.9 * (place - bins + 0.5) / bins)
  return jnp.where(code > 0, value, 0.0 if signed else 10.0 ** -DECADES)


def dequantize(x: Quantized) -> jax.Array:
  """The numbers that the codes stand for, float32."""
  signed = x.codes.dtype == jnp.int8
  codes = x.codes.astype(jnp.int32)
  values = _value(jnp.abs(codes), signed) * jnp.where(codes < 0, -1.0, 1.0)
  blocks = values.reshape(*x.scales.shape, -1) * x.scales[..., None]
  return blocks.reshape(x.codes.shape)


def quantized(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Keeps what `inner` holds for each number of a parameter in 8 bits between steps.

  Everything else of its state (counts, factors, small arrays) stays as it is.
  """
  inner = optax.with_extra_args_support(inner)

  def compress(state: Any, params: Any) -> Any:
    shapes = {names_of(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}

    def one(path, x):
      names = names_of(path)
      of_param = any(shapes.get(names[i:]) == x.shape for i in range(len(names)))
      if not of_param or x.size < LEAST_SIZE or math.gcd(x.shape[-1], BLOCK) < LEAST_BLOCK:
        return x
      signed = not any(getattr(key, 'name', None) in _UNSIGNED for key in path)
      return quantize(x, signed)

    return jax.tree_util.tree_map_with_path(one, state)

  def expand(state):
    is_quantized = lambda x: isinstance(x, Quantized)
    return jax.tree.map(lambda x: dequantize(x) if is_quantized(x) else x, state,
                        is_leaf=is_quantized)

  def update(updates, state, params=None, **extra):
    updates, state = inner.update(updates, expand(state), params, **extra)
    return updates, compress(state, params)

  return optax.GradientTransformationExtraArgs(
      lambda params: compress(inner.init(params), params), update)
