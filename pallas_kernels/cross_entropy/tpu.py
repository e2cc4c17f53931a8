"""`reference.cross_entropy` by the kernels of `tpu_kernels`, also of a vocabulary cut over devices.

Each device has some rows of the embedding and passes over them alone; only numbers of a token, its
log-sum-exp and its target's logit, are summed over the devices.
"""
import functools

from jax import lax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.cross_entropy import block_sizes, tpu_kernels

DTYPES = jnp.bfloat16, jnp.float32


def refusal(options, hidden, embedding) -> str | None:
  """Says why the kernels do not take these arrays, or None if they do."""
  for name, x in (('hidden', hidden), ('embedding', embedding)):
    if x.dtype not in DTYPES:
      return f'{name} is {x.dtype}; the TPU kernels take bfloat16 and float32'
  if 0 in hidden.shape:
    return f'hidden {hidden.shape} has no tokens'
  return block_sizes.refusal(hidden, embedding, _sums(options))


def _sums(options):
  return 2 if tpu_kernels.wants_flat(options) else 1


def losses(options, hidden_BTD, embedding_VD, bias_V, targets_BT, *, axis_name=None, blocks=None,
           wants_best=False, interpret=None):
  """Returns losses [B, T], unweighted, and whether each target is the argmax, boolean [B, T]."""
  head = _head(hidden_BTD, embedding_VD, bias_V, targets_BT, axis_name)
  stats, _, _ = _run(interpret, functools.partial(
      tpu_kernels.over_vocabulary, options, wants_best=wants_best,
      blocks=blocks or block_sizes.find('loss', hidden_BTD, embedding_VD)), *head)
  stats = _over_devices(stats, axis_name)
  losses_M = _losses(options, stats, targets_BT.reshape(-1), _vocabulary(embedding_VD, axis_name))
  return losses_M.reshape(targets_BT.shape), stats.is_best.reshape(targets_BT.shape) > 0


def loss_and_gradients(options, hidden_BTD, embedding_VD, bias_V, targets_BT, weights_BT, *,
                       axis_name=None, blocks=(None, None), interpret=None):
  """Returns the loss and the gradients of hidden, embedding and bias; of the rows of the embedding
  that this device has, if there is an axis: the gradient of hidden is then a summand."""
  find = lambda name, given: given or block_sizes.find(name, hidden_BTD, embedding_VD,
                                                       sums=_sums(options))
  head = _head(hidden_BTD, embedding_VD, bias_V, targets_BT, axis_name)
  here, mean_MD, flat_MD = _run(interpret, functools.partial(
      tpu_kernels.over_vocabulary, options, wants_mean=True, blocks=find('hidden', blocks[0])),
                                                *head)
  stats, vocabulary = _over_devices(here, axis_name), _vocabulary(embedding_VD, axis_name)
  weights_M, index_M = weights_BT.reshape(-1), head[-1]
  losses_M = _losses(options, stats, targets_BT.reshape(-1), vocabulary)

  # dhidden = sum_v(dlogits_v * embedding_v), the target's summand apart.
  smoothing, scale_M = options.label_smoothing, 1 + 2 * options.z_loss * stats.lse
  own_M = scale_M * jnp.exp(stats.target - stats.lse) - (1 - smoothing)
  own_M = jnp.where(index_M < 0, 0, tpu_kernels.bend(options, own_M, stats.target))
  rows_MD = embedding_VD[jnp.maximum(index_M, 0)].astype(mean_MD.dtype)
  share_M = scale_M * jnp.exp(here.lse - stats.lse)
  dhidden_MD = share_M[:, None] * mean_MD + own_M[:, None] * rows_MD
  if smoothing:
    flat_MD = embedding_VD.sum(0, dtype=jnp.float32)[None] if flat_MD is None else flat_MD
    dhidden_MD -= smoothing / vocabulary * flat_MD
  dhidden_BTD = (weights_M[:, None] * dhidden_MD).astype(hidden_BTD.dtype).reshape(hidden_BTD.shape)

  dembedding_VD, dbias_V = _run(interpret, functools.partial(
      tpu_kernels.over_tokens, options, vocabulary=vocabulary,
      blocks=find('embedding', blocks[1])), *head, stats.lse, weights_M)
  return jnp.vdot(losses_M, weights_M), dhidden_BTD, dembedding_VD, dbias_V


def _run(interpret, kernel, *args):
  """Calls a kernel; `interpret` None: as the platform that the program is lowered for needs it."""
  if interpret is None:
    return platform.interpreted(kernel, *args)
  return kernel(*args, interpret=interpret)


def _head(hidden_BTD, embedding_VD, bias_V, targets_BT, axis_name):
  """The kernels' first arguments: tokens in one dimension, targets counted from this device's row.
  """
  size, index_M = len(embedding_VD), targets_BT.reshape(-1)
  if axis_name is not None:
    index_M = index_M - lax.axis_index(axis_name) * size
  index_M = jnp.where((0 <= index_M) & (index_M < size), index_M, -1)
  return hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), embedding_VD, bias_V, index_M


def _vocabulary(embedding_VD, axis_name):
  return len(embedding_VD) * (1 if axis_name is None else lax.axis_size(axis_name))


def _over_devices(stats, axis_name):
  """The statistics of the whole vocabulary from those of each device's rows."""
  if axis_name is None:
    return stats
  largest_M = lax.pmax(stats.lse, axis_name)
  sums_M, target_M, total_M = lax.psum(
      (jnp.exp(stats.lse - largest_M), stats.target, stats.total), axis_name)
  return tpu_kernels.Statistics(largest_M + jnp.log(sums_M), target_M, total_M, stats.is_best)


def _losses(options, stats, targets_M, vocabulary):
  """Float32 [M]; NaN for a target outside the vocabulary."""
  expected_M = stats.target
  if options.label_smoothing:
    expected_M += options.label_smoothing * (stats.total / vocabulary - expected_M)
  losses_M = stats.lse - expected_M + options.z_loss * jnp.square(stats.lse)
  return jnp.where((0 <= targets_M) & (targets_M < vocabulary), losses_M, jnp.nan)
