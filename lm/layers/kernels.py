"""The attention kernels on a mesh: each device computes its rows and heads."""
import functools
import math
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp

from lm.parallel.rules import Rules, axes_of, per_device
from pallas_kernels.flash_attention import decode_attention, flash_attention

# As `flash_attention`'s: None is the fastest that takes the case on the platform of the program.
Implementation = Optional[Literal['pallas', 'reference']]

_TOKENS, _CACHE = ('batch', None, 'heads', None), ('batch', 'heads', None, None)
_ROWS = ('batch', None)
_NAMES = {'query': _TOKENS, 'bias': ('batch', 'heads', None, None), 'prefix': _ROWS,
          'query_segment_ids': _ROWS, 'key_segment_ids': _ROWS, 'query_offset': ('batch',),
          'lengths': ('batch',)}


def attend(rules: Rules, implementation: Implementation, *, query: jax.Array, key: jax.Array,
           value: jax.Array, causal: bool = True, window: int | None = None,
           scale: float | None = None, softcap: float | None = None, **arrays: jax.Array | None
           ) -> jax.Array:
  """`flash_attention` with its arguments; rows and heads are cut over the mesh, lengths are not."""
  kernel = functools.partial(flash_attention, causal=causal, window=window, scale=scale,
                             softcap=softcap, implementation=implementation)
  return _call(kernel, rules, _TOKENS, query=query, key=key, value=value, **arrays)


def attend_to_cache(rules: Rules, *, query: jax.Array, key: jax.Array, value: jax.Array,
                    lengths: jax.Array, window: int | None = None, scale: float | None = None,
                    softcap: float | None = None, **arrays: jax.Array | None) -> jax.Array:
  """`decode_attention` with its arguments, cut in the same way."""
  kernel = functools.partial(decode_attention, window=window, scale=scale, softcap=softcap)
  return _call(kernel, rules, _CACHE, query=query, key=key, value=value, lengths=lengths, **arrays)


def _call(kernel, rules, key_names, **arrays: Any):
  arrays = {name: x for name, x in arrays.items() if x is not None}
  if rules.mesh is not None:
    shards = math.prod(rules.mesh.shape[axis] for axis in axes_of(rules.heads))
    axis = key_names.index('heads')
    for name in ('key', 'value'):  # more devices than key-value heads share them
      heads = arrays[name].shape[axis]
      if 1 < heads < shards and shards % heads == 0 and arrays['query'].shape[2] % shards == 0:
        arrays[name] = jnp.repeat(arrays[name], shards // heads, axis)
  return per_device(kernel, rules, _TOKENS, _NAMES | {'key': key_names, 'value': key_names},
                    **arrays)
