"""The specification of `glu`."""
import functools

import jax
import jax.numpy as jnp

ACTIVATIONS = {'swiglu': jax.nn.silu, 'geglu': functools.partial(jax.nn.gelu, approximate=True),
               'geglu_exact': functools.partial(jax.nn.gelu, approximate=False)}


@functools.partial(jax.checkpoint, static_argnums=0)  # keeps its inputs alone for the backward pass
def glu(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
  """f(gate) * up, as `api.glu` writes it."""
  y = ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)
  return y.astype(gate.dtype)
