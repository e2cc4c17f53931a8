"""`reference.forward` and `reference.backward` as Pallas kernels for TPUs.

Here arrays are brought into the form of the kernels: heads side by side in lanes, without a
transpose, lengths padded to blocks. The kernels are in tpu_forward.py and tpu_backward.py.
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import chips, dropout
from pallas_kernels.flash_attention import (block_sizes, tpu_backward, tpu_blocks,
                                            tpu_forward, tpu_positions)
from pallas_kernels.flash_attention.reference import (MASKED, NO_KEY, Terms, places,
                                                      sinks_gradient)
from pallas_kernels.flash_attention.tpu_blocks import LANES, Layout

LARGEST_HEAD = 256
LEAST_SHARED_HEAD = 32  # of more heads a tile would be too many small products
MOST_VISITS = 2**14  # their list is in scalar memory


def _layout(name, options, query, key, terms, chip, blocks=None) -> Layout:
  """The layout of a pass, 'forward' or 'backward'; `blocks` are the table's if None.

  Raises:
    NotImplementedError: no blocks fit.
  """
  (_, T, N, H), (S, K) = query.shape, key.shape[1:3]
  G, narrow = N // K, max(2 ** (H - 1).bit_length(), LEAST_SHARED_HEAD)  # a part of a tile
  share = LANES // narrow if narrow < LANES and K % (LANES // narrow) == 0 else 1
  head = narrow if share > 1 else -(-H // LANES) * LANES
  blocks = blocks or block_sizes.find(name, chip, T, S, head, share, query.dtype.itemsize,
                                      0 if terms.bias is None else terms.bias.dtype.itemsize,
                                      tpu_positions.vmem_bytes(name, terms, T, S, head * share,
                                                               share))
  largest = lambda n, most: max(i for i in range(1, n + 1) if n % i == 0 and i <= most)
  query_tiles = largest(G, blocks.tiles)
  key_tiles = largest(K // share, blocks.tiles // G) if query_tiles == G else 1
  return Layout(options, T, S, head, share, blocks.queries, blocks.keys, key_tiles, query_tiles,
                G // query_tiles)


def refusal(options, query: jax.Array, key: jax.Array, terms: Terms) -> str | None:
  """Why the kernels do not take a call, or None."""
  if query.dtype not in (jnp.bfloat16, jnp.float32):
    return f'query is {query.dtype}, the kernel takes bfloat16 and float32'
  if query.shape[-1] > LARGEST_HEAD:
    return f'heads of {query.shape[-1]} are wider than {LARGEST_HEAD}'
  if terms.relative_key is not None and chips.generation() == 'v4':
    return 'relative_key needs rotations of rows by different numbers of lanes, which a v4 has not'
  if not query.size or not key.size:
    return f'query {query.shape} and key {key.shape} must have elements'
  try:
    for name in ('forward', 'backward'):
      layout = _layout(name, options, query, key, terms, chips.generation_or_least())
      most = -(-layout.T // layout.block_q) * -(-layout.S // layout.block_k)
      if most > MOST_VISITS:
        return (f'T={layout.T} and S={layout.S} are {most} blocks, the kernel takes {MOST_VISITS}: '
                'shard the length')
  except NotImplementedError as error:
    return str(error)
  return None


def _pad(x, axis, multiple, fill=0):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, widths, constant_values=fill)


def _reorder(x, axis, first, second):
  """Heads ordered by [.., first, second] come to be ordered by [.., second, first]."""
  if 1 in (first, second):
    return x
  split = x.reshape(*x.shape[:axis], -1, first, second, *x.shape[axis + 1:])
  return jnp.swapaxes(split, axis + 1, axis + 2).reshape(x.shape)


class _Form:
  """Brings the arrays of a call, of [B, length, heads, H], into the kernels' form and back."""

  def __init__(self, layout: Layout, query, key):
    self.layout, self.H = layout, query.shape[-1]
    self.G = query.shape[2] // key.shape[2]

  def lanes(self, x, block, ordered=True):
    """[B, T, N, H] -> [B, padded T, N * head]; queries' heads are ordered by tiles."""
    layout = self.layout
    x = _reorder(x, 2, layout.share, self.G) if ordered else x
    x = _pad(_pad(x, 3, layout.head), 1, block)
    return x.reshape(*x.shape[:2], -1)

  def heads(self, x, length, ordered=True):
    """The inverse of `lanes`."""
    x = x[:, :length].reshape(x.shape[0], length, -1, self.layout.head)[..., :self.H]
    return _reorder(x, 2, self.G, self.layout.share) if ordered else x

  def rows(self, x, fill):
    """[B, N, T] -> [B, N, 1, padded T]."""
    x = _reorder(x, 1, self.layout.share, self.G)
    return _pad(x, 2, self.layout.block_q, fill)[:, :, None]

  def scores(self, x):
    """[B, N, T, S] -> padded to blocks."""
    layout = self.layout
    return _pad(_pad(_reorder(x, 1, layout.share, self.G), 2, layout.block_q), 3, layout.block_k)


