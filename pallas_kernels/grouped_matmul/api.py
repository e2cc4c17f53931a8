"""One product for each group of rows, as experts that drop no token need it."""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.grouped_matmul import reference, tpu


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, *,
                   implementation: str | None = None) -> jax.Array:
  """Multiplies each group of rows by its own matrix: y[m] = x[m] w[g] for row m of group g.

  Operands are multiplied in the dtype of `x` and sums are float32; the gradient of `w` has the
  dtype of `w`, so float32 masters receive unrounded sums (dw[g] = x[rows of g]^T dy[rows of g]).
  The Pallas kernels visit only the pairs of a tile of rows and a group that share rows
  (MegaBlocks, arXiv:2211.15841, section 5).

  Args:
    x: [M, K], bfloat16 or float32, its rows in the order of their groups.
    w: [G, K, N], any floating dtype; cast to the dtype of `x`.
    group_sizes: int32 [G], rows of each group; rows behind the last group are of none, and their
      results and gradients are 0.
    implementation: None, 'reference' (`jax.lax.ragged_dot`) or 'tpu' (Pallas; interpreted where
      there is no TPU). None is XLA's on a CPU or GPU, and on a TPU Pallas where it takes the case.

  Returns:
    [M, N] in the dtype of `x`.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: 'tpu' does not take this case.
  """
  if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
    raise ValueError(f'x {x.shape} and w {w.shape} must be [M, K] and [G, K, N]')
  if group_sizes.shape != w.shape[:1] or group_sizes.dtype != jnp.int32:
    raise ValueError(f'group_sizes is {group_sizes.dtype} {group_sizes.shape}, it must be int32 '
                     f'{w.shape[:1]}: one for each matrix of w {w.shape}')
  if implementation not in (None, 'reference', 'tpu'):
    raise ValueError(f"implementation={implementation!r} must be None, 'reference' or 'tpu'")
  refusal = None if implementation == 'reference' else tpu.refusal(x, w)
  if refusal and implementation == 'tpu':
    raise NotImplementedError(refusal)
  if refusal and jax.default_backend() == 'tpu':
    platform.warn_once(f'grouped_matmul takes XLA\'s form on TPUs too: {refusal}')
  return _grouped(implementation if not refusal else 'reference', x, w, group_sizes)


def _choose(implementation, plain, kernel, *args):
  if implementation == 'reference':
    return plain(*args)
  kernel = functools.partial(platform.interpreted, kernel)
  return (kernel(*args) if implementation == 'tpu'
          else platform.by_platform(plain, plain, *args, tpu=kernel))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(implementation, x, w, group_sizes):
  return _choose(implementation, reference.product, tpu.product, x, w, group_sizes)


def _forward(implementation, x, w, group_sizes):
  return _grouped(implementation, x, w, group_sizes), (x, w, group_sizes)


def _backward(implementation, residuals, dy):
  return *_choose(implementation, reference.gradients, tpu.gradients, *residuals, dy), None


_grouped.defvjp(_forward, _backward)
