"""Which tokens may be drawn: each filter takes scores and gives -inf to those that it removes.

All take float32 `scores_BV`, at most 0 and 0 for the most probable token of a row, which always
stays, and one setting a row, whose neutral value removes nothing. Probabilities are those of
softmax(scores): of what earlier filters have left.
"""
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def top_k(scores_BV: Float[Array, 'B V'], k_B: Int[Array, ' B']) -> Float[Array, 'B V']:
  """Keeps the k most probable tokens; 0 keeps all."""
  k_B = jnp.where(k_B == 0, scores_BV.shape[1], k_B)
  ones_BV = jnp.ones_like(scores_BV)
  return _keep(scores_BV, nearest(-scores_BV, ones_BV, k_B.astype(jnp.float32)))


def top_p(scores_BV: Float[Array, 'B V'], p_B: Float[Array, ' B']) -> Float[Array, 'B V']:
  """Keeps the fewest most probable tokens whose probabilities reach p; 1 keeps all.

  Reference: nucleus sampling, arXiv:1904.09751, section 3.1.
  """
  return _keep(scores_BV, nearest(-scores_BV, jax.nn.softmax(scores_BV), p_B)
               | (p_B == 1)[:, None])


def nearest(distances_BV: Float[Array, 'B V'], weights_BV: Float[Array, 'B V'],
            least_B: Float[Array, ' B']) -> Bool[Array, 'B V']:
  """True for the fewest entries of least distance whose weights reach `least`.

  Of equal distances, which must have equal weights, the lower index comes first; the first entry
  always stays. Sorting 32,000 floats takes XLA:CPU 14 ms, twice the time of a small model's step.
  So the last distance that stays is found by bisection, exactly: the bits of floats that are not
  negative are ordered as integers are.

  Args:
    distances_BV: not negative; infinity for what counts for nothing.
  """
  least_B1 = least_B[:, None]
  # Of -0 only the magnitude counts.
  bits_BV = lax.bitcast_convert_type(jnp.abs(distances_BV), jnp.int32)

  def halve(_, bounds):
    low_B1, high_B1 = bounds
    middle_B1 = low_B1 + (high_B1 - low_B1) // 2
    sum_B1 = jnp.where(bits_BV <= middle_B1, weights_BV, 0).sum(-1, keepdims=True)
    enough_B1 = sum_B1 >= least_B1
    return jnp.where(enough_B1, low_B1, middle_B1 + 1), jnp.where(enough_B1, middle_B1, high_B1)

  infinity = 0x7f800000  # bits of float32 infinity: where rounding leaves the sum below, all stay
  low_B1 = jnp.zeros_like(bits_BV[:, :1])
  last_B1, _ = lax.fori_loop(0, 31, halve, (low_B1, jnp.full_like(low_B1, infinity)))
  tied_BV = bits_BV == last_B1
  before_B1 = jnp.where(bits_BV < last_B1, weights_BV, 0).sum(-1, keepdims=True)
  tied_before_BV = jnp.cumsum(tied_BV, axis=-1) - tied_BV
  return (bits_BV < last_B1) | (tied_BV & (before_B1 + tied_before_BV * weights_BV < least_B1))


def _keep(scores_BV, kept_BV):
  return jnp.where(kept_BV, scores_BV, -jnp.inf)
