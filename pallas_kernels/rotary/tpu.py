"""`reference.rotary` as a Pallas kernel for TPUs, in place, with the heads of a token side by side.

x and x with its halves swapped are multiplied by [cos, cos] and [-sin, sin]. Lanes are rotated 128
at a time, a register's width: one head of 128, or several smaller ones.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import LANES
from pallas_kernels.rotary.block_sizes import CHUNK_TOKENS, LARGEST_WIDTH, block_size


def refusal(query: jax.Array, key: jax.Array) -> str | None:
  """Why the kernel does not take these, [B, T, N, H] and [B, T, K, H], or None."""
  N, H = query.shape[2:]
  if query.dtype not in (jnp.bfloat16, jnp.float32):
    return f'query is {query.dtype}, the kernel takes bfloat16 and float32'
  if LANES % H and H % (2 * LANES):
    return f'H={H} must divide {LANES} or be a multiple of {2 * LANES}'
  if max(N, key.shape[2]) * H > LARGEST_WIDTH:
    return f'N={N} heads of {H} are more than {LARGEST_WIDTH} numbers: a block must fit into VMEM'
  if not query.size or not key.size:
    return f'query {query.shape} or key {key.shape} is empty, the kernel takes at least one element'
  return None


def _swapped(x, H):
  """The halves of each head swapped; of a head that fills registers, or of heads that fill one."""
  width = x.shape[-1]
  if width < LANES:
    x = jnp.concatenate([x] * (LANES // width), -1)
  if H >= LANES:
    return pltpu.roll(x, H // 2, 1)
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  is_first = jax.lax.rem(lane, H) < H // 2
  swapped = jnp.where(is_first, pltpu.roll(x, LANES - H // 2, 1), pltpu.roll(x, H // 2, 1))
  return swapped[:, :width]


def _kernel(sign, H, query_ref, key_ref, sin_ref, cos_ref, query_out_ref, key_out_ref):
  group = max(LANES, H)

  @pl.loop(0, query_ref.shape[1] // CHUNK_TOKENS)
  def _(i):
    rows = pl.ds(pl.multiple_of(i * CHUNK_TOKENS, CHUNK_TOKENS), CHUNK_TOKENS)
    sin, cos = sign * sin_ref[0, rows], cos_ref[0, rows]
    cos = jnp.concatenate([cos, cos] * (group // H), -1)
    sin = jnp.concatenate([-sin, sin] * (group // H), -1)
    for ref, out_ref in ((query_ref, query_out_ref), (key_ref, key_out_ref)):
      for start in range(0, ref.shape[2], group):
        lanes = pl.ds(start, min(group, ref.shape[2] - start))
        x = ref[0, rows, lanes].astype(jnp.float32)
        y = x * cos[:, :lanes.size] + _swapped(x, H) * sin[:, :lanes.size]
        out_ref[0, rows, lanes] = y.astype(out_ref.dtype)


def rotate(sign, H, query, key, sin_BTH, cos_BTH, *, interpret):
  """Rotates [B, T, N * H] and [B, T, K * H] by sign (1 or -1) times angles [1 or B, T, H/2]."""
  B, T, width = query.shape
  block = block_size(T, max(width, key.shape[2]), query.dtype.itemsize)
  tokens = lambda x: pl.BlockSpec((1, block, x.shape[2]), lambda t, b: (b, t, 0))
  angles = pl.BlockSpec((1, block, H // 2), lambda t, b: (b if sin_BTH.shape[0] > 1 else 0, t, 0))
  return pl.pallas_call(
      functools.partial(_kernel, sign, H),
      [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key)], grid=(pl.cdiv(T, block), B),
      in_specs=[tokens(query), tokens(key), angles, angles],
      out_specs=[tokens(query), tokens(key)], input_output_aliases={0: 0, 1: 1},
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel')),
      interpret=interpret, name='rotary')(query, key, sin_BTH, cos_BTH)
