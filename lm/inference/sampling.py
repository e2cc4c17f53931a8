"""The next token from the logits, by what each request asks: one program for all of them."""
from collections.abc import Sequence
import dataclasses
from typing import NamedTuple, Optional

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32
import numpy as np

from lm.inference import filters


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """What a request asks; the filters apply in the order temperature, top-k, top-p.

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


class Choices(NamedTuple):
  """What the requests of a batch ask, a row each: see `SamplingConfig` for the meaning."""
  temperature_B: Float[Array, ' B']
  top_k_B: Int[Array, ' B']  # 0: all
  top_p_B: Float[Array, ' B']  # 1: all


class SamplerState(NamedTuple):
  """What the choice of a row's next token remembers of its text.

  tokens_BS: the text: what the model has read, and what was chosen since.
  length_B: how many they are; behind them stands anything.
  prompt_B: how many of them were read.
  """
  tokens_BS: Int[Array, 'B S']
  length_B: Int[Array, ' B']
  prompt_B: Int[Array, ' B']


def choices(configs: Sequence[SamplingConfig], eos_id: int = -1) -> Choices:
  """What these requests ask, as arrays of numpy.

  Args:
    eos_id: the token that ends a text; -1 for none.
  """
  del eos_id
  column = lambda values, dtype: np.asarray(list(values), dtype)
  return Choices(
      temperature_B=column((c.temperature for c in configs), np.float32),
      top_k_B=column((min(c.top_k or 0, 2**24) for c in configs), np.int32),
      top_p_B=column((1 if c.top_p is None else c.top_p for c in configs), np.float32))


def begin(asked: Choices, inputs_BT: Int[Array, 'B T'], lengths_B: Int[Array, ' B'],
          num_places: int) -> SamplerState:
  """The state before the first token.

  Args:
    asked: of the same rows.
    inputs_BT: what the model has read, padded behind `lengths_B` tokens with anything. Of an
      encoder-decoder they are the decoder's.
    num_places: T and the most tokens that will be chosen.
  """
  del asked
  inputs_BT, lengths_B = jnp.asarray(inputs_BT), jnp.asarray(lengths_B)
  tokens_BS = jnp.pad(inputs_BT, ((0, 0), (0, num_places - inputs_BT.shape[1])))
  return SamplerState(tokens_BS, lengths_B, lengths_B)


def sample(logits_BV: Float[Array, 'B V'], keys_B: Key[Array, ' B'], asked: Choices,
           state: SamplerState, allowed_BW: UInt32[Array, 'B W'] | None = None
           ) -> tuple[Int[Array, ' B'], Float[Array, ' B'], SamplerState]:
  """Draws one token a row from softmax(logits / temperature), filtered and renormalised.

  Of equally probable tokens those of lower id count as the more probable, so that top_k=k keeps k
  tokens exactly; the most probable token always stays. What no row asks is not computed.

  Args:
    logits_BV: scores of the next token; computed in float32.
    keys_B: a row's token depends on its own key, not on the rows beside it.
    asked: traced, so that a program serves whatever is asked.
    state: from `begin`, then from the step before.
    allowed_BW: tokens that may follow, 32 a word, the lowest bit first; W = ceil(V / 32).

  Returns:
    tokens, int32; their log-probabilities under the model itself (temperature 1, nothing filtered),
    nats; the state with the tokens in it.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  scores_BV = logits_BV
  if allowed_BW is not None:
    scores_BV = jnp.where(_unpack(allowed_BW, logits_BV.shape[1]), scores_BV, -jnp.inf)
  token_B = jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)
  warm_B = asked.temperature_B > 0
  token_B = lax.cond(warm_B.any(), lambda: jnp.where(warm_B, _draw(scores_BV, keys_B, asked),
                                                     token_B), lambda: token_B)
  chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
  log_prob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
  rows_B = jnp.arange(len(token_B))
  tokens_BS = state.tokens_BS.at[rows_B, state.length_B].set(token_B, mode='drop')
  return token_B, log_prob_B, state._replace(tokens_BS=tokens_BS, length_B=state.length_B + 1)


def _unpack(words_BW, size):
  """Bits as booleans [B, size]."""
  bits_BWP = words_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
  return bits_BWP.reshape(len(words_BW), -1)[:, :size].astype(bool)


def _draw(scores_BV, keys_B, asked):
  """A token for each row by its temperature and filters; of rows of temperature 0, anything."""
  temperature_B1 = jnp.where(asked.temperature_B > 0, asked.temperature_B, 1)[:, None]
  # The largest becomes 0 first: a tiny temperature then gives -inf, never inf - inf.
  scores_BV = (scores_BV - scores_BV.max(-1, keepdims=True)) / temperature_B1
  for keep, setting_B, neutral in ((filters.top_k, asked.top_k_B, 0),
                                   (filters.top_p, asked.top_p_B, 1)):
    scores_BV = lax.cond((setting_B != neutral).any(), keep, lambda scores_BV, _: scores_BV,
                         scores_BV, setting_B)
  return jax.vmap(jax.random.categorical)(keys_B, scores_BV).astype(jnp.int32)
