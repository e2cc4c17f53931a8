"""`reference.quantized_matmul` as a Pallas kernel for TPUs.

A step of the grid has whole columns of the weights, still quantised. It walks them in chunks of
rows: a chunk becomes operands of the matrix unit once, and meets all rows of x.
"""
import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels.quantized_matmul import block_sizes
from pallas_kernels.quantized_matmul.block_sizes import LANES

GROUPS = (32, 64, 128, 256, 512, 1024)


def refusal(x_MK, values_KN, scales_PN, dtype, chip: str | None = None) -> str | None:
  """Says why the kernel does not take these arrays on a generation of TPU, or None.

  chip: None is the TPU of the mesh in use or of this machine, if it has one.
  """
  (M, K), N = x_MK.shape, values_KN.shape[1]
  chip, group = chip or chips.generation(), K // len(scales_PN)
  if x_MK.dtype not in (jnp.bfloat16, jnp.float32, jnp.int8):
    return f'x is {x_MK.dtype}, the kernel takes bfloat16, float32 and int8'
  if x_MK.dtype == jnp.int8 and chip in block_sizes.WITHOUT_INT8:
    return f'x is int8, which the matrix units of {chip} do not multiply'
  if dtype not in (jnp.bfloat16, jnp.float32):
    return f'dtype={dtype.name}, the kernel gives bfloat16 and float32'
  if not M * N or K % LANES:
    return (f'x is {x_MK.shape} and values {values_KN.shape}, the kernel takes K in multiples of '
            f'{LANES} and at least one row and column')
  if len(scales_PN) > 1 and group not in GROUPS:
    return f'a group has {group} rows, the kernel takes {GROUPS}'
  try:
    block_sizes.find(M, K, N, len(scales_PN), x_MK.dtype, values_KN.dtype, chip)
  except NotImplementedError as error:
    return str(error)
  return None


def quantized_matmul(x_MK, values_KN, scales_PN, x_scale_M1, *, dtype, interpret, blocks=None):
  """Returns x (values * scales), [M, N] in `dtype`; for what `refusal` does not name."""
  (M, K), (P, N) = x_MK.shape, scales_PN.shape
  blocks = blocks or block_sizes.find(M, K, N, P, x_MK.dtype, values_KN.dtype)
  rows, columns = blocks.rows, blocks.columns
  of_rows = lambda width: pl.BlockSpec((rows, width), lambda i, j: (i, 0))
  of_columns = lambda height: pl.BlockSpec((height, columns), lambda i, j: (0, j))
  is_int8 = x_scale_M1 is not None
  return pl.pallas_call(
      functools.partial(_kernel, K // P, blocks, is_int8),
      jax.ShapeDtypeStruct((M, N), dtype), grid=(pl.cdiv(M, rows), pl.cdiv(N, columns)),
      in_specs=[of_rows(K), of_columns(K), of_columns(P)] + [of_rows(1)] * is_int8,
      out_specs=pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
      scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel'),
                                           vmem_limit_bytes=blocks.vmem_bytes),
      cost_estimate=pl.CostEstimate(
          flops=2 * M * K * N, transcendentals=0, bytes_accessed=x_MK.nbytes
          + values_KN.size * values_KN.dtype.itemsize + scales_PN.nbytes + M * N * dtype.itemsize),
      name='quantized_matmul', interpret=interpret,
  )(x_MK, values_KN, scales_PN, *[x_scale_M1] * is_int8)


def _kernel(group, blocks, is_int8, x_ref, values_ref, scales_ref, *refs):
  x_scale_ref, y_ref, sums_ref = refs if is_int8 else (None, *refs)
  K, is_grouped = len(values_ref), len(scales_ref) > 1
  # An int32 sum of a group, or a few rows, are cheaper to scale than the group's weights.
  scales_sums = is_int8 or len(x_ref) <= LANES <= group
  sums_ref[...] = jnp.zeros_like(sums_ref)

  @pl.loop(0, K // blocks.chunk)
  def _(k):
    at = pl.ds(pl.multiple_of(k * blocks.chunk, blocks.chunk), blocks.chunk)
    values, parts = values_ref[at, :], [(slice(None), None)]
    if is_grouped:
      first = k * (blocks.chunk // group)
      parts = [(slice(g * group, (g + 1) * group), scales_ref[pl.ds(first + g, 1), :])
               for g in range(blocks.chunk // group)]
    if is_grouped and not scales_sums:
      values = jnp.concatenate([values[part].astype(jnp.float32) * scale for part, scale in parts])
      parts = [(slice(None), None)]
    w = values.astype(x_ref.dtype)

    @pl.loop(0, len(x_ref) // blocks.inner)
    def _(i):
      some = pl.ds(pl.multiple_of(i * blocks.inner, blocks.inner), blocks.inner)
      x = x_ref[some, at]
      for part, scale in parts:
        sums = _dot(x[:, part], w[part])
        sums_ref[some, :] += sums if scale is None else sums * scale

  y = sums_ref[...] if is_grouped else sums_ref[...] * scales_ref[...]
  y_ref[...] = (y * x_scale_ref[...] if is_int8 else y).astype(y_ref.dtype)


def _dot(x, w):
  """The sums of products in float32, by way of int32 for int8."""
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
  return jnp.dot(x, w, precision=precision, preferred_element_type=kind).astype(jnp.float32)
