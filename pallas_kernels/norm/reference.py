"""The specification of `norm`."""
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Options(NamedTuple):
  """What a program is compiled for: `norm`'s arguments of these names."""
  kind: str
  epsilon: float


def norm(options, x, residual, scale_D, bias_D):
  """(y, x + residual) as `api.norm` writes them; the sum is None without residual."""
  total = None if residual is None else x + residual
  y = (x if total is None else total).astype(jnp.float32)
  if options.kind == 'layernorm':
    y -= y.mean(-1, keepdims=True)
  y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + options.epsilon) * scale_D
  if bias_D is not None:
    y += bias_D
  return y.astype(x.dtype), total
