"""`reference.forward` and `reference.backward` as Pallas kernels for GPUs (Triton).

Arrays stay as they come: a kernel reads its tiles of [B, length, heads, H], and masks what is
beyond a length or a head. The kernels are in gpu_kernels.py.
"""
import contextlib
import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels import chips, dropout
from pallas_kernels.flash_attention import gpu_kernels, gpu_positions
from pallas_kernels.flash_attention.gpu_kernels import Tiles
from pallas_kernels.flash_attention.reference import NO_KEY, Terms, sinks_gradient

LARGEST_HEAD = 256


class Blocks(NamedTuple):
  """Queries and keys of a tile, the warps of a program, and the tiles that it loads ahead."""
  queries: int
  keys: int
  warps: int
  stages: int


# {card: {pass: {columns of a head: blocks}}}, of 2-byte elements. Those of the H100 are the fastest
# of some ten that were timed on one; those of the A100, which were not, are the largest tiles at
# which ptxas keeps all registers and two programs of 4 warps, or one of 8, fit into an SM.
TABLE = {
    'h100': {'forward': {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 3),
                         256: Blocks(64, 64, 4, 2)},
             'query_gradient': {64: Blocks(64, 64, 4, 2), 128: Blocks(128, 64, 8, 3),
                                256: Blocks(64, 64, 4, 2)},
             'key_gradient': {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 3),
                              256: Blocks(128, 32, 8, 2)},
             'distance_gradient': {64: Blocks(64, 64, 4, 2), 128: Blocks(64, 64, 8, 2),
                                   256: Blocks(32, 32, 4, 2)}},
    'a100': {'forward': {64: Blocks(128, 64, 4, 2), 128: Blocks(128, 64, 8, 3),
                         256: Blocks(64, 64, 8, 2)},
             'query_gradient': {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 2),
                                256: Blocks(64, 32, 8, 2)},
             'key_gradient': {64: Blocks(32, 128, 8, 3), 128: Blocks(64, 64, 8, 2),
                              256: Blocks(32, 32, 4, 2)},
             'distance_gradient': {64: Blocks(64, 64, 4, 2), 128: Blocks(64, 64, 8, 2),
                                   256: Blocks(32, 32, 4, 2)}},
}
# {columns of a head: blocks of all passes}, of float32, whose products leave the tensor cores idle.
FLOAT32 = {64: Blocks(32, 32, 8, 1), 128: Blocks(32, 16, 8, 2), 256: Blocks(16, 16, 8, 1)}


def refusal(options, query: jax.Array, key: jax.Array, terms: Terms) -> str | None:
  """Why the kernels do not take a call, or None."""
  del options
  others = [name for name, x in terms._asdict().items()
            if x is not None and name not in ('bias', 'sinks', 'distance_bias')]
  if others:
    return f'the kernel does not take {" and ".join(others)}'
  if query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    return f'query is {query.dtype}, the kernel takes bfloat16, float16 and float32'
  if query.shape[-1] > LARGEST_HEAD:
    return f'heads of {query.shape[-1]} are wider than {LARGEST_HEAD}'
  if not query.size or not key.size:
    return f'query {query.shape} and key {key.shape} must have elements'
  return None


def visited(tiles: Tiles, masking) -> jax.Array:
  """Boolean [1 or B, tiles of queries, tiles of keys], False where the mask empties a tile.

  Exact for lengths, `causal`, `window`, `chunk`, offsets and prefixes that begin a row, each for
  itself; a tile of segment ids is taken to have all between its least and largest.
  """
  options = tiles.options
  first_q = jnp.arange(0, tiles.T, tiles.queries)[:, None]
  last_q = jnp.minimum(first_q + tiles.queries, tiles.T) - 1
  first_k = jnp.arange(0, tiles.S, tiles.keys)
  last_k = jnp.minimum(first_k + tiles.keys, tiles.S) - 1
  seen = jnp.ones((1, first_q.size, first_k.size), bool)
  first_q, last_q = first_q + options.query_offset, last_q + options.query_offset
  if masking.query_offset is not None:
    first_q, last_q = (masking.query_offset[:, None, None] + x for x in (first_q, last_q))
  if options.causal:
    before = last_q >= first_k
    if masking.prefix is not None:
      before = before | _extreme(masking.prefix, tiles.keys, 'max')[:, None]
    seen = seen & before
  if options.window is not None:
    seen = seen & (first_q - last_k < options.window) & (first_k - last_q < options.window)
  if options.chunk is not None:
    seen = seen & (first_q // options.chunk <= last_k // options.chunk)
    seen = seen & (last_q // options.chunk >= first_k // options.chunk)
  if masking.query_segment_ids is not None:
    low, high = (_extreme(masking.query_segment_ids, tiles.queries, name)[:, :, None]
                 for name in ('min', 'max'))
    seen = seen & (low <= _extreme(masking.key_segment_ids, tiles.keys, 'max')[:, None])
    seen = seen & (high >= _extreme(masking.key_segment_ids, tiles.keys, 'min')[:, None])
  return seen


def _extreme(x, size, name):
  """The least or the largest of every tile of [B, length]: [B, tiles]."""
  padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), 'edge')
  return getattr(padded.reshape(x.shape[0], -1, size), name)(2)


