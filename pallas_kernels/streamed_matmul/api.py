"""Products of few rows with matrices that lie as they are read."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import native, platform
from pallas_kernels.streamed_matmul import cpu, reference


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streamed:
  """A matrix whose rows are the outputs of a product: what a CPU decodes with.

  values: float32, bfloat16 or int8, [N, K] or, of stacked layers, [L, N, K]. An embedding [V, D]
    lies so anyway.
  scales: float32 [N] or [L, N] of int8, else None.
  """
  values: Any
  scales: Any = None


def streamed_matmul(x: jax.Array, w: Streamed, *, dtype: jax.typing.DTypeLike | None = None,
                    implementation: str | None = None) -> jax.Array:
  """Multiplies the rows of `x` by a streamed matrix: y[..., n] = sum_k x[..., k] w[n, k].

  Up to `cpu.MAX_ROWS` rows on a CPU are multiplied and summed in float32 by native code, which
  reads w once at the speed of memory; more of them, and all on other platforms, by XLA in the dtype
  of x. It has no gradient.

  Args:
    x: [..., K], bfloat16 or float32.
    w: a matrix [N, K].
    dtype: of the result; None is that of `x`.
    implementation: None, 'reference' (XLA) or 'cpu' (native).

  Returns:
    [..., N] in `dtype`.

  Raises:
    ValueError: shapes that do not fit, or an implementation of another name.
    NotImplementedError: 'cpu' is named, and this machine has no C++ compiler.
  """
  if w.values.ndim != 2 or x.shape[-1] != w.values.shape[1]:
    raise ValueError(f'x {x.shape} and w {w.values.shape} must be [..., K] and [N, K]')
  if implementation not in (None, 'reference', 'cpu'):
    raise ValueError(f"implementation={implementation!r} must be None, 'reference' or 'cpu'")
  if implementation == 'cpu' and not native.is_there():
    raise NotImplementedError('cpu takes a C++ compiler, and there is none')
  x_MK, N = x.reshape(-1, x.shape[-1]), len(w.values)
  scales = jnp.zeros(0) if w.scales is None else w.scales

  def on_cpu(x_MK, values, scales):
    return cpu.matmul(x_MK, values, scales)

  def plain(x_MK, values, scales):
    return reference.matmul(x_MK, values, None if w.scales is None else scales)

  if implementation == 'cpu':
    y_MN = on_cpu(x_MK, w.values, scales)
  elif (implementation == 'reference' or len(x_MK) > cpu.MAX_ROWS[w.values.dtype.name]
        or not native.is_there()):
    y_MN = plain(x_MK, w.values, scales)
  else:
    y_MN = platform.by_platform(on_cpu, plain, x_MK, w.values, scales)
  return y_MN.astype(dtype or x.dtype).reshape(*x.shape[:-1], N)


def streamed_rows(w: Streamed, rows: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Rows of a streamed matrix, as of an embedding's tokens. On a CPU native code copies them: in a
  loop XLA's gather of bfloat16 makes a copy of the whole table first.

  Args:
    w: a matrix [N, K].
    rows: integers [...], from 0; of floats, one behind the last is NaN.
    dtype: of the result.

  Returns:
    [..., K] in `dtype`.
  """
  if native.is_there():
    found = platform.by_platform(cpu.rows, reference.rows, w.values, rows)
  else:
    found = reference.rows(w.values, rows)
  if w.scales is None:
    return found.astype(dtype)
  return (found.astype(jnp.float32) * w.scales[rows][..., None]).astype(dtype)
