"""What a row's text so far does to the scores of its next token.

All take float32 `scores_BV`, the text `tokens_BS` of which `length_B` tokens count, and settings a
row, whose neutral value changes nothing. They are computed from the text at every step: tables of
counts would be V numbers a row.
"""
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NOBODY = -1  # In place of a token: any, or none at all.


def repetition(scores_BV: Float[Array, 'B V'], tokens_BS: Int[Array, 'B S'],
               length_B: Int[Array, ' B'], penalty_B: Float[Array, ' B']) -> Float[Array, 'B V']:
  """Divides positive scores of tokens that the text has by the penalty, and multiplies negative
  ones; 1 changes nothing.

  Reference: CTRL, arXiv:1909.05858, section 4.1, for negative scores as transformers does it.
  """
  rows_B1, B = jnp.arange(len(tokens_BS))[:, None], len(tokens_BS)
  present_BV = jnp.zeros(scores_BV.shape, bool).at[
      rows_B1, _counting(tokens_BS, jnp.zeros(B, int), length_B, scores_BV)].set(True, mode='drop')
  penalty_B1 = penalty_B[:, None]
  punished_BV = jnp.where(scores_BV < 0, scores_BV * penalty_B1, scores_BV / penalty_B1)
  return jnp.where(present_BV & (penalty_B1 != 1), punished_BV, scores_BV)


def frequency(scores_BV: Float[Array, 'B V'], tokens_BS: Int[Array, 'B S'],
              start_B: Int[Array, ' B'], length_B: Int[Array, ' B'],
              presence_B: Float[Array, ' B'], frequency_B: Float[Array, ' B']
              ) -> Float[Array, 'B V']:
  """Subtracts, of tokens that stand behind `start` places of the text, `presence` once and
  `frequency` for each time; 0 changes nothing.

  Reference: "Frequency and presence penalties" of the API of OpenAI.
  """
  rows_B1 = jnp.arange(len(tokens_BS))[:, None]
  counts_BV = jnp.zeros_like(scores_BV).at[
      rows_B1, _counting(tokens_BS, start_B, length_B, scores_BV)].add(1.0, mode='drop')
  return scores_BV - (presence_B[:, None] * (counts_BV > 0) + frequency_B[:, None] * counts_BV)


def repeated_ngrams(scores_BV: Float[Array, 'B V'], tokens_BS: Int[Array, 'B S'],
                    length_B: Int[Array, ' B'], size_B: Int[Array, ' B']) -> Float[Array, 'B V']:
  """Forbids what would complete `size` tokens that the text already has in this order; 0 nothing.

  Reference: Paulus et al., arXiv:1705.04304, section 2.5.
  """
  B, S = tokens_BS.shape
  places_S = jnp.arange(S)
  # Of each place, whether the k tokens before it are the last k of the text.
  same_BS = (places_S < length_B[:, None]) & (places_S >= size_B[:, None] - 1)

  def one_more(k, same_BS):
    last_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(length_B - k, 0)[:, None], axis=1)
    before_BS = jnp.roll(tokens_BS, k, axis=1)
    return same_BS & ((before_BS == last_B1) | (k >= size_B[:, None]))

  same_BS = lax.fori_loop(1, size_B.max(), one_more, same_BS & (size_B > 0)[:, None])
  ends_BS = jnp.where(same_BS, tokens_BS, scores_BV.shape[1])
  return scores_BV.at[jnp.arange(B)[:, None], ends_BS].set(-jnp.inf, mode='drop')


def sequences(scores_BV: Float[Array, 'B V'], tokens_BS: Int[Array, 'B S'],
              length_B: Int[Array, ' B'], sequences_BNW: Int[Array, 'B N W'],
              bias_BN: Float[Array, 'B N']) -> Float[Array, 'B V']:
  """Adds `bias` to the score of a sequence's last token where the text ends with those before it.

  Args:
    sequences_BNW: of up to W tokens, aligned to the right and padded by `NOBODY`; one of `NOBODY`
      alone is none.
    bias_BN: -inf forbids a sequence.
  """
  B, _, W = sequences_BNW.shape
  places_BW = length_B[:, None] - W + 1 + jnp.arange(W - 1)
  last_BW = jnp.take_along_axis(tokens_BS, jnp.maximum(places_BW, 0), axis=1)
  last_BW = jnp.where(places_BW < 0, NOBODY - 1, last_BW)
  before_BNW = sequences_BNW[:, :, :-1]
  complete_BN = ((before_BNW == last_BW[:, None]) | (before_BNW == NOBODY)).all(-1)
  ends_BN = sequences_BNW[:, :, -1]
  ends_BN = jnp.where(complete_BN & (ends_BN != NOBODY), ends_BN, scores_BV.shape[1])
  return scores_BV.at[jnp.arange(B)[:, None], ends_BN].add(bias_BN, mode='drop')


def _counting(tokens_BS, start_B, end_B, scores_BV):
  """The tokens of these places; in the others' place one that no vocabulary has."""
  places_S = jnp.arange(tokens_BS.shape[1])
  counts_BS = (places_S >= start_B[:, None]) & (places_S < end_B[:, None])
  return jnp.where(counts_BS, tokens_BS, scores_BV.shape[1])
