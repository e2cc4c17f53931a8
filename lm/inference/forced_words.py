"""Words that a beam search must write: dynamic beam allocation (arXiv:1804.06609).

Hypotheses stand in banks by how many tokens of the words they have. Each bank has a share of the
beams, so that those that write a word, at first improbable, do not compete with those that do not
yet (section 3.2). Everything here is of one search; `beam.py` maps it over a batch.
"""
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from lm.errors import UserError


class Words(NamedTuple):
  """Of one request: N words of up to P tokens each; of a word of length 0 there is none."""
  tokens_NP: jax.Array
  lengths_N: jax.Array


class Progress(NamedTuple):
  """Of each hypothesis: which words it has, and how many first tokens of the others its last tokens
  are."""
  met_MN: jax.Array
  places_MN: jax.Array


def pad(words: Sequence[Sequence[Sequence[int]]], num_rows: int, eos_id: int) -> Words:
  """The words of each request in arrays [B, N, P] and [B, N].

  Raises:
    UserError: a word has no tokens, or holds the end of the text.
  """
  for row, of_row in enumerate(words):
    for word in of_row:
      if not len(word) or eos_id in list(word):
        raise UserError(f'the forced word {list(word)} of prompt {row} must have tokens, and not '
                        f'the end of the text {eos_id} among them; leave it out')
  N = max((len(of_row) for of_row in words), default=0)
  P = max((len(word) for of_row in words for word in of_row), default=0)
  tokens, lengths = np.full((num_rows, N, P), -1, np.int32), np.zeros((num_rows, N), np.int32)
  for row, of_row in enumerate(words):
    for i, word in enumerate(of_row):
      tokens[row, i, :len(word)], lengths[row, i] = word, len(word)
  return Words(tokens, lengths)


def start(words: Words, num_beams: int) -> Progress:
  """Nothing is written yet."""
  zeros_MN = jnp.zeros((num_beams, len(words.lengths_N)), jnp.int32)
  return Progress(jnp.broadcast_to(words.lengths_N == 0, zeros_MN.shape), zeros_MN)


def lacks(progress: Progress) -> Bool[Array, ' M']:
  """Whether a hypothesis has not got all words."""
  return ~progress.met_MN.all(axis=1)


def bank(words: Words, progress: Progress) -> Int[Array, ' M']:
  """How many tokens of the words stand in each hypothesis."""
  met_M = jnp.where(progress.met_MN, words.lengths_N, 0).sum(axis=1)
  return met_M + progress.places_MN.max(axis=1, initial=0)


def wanted(words: Words, progress: Progress, num_tokens: int) -> Bool[Array, 'M V']:
  """The tokens that would bring a hypothesis one further in a word (section 3.1)."""
  next_MN = _next(words, progress)
  one = lambda next_N: jnp.zeros(num_tokens, bool).at[next_N].set(True, mode='drop')
  return jax.vmap(one)(jnp.where(progress.met_MN, num_tokens, next_MN))


def advance(words: Words, progress: Progress, token_M: Int[Array, ' M']) -> Progress:
  """Puts a token behind each hypothesis; one that breaks a word off begins it anew.

  Of words that end together only the longest counts, and a token counts for one word.
  """
  token_M1 = token_M[:, None]
  goes_on_MN = (_next(words, progress) == token_M1) & ~progress.met_MN
  begins_MN = (words.tokens_NP[:, 0] == token_M1) & ~progress.met_MN
  places_MN = jnp.where(goes_on_MN, progress.places_MN + 1, begins_MN.astype(jnp.int32))
  ends_MN = goes_on_MN & (places_MN == words.lengths_N)
  longest_M = jnp.argmax(jnp.where(ends_MN, words.lengths_N, 0), axis=1)
  ends_MN &= jnp.arange(len(words.lengths_N)) == longest_M[:, None]
  places_MN = jnp.where(ends_MN.any(axis=1, keepdims=True), 0, places_MN)
  return Progress(progress.met_MN | ends_MN, places_MN)


def allocate(scores_X: Float[Array, ' X'], banks_X: Int[Array, ' X'], num_banks: Int[Array, ''],
             most_banks: int, num_beams: int) -> Int[Array, ' M']:
  """Which `num_beams` of the candidates stay.

  Every bank gets an equal share of the beams, what is left goes to the last; what a bank cannot
  fill goes to the one below it (section 3.2), and what none below can fill to the best of the rest.

  Args:
    scores_X: of candidates, falling; -inf for what is none.
    banks_X: of candidates.
    num_banks: of this request, at most `most_banks`.

  Returns:
    Places among the candidates; those of -inf come last.
  """
  stands_X = scores_X > -jnp.inf
  is_in_XN = (banks_X[:, None] == jnp.arange(most_banks)) & stands_X[:, None]
  share = num_beams // num_banks

  def fill(spare, index):
    room = jnp.where(index < num_banks, share, 0) + spare
    room += jnp.where(index == num_banks - 1, num_beams - share * num_banks, 0)
    size = jnp.minimum(room, is_in_XN[:, index].sum())
    return room - size, size

  _, sizes_N = jax.lax.scan(fill, jnp.int32(0), jnp.arange(most_banks), reverse=True)
  place_XN = jnp.cumsum(is_in_XN, axis=0) - is_in_XN
  has_room_X = (is_in_XN & (place_XN < sizes_N)).any(axis=1)
  order_X = jnp.argsort(jnp.where(has_room_X, 0, jnp.where(stands_X, 1, 2)), stable=True)
  return order_X[:num_beams]


def _next(words, progress):
  """The token that each word wants next."""
  one = lambda places_N: jnp.take_along_axis(words.tokens_NP, places_N[:, None], axis=1)[:, 0]
  return jax.vmap(one)(progress.places_MN)
