"""Attention's backward pass on a TPU: all gradients from one recomputation of the scores
(FlashAttention, arXiv:2205.14135, algorithm 4).

Scores are transposed, [keys, queries]: the log-sum-exp then lies along lanes and the gradients of
key and value are plain products. The gradient of a program's queries stays in VMEM over their whole
length, since each block of keys adds to it.
"""
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.flash_attention import tpu_blocks, tpu_positions
from pallas_kernels.flash_attention.tpu_blocks import LOG2_E


def _tile(layout, ref, out, visit, q_lanes, k_lanes, first_head):
  """What one visit of a tile adds to the gradients of query, key and value, float32."""
  query, dout = ref['query'][0, :, q_lanes], ref['dout'][0, :, q_lanes]
  key, value = ref['key'][0, :, k_lanes], ref['value'][0, :, k_lanes]
  parts = []
  for i in range(layout.share):
    head = first_head + i
    products = tpu_blocks.dot(key, tpu_blocks.one_head(layout, query, i), (1, 1))
    added = tpu_positions.scores(layout, ref, visit, q_lanes, head)
    scores, slope = tpu_blocks.base_2_scores(layout, products, added, visit.mask)
    probs = jnp.exp2(scores - ref['lse'][0, head] * LOG2_E)
    dprobs = tpu_blocks.dot(value, tpu_blocks.one_head(layout, dout, i), (1, 1))
    factors = visit.factors(head)
    dscores = probs * (dprobs * factors - ref['delta'][0, head])
    tpu_positions.add_gradients(layout, ref, out, visit, q_lanes, head, dscores)
    dscores = (dscores if slope is None else dscores * slope).astype(query.dtype)
    parts.append((tpu_blocks.dot(dscores, key, (0, 0)), tpu_blocks.dot(dscores, query, (1, 0)),
                  tpu_blocks.dot((probs * factors).astype(query.dtype), dout, (1, 0))))
  return [tpu_blocks.merge_heads(layout, of_heads) for of_heads in zip(*parts)]


def _kernel(layout, query_block, key_block, first_of_query, first_of_key, offset, ref, out,
            dquery_ref, dkey_ref, dvalue_ref):
  """A visit: adds to the three gradients, and writes what they are so far.

  dquery_ref: float32 [T, lanes]. dkey_ref and dvalue_ref: float32 [block_k, lanes].
  """
  step = pl.program_id(2)
  first_q, first_k = query_block[step] * layout.block_q, key_block[step] * layout.block_k
  rows = pl.ds(pl.multiple_of(first_q, layout.block_q), layout.block_q)
  visit = tpu_blocks.visit(layout, ref, first_q, first_k, offset[pl.program_id(0)], 1)
  scale, new_q, new_k = layout.options.scale, first_of_query[step] == 1, first_of_key[step] == 1
  tpu_positions.start_gradients(out, step)
  for (q_lanes, k_lanes), head in layout.tiles():
    if head % (layout.query_tiles * layout.share) == 0:
      dkey = jnp.where(new_k, 0.0, dkey_ref[:, k_lanes])
      dvalue = jnp.where(new_k, 0.0, dvalue_ref[:, k_lanes])
    parts = _tile(layout, ref, out, visit, q_lanes, k_lanes, head)
    dquery = jnp.where(new_q, 0.0, dquery_ref[rows, q_lanes]) + parts[0]
    dkey, dvalue = dkey + parts[1], dvalue + parts[2]
    dquery_ref[rows, q_lanes], dkey_ref[:, k_lanes], dvalue_ref[:, k_lanes] = dquery, dkey, dvalue
    out['dquery'][0, rows, q_lanes] = (dquery * scale).astype(out['dquery'].dtype)
    out['dkey'][0, :, k_lanes] = (dkey * scale).astype(out['dkey'].dtype)
    out['dvalue'][0, :, k_lanes] = dvalue.astype(out['dvalue'].dtype)


def _kernel_of_bias(layout, *refs):
  """`_kernel`, whose argument after `ref` is the gradient of the bias before any visit."""
  prefetched, (ref, _, *rest) = refs[:5], refs[5:]
  _kernel(layout, *prefetched, ref, *rest)


def backward(layout: tpu_blocks.Layout, visits, offset, arrays: dict[str, jax.Array],
             dbias: jax.Array | None, *, interpret: bool | pltpu.InterpretParams, vmem_bytes: int
             ) -> dict[str, jax.Array]:
  """Returns 'dquery', 'dkey', 'dvalue' and, where there is one, 'dbias', and those of
  `tpu_positions.gradients`.

  'dkey' and 'dvalue' are [B, S, programs * lanes]: where programs share keys, each has its part of
  the sum, in float32.

  Args:
    layout: whose blocks divide the lengths of `arrays`.
    visits: of `tpu_blocks.visits`, by key.
    offset: int32 [B].
    arrays: those of `forward`, 'dout' like 'query', and 'lse' and 'delta', float32 [B, N, 1, T].
    dbias: zeros [B, N, T, S]: the gradient of the bias in blocks that are not visited.
    interpret: whether to run without a TPU.
    vmem_bytes: the kernel's share of VMEM.
  """
  specs = tpu_blocks.block_specs(layout) | tpu_positions.block_specs(layout, arrays)
  query = arrays['query']
  B, T, q_lanes = query.shape
  lanes, k_lanes = specs['query'].block_shape[-1], specs['key'].block_shape[-1]
  programs, S = q_lanes // lanes, arrays['key'].shape[1]
  part = jnp.float32 if layout.splits > 1 else query.dtype
  dkey = jax.ShapeDtypeStruct((B, S, programs * k_lanes), part)
  outs = {'dquery': jax.ShapeDtypeStruct(query.shape, query.dtype), 'dkey': dkey, 'dvalue': dkey}
  specs |= {'dquery': pl.BlockSpec((1, T, lanes), lambda b, h, *_: (b, 0, h)),
            'dvalue': specs['dkey']}
  outs |= tpu_positions.gradients(arrays)
  in_specs, kernel, aliases, args = [{name: specs[name] for name in arrays}], _kernel, {}, [arrays]
  if dbias is not None:
    outs['dbias'] = jax.ShapeDtypeStruct(dbias.shape, dbias.dtype)
    in_specs.append(pl.BlockSpec(memory_space=pl.ANY))
    args.append(dbias)
    kernel, aliases = _kernel_of_bias, {5 + len(arrays): sorted(outs).index('dbias')}
  sums = pltpu.VMEM((layout.block_k, k_lanes), jnp.float32)
  grid_spec = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5, grid=(B, programs, visits.shape[1]), in_specs=in_specs,
      out_specs={name: specs[name] for name in outs},
      scratch_shapes=[pltpu.VMEM((T, lanes), jnp.float32), sums, sums])
  return pl.pallas_call(
      functools.partial(kernel, layout), grid_spec=grid_spec, out_shape=outs,
      input_output_aliases=aliases, interpret=interpret, name='flash_attention_backward',
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=vmem_bytes),
  )(*visits, offset, *args)
