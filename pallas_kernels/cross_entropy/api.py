"""Cross entropy of a linear head, whose logits exist only one block of tokens at a time."""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.cross_entropy import blocks, gpu, reference, tpu
from pallas_kernels.cross_entropy.reference import Options
from pallas_kernels.matmul import cpu

_KERNELS = {'tpu': tpu, 'gpu': gpu}


def cross_entropy(hidden: jax.Array, embedding: jax.Array, targets: jax.Array,
                  loss_weights: jax.Array, *, bias: jax.Array | None = None,
                  softcap: float | None = None, z_loss: float = 0.0, label_smoothing: float = 0.0,
                  implementation: str | None = None,
                  axis_name: str | tuple[str, ...] | None = None) -> jax.Array:
  """Sums weight * loss over tokens, with logits[v] = hidden . embedding[v] + bias[v] and

    loss = lse - (1 - label_smoothing) * logits[target] - label_smoothing * mean_v(logits[v])
           + z_loss * lse^2,   where lse = logsumexp_v(logits[v]).

  Exact, in float32, without a [B, T, V] array in either pass: since nothing follows a loss, its
  gradient is computed in the forward pass and only scaled in the backward pass (as in Liger Kernel,
  arXiv:2410.10989, section 3.2). XLA's form does so beside each block of logits, by three products
  of B * T * D * V; the kernels have no place for a block's whole vocabulary, and compute the logits
  twice.

  Args:
    hidden: [B, T, D], bfloat16 or float32: the last layer's output.
    embedding: [V, D], the head, cast to the dtype of `hidden`.
    targets: int32 [B, T], each in [0, V).
    loss_weights: float32 [B, T]; tokens of weight 0 do not count. They are data: their gradient is
      not computed, it is zero.
    bias: [V], with a gradient; None is 0.
    softcap: bends the logits into (-softcap, softcap), softcap * tanh(logits / softcap) (Gemma 2,
      arXiv:2408.00118, section 2). None leaves them.
    z_loss: what a squared log-sum-exp costs, so that logits do not drift (PaLM, arXiv:2204.02311,
      section 5, has 1e-4).
    label_smoothing: share of the target's probability that all V tokens divide evenly
      (arXiv:1512.00567, section 7).
    implementation: None, 'reference' (all logits at once), 'blocks' (of tokens, for XLA), 'tpu' or
      'gpu' (Pallas kernels over blocks of the vocabulary, whose logits never leave VMEM or
      registers; interpreted on any other platform. 'gpu' writes their gradient, 64 MiB of it at a
      time). The compiler does not cut a kernel over devices, so on a mesh they belong inside
      `jax.shard_map`, and None is 'blocks'.
    axis_name: inside `jax.shard_map(..., check_vma=False)`, the mesh axis whose devices have equal
      parts of the vocabulary, in order: rows of `embedding` and `bias`. `targets` and the loss are
      those of the whole vocabulary. None is then 'tpu' on a TPU, where it takes the arrays, and
      else 'blocks'.

  Returns:
    The float32 sum of losses in nats; divide by the sum of the weights for the mean.

  Raises:
    ValueError: shapes that do not fit, or an option out of its range.
    NotImplementedError: the named implementation does not take this case.
  """
  if hidden.shape[:2] != targets.shape or targets.shape != loss_weights.shape:
    raise ValueError(f'hidden {hidden.shape}, targets {targets.shape} and loss_weights '
                     f'{loss_weights.shape} must be [B, T, D], [B, T] and [B, T]')
  if not 0 <= label_smoothing < 1:
    raise ValueError(f'label_smoothing={label_smoothing} must be in [0, 1)')
  if z_loss < 0:
    raise ValueError(f'z_loss={z_loss} must not be negative')
  _check_head(hidden, embedding, bias, softcap)
  options, args = Options(softcap, z_loss, label_smoothing), (hidden, embedding, bias, targets,
                                                              loss_weights)
  at_once = functools.partial(reference.cross_entropy, options, axis_name=axis_name)
  if implementation == 'reference':
    return at_once(*args)
  refusal = _refusal(implementation, options, hidden, embedding)
  form = lambda name: functools.partial(_cross_entropy, options, name, axis_name)
  if implementation is None and axis_name is not None and not refusal:
    return platform.by_platform(form('blocks'), form('blocks'), *args, tpu=form('tpu'))
  return form(implementation or 'blocks')(*args)


def token_losses(hidden: jax.Array, embedding: jax.Array, targets: jax.Array, *,
                 bias: jax.Array | None = None, softcap: float | None = None,
                 implementation: str | None = None,
                 axis_name: str | tuple[str, ...] | None = None
                 ) -> tuple[jax.Array, jax.Array]:
  """Scores tokens one by one, by the losses of `cross_entropy`; not to be differentiated.

  Args:
    implementation: None, 'blocks', 'tpu' or 'gpu'; this and the others are as in `cross_entropy`,
      but with an `axis_name` the kernels are refused.

  Returns:
    losses, float32 [B, T] in nats, and whether each target is the most likely token, boolean
    [B, T]; of equal logits the first one is.

  Raises:
    ValueError: shapes that do not fit, or a softcap that is not positive.
    NotImplementedError: the named implementation does not take this case.
  """
  _check_head(hidden, embedding, bias, softcap)
  options = Options(softcap)
  _refusal(implementation, options, hidden, embedding)
  if implementation in _KERNELS and axis_name is not None:
    raise NotImplementedError(f'{implementation} scores tokens of a whole vocabulary, and axis_name'
                              f"={axis_name} cuts it; take 'blocks'")
  return _token_losses(options, implementation or 'blocks', axis_name, hidden, embedding, bias,
                       targets, wants_best=True)


