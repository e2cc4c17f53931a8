"""Rotary position embedding of queries and keys, in one call."""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.rotary import reference, tpu


def rotary(query: jax.Array, key: jax.Array, sin: jax.Array, cos: jax.Array, *,
           implementation: str | None = None) -> tuple[jax.Array, jax.Array]:
  """Rotates the pairs (i, i + H/2) of every head of every token (RoPE, arXiv:2104.09864, section
  3.2.2) by the token's i-th angle:

    out[i]       = x[i] cos[i] - x[i + H/2] sin[i]
    out[i + H/2] = x[i + H/2] cos[i] + x[i] sin[i]

  in float32, rounded once. Neighbours are paired in the paper, halves here as in GPT-NeoX and
  Llama: the same up to an order of the dimensions. The gradient is turned back by the same angles.
  On a TPU both arrays are rotated in place, where the program needs them no more, and read and
  written once.

  Args:
    query: [B, T, N, H], bfloat16 or float32, H even.
    key: [B, T, K, H], in the dtype of `query`.
    sin: float32 [B or 1, T, H/2], of the angles, not of their gradients: it is data, its gradient
      is zero.
    cos: as `sin`.
    implementation: None, 'reference' (XLA) or 'tpu' (Pallas; interpreted where there is no TPU).
      None is XLA's on a CPU or GPU, where each array is one fusion, and on a TPU Pallas where it
      takes the case.

  Returns:
    query and key, rotated.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: 'tpu' does not take this case.
  """
  B, T, _, H = query.shape
  if key.shape[:2] != (B, T) or key.shape[3] != H or key.dtype != query.dtype or H % 2:
    raise ValueError(f'query is {query.dtype} {query.shape} and key {key.dtype} {key.shape}, they '
                     'must be [B, T, N, H] and [B, T, K, H] of one dtype, H even')
  for name, angles in (('sin', sin), ('cos', cos)):
    if angles.shape not in ((B, T, H // 2), (1, T, H // 2)) or angles.dtype != jnp.float32:
      raise ValueError(f'{name} is {angles.dtype} {angles.shape}, it must be float32 '
                       f'{(B, T, H // 2)} or {(1, T, H // 2)} for query {query.shape}')
  if sin.shape != cos.shape:
    raise ValueError(f'sin {sin.shape} and cos {cos.shape} must be alike')
  if implementation not in (None, 'reference', 'tpu'):
    raise ValueError(f"implementation={implementation!r} must be None, 'reference' or 'tpu'")
  args = query, key, sin, cos
  refusal = tpu.refusal(query, key)
  if implementation == 'tpu':
    if refusal:
      raise NotImplementedError(refusal)
    return _kernel(*args)
  if implementation == 'reference' or refusal:
    if implementation is None and jax.default_backend() == 'tpu':
      platform.warn_once(f'rotary is left to XLA: {refusal}')
    return reference.rotary(*args)
  return platform.by_platform(reference.rotary, reference.rotary, *args, tpu=_kernel)


def _rotate(sign, query, key, sin, cos):
  # Heads side by side: an array of [heads, H] would be padded to whole tiles.
  flat = [x.reshape(*x.shape[:2], -1) for x in (query, key)]
  H = query.shape[3]
  out = platform.interpreted(functools.partial(tpu.rotate, sign, H), *flat, sin, cos)
  return out[0].reshape(query.shape), out[1].reshape(key.shape)


@jax.custom_vjp
def _kernel(query, key, sin, cos):
  return _rotate(1, query, key, sin, cos)


def _forward(query, key, sin, cos):
  return _rotate(1, query, key, sin, cos), (sin, cos)


def _backward(angles, gradients):
  return *_rotate(-1, *gradients, *angles), None, None


_kernel.defvjp(_forward, _backward)
