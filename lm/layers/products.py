"""Products with parameters in fewer bits, forward and backward, of float32 masters.

'int8': a scale for each row of inputs and gradients and each column of parameters. Gradients are
  rounded stochastically, so that what flows back has no bias; the gradient of the parameter, whose
  sum is over tokens, is computed in the inputs' own dtype (SwitchBack, arXiv:2304.13013, section
  2.2).
'fp8': E4M3 of inputs and parameters, E5M2 of gradients, in all three products, each array scaled by
  its largest magnitude (arXiv:2209.05433, section 3).
'fp8_delayed': the same, scaled by the largest magnitudes of the last HISTORY steps, so that no
  array is read before it is converted. They stand in the parameters as `history`, whose gradient is
  its next value (`lm.training.precision` puts it there).

'fake_int8', 'fake_int4': products of floats by parameters that are rounded as
  `lm.compression.quantize` will round them when training is over, the latter in groups of
  FAKE_GROUP inputs where these divide; gradients go straight through the rounding
  (quantisation-aware training, arXiv:1712.05877, section 3; arXiv:1308.3432).

Values in 8 bits are exact in bfloat16: a CPU multiplies them in that, or in float32.
"""
from collections.abc import Callable
import functools
from typing import Literal, Optional

import jax
from jax import lax
import jax.numpy as jnp

from lm.parallel.rules import Rules
from pallas_kernels import platform, stochastic_rounding
from pallas_kernels.matmul import dot, matmul
from pallas_kernels.quantized_matmul import quantize, quantized_matmul

Products = Optional[Literal['int8', 'fp8', 'fp8_delayed', 'fake_int8', 'fake_int4']]
FAKE_GROUP = 32
HISTORY = 16  # steps
OPERANDS = 3  # inputs, parameters, gradients


def product(kind: Products, rules: Rules) -> Callable[..., jax.Array]:
  """`matmul(x, w)` in this kind; of 'fp8_delayed' it is called with a history [3, HISTORY] too.

  Where the compiler cuts it over devices it has its plain form: that of a CPU's matrix unit fixes
  the order in memory, which the compiler does not cut.
  """
  is_cut = rules.is_cut
  plain = functools.partial(matmul, implementation='reference') if is_cut else matmul
  if kind is None:
    return plain
  if kind.startswith('fake'):
    return lambda x, w_KN: plain(x, _rounded(4 if kind == 'fake_int4' else 8, w_KN))
  return functools.partial(_int8 if kind == 'int8' else _fp8, is_cut)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(bits, w_KN):
  """The multiples of its scales that are nearest to a parameter."""
  K, N = w_KN.shape
  size = FAKE_GROUP if bits == 4 and K % FAKE_GROUP == 0 else K
  values_KN, scales_PN = quantize(w_KN, bits, size)
  values_PGN = values_KN.astype(jnp.float32).reshape(-1, size, N)
  return (values_PGN * scales_PN[:, None]).reshape(K, N).astype(w_KN.dtype)


_rounded.defvjp(lambda bits, w_KN: (_rounded(bits, w_KN), None), lambda bits, _, g: (g,))


