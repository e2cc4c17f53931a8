"""`reference.glu` as Pallas kernels for TPUs.

A block is walked in chunks that fit into registers: the compiler unrolls what a chunk holds.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.glu.block_sizes import block_sizes


def refusal(gate: jax.Array) -> str | None:
  """Why the kernels do not take `gate`, or None."""
  if gate.dtype not in (jnp.bfloat16, jnp.float32):
    return f'gate is {gate.dtype}, the kernel takes bfloat16 and float32'
  if not gate.size:
    return f'gate has shape {gate.shape}, the kernel takes at least one element'
  return None


# Each activation gives (f(x), f'(x)); what nobody uses is not computed.


def _silu(x):
  share = jax.nn.sigmoid(x)
  return x * share, share * (1 + x * (1 - share))


def _gelu(x):
  slope, cubic = math.sqrt(2 / math.pi), 0.044715
  tanh = jnp.tanh(slope * x * (1 + cubic * x * x))
  share = 0.5 + 0.5 * tanh
  return x * share, share + 0.5 * slope * x * (1 - tanh * tanh) * (1 + 3 * cubic * x * x)


def _gelu_exact(x):
  share = 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))
  return x * share, share + x * jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


_ACTIVATIONS = {'swiglu': _silu, 'geglu': _gelu, 'geglu_exact': _gelu_exact}


def _float32(ref):
  return ref[...].astype(jnp.float32)


def _forward_chunk(activation, gate_ref, up_ref, y_ref):
  value, _ = _ACTIVATIONS[activation](_float32(gate_ref))
  y_ref[...] = (value * _float32(up_ref)).astype(y_ref.dtype)


def _backward_chunk(activation, gate_ref, up_ref, dy_ref, dgate_ref, dup_ref):
  value, slope = _ACTIVATIONS[activation](_float32(gate_ref))
  dy = _float32(dy_ref)
  dgate_ref[...] = (dy * _float32(up_ref) * slope).astype(dgate_ref.dtype)
  dup_ref[...] = (dy * value).astype(dup_ref.dtype)


def _kernel(chunk, rows, columns, *refs):
  across = refs[0].shape[1] // columns

  @pl.loop(0, refs[0].shape[0] // rows * across)
  def _(i):
    row, column = jax.lax.div(i, across) * rows, jax.lax.rem(i, across) * columns
    part = (pl.ds(pl.multiple_of(row, rows), rows),
            pl.ds(pl.multiple_of(column, columns), columns))
    chunk(*(ref.at[part] for ref in refs))


def _call(name, chunk, num_outputs, args, interpret):
  M, F = args[0].shape
  rows, columns, *chunk_sizes = block_sizes(M, F, args[0].dtype.itemsize)
  spec = pl.BlockSpec((rows, columns), lambda i, j: (i, j))
  return pl.pallas_call(
      functools.partial(_kernel, chunk, *chunk_sizes),
      [jax.ShapeDtypeStruct((M, F), args[0].dtype)] * num_outputs,
      grid=(pl.cdiv(M, rows), pl.cdiv(F, columns)), in_specs=[spec] * len(args),
      out_specs=[spec] * num_outputs,
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel')),
      interpret=interpret, name=name)(*args)


def forward(activation, gate_MF, up_MF, *, interpret):
  """Returns f(gate) * up, [M, F]."""
  chunk = functools.partial(_forward_chunk, activation)
  return _call('glu_forward', chunk, 1, (gate_MF, up_MF), interpret)[0]


def backward(activation, gate_MF, up_MF, dy_MF, *, interpret):
  """Returns dgate and dup, [M, F]."""
  chunk = functools.partial(_backward_chunk, activation)
  return _call('glu_backward', chunk, 2, (gate_MF, up_MF, dy_MF), interpret)
