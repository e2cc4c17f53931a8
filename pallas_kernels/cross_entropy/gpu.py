"""`reference.cross_entropy` by Pallas kernels for GPUs (Triton), also of a vocabulary cut over
devices (`statistics`).

Both kernels multiply tiles of tokens by tiles of the vocabulary, whose logits never leave the
registers. The first one keeps what a tile tells of its tokens; with their log-sum-exp the second
one writes the gradient of the logits, for as much of the vocabulary at a time as CHUNK_BYTES hold,
of which XLA makes the gradients of hidden and of the embedding by its own products. So each sum has
one writer, where Cut Cross-Entropy (arXiv:2411.09009, section 4.3) adds up by atomics, and no part
of the gradient is left out for being small.

Four products, against the three of XLA's form, which keeps a quarter of the logits and the whole
gradient of the embedding in float32.
"""
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels.cross_entropy import statistics
from pallas_kernels.cross_entropy.statistics import Statistics, bend, capped
from pallas_kernels.grouped_matmul.gpu import Blocks, Side, dot, load, mask_of

DTYPES = jnp.bfloat16, jnp.float32
CHUNK_BYTES = 2**26
# rows are tokens, columns of the vocabulary
HALF, FLOAT32 = Blocks(128, 256, 64, 8, 3), Blocks(64, 64, 32, 8, 2)
OF_TOKENS = 'lse', 'scale', 'expected', 'flat'  # `statistics.of_gradient`


def refusal(options, hidden, embedding) -> str | None:
  """Says why the kernels do not take these arrays, or None if they do."""
  del options
  for name, x in (('hidden', hidden), ('embedding', embedding)):
    if x.dtype not in DTYPES:
      return f'{name} is {x.dtype}; the GPU kernels take bfloat16 and float32'
  if not hidden.size * embedding.size:
    return f'hidden {hidden.shape} and embedding {embedding.shape} must have elements'
  return None


def _tile(options, blocks, sizes, ref, first):
  """Logits of this program's tile, which begins at row `first` of the embedding, and its sides."""
  M, V, D = sizes
  tokens = Side(pl.program_id(0) * blocks.rows, blocks.rows, M)
  words = Side(first, blocks.columns, V)

  def add(i, sums):
    chunk = Side(i * blocks.chunk, blocks.chunk, D)
    hidden, rows = load(ref['hidden'], tokens, chunk), load(ref['embedding'], words, chunk)
    return sums + dot(hidden, rows, 1, 1)

  logits = lax.fori_loop(0, pl.cdiv(D, blocks.chunk), add,
                         jnp.zeros((blocks.rows, blocks.columns), jnp.float32))
  if 'bias' in ref:
    logits += _vector(ref['bias'], words).astype(jnp.float32)[None]
  return capped(options, logits), tokens, words


def _vector(ref, side: Side):
  mask = side.mask
  return plgpu.load(ref.at[side.slice], mask=mask, other=None if mask is None else 0)


def _statistics_kernel(options, blocks, sizes, ref, out):
  """Writes what a tile tells of its tokens."""
  first, V = pl.program_id(1) * blocks.columns, sizes[1]
  logits, tokens, words = _tile(options, blocks, sizes, ref, first)
  stands = words.mask
  keep = lambda x, other: x if stands is None else jnp.where(stands[None], x, other)
  largest = keep(logits, -jnp.inf).max(1)
  exps = keep(jnp.exp(logits - largest[:, None]), 0)
  found = {'lse': largest + jnp.log(exps.sum(1))}
  if 'total' in out:
    found['total'] = keep(logits, 0).sum(1)
  if 'largest' in out:
    is_largest = keep(logits, -jnp.inf) == largest[:, None]
    word = first + jnp.arange(blocks.columns)
    found |= {'largest': largest, 'best': jnp.where(is_largest, word[None], V).min(1)}
  for name, x in found.items():
    plgpu.store(out[name].at[tokens.slice], x, mask=tokens.mask)