def _by_distance(form, query_axis, offset, distance_bias, relative_key):
  """The arrays of `tpu_positions` by name, of what is not None."""
  layout, arrays = form.layout, {}
  if distance_bias is not None:
    arrays['table'] = _reorder(
        tpu_positions.table(layout, query_axis, offset, distance_bias), 1, layout.share, form.G)
  if relative_key is not None:
    keys = tpu_positions.keys_by_diagonal(layout, offset, relative_key)
    arrays['relative_key'] = form.lanes(keys, LANES)
  return arrays


def _inputs(form, query, key, value, terms, masking, query_axis):
  """(offset [B], the arrays by name) of a pass with queries along `query_axis`."""
  layout, B = form.layout, query.shape[0]
  arrays = {'query': form.lanes(query, layout.block_q),
            'key': form.lanes(key, layout.block_k, False),
            'value': form.lanes(value, layout.block_k, False)}
  for name, x in tpu_blocks.mask_arrays(layout, B, masking).items():
    arrays[name] = _pad(x, 2, layout.block_q if name.startswith('query') else layout.block_k)
  if terms.bias is not None:
    name = 'bias' if terms.bias.shape[0] == B > 1 else 'shared_bias'
    arrays[name] = form.scores(terms.bias)
  arrays |= _by_distance(form, query_axis, masking.query_offset, terms.distance_bias,
                         terms.relative_key)
  if terms.relative_query is not None:
    arrays['relative_query'] = form.lanes(terms.relative_query, layout.block_q)
  if layout.options.dropout_rate:
    seeds = _reorder(dropout.of_seeds(masking.dropout_seeds), 1, layout.share, form.G)
    arrays['seeds'] = seeds.reshape(B, -1, 1, layout.heads)
  if terms.sinks is not None:
    sinks = jnp.maximum(terms.sinks.astype(jnp.float32), NO_KEY)
    arrays['sinks'] = _reorder(sinks, 0, layout.share, form.G).reshape(1, -1, 1, layout.heads)
  first_place_B = jnp.broadcast_to(places(layout.options, 1, masking)[:, 0], B)
  return first_place_B.astype(jnp.int32), arrays


