"""`reference.norm` as Pallas kernels for TPUs, over blocks of rows that lie in VMEM whole.

Within a block a loop takes as many rows at a time as registers hold. Gradients of scale and bias
are kept eight sums a column, one for each sublane, so that no row is ever folded into another. The
leading axis of the backward grid, of two, is what the two cores of a v4 or v5p divide.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.norm.block_sizes import LARGEST_D, block_sizes

SUBLANES = 8


def refusal(x: jax.Array) -> str | None:
  """Why the kernels do not take `x`, or None."""
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f'x is {x.dtype}, the kernel takes bfloat16 and float32'
  if x.shape[-1] > LARGEST_D:
    return f'D={x.shape[-1]} is more than {LARGEST_D}: a block of rows must fit into VMEM'
  if not x.size:
    return f'x has shape {x.shape}, the kernel takes at least one element'
  return None


def _centered(options, x):
  """x less its mean (LayerNorm's), and what makes its mean square 1; float32."""
  if options.kind == 'layernorm':
    x -= x.mean(-1, keepdims=True)
  return x, jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + options.epsilon)


def _chunks(ref, size):
  """Calls the decorated function with each slice of `size` rows of a block."""
  def run(body):
    pl.loop(0, ref.shape[0] // size)(lambda i: body(pl.ds(pl.multiple_of(i * size, size), size)))
  return run


def _forward_kernel(options, chunk, x_ref, residual_ref, scale_ref, bias_ref, y_ref, total_ref):
  @_chunks(x_ref, chunk)
  def _(rows):
    x = x_ref[rows].astype(jnp.float32)
    if residual_ref is not None:
      total_ref[rows] = (x + residual_ref[rows].astype(jnp.float32)).astype(total_ref.dtype)
      x = total_ref[rows].astype(jnp.float32)
    x, root = _centered(options, x)
    y = x * (root * scale_ref[...].astype(jnp.float32))
    if bias_ref is not None:
      y += bias_ref[...].astype(jnp.float32)
    y_ref[rows] = y.astype(y_ref.dtype)


def forward(options, x_MD, residual_MD, scale_D, bias_D, *, interpret):
  """Returns y and x + residual, [M, D]; the sum is None without residual."""
  M, D = x_MD.shape
  block, chunk = block_sizes(M, D, x_MD.dtype.itemsize)
  rows = pl.BlockSpec((block, D), lambda i: (i, 0))
  row = pl.BlockSpec((1, D), lambda i: (0, 0))
  args = x_MD, residual_MD, scale_D[None], None if bias_D is None else bias_D[None]
  out = jax.ShapeDtypeStruct(x_MD.shape, x_MD.dtype)
  outs = out, None if residual_MD is None else out
  return pl.pallas_call(
      functools.partial(_forward_kernel, options, chunk), outs, grid=(pl.cdiv(M, block),),
      in_specs=[None if x is None else spec for x, spec in zip(args, (rows, rows, row, row))],
      out_specs=tuple(None if x is None else rows for x in outs),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
      interpret=interpret, name='norm_forward')(*args)


def _backward_kernel(options, chunk, M, x_ref, scale_ref, dy_ref, dtotal_ref, dx_ref, dscale_ref,
                     dbias_ref):
  block, D = x_ref.shape
  step = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
  has_tail = pl.num_programs(0) * pl.num_programs(1) * block > M

  @pl.when(pl.program_id(1) == 0)
  def _():
    for ref in (dscale_ref, dbias_ref):
      if ref is not None:
        ref[...] = jnp.zeros_like(ref)

  def add(ref, x, rows):
    if ref is None:
      return
    if has_tail:  # rows beyond the last hold anything
      row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) + rows.start
      x = jnp.where(step * block + row < M, x, 0)
    ref[0] += x.reshape(-1, SUBLANES, D).sum(0)

  @_chunks(x_ref, chunk)
  def _(rows):
    x, root = _centered(options, x_ref[rows].astype(jnp.float32))
    normed, dy = x * root, dy_ref[rows].astype(jnp.float32)
    add(dscale_ref, dy * normed, rows)
    add(dbias_ref, dy, rows)
    dy *= scale_ref[...].astype(jnp.float32)
    dx = dy - normed * (dy * normed).mean(-1, keepdims=True)
    if options.kind == 'layernorm':
      dx -= dy.mean(-1, keepdims=True)
    dx *= root
    if dtotal_ref is not None:
      dx += dtotal_ref[rows].astype(jnp.float32)
    dx_ref[rows] = dx.astype(dx_ref.dtype)


def backward(options, has_bias, x_MD, scale_D, dy_MD, dtotal_MD, *, interpret):
  """Returns dx [M, D], and dscale and dbias (or None), float32 [D]; of x as it was normalised."""
  M, D = x_MD.shape
  block, chunk = block_sizes(M, D, x_MD.dtype.itemsize)
  blocks = pl.cdiv(M, block)
  cores = min(2, blocks)
  steps = pl.cdiv(blocks, cores)
  # Of an odd number of blocks the last is visited twice; the second time all of its rows are tail.
  rows = pl.BlockSpec((block, D), lambda c, i: (jnp.minimum(c * steps + i, blocks - 1), 0))
  row = pl.BlockSpec((1, D), lambda c, i: (0, 0))
  sums = pl.BlockSpec((1, SUBLANES, D), lambda c, i: (c, 0, 0))
  args = x_MD, scale_D[None], dy_MD, dtotal_MD
  out = jax.ShapeDtypeStruct((cores, SUBLANES, D), jnp.float32)
  dx_MD, dscale, dbias = pl.pallas_call(
      functools.partial(_backward_kernel, options, chunk, M),
      (jax.ShapeDtypeStruct(x_MD.shape, x_MD.dtype), out, out if has_bias else None),
      grid=(cores, steps),
      in_specs=[rows, row, rows, None if dtotal_MD is None else rows],
      out_specs=(rows, sums, sums if has_bias else None),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
      interpret=interpret, name='norm_backward')(*args)
  return dx_MD, dscale.sum((0, 1)), dbias.sum((0, 1)) if has_bias else None