def quantized(kind: Products, x: jax.Array, values_KN: jax.Array, scales_PN: jax.Array
              ) -> jax.Array:
  """x (values * scales) of a parameter that is kept in few bits; in the kind 'int8' the rows of x
  are rounded too, each to a scale of its own. It has no gradient."""
  if kind == 'int8' and jnp.issubdtype(values_KN.dtype, jnp.integer):
    x_values, x_scale = _to_int8(x, -1)
    return quantized_matmul(x_values, values_KN, scales_PN, x_scale=x_scale, dtype=x.dtype)
  return quantized_matmul(x, values_KN, scales_PN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _int8(is_cut, x, w_KN):
  (x_values, x_scale), (w_values, w_scale) = _to_int8(x, -1), _to_int8(w_KN, 0)
  return (_dot(x_values, w_values, is_cut) * (x_scale * w_scale)).astype(x.dtype)


def _int8_backward(is_cut, residuals, g):
  x, w_KN = residuals
  w_values, w_scale = _to_int8(w_KN, 0)
  # The scales of the columns of w weigh those of g: one w in int8 serves both passes.
  g_values, g_scale = _to_int8(g * w_scale, -1, stochastic_rounding.to_int8)
  dx = _dot(g_values, w_values.T, is_cut) * g_scale
  multiply = functools.partial(matmul, implementation='reference' if is_cut else None)
  dw_KN, = jax.vjp(functools.partial(multiply, x), w_KN)[1](g)
  return dx.astype(x.dtype), dw_KN


_int8.defvjp(lambda is_cut, x, w_KN: (_int8(is_cut, x, w_KN), (x, w_KN)), _int8_backward)


def _to_int8(x, axis, round_to=lambda x: jnp.round(x).astype(jnp.int8)):
  """Values, and float32 scales that the elements along `axis` share."""
  x = x.astype(jnp.float32)
  scale = jnp.abs(x).max(axis, keepdims=True) / 127
  return round_to(x / jnp.where(scale > 0, scale, 1)), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fp8(is_cut, x, w_KN, history=None):
  return _fp8_forward(is_cut, x, w_KN, history)[0]


def _fp8_forward(is_cut, x, w_KN, history):
  seen = _largest(x), _largest(w_KN)
  known = seen if history is None else history[:2].max(-1)
  x_values, x_scale = _to_fp8(x, jnp.float8_e4m3fn, known[0])
  w_values, w_scale = _to_fp8(w_KN, jnp.float8_e4m3fn, known[1])
  y = _dot(x_values, w_values, is_cut) * (x_scale * w_scale)
  dtypes = jnp.zeros((), x.dtype), jnp.zeros((), w_KN.dtype)
  return y.astype(x.dtype), (x_values, x_scale, w_values, w_scale, seen, history, dtypes)


def _fp8_backward(is_cut, residuals, g):
  x_values, x_scale, w_values, w_scale, seen, history, (x, w) = residuals
  largest = _largest(g)
  g_values, g_scale = _to_fp8(g, jnp.float8_e5m2, largest if history is None else history[2].max())
  dx = _dot(g_values, w_values.T, is_cut) * (g_scale * w_scale)
  rows = lambda y: y.reshape(-1, y.shape[-1])
  dw_KN = _dot(rows(x_values).T, rows(g_values), is_cut) * (x_scale * g_scale)
  if history is not None:
    history = jnp.roll(history, 1, axis=-1).at[:, 0].set(jnp.stack([*seen, largest]))
  return dx.astype(x.dtype), dw_KN.astype(w.dtype), history


_fp8.defvjp(_fp8_forward, _fp8_backward)


def _largest(x):
  return jnp.abs(x).max().astype(jnp.float32)


def _to_fp8(x, dtype, largest):
  """Values, and their scale; what is greater than `largest` is cut: E4M3 has no infinity."""
  limit = float(jnp.finfo(dtype).max)
  scale = jnp.where(largest > 0, largest, limit) / limit
  return jnp.clip(x.astype(jnp.float32) / scale, -limit, limit).astype(dtype), scale


def _dot(a: jax.Array, b_KN: jax.Array, is_cut: bool) -> jax.Array:
  """Float32 a b of values [..., K] and [K, N]: int8 summed in int32, floats in float32."""
  def native(a, b):
    sums = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return lax.dot_general(a, b, (((a.ndim - 1,), (0,)), ((), ())),
                           preferred_element_type=sums).astype(jnp.float32)

  def on_cpu(a, b):
    if is_cut or not platform.cpu_has_bfloat16_units():
      return jnp.einsum('...k,kn->...n', a.astype(jnp.float32), b.astype(jnp.float32))
    a_MK = a.reshape(-1, a.shape[-1]).astype(jnp.bfloat16)
    return dot(a_MK, b.astype(jnp.bfloat16)).reshape(*a.shape[:-1], -1)

  return platform.by_platform(on_cpu, native, a, b_KN)
