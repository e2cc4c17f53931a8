"""What the inputs of a linear layer are like, as the gradient of leaves beside its kernel.

`lm/compression/calibration.py` puts a `seen` there. Nothing that the layer gives depends on it; its
gradient is not a derivative but what its names ask for, so that scans, layers and modules bring it
to where it belongs as they bring any gradient. K: inputs.
"""
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Seen = Mapping[str, jax.Array]


@jax.custom_vjp
def observed(y: Float[Array, '*rows N'], x: Float[Array, '*rows K'], seen: Seen
             ) -> Float[Array, '*rows N']:
  """y, unchanged. Of the rows x of whose y the loss depends (so padding has no part), the gradient
  of `seen` is

  count []: how many there are;  magnitudes, squares [K]: their sums of |x_k| and of x_k^2;
  largest [K]: the largest |x_k|;  moments [K, K]: their sum of x^T x;
  curvature [K, K]: the same, x weighing the mean square of the loss' gradient at the outputs y:
  where the outputs move by d, the loss moves by about |g . d| (arXiv:2505.07004, equation 5, with
  all outputs as one group).
  """
  del x, seen
  return y


def _backward(saved, g):
  x, seen = saved
  counts = (g != 0).any(-1, keepdims=True)
  x_RK = jnp.where(counts, x, 0).astype(jnp.float32).reshape(-1, x.shape[-1])
  weights_R1 = jnp.square(g.astype(jnp.float32)).mean(-1, keepdims=True).reshape(-1, 1)
  found = {'count': lambda: counts.sum(dtype=jnp.float32),
           'magnitudes': lambda: jnp.abs(x_RK).sum(0),
           'squares': lambda: jnp.square(x_RK).sum(0),
           'largest': lambda: jnp.abs(x_RK).max(0),
           'moments': lambda: jnp.matmul(x_RK.T, x_RK, precision='highest'),
           'curvature': lambda: jnp.matmul((x_RK * weights_R1).T, x_RK, precision='highest')}
  return g, jnp.zeros_like(x), {name: found[name]() for name in seen}


observed.defvjp(lambda y, x, seen: (y, (x, seen)), _backward)
