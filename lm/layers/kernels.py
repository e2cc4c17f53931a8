"""The kernels of attention and of the loss on a mesh: each device computes its rows and heads, and
its part of the length."""
import functools
import math
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp

from lm.errors import UserError
from lm.parallel import gather
from lm.parallel.ring import Ring, ring_attention
from lm.parallel.rules import axes_of, per_device, Rules
from pallas_kernels import cross_entropy as kernels
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.dropout import Draws
from pallas_kernels.flash_attention import flash_attention

# As `flash_attention`'s: None is the fastest that takes the case on the platform of the program.
Implementation = Optional[Literal['pallas', 'reference']]

_TOKENS, _CACHE = ('batch', 'length', 'heads', None), ('batch', 'heads', None, None)
_ROWS = ('batch', 'length')
_NAMES = {'query': _TOKENS, 'bias': ('batch', 'heads', None, None), 'prefix': _ROWS,
          'query_segment_ids': _ROWS, 'key_segment_ids': _ROWS, 'query_offset': ('batch',),
          'lengths': ('batch',), 'page_table': ('batch', None), 'dropout_seeds': ('batch', 'heads'),
          'distance_bias': ('heads', None), 'relative_query': _TOKENS,
          'relative_key': (None, 'heads', None)}
_HEAD = ('vocab', 'embed')
_SCORES = {'hidden': (*_ROWS, None), 'targets': _ROWS, 'loss_weights': _ROWS,
           'embedding': ('vocab', None), 'bias': ('vocab',)}


def attend(rules: Rules, implementation: Implementation, zigzag: bool = False, **arguments: Any
           ) -> Any:
  """`flash_attention(**arguments)`; rows and heads are cut over the mesh and, where the devices
  divide them, lengths: then queries meet the keys of other devices as `rules.attention` says.

  Args:
    zigzag: whether rows are in the order of `lm.parallel.ring.zigzag`.

  Raises:
    UserError: an all-to-all of heads that do not divide over the devices, or the log-sum-exp is
      wanted of rows that are cut.
  """
  lengths = arguments['query'].shape[1], arguments['key'].shape[1]
  shards, axes = rules.shards('length'), axes_of(rules.length)
  is_cut = (shards > 1 and not any(length % shards for length in lengths)
            and not hasattr(arguments.get('query_offset'), 'shape')
            and arguments.get('bias') is None)
  kernel = functools.partial(flash_attention, implementation=implementation)
  if not is_cut:
    return _call(kernel, rules, _TOKENS, arguments, cuts_length=False)
  if arguments.get('return_lse'):
    raise UserError(f'learnt keys (PrefixTuning, PromptTuning) need whole rows, and mesh axis '
                    f'{", ".join(axes)} cuts them over {shards} devices; set Rules.length=None and '
                    'Rules.act_length=None, or take LoRA')
  arrays, static = _split(arguments)
  if rules.attention == 'all_to_all':
    kernel = functools.partial(_all_to_all, axes, shards, functools.partial(kernel, **static))
  else:
    options = tuple((name, static[name]) for name in ('scale', 'softcap', 'dropout_rate')
                    if name in static)
    ring = Ring(axes, shards, zigzag, static.get('causal', True), static.get('window'),
                static.get('query_offset') or 0, (*options, ('implementation', implementation)))
    kernel = functools.partial(ring_attention, ring)
  return _call(kernel, rules, _TOKENS, arrays)


def attend_to_cache(rules: Rules, **arguments: Any) -> jax.Array:
  """`decode_attention(**arguments)`; rows and heads are cut over the mesh, of a pool of pages only
  heads."""
  cache = _CACHE if arguments.get('page_table') is None else (None, *_CACHE[1:])
  return _call(decode_attention, rules, cache, arguments, cuts_length=False)


def cross_entropy(rules: Rules, **arguments: Any) -> jax.Array:
  """`cross_entropy(**arguments)` of `pallas_kernels`: each device sums the losses of its own tokens
  and, where the rules cut the vocabulary, has its part of each block of logits. Devices that share
  the head gather it once, and sum the gradient of their own tokens before any other's."""
  arrays, options = _split(arguments)
  losses = functools.partial(kernels.cross_entropy, axis_name=_vocabulary(rules, arrays), **options)
  is_gathered = gather.is_gathered(rules, _HEAD)
  if is_gathered:
    losses = functools.partial(_of_gathered_head, losses, rules)
  names = _SCORES | {'embedding': _HEAD} if is_gathered else _SCORES
  part = lambda **arrays: losses(**arrays)[None, None]
  return per_device(part, rules, _ROWS, names, **arrays).sum()