def _gradient_kernel(options, blocks, sizes, ref, out):
  """Writes a tile of the gradient of the logits of a chunk of the vocabulary, from 'first' on; that
  of what is before 'begin' is zero."""
  column = pl.program_id(1) * blocks.columns
  logits, tokens, words = _tile(options, blocks, sizes, ref, ref['first'][0] + column)
  lse, scale, expected, flat = (_vector(ref[name], tokens)[:, None] for name in OF_TOKENS)
  word = (words.first + jnp.arange(blocks.columns))[None]
  is_target = word == _vector(ref['targets'], tokens)[:, None]
  dlogits = scale * jnp.exp(logits - lse) - jnp.where(is_target, expected, 0)
  if options.label_smoothing:
    dlogits -= flat
  dlogits = jnp.where(word >= ref['begin'][0], bend(options, dlogits, logits), 0)
  columns = Side(column, blocks.columns, out.shape[1])
  plgpu.store(out.at[tokens.slice, columns.slice], dlogits.astype(out.dtype),
              mask=mask_of(tokens, columns))


def _call(kernel, name, options, blocks, arrays, outs, columns, out_spec, interpret):
  """Runs a kernel over tiles of the tokens and of `columns` rows of the embedding."""
  arrays = {name: x for name, x in arrays.items() if x is not None}
  (M, D), V = arrays['hidden'].shape, len(arrays['embedding'])
  whole = lambda x: pl.BlockSpec(x.shape, lambda i, j: (0,) * x.ndim)
  return pl.pallas_call(
      functools.partial(kernel, options, blocks, (M, V, D)), outs,
      grid=(pl.cdiv(M, blocks.rows), pl.cdiv(columns, blocks.columns)),
      in_specs=[jax.tree.map(whole, arrays)], out_specs=jax.tree.map(out_spec, outs),
      compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
      name=f'cross_entropy_{name}', interpret=interpret)(arrays)


def _blocks(hidden, blocks):
  return blocks or (FLOAT32 if hidden.dtype == jnp.float32 else HALF)


def over_vocabulary(options, hidden_MD, embedding_VD, bias_V, targets_M, *, interpret, blocks=None,
                    wants_best=False) -> Statistics:
  """The statistics of these rows of the embedding, by one product.

  Args:
    options: what `cross_entropy` was called with.
    hidden_MD, embedding_VD, bias_V: the head, or one device's rows of it, of one dtype.
    targets_M: int32, among these rows; -1 where they do not have the target.
    interpret: for machines without a GPU.
    blocks: how much is computed at a time; None is the default of the dtype.
    wants_best: whether `Statistics.is_best` is wanted.
  """
  blocks, (M, V) = _blocks(hidden_MD, blocks), (len(hidden_MD), len(embedding_VD))
  shape = pl.cdiv(V, blocks.columns), M
  names = ['lse'] + ['total'] * bool(options.label_smoothing) + ['largest', 'best'] * wants_best
  outs = {name: jax.ShapeDtypeStruct(shape, jnp.int32 if name == 'best' else jnp.float32)
          for name in names}
  outs = _call(_statistics_kernel, 'statistics', options, blocks,
               {'hidden': hidden_MD, 'embedding': embedding_VD, 'bias': bias_V}, outs, V,
               lambda x: pl.BlockSpec((None, M), lambda i, j: (j, 0)), interpret)
  wide = lambda x: x.astype(jnp.float32)
  row_M, zeros_M = jnp.maximum(targets_M, 0), jnp.zeros(M, jnp.float32)
  target_M = (wide(hidden_MD) * wide(embedding_VD[row_M])).sum(1)
  if bias_V is not None:
    target_M += wide(bias_V)[row_M]
  target_M = jnp.where(targets_M < 0, 0, capped(options, target_M))
  is_best_M = zeros_M
  if wants_best:
    tile_M = outs['largest'].argmax(0)  # of equal ones the first
    is_best_M = wide(jnp.take_along_axis(outs['best'], tile_M[None], 0)[0] == targets_M)
  return Statistics(jax.nn.logsumexp(outs['lse'], 0), target_M,
                    outs['total'].sum(0) if 'total' in outs else zeros_M, is_best_M)


def losses(options, hidden_BTD, embedding_VD, bias_V, targets_BT, *, axis_name=None, blocks=None,
           wants_best=False, interpret=None):
  """Returns losses [B, T], unweighted, and whether each target is the argmax, boolean [B, T]."""
  head = statistics.head(hidden_BTD, embedding_VD.astype(hidden_BTD.dtype), bias_V, targets_BT,
                         axis_name)
  stats = statistics.over_devices(statistics.run('cuda', interpret, functools.partial(
      over_vocabulary, options, wants_best=wants_best, blocks=blocks), *head), axis_name)
  losses_M = statistics.losses(options, stats, targets_BT.reshape(-1),
                               statistics.vocabulary(embedding_VD, axis_name))
  return losses_M.reshape(targets_BT.shape), stats.is_best.reshape(targets_BT.shape) > 0


