"""The next token from the logits: greedy, temperature, top-k, top-p."""
import dataclasses
from typing import Optional

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How tokens are chosen; the filters apply in the order temperature, top-k, top-p.

  temperature: logits are divided by it; 0 takes the most probable token.
  top_k: keep the k most probable tokens; None keeps all.
  top_p: keep the fewest most probable tokens whose probabilities reach p (nucleus sampling,
    arXiv:1904.09751, section 3.1); None or 1 keeps all.
  max_new_tokens: the longest completion, in tokens.
  """
  temperature: float = 0.8
  top_k: Optional[int] = None
  top_p: Optional[float] = None
  max_new_tokens: int = 128

  def __post_init__(self):
    if not 0 <= self.temperature < float('inf'):
      raise ValueError(f'temperature={self.temperature} must be 0 (greedy) or more; try 0.8')
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(f'top_k={self.top_k} must be at least 1; set None to keep all tokens')
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ValueError(f'top_p={self.top_p} must be in (0, 1]; set None to keep all tokens')
    if self.max_new_tokens < 1:
      raise ValueError(f'max_new_tokens={self.max_new_tokens} must be at least 1; nothing else is '
                       'generated')


def sample(logits_BV: Float[Array, 'B V'], rng: Key[Array, ''] | Key[Array, 'B'],
           config: SamplingConfig) -> Int[Array, 'B']:
  """Draws one token a row from softmax(logits / temperature), filtered and renormalised.

  Of equally probable tokens those of lower id count as the more probable, so that top_k=k keeps k
  tokens exactly; the most probable token always stays.

  Args:
    logits_BV: scores of the next token; computed in float32.
    rng: a key, or a key for each row: then a row's token does not depend on the rows beside it.
    config: static under jit.

  Returns:
    int32 [B].
  """
  logits_BV = logits_BV.astype(jnp.float32)
  if config.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  keys_B = jax.random.split(rng, logits_BV.shape[0]) if rng.ndim == 0 else rng
  # The largest becomes 0 first: a tiny temperature then gives -inf, never inf - inf.
  scores_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / config.temperature
  draw = jax.vmap(jax.random.categorical)
  top_p = None if config.top_p == 1 else config.top_p
  if config.top_k is None or config.top_k >= scores_BV.shape[1]:
    if top_p is not None:
      scores_BV = jnp.where(_nucleus(scores_BV, top_p), scores_BV, -jnp.inf)
    return draw(keys_B, scores_BV).astype(jnp.int32)
  scores_BP, tokens_BP = lax.top_k(scores_BV, config.top_k)
  if top_p is not None:
    probs_BP = jax.nn.softmax(scores_BP)
    before_BP = jnp.cumsum(probs_BP[:, :-1], axis=-1)
    scores_BP = scores_BP.at[:, 1:].set(jnp.where(before_BP < top_p, scores_BP[:, 1:], -jnp.inf))
  choice_B1 = draw(keys_B, scores_BP)[:, None]
  return jnp.take_along_axis(tokens_BP, choice_B1, axis=1)[:, 0].astype(jnp.int32)


def _nucleus(scores_BV: Float[Array, 'B V'], top_p: float) -> Bool[Array, 'B V']:
  """True for the tokens that stay: those before which less than `top_p` of the probability stands.

  Sorting 32,000 floats takes XLA:CPU 14 ms, twice the time of a small model's step. So the last
  score that stays is found by bisection, exactly: distances from the largest score are non-negative
  floats, whose bits are ordered as integers are.

  Args:
    scores_BV: at most 0, and 0 for the largest of each row.
    top_p: below 1.
  """
  probs_BV = jax.nn.softmax(scores_BV)
  bits_BV = lax.bitcast_convert_type(jnp.abs(scores_BV), jnp.int32)

  def halve(_, bounds):
    low_B1, high_B1 = bounds
    middle_B1 = low_B1 + (high_B1 - low_B1) // 2
    mass_B1 = jnp.where(bits_BV <= middle_B1, probs_BV, 0).sum(-1, keepdims=True)
    enough_B1 = mass_B1 >= top_p
    return jnp.where(enough_B1, low_B1, middle_B1 + 1), jnp.where(enough_B1, middle_B1, high_B1)

  infinity = 0x7f800000  # bits of float32 infinity: where rounding leaves the sum below p, all stay
  low_B1 = jnp.zeros_like(bits_BV[:, :1])
  last_B1, _ = lax.fori_loop(0, 31, halve, (low_B1, jnp.full_like(low_B1, infinity)))
  tied_BV = bits_BV == last_B1
  above_B1 = jnp.where(bits_BV < last_B1, probs_BV, 0).sum(-1, keepdims=True)
  tied_before_BV = jnp.cumsum(tied_BV, axis=-1) - tied_BV
  return (bits_BV < last_B1) | (tied_BV & (above_B1 + tied_before_BV * probs_BV < top_p))
