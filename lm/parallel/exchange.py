"""Rows that go to the devices that want them, as many as there are: a ragged all-to-all."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.platform import by_platform


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def ragged_all_to_all(rows: jax.Array, sizes: jax.Array, num_rows: int, most: int,
                      axes: tuple[str, ...]) -> jax.Array:
  """Sends ranges of rows to other devices; called in `jax.shard_map`.

  Args:
    rows: [S, D], those for device 0 first, then those for device 1, and so on.
    sizes: int32 [n, n], how many each device sends to each, known to all.
    num_rows: of the result, enough for whatever `sizes` may be.
    most: rows that any device sends to any other.
    axes: of the mesh, with n devices.

  Returns:
    [num_rows, D], rows from device 0 first, then from device 1, and so on. What stands behind them
    is not defined, nor is the gradient of rows that are not sent.
  """
  return by_platform(functools.partial(_padded, num_rows, most, axes),
                     functools.partial(_ragged, num_rows, axes), rows, sizes)


def _backward(num_rows, most, axes, residuals, g):
  del num_rows
  sizes, length = residuals
  return (ragged_all_to_all(g, sizes.T, length, most, axes),
          np.zeros(sizes.shape, jax.dtypes.float0))


ragged_all_to_all.defvjp(
    lambda rows, sizes, *static: (ragged_all_to_all(rows, sizes, *static), (sizes, len(rows))),
    _backward)


def _ragged(num_rows, axes, rows, sizes):
  here = jax.lax.axis_index(axes)
  sent, received = sizes[here], sizes[:, here]
  places = (jnp.cumsum(sizes, 0) - sizes)[here]  # of this device's first row, on each other
  return jax.lax.ragged_all_to_all(
      rows, jax.lax.empty((num_rows, rows.shape[1]), rows.dtype), jnp.cumsum(sent) - sent, sent,
      places, received, axis_name=axes)


def _padded(num_rows, most, axes, rows, sizes):
  """The same as an all-to-all of ranges filled up to `most` rows: XLA:CPU has no ragged one."""
  here = jax.lax.axis_index(axes)

  def places(counts, end):
    first = (jnp.cumsum(counts) - counts)[:, None]
    return jnp.where(jnp.arange(most) < counts[:, None], first + jnp.arange(most), end)
  ranges = rows.at[places(sizes[here], len(rows))].get(mode='fill', fill_value=0)
  ranges = jax.lax.all_to_all(ranges, axes, 0, 0, tiled=True)
  empty = jnp.full((num_rows, rows.shape[1]), jnp.nan, rows.dtype)
  return empty.at[places(sizes[:, here], num_rows)].set(ranges, mode='drop')