def chunk_of(tokens: int, size: int, itemsize: int, blocks: Blocks) -> int:
  """Rows of the embedding whose logits' gradient is in memory at a time."""
  return min(max(1, CHUNK_BYTES // (tokens * itemsize * blocks.columns)) * blocks.columns, size)


def gradients(options, hidden_MD, embedding_VD, bias_V, targets_M, tokens_4M, *, dtypes, interpret,
              blocks=None):
  """The gradients of hidden, float32, of the embedding and of bias, or None, by three products.

  Args:
    tokens_4M: `statistics.of_gradient`. The others are as in `over_vocabulary`.
    dtypes: of the gradients of the embedding and of bias.
  """
  blocks, (M, D), V = _blocks(hidden_MD, blocks), hidden_MD.shape, len(embedding_VD)
  size = chunk_of(M, V, hidden_MD.dtype.itemsize, blocks)
  arrays = {'hidden': hidden_MD, 'embedding': embedding_VD, 'bias': bias_V, 'targets': targets_M,
            **dict(zip(OF_TOKENS, tokens_4M, strict=True))}

  def add(i, sums):
    dhidden_MD, dembedding_VD, dbias_V = sums
    begin = i * size
    first = jnp.minimum(begin, V - size)  # the last chunk begins with zeros for what is done
    dlogits_MC = _call(
        _gradient_kernel, 'gradient', options, blocks,
        arrays | {'first': first[None], 'begin': begin[None]},
        jax.ShapeDtypeStruct((M, size), hidden_MD.dtype), size,
        lambda x: pl.BlockSpec(x.shape, lambda i, j: (0, 0)), interpret)
    rows_CD = lax.dynamic_slice_in_dim(embedding_VD, first, size)
    dhidden_MD += dot(dlogits_MC, rows_CD, 1, 0)
    more = lambda sums, x: lax.dynamic_update_slice_in_dim(
        sums, lax.dynamic_slice_in_dim(sums, first, size) + x.astype(sums.dtype), first, 0)
    dembedding_VD = more(dembedding_VD, dot(dlogits_MC, hidden_MD, 0, 0))
    if dbias_V is not None:
      dbias_V = more(dbias_V, dlogits_MC.sum(0, dtype=jnp.float32))
    return dhidden_MD, dembedding_VD, dbias_V

  start = (jnp.zeros((M, D), jnp.float32), jnp.zeros((V, D), dtypes[0]),
           None if bias_V is None else jnp.zeros(V, dtypes[1]))
  return lax.fori_loop(0, pl.cdiv(V, size), add, start)


def loss_and_gradients(options, hidden_BTD, embedding_VD, bias_V, targets_BT, weights_BT, *,
                       axis_name=None, blocks=None, interpret=None):
  """Returns the loss and the gradients of hidden, embedding and bias; of the rows of the embedding
  that this device has, if there is an axis: the gradient of hidden is then a summand."""
  head = statistics.head(hidden_BTD, embedding_VD.astype(hidden_BTD.dtype), bias_V, targets_BT,
                         axis_name)
  stats = statistics.over_devices(statistics.run('cuda', interpret, functools.partial(
      over_vocabulary, options, blocks=blocks), *head), axis_name)
  size, weights_M = statistics.vocabulary(embedding_VD, axis_name), weights_BT.reshape(-1)
  losses_M = statistics.losses(options, stats, targets_BT.reshape(-1), size)
  dtypes = embedding_VD.dtype, None if bias_V is None else bias_V.dtype
  dhidden_MD, *rest = statistics.run('cuda', interpret, functools.partial(
      gradients, options, dtypes=dtypes, blocks=blocks), *head,
                                     statistics.of_gradient(options, stats.lse, weights_M, size))
  dhidden_BTD = dhidden_MD.astype(hidden_BTD.dtype).reshape(hidden_BTD.shape)
  return jnp.vdot(losses_M, weights_M), dhidden_BTD, *rest