def _refusal(implementation, options, hidden, embedding) -> str | None:
  """Why the kernels that are named, or else the TPU's, do not take these arrays, or None; raised
  where they are asked for by name."""
  if implementation not in (None, 'blocks', *_KERNELS):
    raise ValueError(f"implementation={implementation!r} must be None, 'reference', 'blocks', "
                     "'tpu' or 'gpu'")
  refusal = _KERNELS.get(implementation, tpu).refusal(options, hidden, embedding)
  if refusal and implementation in _KERNELS:
    raise NotImplementedError(refusal)
  return refusal


def _check_head(hidden, embedding, bias, softcap):
  if embedding.shape[1:] != hidden.shape[2:]:
    raise ValueError(f'embedding {embedding.shape} must be [V, D] for hidden {hidden.shape}, '
                     '[B, T, D]')
  if bias is not None and bias.shape != embedding.shape[:1]:
    raise ValueError(f'bias has shape {bias.shape}, it must be {embedding.shape[:1]}: one for each '
                     f'row of embedding {embedding.shape}')
  if softcap is not None and softcap <= 0:
    raise ValueError(f'softcap={softcap} must be positive, or None for uncapped logits')


def _scan(body, start, hidden, embedding, bias, targets, loss_weights):
  """Scans `body` over blocks of tokens, cut along T so that B stays sharded as it is."""
  B, T = targets.shape
  number = blocks.number(*hidden.shape, embedding.shape[0])
  length = -(-T // number)

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, -T % number)) + ((0, 0),) * (x.ndim - 2))  # padding weighs 0
    x = x.reshape(B, number, length, *x.shape[2:]).swapaxes(0, 1)
    return x.reshape(number, B * length, *x.shape[3:])

  def join(x):
    x = x.reshape(number, B, length, x.shape[-1]).swapaxes(0, 1)
    return x.reshape(B, -1, x.shape[-1])[:, :T]

  body = functools.partial(body, blocks.Head(embedding.astype(hidden.dtype), bias))
  carry, tokens = jax.lax.scan(body, start, (cut(hidden), cut(targets), cut(loss_weights)))
  return carry, jax.tree.map(join, tokens)


def _by_platform(implementation, in_blocks, kernel, *args):
  """Calls `in_blocks(products, *args)` or, as `implementation` says, `kernel(module, *args)`."""
  if implementation in _KERNELS:
    return kernel(_KERNELS[implementation], *args)
  on_cpu = plain = functools.partial(in_blocks, blocks.PLAIN)
  if args[0].dtype == jnp.bfloat16 and platform.cpu_has_bfloat16_units():
    on_cpu = functools.partial(in_blocks, blocks.MATRIX_UNIT)
  return platform.by_platform(on_cpu, plain, *args, tpu=functools.partial(in_blocks, blocks.TPU))


def _token_losses(options, implementation, axis_name, hidden, embedding, bias, targets,
                  wants_best=False):
  def in_blocks(products, *args):
    body = functools.partial(blocks.losses, options, products, axis_name)
    _, tokens = _scan(body, None, *args, jnp.zeros(targets.shape, jnp.float32))
    return jax.tree.map(lambda x_BT1: x_BT1[..., 0], tokens)

  kernel = lambda module, *args: module.losses(options, *args, axis_name=axis_name,
                                               wants_best=wants_best)
  return _by_platform(implementation, in_blocks, kernel, hidden, embedding, bias, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _cross_entropy(options, implementation, axis_name, *args):
  *head, loss_weights = args
  return jnp.vdot(_token_losses(options, implementation, axis_name, *head)[0], loss_weights)


def loss_and_gradients(options, implementation, axis_name, *args):
  """Returns the loss and the gradients of hidden, embedding and bias, of equal order in `args`."""
  def in_blocks(products, hidden, embedding, bias, targets, loss_weights):
    is_only = blocks.number(*hidden.shape, embedding.shape[0]) == 1
    is_transposed = products.t_dot is None and not is_only
    shape = embedding.T.shape if is_transposed else embedding.shape
    start = (jnp.float32(0), jnp.zeros(shape, jnp.float32),
             None if bias is None else jnp.zeros(bias.shape, jnp.float32))
    body = functools.partial(blocks.loss_and_gradients, options, products, axis_name,
                             is_only=is_only)
    (total, dembedding, dbias), dhidden = _scan(body, start, hidden, embedding, bias, targets,
                                                loss_weights)
    if is_transposed:
      dembedding = platform.by_platform(cpu.transpose_apart, jnp.transpose, dembedding)
    dembedding = dembedding.astype(embedding.dtype)
    return total, dhidden, dembedding, None if bias is None else dbias.astype(bias.dtype)

  kernel = lambda module, *args: module.loss_and_gradients(options, *args, axis_name=axis_name)
  return _by_platform(implementation, in_blocks, kernel, *args)


def _forward(options, implementation, axis_name, *args):
  total, *gradients = loss_and_gradients(options, implementation, axis_name, *args)
  return total, (gradients, args[3])


def _backward(options, implementation, axis_name, residuals, g):
  del options, implementation
  if axis_name is not None:  # the loss of each device is a sum over all
    g = jax.lax.psum(g, axis_name)
  gradients, targets = residuals
  scaled = jax.tree.map(lambda x: (x * g).astype(x.dtype), gradients)
  return (*scaled, jnp.zeros(targets.shape, jax.dtypes.float0),
          jnp.zeros(targets.shape, jnp.float32))


_cross_entropy.defvjp(_forward, _backward)
