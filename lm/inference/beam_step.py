"""One step of one beam search: which texts go on, which have ended. No model here, only scores.

Letters: M beams of a search, S places of a text, the last P of them for new tokens, X candidates.
"""
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lm.inference import forced_words


class Rules(NamedTuple):
  """Numbers of a config: one program does for all of them."""
  length_penalty: float
  diversity_penalty: float
  min_new_tokens: int
  is_eager: bool  # early_stopping is True
  is_exact: bool  # early_stopping is 'never'
  eos_id: int


class Texts(NamedTuple):
  """M texts: at the end of `tokens_MS` P places of new tokens."""
  tokens_MS: jax.Array
  log_probs_MP: jax.Array


class Search(NamedTuple):
  """Of one group: texts that go on, and texts that have ended, the best first.

  scores_M: log-probabilities; -inf where there is none.
  ended_scores_M: with the length penalty; -inf where there is none.
  ended_lacks_M: whether forced words are not there.
  is_open: whether an ended text can still come in.
  """
  texts: Texts
  scores_M: jax.Array
  progress: forced_words.Progress
  ended: Texts
  ended_scores_M: jax.Array
  ended_lengths_M: jax.Array
  ended_lacks_M: jax.Array
  is_open: jax.Array


def step(ngram_size: int, search: Search, log_probs_MV: Float[Array, 'M V'],
         loss_V: Float[Array, ' V'], num_done: Int[Array, ''], limit: Int[Array, ''],
         words: forced_words.Words, rules: Rules) -> tuple[Search, Int[Array, ' M']]:
  """Puts a token behind each text of one search.

  As in `transformers`, of the 2M best candidates those of the best M that end come to the ended
  texts, and the M best that do not end go on. With forced words M are chosen by their banks, from
  more candidates: the best of each text, and what brings it further in a word.

  Args:
    ngram_size: 0, or of n-grams that may not stand twice in a text.
    log_probs_MV: of the next token.
    loss_V: what a token loses in the choice, for other groups took it.
    num_done: new tokens so far.
    limit: how many there may be.

  Returns:
    The search, and from which text each that goes on came.
  """
  texts, V = search.texts, log_probs_MV.shape[1]
  place = texts.tokens_MS.shape[1] - texts.log_probs_MP.shape[1] + num_done
  may_end_M = (num_done >= rules.min_new_tokens) & ~forced_words.lacks(search.progress)
  allowed_MV = may_end_M[:, None] | (jnp.arange(V) != rules.eos_id)
  if ngram_size:
    allowed_MV &= ~repeats(texts.tokens_MS, place, ngram_size, V)
  totals_MV = jnp.where(allowed_MV, search.scores_M[:, None] + log_probs_MV, -jnp.inf)

  ranks_X, flat_X = _candidates(totals_MV - loss_V, words, search.progress)
  beams_X, tokens_X, scores_X = flat_X // V, flat_X % V, totals_MV.reshape(-1)[flat_X]
  is_eos_X = tokens_X == rules.eos_id
  ends_X = is_eos_X | (num_done + 1 >= limit)
  progress, best_M, on_M = _choose(ranks_X, beams_X, tokens_X, is_eos_X, words, search.progress)

  def text(choice_M):
    put = lambda table, x_X: table[beams_X[choice_M]].at[:, place].set(x_X[choice_M])
    log_probs_X = log_probs_MV.reshape(-1)[flat_X]
    new = texts.log_probs_MP[beams_X[choice_M]].at[:, num_done].set(log_probs_X[choice_M])
    return Texts(put(texts.tokens_MS, tokens_X), new)

  penalised_X = scores_X / (num_done + 1.0)**rules.length_penalty
  penalised_X = jnp.where(ends_X & search.is_open, penalised_X, -jnp.inf)
  new = (text(best_M), penalised_X[best_M], jnp.full_like(best_M, num_done + 1),
         forced_words.lacks(progress)[best_M] | (penalised_X[best_M] == -jnp.inf))
  search = _end(search, new)._replace(
      texts=text(on_M), scores_M=jnp.where(is_eos_X, -jnp.inf, scores_X)[on_M],
      progress=jax.tree.map(lambda x: x[on_M], progress))
  return search._replace(is_open=_is_open(search, num_done + 1, limit, rules)), beams_X[on_M]


