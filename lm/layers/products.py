"""Products with parameters in fewer bits, forward and backward, of float32 masters.

'int8': each row and column that is contracted has its scale; gradients are rounded stochastically,
  so that their sums stay unbiased (arXiv:1805.11046; arXiv:2105.03536).
'fp8': E4M3 of inputs and parameters, E5M2 of gradients, a scale each from its largest magnitude
  (arXiv:2209.05433).
'fp8_delayed': the same, by the largest magnitudes of the last HISTORY steps, which stand in the
  parameters as `history`: known before the product, so that nothing is read twice. Their gradient
  is their next value (`lm.training.precision` puts it there).

Values are exact in bfloat16: where a chip multiplies none of these, they are multiplied in that.
"""
from collections.abc import Callable
import functools
from typing import Literal, Optional

import jax
from jax import lax
import jax.numpy as jnp

from lm.parallel.rules import Rules
from pallas_kernels import platform, stochastic_rounding
from pallas_kernels.matmul import cpu, matmul

Products = Optional[Literal['int8', 'fp8', 'fp8_delayed']]
HISTORY = 16  # steps
OPERANDS = 3  # inputs, parameters, gradients

_FORWARD = {'int8': jnp.int8, 'fp8': jnp.float8_e4m3fn}
_BACKWARD = {'int8': jnp.int8, 'fp8': jnp.float8_e5m2}


def product(kind: Products, rules: Rules) -> Callable[..., jax.Array]:
  """`matmul(x, w)` in this kind; of 'fp8_delayed' it is called with a history [3, HISTORY] too.

  Where the compiler cuts it over devices it has its plain form: that of a CPU's matrix unit fixes
  the order in memory, which the compiler does not cut.
  """
  is_cut = rules.mesh is not None and rules.mesh.size > 1
  if kind is None:
    return functools.partial(matmul, implementation='reference') if is_cut else matmul
  if kind == 'fp8_delayed':
    return functools.partial(_delayed, is_cut)
  return functools.partial(_quantized, kind, is_cut)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _quantized(kind, is_cut, x, w_KN):
  form = _FORWARD[kind]
  x_values, x_scale = quantize(x, form, axis=-1)
  w_values, w_scale = quantize(w_KN, form, axis=0)
  y = _dot(x_values, w_values, is_cut) * (x_scale * w_scale)
  return y.astype(x.dtype)


def _quantized_forward(kind, is_cut, x, w_KN):
  return _quantized(kind, is_cut, x, w_KN), (x, w_KN)


def _quantized_backward(kind, is_cut, residuals, g):
  x, w_KN = residuals
  forward, backward = _FORWARD[kind], _BACKWARD[kind]
  g_values, g_scale = quantize(g, backward, axis=-1, stochastic=True)
  w_values, w_scale = quantize(w_KN, forward, axis=1)
  dx = _dot(g_values, w_values.T, is_cut) * (g_scale * w_scale.T)
  rows = lambda y: y.reshape(-1, y.shape[-1])
  g_values, g_scale = quantize(rows(g), backward, axis=0, stochastic=True)
  x_values, x_scale = quantize(rows(x), forward, axis=0)
  dw_KN = _dot(x_values.T, g_values, is_cut) * (x_scale.T * g_scale)
  return dx.astype(x.dtype), dw_KN.astype(w_KN.dtype)


_quantized.defvjp(_quantized_forward, _quantized_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delayed(is_cut, x, w_KN, history):
  return _delayed_forward(is_cut, x, w_KN, history)[0]


def _delayed_forward(is_cut, x, w_KN, history):
  largest = history.max(-1)
  x_values, x_scale = _by_largest(x, _FORWARD['fp8'], largest[0])
  w_values, w_scale = _by_largest(w_KN, _FORWARD['fp8'], largest[1])
  y = _dot(x_values, w_values, is_cut) * (x_scale * w_scale)
  return y.astype(x.dtype), (x_values, x_scale, w_values, w_scale, history, _largest(x),
                             _largest(w_KN), jnp.zeros((), x.dtype), jnp.zeros((), w_KN.dtype))


def _delayed_backward(is_cut, residuals, g):
  x_values, x_scale, w_values, w_scale, history, x_largest, w_largest, x, w = residuals
  g_values, g_scale = _by_largest(g, _BACKWARD['fp8'], history[2].max())
  dx = _dot(g_values, w_values.T, is_cut) * (g_scale * w_scale)
  rows = lambda y: y.reshape(-1, y.shape[-1])
  dw_KN = _dot(rows(x_values).T, rows(g_values), is_cut) * (x_scale * g_scale)
  seen = jnp.stack([x_largest, w_largest, _largest(g)])
  history = jnp.roll(history, 1, axis=-1).at[:, 0].set(seen)
  return dx.astype(x.dtype), dw_KN.astype(w.dtype), history


_delayed.defvjp(_delayed_forward, _delayed_backward)


def quantize(x: jax.Array, dtype: jax.typing.DTypeLike, axis: int, stochastic: bool = False
             ) -> tuple[jax.Array, jax.Array]:
  """Values of int8, or of an 8-bit float, and float32 scales: x ~ values * scales.

  Args:
    axis: of int8, whose elements share a scale (kept with size 1); all of x shares that of a float.
    stochastic: rounds int8 up or down with probabilities by the distance, so that the mean is x.
  """
  if dtype != jnp.int8:
    return _by_largest(x, dtype, _largest(x))
  x = x.astype(jnp.float32)
  scale = jnp.abs(x).max(axis, keepdims=True) / 127
  x = x / jnp.where(scale > 0, scale, 1)
  return stochastic_rounding.to_int8(x) if stochastic else jnp.round(x).astype(jnp.int8), scale


def _largest(x):
  return jnp.abs(x).max().astype(jnp.float32)


def _by_largest(x, dtype, largest):
  """Saturates what is greater: an infinity in 8 bits would be no number in E4M3."""
  limit = float(jnp.finfo(dtype).max)
  scale = jnp.where(largest > 0, largest, limit) / limit
  return jnp.clip(x.astype(jnp.float32) / scale, -limit, limit).astype(dtype), scale


def _dot(a: jax.Array, b_KN: jax.Array, is_cut: bool) -> jax.Array:
  """Float32 a b of values [..., K] and [K, N]: int8 in int32, floats in float32."""
  def native(a, b):
    kind = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return lax.dot_general(a, b, (((a.ndim - 1,), (0,)), ((), ())),
                           preferred_element_type=kind).astype(jnp.float32)

  def on_cpu(a, b):
    if platform.cpu_has_bfloat16_units() and not is_cut:
      a_MK = cpu.row_major(a.reshape(-1, a.shape[-1]).astype(jnp.bfloat16))
      return cpu.dot(a_MK, b.astype(jnp.bfloat16)).reshape(*a.shape[:-1], -1)
    return jnp.einsum('...k,kn->...n', a.astype(jnp.float32), b.astype(jnp.float32))

  return platform.by_platform(on_cpu, native, a, b_KN)
