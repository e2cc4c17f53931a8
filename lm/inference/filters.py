"""Which tokens may be drawn: each filter takes scores and gives -inf to those that it removes.

All take float32 `scores_BV` with a finite one in every row, and one setting a row, whose neutral
value removes nothing. Probabilities are softmax(scores): of what earlier filters have left. At
least one token stays.
"""
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CANDIDATES = 64  # What most filters keep is fewer: these are found without passes over all scores.


def truncate(scores_BV: Float[Array, 'B V'], top_k_B: Int[Array, ' B'],
             top_p_B: Float[Array, ' B'], min_p_B: Float[Array, ' B'],
             typical_p_B: Float[Array, ' B']) -> Float[Array, 'B V']:
  """Filters that keep what is first in some order, one behind the other.

  Three steps of a loop, of which those that nobody asks for are left out at its ends: a search is
  half a second of compiling.

  Args:
    top_k_B: keep the k most probable tokens, of equals the lower ids; 0 keeps all.
    top_p_B: keep the fewest most probable tokens whose probabilities reach p; 1 keeps all.
      (Nucleus sampling, arXiv:1904.09751, section 3.1.)
    min_p_B: keep what is at least p times as probable as the most probable token; 0 keeps all.
      (arXiv:2407.01082, section 3.)
    typical_p_B: keep the fewest tokens whose probabilities reach p of those whose information is
      nearest to the entropy; 1 keeps all. The most probable token may go. (Locally typical
      sampling, arXiv:2202.00666, section 4.)
  """
  least_3B = jnp.stack([top_k_B.astype(jnp.float32), top_p_B, typical_p_B])
  neutral_3B = least_3B == jnp.array([[0], [1], [1]])
  asked_3 = (~neutral_3B).any(-1).at[1].max((min_p_B > 0).any())

  def step(i, scores_BV):
    below_BV = scores_BV.max(-1, keepdims=True) - scores_BV
    log_probs_BV = jax.nn.log_softmax(scores_BV)
    unusual_BV = jnp.abs(log_probs_BV + _entropy(log_probs_BV)[:, None])
    # A row without a filter wants nothing, or it would send those with one the slow way.
    kept_BV = nearest(jnp.where(i == 2, unusual_BV, below_BV),
                      jnp.where(i == 0, 1, jax.nn.softmax(scores_BV)),
                      jnp.where(neutral_3B[i], 0, least_3B[i]))
    kept_BV |= neutral_3B[i][:, None]
    kept_BV &= (i != 1) | (below_BV <= -jnp.log(min_p_B)[:, None])
    return jnp.where(kept_BV, scores_BV, -jnp.inf)

  first, end = jnp.argmax(asked_3), 3 - jnp.argmax(asked_3[::-1])
  return lax.fori_loop(first, jnp.where(asked_3.any(), end, first), step, scores_BV)


def eta(scores_BV: Float[Array, 'B V'], epsilon_B: Float[Array, ' B']) -> Float[Array, 'B V']:
  """Keeps what is more probable than min(epsilon, sqrt(epsilon) exp(-entropy)), and the most
  probable token; 0 keeps all.

  Reference: eta-sampling, arXiv:2210.15191, section 3.2.
  """
  log_probs_BV = jax.nn.log_softmax(scores_BV)
  eta_B = jnp.minimum(epsilon_B, jnp.sqrt(epsilon_B) * jnp.exp(-_entropy(log_probs_BV)))
  kept_BV = (log_probs_BV >= jnp.log(eta_B)[:, None]) | _is_best(scores_BV)
  return jnp.where(kept_BV, scores_BV, -jnp.inf)


def surprise(scores_BV: Float[Array, 'B V'], bits_B: Float[Array, ' B']) -> Float[Array, 'B V']:
  """Keeps what surprises by at most this many bits, -log2 p, and the most probable token; infinity
  keeps all.

  Reference: mirostat 2 (arXiv:2007.14966, algorithm 1, without the estimate of k).
  """
  bits_BV = -jax.nn.log_softmax(scores_BV) / jnp.log(2.0)
  kept_BV = (bits_BV <= bits_B[:, None]) | _is_best(scores_BV)
  return jnp.where(kept_BV, scores_BV, -jnp.inf)