def repeats(tokens_MS: Int[Array, 'M S'], place: Int[Array, ''], ngram_size: int, num_tokens: int
            ) -> Bool[Array, 'M V']:
  """Which tokens at `place` would end n tokens that stand before it in the same text.

  Args:
    tokens_MS: what stands before `place`; ids from `num_tokens` on are no tokens.
  """
  n, S = ngram_size, tokens_MS.shape[1]

  def one(tokens_S):
    same_S = jnp.arange(S) + n <= place  # the n-gram that begins here
    for i in range(n - 1):
      same_S &= jnp.roll(tokens_S, -i) == tokens_S[place - n + 1 + i]
    same_S &= place >= n
    last_S = jnp.where(same_S, jnp.roll(tokens_S, 1 - n), num_tokens)
    return jnp.zeros(num_tokens, bool).at[last_S].set(True, mode='drop')

  return jax.vmap(one)(tokens_MS)


def _candidates(ranks_MV, words, progress):
  """What may go on or end: falling ranks and places in [M V], one axis."""
  M, V = ranks_MV.shape
  few, N = min(2 * M, M * V), len(words.lengths_N)
  ranks_X, flat_X = lax.top_k(ranks_MV.reshape(-1), few)
  if not N:
    return ranks_X, flat_X
  is_one_MV = (ranks_MV >= ranks_X[-1]) | (ranks_MV >= ranks_MV.max(axis=1, keepdims=True))
  is_one_MV |= forced_words.wanted(words, progress, V)
  all_of_them = jnp.where(is_one_MV, ranks_MV, -jnp.inf).reshape(-1)
  return lax.top_k(all_of_them, min(few + M * (N + 1), M * V))


def _choose(ranks_X, beams_X, tokens_X, is_eos_X, words, progress):
  """Progress of the candidates, the M best of them, and the M best that do not end."""
  M = len(progress.met_MN)
  progress = jax.tree.map(lambda x: x[beams_X], progress)
  if not len(words.lengths_N):
    return progress, jnp.arange(M), jnp.argsort(is_eos_X, stable=True)[:M]
  progress = forced_words.advance(words, progress, tokens_X)
  bank_X, total = forced_words.bank(words, progress), words.lengths_N.sum() + 1
  allocate = lambda ranks_X: forced_words.allocate(ranks_X, bank_X, total,
                                                   words.tokens_NP.size + 1, M)
  return progress, allocate(ranks_X), allocate(jnp.where(is_eos_X, -jnp.inf, ranks_X))


def _end(search, new):
  """The best M of the texts that had ended and those that end now; behind all others those that
  lack forced words."""
  old = (search.ended, search.ended_scores_M, search.ended_lengths_M, search.ended_lacks_M)
  both = jax.tree.map(lambda *x: jnp.concatenate(x), old, new)
  order_M = jnp.lexsort((-both[1], both[3]))[:len(search.scores_M)]
  ended, scores_M, lengths_M, lacks_M = jax.tree.map(lambda x: x[order_M], both)
  return search._replace(ended=ended, ended_scores_M=scores_M, ended_lengths_M=lengths_M,
                         ended_lacks_M=lacks_M)


def _is_open(search, num_done, limit, rules):
  """Whether an ended text may still come in; see `BeamConfig.early_stopping`."""
  is_full = (search.ended_scores_M > -jnp.inf).all()
  longest = jnp.where(rules.is_exact & (rules.length_penalty > 0), limit, num_done)
  best = search.scores_M.max() / longest.astype(jnp.float32)**rules.length_penalty
  can_improve = ~is_full | (best > search.ended_scores_M.min())
  return search.is_open & can_improve & ~(is_full & rules.is_eager) & (num_done < limit)
