"""The attention kernels on a mesh: each device computes its rows and heads."""
import functools
import math
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp

from lm.parallel.rules import Rules, axes_of, per_device
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.flash_attention import flash_attention

# As `flash_attention`'s: None is the fastest that takes the case on the platform of the program.
Implementation = Optional[Literal['pallas', 'reference']]

_TOKENS, _CACHE = ('batch', None, 'heads', None), ('batch', 'heads', None, None)
_ROWS = ('batch', None)
_NAMES = {'query': _TOKENS, 'bias': ('batch', 'heads', None, None), 'prefix': _ROWS,
          'query_segment_ids': _ROWS, 'key_segment_ids': _ROWS, 'query_offset': ('batch',),
          'lengths': ('batch',), 'dropout_seeds': ('batch', 'heads'),
          'distance_bias': ('heads', None), 'relative_query': _TOKENS,
          'relative_key': (None, 'heads', None)}


def attend(rules: Rules, implementation: Implementation, **arguments: Any) -> jax.Array:
  """`flash_attention(**arguments)`; rows and heads are cut over the mesh, lengths are not."""
  return _call(functools.partial(flash_attention, implementation=implementation), rules, _TOKENS,
               arguments)


def attend_to_cache(rules: Rules, **arguments: Any) -> jax.Array:
  """`decode_attention(**arguments)`, cut in the same way."""
  return _call(decode_attention, rules, _CACHE, arguments)


def dropout(rate: float, rng: jax.Array | None, query_BTNH: jax.Array) -> dict[str, Any]:
  """The arguments of `attend` for dropout of its probabilities; none without a key."""
  if rng is None or rate == 0:
    return {}
  B, _, N, _ = query_BTNH.shape
  return {'dropout_rate': rate, 'dropout_seeds': jax.random.bits(rng, (B, N))}


def _call(kernel, rules, key_names, arguments):
  names = _NAMES | {'key': key_names, 'value': key_names}
  arrays = {name: x for name, x in arguments.items() if name in names and hasattr(x, 'shape')}
  kernel = functools.partial(kernel, **{name: x for name, x in arguments.items()
                                        if name not in arrays})
  if rules.mesh is not None:
    shards = math.prod(rules.mesh.shape[axis] for axis in axes_of(rules.heads))
    axis = key_names.index('heads')
    for name in ('key', 'value'):  # more devices than key-value heads share them
      heads = arrays[name].shape[axis]
      if 1 < heads < shards and shards % heads == 0 and arrays['query'].shape[2] % shards == 0:
        arrays[name] = jnp.repeat(arrays[name], shards // heads, axis)
  return per_device(kernel, rules, _TOKENS, names, **arrays)
