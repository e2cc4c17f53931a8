"""`reference.norm` as Pallas kernels for GPUs (Triton), over rows that lie in registers whole.

XLA for GPUs adds the residual in a kernel before the norm's, and reads all but the result twice in
the backward pass. Here each array moves once; the gradients of scale and bias are summed over the
rows of a program, and over programs afterwards.
"""
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

LARGEST_D = 8192
ELEMENTS = 4096  # of a step's rows, at least: of narrow rows it takes several
PROGRAMS = 528  # of the backward pass: four for each SM of an H100
WARPS = 8


def refusal(x: jax.Array) -> str | None:
  """Why the kernels do not take `x`, or None."""
  if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    return f'x is {x.dtype}, the kernel takes bfloat16, float16 and float32'
  if x.shape[-1] > LARGEST_D:
    return f'D={x.shape[-1]} is more than {LARGEST_D}: a row must fit into registers'
  if not x.size:
    return f'x has shape {x.shape}, the kernel takes at least one element'
  return None


def _rows(D: int) -> int:
  return max(1, ELEMENTS // pl.next_power_of_2(D))


def _place(ref, first, M, D):
  """(index, mask) of a step's rows, of which what is beyond [M, D] does not count."""
  rows, width = _rows(D), ref.shape[1]
  mask = (first + jnp.arange(rows) < M)[:, None] & (jnp.arange(width) < D)[None]
  return (pl.ds(first, rows), pl.ds(0, width)), mask


def _load(ref, index, mask):
  return plgpu.load(ref.at[index], mask=mask, other=0).astype(jnp.float32)


def _vector(ref, D):
  return plgpu.load(ref, mask=jnp.arange(ref.shape[0]) < D, other=0).astype(jnp.float32)[None]


def _normal(options, x, mask, D):
  """x less its mean (LayerNorm's) with mean square 1, and the factor that made it so."""
  mean = lambda x: x.sum(1, keepdims=True) * (1 / D)
  if options.kind == 'layernorm':
    x = jnp.where(mask, x - mean(x), 0.0)
  root = lax.rsqrt(mean(x * x) + options.epsilon)
  return x * root, root


def _forward_kernel(options, M, D, ref, out):
  index, mask = _place(ref['x'], pl.program_id(0) * _rows(D), M, D)
  x = _load(ref['x'], index, mask)
  if 'residual' in ref:
    total = (x + _load(ref['residual'], index, mask)).astype(out['total'].dtype)
    plgpu.store(out['total'].at[index], total, mask=mask)
    x = total.astype(jnp.float32)
  y = _normal(options, x, mask, D)[0] * _vector(ref['scale'], D)
  y = y + _vector(ref['bias'], D) if 'bias' in ref else y
  plgpu.store(out['y'].at[index], y.astype(out['y'].dtype), mask=mask)


def _backward_kernel(options, M, D, steps, ref, out):
  scale, first_step = _vector(ref['scale'], D), pl.program_id(0) * steps

  def add(i, sums):
    index, mask = _place(ref['total'], (first_step + i) * _rows(D), M, D)
    normal, root = _normal(options, _load(ref['total'], index, mask), mask, D)
    dy = _load(ref['dy'], index, mask)
    dnormal = dy * scale
    mean = lambda x: x.sum(1, keepdims=True) * (1 / D)
    dx = dnormal - normal * mean(dnormal * normal)
    dx = root * (dx - mean(dnormal) if options.kind == 'layernorm' else dx)
    dx = dx + _load(ref['dtotal'], index, mask) if 'dtotal' in ref else dx
    plgpu.store(out['dx'].at[index], dx.astype(out['dx'].dtype), mask=mask)
    sums['dscale'] += (dy * normal).sum(0)
    if 'dbias' in sums:
      sums['dbias'] += dy.sum(0)
    return sums

  width = ref['total'].shape[1]
  sums = {name: jnp.zeros(width, jnp.float32) for name in out if name != 'dx'}
  for name, x in lax.fori_loop(0, steps, add, sums).items():
    plgpu.store(out[name], x, mask=jnp.arange(width) < D)


def _call(kernel, name, programs, arrays, outs, rows, interpret):
  """Runs a kernel whose matrices come whole, padded to steps, and whose partial sums a row each."""
  width = pl.next_power_of_2(arrays['scale'].shape[0])

  def spec(name, x):
    if name in ('dscale', 'dbias'):
      return pl.BlockSpec((None, width), lambda i: (i, 0))
    shape = (width,) if x.ndim == 1 else (rows, width)
    return pl.BlockSpec(shape, lambda i: (0,) * len(shape))

  arrays = {name: x for name, x in arrays.items() if x is not None}
  specs = lambda shaped: {name: spec(name, x) for name, x in shaped.items()}
  return pl.pallas_call(
      kernel, outs, grid=(programs,), in_specs=[specs(arrays)], out_specs=specs(outs),
      compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1), name=name,
      interpret=interpret)(arrays)


def forward(options, x_MD, residual_MD, scale_D, bias_D, *, interpret):
  """Returns y and x + residual, or None without residual."""
  (M, D), programs = x_MD.shape, pl.cdiv(len(x_MD), _rows(x_MD.shape[1]))
  like = jax.ShapeDtypeStruct(x_MD.shape, x_MD.dtype)
  outs = {'y': like} if residual_MD is None else {'y': like, 'total': like}
  outs = _call(functools.partial(_forward_kernel, options, M, D), 'norm_forward', programs,
               {'x': x_MD, 'residual': residual_MD, 'scale': scale_D, 'bias': bias_D}, outs,
               programs * _rows(D), interpret)
  return outs['y'], outs.get('total')


def backward(options, has_bias, total_MD, scale_D, dy_MD, dtotal_MD, *, interpret):
  """Returns the gradients of x + residual, in its dtype, and of scale and bias, float32 [D]."""
  (M, D) = total_MD.shape
  needed = pl.cdiv(M, _rows(D))
  steps = pl.cdiv(needed, PROGRAMS)
  programs = pl.cdiv(needed, steps)
  part = jax.ShapeDtypeStruct((programs, D), jnp.float32)
  outs = {'dx': jax.ShapeDtypeStruct(total_MD.shape, total_MD.dtype), 'dscale': part}
  outs |= {'dbias': part} if has_bias else {}
  outs = _call(functools.partial(_backward_kernel, options, M, D, steps), 'norm_backward', programs,
               {'total': total_MD, 'scale': scale_D, 'dy': dy_MD, 'dtotal': dtotal_MD}, outs,
               programs * steps * _rows(D), interpret)
  return outs['dx'], outs['dscale'].sum(0), outs['dbias'].sum(0) if has_bias else None