def nearest(distances_BV: Float[Array, 'B V'], weights_BV: Float[Array, 'B V'],
            least_B: Float[Array, ' B']) -> Bool[Array, 'B V']:
  """True for the fewest entries of least distance whose weights reach `least`.

  Of equal distances the lower index comes first; the first entry always stays. Sorting 49,152
  floats takes XLA:CPU 8 ms, a small model's step. So the last entry that stays is looked for among
  the first candidates, and where they weigh too little by bisection, exactly: the bits of floats
  that are not negative are ordered as integers are.

  Args:
    distances_BV: not negative; infinity for what counts for nothing.
    weights_BV: equal where distances are, but for rounding.
  """
  num = min(CANDIDATES, distances_BV.shape[1])
  near_BP, index_BP = lax.top_k(-distances_BV, num)
  near_BP, near_weights_BP = -near_BP, jnp.take_along_axis(weights_BV, index_BP, axis=1)
  place_B1 = (running_sums(near_weights_BP) < least_B[:, None]).sum(1, keepdims=True)
  found_B1 = place_B1 < num
  near_B1 = jnp.take_along_axis(near_BP, jnp.minimum(place_B1, num - 1), axis=1)
  ties_B1 = _kept_ties(near_BP, near_weights_BP, near_B1, least_B)
  # Candidates stand in the order of distances, then of indices.
  last_B1 = (near_BP < near_B1).sum(-1, keepdims=True) + ties_B1 - 1
  quick = near_B1, jnp.take_along_axis(index_BP, last_B1, axis=1)
  slow = lax.cond(found_B1.all(), lambda: quick, lambda: _bisect(distances_BV, weights_BV, least_B))
  # Whether others need the slow way must not change what a row keeps, not by a rounding.
  last_B1, index_B1 = (jnp.where(found_B1, *both) for both in zip(quick, slow))
  indices_V = jnp.arange(distances_BV.shape[1])
  return (distances_BV < last_B1) | ((distances_BV == last_B1) & (indices_V <= index_B1))


def _bisect(distances_BV, weights_BV, least_B):
  """The distance and the index [B, 1] of the last entry that `nearest` keeps; all, where their
  weights do not reach `least`."""
  bits_BV = lax.bitcast_convert_type(jnp.abs(distances_BV), jnp.int32)  # abs: -0 has another bit
  infinity = 0x7f800000  # bits of float32 infinity
  last_B1 = _first(infinity, lambda bits_B1: least_B[:, None] <= jnp.where(
      bits_BV <= bits_B1, weights_BV, 0).sum(-1, keepdims=True), len(bits_BV))
  last_B1 = lax.bitcast_convert_type(last_B1, jnp.float32)
  ties_B1 = _kept_ties(distances_BV, weights_BV, last_B1, least_B)
  tied_BV, indices_V = distances_BV == last_B1, jnp.arange(bits_BV.shape[1])
  index_B1 = _first(len(indices_V) - 1, lambda index_B1: ties_B1 <= (
      tied_BV & (indices_V <= index_B1)).sum(-1, keepdims=True), len(bits_BV))
  return last_B1, index_B1


def _first(largest, holds, num_rows):
  """The least integer [B, 1] from 0 to `largest` at which what is monotone holds, or the largest.
  """
  def halve(_, bounds):
    low_B1, high_B1 = bounds
    middle_B1 = low_B1 + (high_B1 - low_B1) // 2
    holds_B1 = holds(middle_B1)
    return jnp.where(holds_B1, low_B1, middle_B1 + 1), jnp.where(holds_B1, middle_B1, high_B1)

  low_B1 = jnp.zeros((num_rows, 1), jnp.int32)
  bounds = low_B1, jnp.full_like(low_B1, largest)
  return lax.fori_loop(0, largest.bit_length(), halve, bounds)[1]


def _kept_ties(distances_BP, weights_BP, last_B1, least_B):
  """How many entries [B, 1] at the last distance stay: as many as the weights want, at least one.
  """
  is_tied_BP = distances_BP == last_B1
  missing_B1 = least_B[:, None] - jnp.where(distances_BP < last_B1, weights_BP, 0).sum(
      -1, keepdims=True)
  each_B1 = jnp.where(is_tied_BP, weights_BP, 0).max(-1, keepdims=True)
  most_B1 = is_tied_BP.sum(-1, keepdims=True)
  wanted_B1 = jnp.ceil(jnp.minimum(missing_B1 / each_B1, most_B1)).astype(jnp.int32)
  return jnp.clip(wanted_B1, 1, most_B1)


def running_sums(x_BP: Float[Array, 'B P']) -> Float[Array, 'B P']:
  """Sums of the first 1, 2, ... entries; for few entries faster than `cumsum`, also to compile."""
  places_P = jnp.arange(x_BP.shape[1])
  return jnp.where(places_P <= places_P[:, None], x_BP[:, None], 0).sum(-1)


def _is_best(scores_BV):
  return scores_BV == scores_BV.max(-1, keepdims=True)


def _entropy(log_probs_BV):
  """Nats."""
  probs_BV = jnp.exp(log_probs_BV)
  return -jnp.where(probs_BV > 0, probs_BV * log_probs_BV, 0).sum(-1)
