"""Gated linear units, less their linear part."""
import functools

import jax

from pallas_kernels import platform
from pallas_kernels.glu import reference, tpu


def glu(gate: jax.Array, up: jax.Array, *, activation: str,
        implementation: str | None = None) -> jax.Array:
  """Computes f(gate) * up (arXiv:2002.05202, section 2) in float32, rounded once, with

    'swiglu'       f(x) = x / (1 + exp(-x))
    'geglu'        f(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
    'geglu_exact'  f(x) = x / 2 * (1 + erf(x / sqrt(2)))

  Only gate and up are kept for the backward pass, which computes f again. On a TPU each pass reads
  each of its arrays once and writes each once.

  Args:
    gate: [..., F], bfloat16 or float32.
    up: as `gate`.
    activation: one of the three.
    implementation: None, 'reference' (XLA) or 'tpu' (Pallas; interpreted where there is no TPU).
      None is XLA's on a CPU or GPU, where each pass is one fusion, and on a TPU Pallas where it
      takes the case.

  Returns:
    [..., F] in the dtype of `gate`.

  Raises:
    ValueError: an unknown activation, or shapes or dtypes that differ.
    NotImplementedError: 'tpu' does not take this case.
  """
  if activation not in reference.ACTIVATIONS:
    raise ValueError(f'activation={activation!r} must be one of {list(reference.ACTIVATIONS)}')
  if (gate.shape, gate.dtype) != (up.shape, up.dtype):
    raise ValueError(f'gate is {gate.dtype} {gate.shape} and up {up.dtype} {up.shape}, they must '
                     'be alike')
  if implementation not in (None, 'reference', 'tpu'):
    raise ValueError(f"implementation={implementation!r} must be None, 'reference' or 'tpu'")
  plain = functools.partial(reference.glu, activation)
  kernel = functools.partial(_kernel, activation)
  refusal = tpu.refusal(gate)
  if implementation == 'tpu':
    if refusal:
      raise NotImplementedError(refusal)
    return kernel(gate, up)
  if implementation == 'reference' or refusal:
    if implementation is None and jax.default_backend() == 'tpu':
      platform.warn_once(f'glu is left to XLA: {refusal}')
    return plain(gate, up)
  return platform.by_platform(plain, plain, gate, up, tpu=kernel)


def _rows(x):
  return x.reshape(-1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel(activation, gate, up):
  y_MF = platform.interpreted(functools.partial(tpu.forward, activation), _rows(gate), _rows(up))
  return y_MF.reshape(gate.shape)


def _forward(activation, gate, up):
  return _kernel(activation, gate, up), (gate, up)


def _backward(activation, residuals, dy):
  gate, up = residuals
  dgate_MF, dup_MF = platform.interpreted(functools.partial(tpu.backward, activation), _rows(gate),
                                          _rows(up), _rows(dy))
  return dgate_MF.reshape(gate.shape), dup_MF.reshape(up.shape)


_kernel.defvjp(_forward, _backward)
