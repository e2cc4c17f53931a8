"""One product for each group of rows, as experts that drop no token need it."""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import chips, platform
from pallas_kernels.grouped_matmul import gpu, reference, tpu

_KERNELS = {'tpu': (tpu, 'tpu'), 'gpu': (gpu, 'cuda')}  # and what they are compiled on


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, *,
                   implementation: str | None = None) -> jax.Array:
  """Multiplies each group of rows by its own matrix: y[m] = x[m] w[g] for row m of group g.

  Operands are multiplied in the dtype of `x` and sums are float32; the gradient of `w` has the
  dtype of `w`, so float32 masters receive unrounded sums (dw[g] = x[rows of g]^T dy[rows of g]).
  The Pallas kernels visit only the pairs of a tile of rows and a group that share rows
  (MegaBlocks, arXiv:2211.15841, section 5).

  Args:
    x: [M, K], bfloat16 or float32 ('gpu': float16 too), its rows in the order of their groups.
    w: [G, K, N], any floating dtype; cast to the dtype of `x`.
    group_sizes: int32 [G], rows of each group; rows behind the last group are of none, and their
      results and gradients are 0.
    implementation: None, 'reference' (`jax.lax.ragged_dot`), 'tpu' or 'gpu' (Pallas; interpreted on
      any other platform). None is Pallas on a TPU, and on an NVIDIA GPU where one is in use, if it
      takes the case, and else XLA's.

  Returns:
    [M, N] in the dtype of `x`.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: the kernel that is named does not take this case.
  """
  if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
    raise ValueError(f'x {x.shape} and w {w.shape} must be [M, K] and [G, K, N]')
  if group_sizes.shape != w.shape[:1] or group_sizes.dtype != jnp.int32:
    raise ValueError(f'group_sizes is {group_sizes.dtype} {group_sizes.shape}, it must be int32 '
                     f'{w.shape[:1]}: one for each matrix of w {w.shape}')
  if implementation not in (None, 'reference', *_KERNELS):
    raise ValueError(f"implementation={implementation!r} must be None, 'reference', 'tpu' or 'gpu'")
  if implementation == 'reference':
    return _grouped('reference', False, x, w, group_sizes)
  kernel = implementation or ('tpu' if chips.card() is None else 'gpu')
  refusal = _KERNELS[kernel][0].refusal(x, w)
  if refusal and implementation:
    raise NotImplementedError(refusal)
  if refusal and (kernel == 'gpu' or jax.default_backend() == 'tpu'):
    platform.warn_once(f'grouped_matmul is left to XLA: {refusal}')
  return _grouped('reference' if refusal else kernel, bool(implementation), x, w, group_sizes)


def _choose(form, is_named, pass_name, *args):
  """Calls a pass of the reference or of a kernel, which is interpreted elsewhere if it is named."""
  plain = getattr(reference, pass_name)
  if form == 'reference':
    return plain(*args)
  module, platform_name = _KERNELS[form]
  kernel = getattr(module, pass_name)
  if is_named:
    return platform.interpreted(kernel, *args, compiled_on=platform_name)
  return platform.by_platform(plain, plain, *args,
                              **{platform_name: functools.partial(kernel, interpret=False)})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(form, is_named, x, w, group_sizes):
  return _choose(form, is_named, 'product', x, w, group_sizes)


def _forward(form, is_named, x, w, group_sizes):
  return _grouped(form, is_named, x, w, group_sizes), (x, w, group_sizes)


def _backward(form, is_named, residuals, dy):
  return *_choose(form, is_named, 'gradients', *residuals, dy), None


_grouped.defvjp(_forward, _backward)