def bounds(seen: jax.Array, axis: int) -> dict[str, jax.Array]:
  """The 'first' of the tiles that are seen along an axis and the 'end' of those, int32 [1 or B,
  tiles]."""
  first = jnp.argmax(seen, axis)
  end = seen.shape[axis] - jnp.argmax(jnp.flip(seen, axis), axis)
  some = seen.any(axis)
  return {name: jnp.where(some, x, 0).astype(jnp.int32)
          for name, x in (('first', first), ('end', end))}


def _tiles(name, options, query, key, terms, card, blocks) -> tuple[Tiles, Blocks]:
  (_, T, _, H), S = query.shape, key.shape[1]
  width = max(64, pl.next_power_of_2(H))
  table = FLOAT32 if query.dtype == jnp.float32 else TABLE[card or chips.card_or_least()][name]
  if blocks is None:
    blocks = table[width]
    if terms.distance_bias is not None:  # a tile of it takes registers and memory too
      blocks = blocks._replace(warps=8, stages=min(blocks.stages, 2))
  least = lambda length, block: min(block, max(16, pl.next_power_of_2(length)))
  return Tiles(options, T, S, H, least(T, blocks.queries), least(S, blocks.keys)), blocks


def _arrays(query, key, value, terms, masking):
  seeds = masking.dropout_seeds
  arrays = {'query': query, 'key': key, 'value': value, 'bias': terms.bias,
            'distance_bias': terms.distance_bias,
            'seeds': None if seeds is None else dropout.of_seeds(seeds),
            'offset': masking.query_offset, 'query_ids': masking.query_segment_ids,
            'key_ids': masking.key_segment_ids,
            'prefix': None if masking.prefix is None else masking.prefix.astype(jnp.int32)}
  return {name: x for name, x in arrays.items() if x is not None}


