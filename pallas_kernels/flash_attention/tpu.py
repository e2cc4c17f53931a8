"""`reference.forward` and `reference.backward` as Pallas kernels for TPUs.

Here arrays are brought into the form of the kernels: heads side by side in lanes, without a
transpose, lengths padded to blocks. The kernels are in tpu_forward.py and tpu_backward.py.
"""
import jax
import jax.numpy as jnp

from pallas_kernels import chips
from pallas_kernels.flash_attention import (block_sizes, dropout, tpu_backward, tpu_blocks,
                                            tpu_forward)
from pallas_kernels.flash_attention.reference import NO_KEY, Terms, places, sinks_gradient
from pallas_kernels.flash_attention.tpu_blocks import LANES, Layout

LARGEST_HEAD = 256
LEAST_SHARED_HEAD = 32  # narrower ones are padded: a tile would be too many small products
MOST_VISITS = 2**14  # their list is in scalar memory


def _layout(name, options, query, key, terms, chip, blocks=None) -> Layout:
  """The layout of a pass, 'forward' or 'backward'; `blocks` are the table's if None.

  Raises:
    NotImplementedError: no blocks fit.
  """
  (_, T, N, H), (S, K) = query.shape, key.shape[1:3]
  share, G = LANES // H if LEAST_SHARED_HEAD <= H < LANES and LANES % H == 0 else 1, N // K
  share = 1 if K % share else share
  head = H if share > 1 else -(-H // LANES) * LANES
  blocks = blocks or block_sizes.find(name, chip, T, S, head, share, query.dtype.itemsize,
                                      0 if terms.bias is None else terms.bias.dtype.itemsize)
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


def _pad(x, axis, multiple):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, widths)


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

  def rows(self, x):
    """[B, N, T] -> [B, N, 1, padded T]."""
    return _pad(_reorder(x, 1, self.layout.share, self.G), 2, self.layout.block_q)[:, :, None]

  def scores(self, x):
    """[B, N, T, S] -> padded to blocks."""
    layout = self.layout
    return _pad(_pad(_reorder(x, 1, layout.share, self.G), 2, layout.block_q), 3, layout.block_k)


def _inputs(form, query, key, value, terms, masking):
  """(offset [B], the arrays by name) that both passes take."""
  layout, B = form.layout, query.shape[0]
  arrays = {'query': form.lanes(query, layout.block_q),
            'key': form.lanes(key, layout.block_k, False),
            'value': form.lanes(value, layout.block_k, False)}
  for name, x in tpu_blocks.mask_arrays(layout, B, masking).items():
    arrays[name] = _pad(x, 2, layout.block_q if name.startswith('query') else layout.block_k)
  if terms.bias is not None:
    name = 'bias' if terms.bias.shape[0] == B > 1 else 'shared_bias'
    arrays[name] = form.scores(terms.bias)
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
  offset, arrays = _inputs(form, query, key, value, terms, masking)
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
  offset, arrays = _inputs(form, query, key, value, terms, masking)
  lse_BNT = lse.reshape(B, N, T)
  delta_BNT = jnp.einsum('btnh,btnh->bnt', g, out, preferred_element_type=jnp.float32)
  delta_BNT -= dlse.reshape(B, N, T)
  arrays |= {'dout': form.lanes(g, layout.block_q), 'lse': form.rows(lse_BNT),
             'delta': form.rows(delta_BNT)}
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
  return form.heads(grads['dquery'], T), dkey, dvalue, Terms(dbias, dsinks)


def _join(x, layout):
  """Adds the parts of programs that share keys: [B, S, tiles * splits * width] without splits."""
  if layout.splits == 1:
    return x
  parts = x.reshape(*x.shape[:2], -1, layout.splits, layout.width)
  return parts.sum(3).reshape(*x.shape[:2], -1)
