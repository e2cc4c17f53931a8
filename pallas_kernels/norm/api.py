"""LayerNorm and RMSNorm over the last axis, with the residual stream's addition before them."""
import functools

import jax

from pallas_kernels import chips, platform
from pallas_kernels.norm import gpu, reference, tpu
from pallas_kernels.norm.reference import Options

_KERNELS = {'tpu': (tpu, 'tpu'), 'gpu': (gpu, 'cuda')}  # and what they are compiled on


def norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None = None, *,
         residual: jax.Array | None = None, kind: str, epsilon: float,
         implementation: str | None = None) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Normalises the last axis of h = x + residual:

    y = scale * (h - mean(h)) / sqrt(mean((h - mean(h))^2) + epsilon) + bias   LayerNorm
    y = scale * h / sqrt(mean(h^2) + epsilon) + bias                           RMSNorm

  (arXiv:1607.06450, section 3; arXiv:1910.07467, section 3). Everything is float32 inside and
  rounded once, but h is rounded to the dtype of `x` before it is normalised, as a residual stream
  is. In Pallas each pass reads each of its arrays once and writes each once: the backward pass
  takes mean and variance again, of h, and sums the gradients of scale and bias in float32.

  Args:
    x: [..., D], bfloat16 or float32.
    scale: [D], any floating dtype; a caller who stores it less 1 adds the 1.
    bias: [D], or None for none.
    residual: what is added before, of the shape and dtype of `x`, or None.
    kind: 'layernorm' or 'rmsnorm'.
    epsilon: keeps the root from 0.
    implementation: None, 'reference' (XLA), 'tpu' or 'gpu' (Pallas; interpreted on any other
      platform). None is Pallas on a TPU, and on an NVIDIA GPU where one is in use, if it takes the
      case, and else XLA's.

  Returns:
    y in the dtype of `x`; with a residual (y, h), h in the dtype of `x`.

  Raises:
    ValueError: shapes or dtypes that do not fit, or an unknown kind.
    NotImplementedError: the kernel that is named does not take this case.
  """
  D = x.shape[-1]
  if kind not in ('layernorm', 'rmsnorm'):
    raise ValueError(f"kind={kind!r} must be 'layernorm' or 'rmsnorm'")
  for name, array in (('scale', scale), ('bias', bias)):
    if array is not None and array.shape != (D,):
      raise ValueError(f'{name} has shape {array.shape}, it must be {(D,)} for x {x.shape}')
  if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
    raise ValueError(f'residual is {residual.dtype} {residual.shape}, it must be as x, {x.dtype} '
                     f'{x.shape}')
  if implementation not in (None, 'reference', *_KERNELS):
    raise ValueError(f"implementation={implementation!r} must be None, 'reference', 'tpu' or 'gpu'")
  options = Options(kind, epsilon)
  plain = functools.partial(reference.norm, options)
  args = x, residual, scale, bias
  name = implementation or ('tpu' if chips.card() is None else 'gpu')
  module, compiled_on = _KERNELS.get(name, (None, None))
  refusal = module and module.refusal(x)
  if refusal and implementation:
    raise NotImplementedError(refusal)
  if refusal and (name == 'gpu' or jax.default_backend() == 'tpu'):
    platform.warn_once(f'norm is left to XLA: {refusal}')
  kernel = functools.partial(_kernel, options, name)
  if refusal or module is None:
    y, total = plain(*args)
  elif implementation:
    y, total = kernel(*args)
  else:
    y, total = platform.by_platform(plain, plain, *args, **{compiled_on: kernel})
  return y if residual is None else (y, total)


def _rows(x):
  return None if x is None else x.reshape(-1, x.shape[-1])


def _pass(name, pass_name, *options):
  """A pass of a kernel, interpreted where it is not compiled."""
  module, compiled_on = _KERNELS[name]
  return functools.partial(platform.interpreted,
                           functools.partial(getattr(module, pass_name), *options),
                           compiled_on=compiled_on)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernel(options, name, x, residual, scale, bias):
  y_MD, total_MD = _pass(name, 'forward', options)(_rows(x), _rows(residual), scale, bias)
  return y_MD.reshape(x.shape), None if residual is None else total_MD.reshape(x.shape)


def _forward(options, name, x, residual, scale, bias):
  y, total = _kernel(options, name, x, residual, scale, bias)
  return (y, total), (x if residual is None else total, scale, bias)


def _backward(options, name, residuals, gradients):
  total, scale, bias = residuals
  dy, dtotal = gradients
  dx_MD, dscale_D, dbias_D = _pass(name, 'backward', options, bias is not None)(
      _rows(total), scale, _rows(dy), _rows(dtotal))
  dx = dx_MD.reshape(total.shape)
  return (dx, None if dtotal is None else dx, dscale_D.astype(scale.dtype),
          None if bias is None else dbias_D.astype(bias.dtype))


_kernel.defvjp(_forward, _backward)