def _of_gathered_head(losses, rules, *, targets, loss_weights, **arrays):
  """`losses` on one device, of its part of the head. Like the gradient itself, which `losses`
  computes in the forward pass, the head's is scattered there, before anything else goes on: all of
  it, [V, D] in float32, does not outlive the loss."""
  def total(arrays):
    head = gather.all_gather(rules, _HEAD, arrays['hidden'].dtype, arrays['embedding'])
    return losses(**arrays | {'embedding': head}, targets=targets, loss_weights=loss_weights)

  def forward(arrays):
    loss, vjp = jax.vjp(total, arrays)
    return loss, jax.lax.optimization_barrier(vjp(jnp.ones_like(loss))[0])

  def backward(gradients, g):
    return (jax.tree.map(lambda x: (x * g).astype(x.dtype), gradients),)

  scored = jax.custom_vjp(total)
  scored.defvjp(forward, backward)
  return scored(arrays)


def token_losses(rules: Rules, **arguments: Any) -> tuple[jax.Array, jax.Array]:
  """`token_losses(**arguments)` of `pallas_kernels`, cut in the same way."""
  arrays, options = _split(arguments)
  losses = functools.partial(kernels.token_losses, axis_name=_vocabulary(rules, arrays), **options)
  part = lambda **arrays: jnp.stack([x.astype(jnp.float32) for x in losses(**arrays)], -1)
  found = per_device(part, rules, (*_ROWS, None), _SCORES, **arrays)
  return found[..., 0], found[..., 1] > 0


def _vocabulary(rules, arrays):
  """The mesh axes that cut the vocabulary, if any do."""
  shards = rules.shards('vocab')
  return axes_of(rules.vocab) if shards > 1 and not len(arrays['embedding']) % shards else None


def _split(arguments):
  """What is an array, and what is not."""
  arrays = {name: x for name, x in arguments.items() if hasattr(x, 'shape')}
  return arrays, {name: x for name, x in arguments.items() if name not in arrays}


def _all_to_all(axes, shards, kernel, **arrays):
  """Attention of some heads over whole rows, between two exchanges (Ulysses, arXiv:2309.14509,
  section 3.1): each device gives parts of the rows for parts of the heads, and back."""
  N = arrays['query'].shape[2]
  if N % shards:
    raise UserError(f'an all-to-all divides the {N} query heads of a device over {shards} devices '
                    f'of mesh axis {", ".join(axes)}, and {N} does not divide; take '
                    "Rules.attention='ring', or fewer devices")
  index = jax.lax.axis_index(axes)

  def own(x, axis):
    size = x.shape[axis] // shards
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)

  def rows(x):  # more devices than key-value heads share them
    x = jnp.repeat(x, math.lcm(x.shape[2], shards) // x.shape[2], 2)
    return jax.lax.all_to_all(x, axes, 2, 1, tiled=True)

  def move(name, x):
    names = _NAMES.get(name, _TOKENS)
    if names == _ROWS:
      return jax.lax.all_gather(x, axes, axis=1, tiled=True)
    return rows(x) if names == _TOKENS else own(x, names.index('heads'))

  out = kernel(**{name: move(name, x) for name, x in arrays.items()})
  return jax.lax.all_to_all(out, axes, 1, 2, tiled=True)


def dropout(rate: float, draws: Draws | None, query_BTNH: jax.Array) -> dict[str, Any]:
  """The arguments of `attend` for dropout of its probabilities; none without draws."""
  if draws is None or rate == 0:
    return {}
  return {'dropout_rate': rate, 'dropout_seeds': draws.each(query_BTNH.shape[2])}


def _call(kernel, rules, key_names, arguments, cuts_length=True):
  names = _NAMES | {'key': key_names, 'value': key_names, 'key_scale': key_names[:3],
                    'value_scale': key_names[:3]}
  if not cuts_length:
    whole = lambda axes: tuple(None if name == 'length' else name for name in axes)
    names = {name: whole(axes) for name, axes in names.items()}
  arrays = {name: x for name, x in arguments.items() if name in names and hasattr(x, 'shape')}
  kernel = functools.partial(kernel, **{name: x for name, x in arguments.items()
                                        if name not in arrays})
  shards, axis = rules.shards('heads'), key_names.index('heads')
  for name in arrays.keys() & {'key', 'value', 'key_scale', 'value_scale'}:
    heads = arrays[name].shape[axis]  # more devices than key-value heads share them
    if 1 < heads < shards and shards % heads == 0 and arrays['query'].shape[2] % shards == 0:
      arrays[name] = jnp.repeat(arrays[name], shards // heads, axis)
  out_names = names['query']
  if arguments.get('return_lse'):
    return per_device(lambda **arrays: list(kernel(**arrays)), rules,
                      [out_names, ('batch', 'heads', None)], names, **arrays)
  return per_device(kernel, rules, out_names, names, **arrays)