def forward(options, query, key, value, terms, masking, *, interpret=False, chip=None, blocks=None):
  """`reference.forward`.

  Args:
    options: and those up to masking are the reference's.
    interpret: whether to run without a TPU.
    chip: the generation that the blocks are for; None is the one in use.
    blocks: None is the table's.
  """
  chip = chip or chips.generation_or_least()
  (B, T, N, _), K = query.shape, key.shape[2]
  layout = _layout('forward', options, query, key, terms, chip, blocks)
  form = _Form(layout, query, key)
  offset, arrays = _inputs(form, query, key, value, terms, masking, int(layout.share > 1))
  out, lse = tpu_forward.forward(layout, tpu_blocks.visits(layout, masking, False), offset, arrays,
                                 interpret=interpret, vmem_bytes=chips.vmem_limit(chip))
  lse_BNT = _reorder(lse[:, :, 0, :T], 1, form.G, layout.share)
  return form.heads(out, T), lse_BNT.reshape(B, K, N // K, T)


def backward(options, query, key, value, terms, masking, out, lse, g, dlse, *, interpret=False,
             chip=None, blocks=None):
  """`reference.backward`; the arguments after dlse are those of `forward`."""
  chip = chip or chips.generation_or_least()
  (B, T, N, _), S = query.shape, key.shape[1]
  layout = _layout('backward', options, query, key, terms, chip, blocks)
  form = _Form(layout, query, key)
  offset, arrays = _inputs(form, query, key, value, terms, masking, 1)
  lse_BNT = lse.reshape(B, N, T)
  delta_BNT = jnp.einsum('btnh,btnh->bnt', g, out, preferred_element_type=jnp.float32)
  delta_BNT -= dlse.reshape(B, N, T)
  arrays |= {'dout': form.lanes(g, layout.block_q), 'lse': form.rows(lse_BNT, -MASKED),
             'delta': form.rows(delta_BNT, 0.0)}
  bias, dbias = terms.bias, None
  if bias is not None:
    padded = arrays.get('bias', arrays.get('shared_bias')).shape[1:]
    dbias = jnp.zeros((B, *padded), bias.dtype if bias.shape[0] == B else jnp.float32)
  grads = tpu_backward.backward(layout, tpu_blocks.visits(layout, masking, True), offset, arrays,
                                dbias, interpret=interpret,
                                vmem_bytes=chips.vmem_limit(chip))
  dkey, dvalue = (form.heads(_join(grads[name], layout).astype(query.dtype), S, False)
                  for name in ('dkey', 'dvalue'))
  if bias is not None:
    dbias = _reorder(grads['dbias'][:, :, :T, :S], 1, form.G, layout.share)
    dbias = dbias if bias.shape[0] == B else dbias.sum(0, keepdims=True)
    dbias = dbias.astype(bias.dtype)
  dsinks = None if terms.sinks is None else sinks_gradient(terms.sinks, lse_BNT, delta_BNT)
  by_distance = _gradients_by_distance(form, grads, terms, masking.query_offset, T)
  return form.heads(grads['dquery'], T), dkey, dvalue, Terms(dbias, dsinks, *by_distance)


def _gradients_by_distance(form, grads, terms, offset, T):
  """The gradients of distance_bias, relative_query and relative_key."""
  scale, drelative_query = form.layout.options.scale, None
  tables = terms.distance_bias, terms.relative_key
  inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tables)
  transpose = jax.linear_transpose(functools.partial(_by_distance, form, 1, offset), *inputs)
  dtables = {name: grads[f'd{name}'] for name in ('table', 'relative_key') if f'd{name}' in grads}
  if offset is None:  # all rows read one table
    dtables = {name: x.sum(0, keepdims=True) for name, x in dtables.items()}
  if terms.relative_query is not None:
    dtables['relative_key'] *= scale
    drelative_query = form.heads(grads['drelative_query'] * scale, T)
    drelative_query = drelative_query.astype(terms.relative_query.dtype)
  dbias, drelative_key = jax.tree.map(lambda dx, x: dx.astype(x.dtype), transpose(dtables), tables)
  return dbias, drelative_query, drelative_key


def _join(x, layout):
  """Adds the parts of programs that share keys: [B, S, tiles * splits * width] without splits."""
  if layout.splits == 1:
    return x
  parts = x.reshape(*x.shape[:2], -1, layout.splits, layout.width)
  return parts.sum(3).reshape(*x.shape[:2], -1)