def _call(kernel, tiles: Tiles, blocks: Blocks, side: str, arrays, masking, outs, interpret):
  """Runs a kernel over (tiles of a side, query heads, B), the 'query', 'key' or 'diagonal'; `outs`
  are shapes by name."""
  B, N, K = arrays['query'].shape[0], arrays['query'].shape[2], arrays['key'].shape[2]
  known = not any(name in arrays for name in ('offset', 'prefix', 'query_ids'))
  # XLA would compute what follows from the lengths alone at each call, by kernels of its own.
  with jax.ensure_compile_time_eval() if known else contextlib.nullcontext():
    seen = visited(tiles, masking)
    seen = gpu_positions.by_diagonal(seen) if side == 'diagonal' else seen
    arrays = arrays | bounds(seen, 1 if side == 'key' else 2)
  up = lambda length, size: pl.cdiv(length, size) * size
  T, S = up(tiles.T, tiles.queries), up(tiles.S, tiles.keys)
  key_head = lambda h: h if N == K else jax.lax.div(h, N // K)
  row_of = lambda x: (lambda b: b) if x.shape[0] == B else (lambda b: 0)

  def spec(name, x):
    row = row_of(x)
    if name in ('query', 'dout', 'out', 'dquery'):
      return pl.BlockSpec((None, T, None, tiles.width), lambda i, h, b: (b, 0, h, 0))
    if name in ('key', 'value'):
      return pl.BlockSpec((None, S, None, tiles.width), lambda i, h, b: (b, 0, key_head(h), 0))
    if name in ('dkey', 'dvalue'):
      return pl.BlockSpec((None, S, None, tiles.width), lambda i, h, b: (b, 0, h, 0))
    if name in ('lse', 'delta'):
      return pl.BlockSpec((None, None, T), lambda i, h, b: (b, h, 0))
    if name in ('bias', 'dbias'):
      return pl.BlockSpec((None, None, T, S), lambda i, h, b: (row(b), h, 0, 0))
    if name == 'distance_bias':
      return pl.BlockSpec((None, x.shape[1]), lambda i, h, b: (h, 0))
    if name == 'sums':
      return pl.BlockSpec((None, None, None, *x.shape[3:]), lambda i, h, b: (b, h, i, 0, 0))
    if name == 'seeds':
      return pl.BlockSpec((None, 1), lambda i, h, b: (b, h))
    if name == 'offset':
      return pl.BlockSpec((1,), lambda i, h, b: (b,))
    if name == 'sinks':
      return pl.BlockSpec((1,), lambda i, h, b: (h,))
    length = {'query_ids': T, 'key_ids': S, 'prefix': S}.get(name, x.shape[-1])
    return pl.BlockSpec((None, length), lambda i, h, b: (row(b), 0))

  return pl.pallas_call(
      kernel, grid=(arrays['first'].shape[1], N, B),
      in_specs=[{name: spec(name, x) for name, x in arrays.items()}],
      out_specs={name: spec(name, x) for name, x in outs.items()}, out_shape=outs,
      compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
      interpret=interpret, name=f'flash_attention_{kernel.func.__name__}')(arrays)


def forward(options, query, key, value, terms, masking, *, interpret=False, card=None, blocks=None):
  """`reference.forward`.

  Args:
    options: and those up to masking are the reference's.
    interpret: whether to run without a GPU.
    card: a key of TABLE; None is the one in use.
    blocks: None is the table's.
  """
  (B, T, N, _), K = query.shape, key.shape[2]
  tiles, blocks = _tiles('forward', options, query, key, terms, card, blocks)
  arrays = _arrays(query, key, value, terms, masking)
  if terms.sinks is not None:
    arrays['sinks'] = jnp.maximum(terms.sinks.astype(jnp.float32), NO_KEY)
  outs = {'out': query, 'lse': jax.ShapeDtypeStruct((B, N, T), jnp.float32)}
  outs = _call(functools.partial(gpu_kernels.forward, tiles), tiles, blocks, 'query', arrays,
               masking, outs, interpret)
  return outs['out'], outs['lse'].reshape(B, K, N // K, T)


def backward(options, query, key, value, terms, masking, out, lse, g, dlse, *, interpret=False,
             card=None, blocks=None):
  """`reference.backward`; the arguments after dlse are those of `forward`."""
  (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
  arrays = _arrays(query, key, value, terms, masking)
  lse_BNT = lse.reshape(B, N, T)
  delta_BNT = jnp.einsum('btnh,btnh->bnt', g, out, preferred_element_type=jnp.float32)
  delta_BNT -= dlse.reshape(B, N, T)
  arrays |= {'dout': g, 'lse': lse_BNT, 'delta': delta_BNT}
  outs, bias = {'dquery': query}, terms.bias
  if bias is not None:
    outs['dbias'] = jax.ShapeDtypeStruct((B, N, T, S),
                                         bias.dtype if bias.shape[0] == B else jnp.float32)
  tiles, of_queries = _tiles('query_gradient', options, query, key, terms, card, blocks)
  outs = _call(functools.partial(gpu_kernels.query_gradient, tiles), tiles, of_queries, 'query',
               arrays, masking, outs, interpret)
  tiles, of_keys = _tiles('key_gradient', options, query, key, terms, card, blocks)
  of_heads = jax.ShapeDtypeStruct((B, S, N, H), key.dtype if N == K else jnp.float32)
  outs |= _call(functools.partial(gpu_kernels.key_gradient, tiles), tiles, of_keys, 'key', arrays,
                masking, {'dkey': of_heads, 'dvalue': of_heads}, interpret)
  if N > K:  # the heads of a group are programs of their own: few key-value heads fill no GPU
    outs |= {name: outs[name].reshape(B, S, K, N // K, H).sum(3).astype(key.dtype)
             for name in ('dkey', 'dvalue')}
  dbias = outs.get('dbias')
  if bias is not None and bias.shape[0] < B:
    dbias = dbias.sum(0, keepdims=True).astype(bias.dtype)
  dsinks = None if terms.sinks is None else sinks_gradient(terms.sinks, lse_BNT, delta_BNT)
  ddistance = None
  if terms.distance_bias is not None:
    ddistance = _distance_gradient(options, query, key, terms, masking, arrays, interpret, card,
                                   blocks)
  return outs['dquery'], outs['dkey'], outs['dvalue'], Terms(dbias, dsinks, ddistance)


def _distance_gradient(options, query, key, terms, masking, arrays, interpret, card, blocks):
  """The gradient of `distance_bias`."""
  (B, T, N, _), S = query.shape, key.shape[1]
  tiles, blocks = _tiles('distance_gradient', options, query, key, terms, card, blocks)
  size = min(tiles.queries, tiles.keys)
  tiles, rows = tiles._replace(queries=size, keys=size), pl.cdiv(T, size)
  outs = {'sums': jax.ShapeDtypeStruct((B, N, rows + pl.cdiv(S, size) - 1, size, size),
                                       jnp.float32)}
  outs = _call(functools.partial(gpu_kernels.distance_gradient, tiles), tiles, blocks, 'diagonal',
               arrays, masking, outs, interpret)
  return gpu_positions.distance_bias_gradient(options, terms.distance_bias, masking.query_offset,
                                              outs['sums'], rows)
