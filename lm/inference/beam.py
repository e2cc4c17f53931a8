"""Beam search in one jitted loop, with diverse groups and forced words.

A search keeps the M likeliest texts that go on, and beside them the M best that have ended; of a
text of n tokens the score is its log-probability over n**length_penalty. Letters: M beams, P new
tokens, S places of a text, X candidates; a function of one search is mapped over batch and groups.

Reference: Vijayakumar et al. 2016, arXiv:1610.02424 (groups); Post and Vilar 2018, arXiv:1804.06609
(forced words). How texts end is as in `transformers`, whose beams these equal.
"""
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, Literal, NamedTuple, Optional

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError
from lm.inference import forced_words
from lm.inference.beam_step import Rules, Search, step, Texts
from lm.inference.decoder import Decoder
from lm.inference.prompts import batches, BOS_ID, LARGEST_BATCH, Stopped, why_stopped


@dataclasses.dataclass(frozen=True)
class BeamConfig:
  """How to search.

  num_beams: of all groups together.
  num_groups: each searches for itself; 1 is plain beam search.
  diversity_penalty: what a token loses, in nats, for each beam of the groups before that takes it
    at the same step (arXiv:1610.02424, section 4, Hamming diversity). As published it counts in the
    choice of that step alone: scores stay the model's.
  length_penalty: above 0 it favours long texts, below 0 short ones.
  early_stopping: when a search of M ended texts ends. True: at once. False: when the best of those
    that go on would score less, ended at their length. 'never': when they would at any length that
    they may still have; with a length_penalty of at most 0 no better text is missed.
  num_return_sequences: the best of all beams that a prompt gets.
  min_new_tokens: before these a text does not end.
  no_repeat_ngram_size: no n tokens of prompt and completion stand there twice; None: they may.
  """
  num_beams: int = 4
  num_groups: int = 1
  diversity_penalty: float = 0.0
  length_penalty: float = 1.0
  early_stopping: bool | Literal['never'] = False
  num_return_sequences: int = 1
  max_new_tokens: int = 128
  min_new_tokens: int = 0
  no_repeat_ngram_size: Optional[int] = None

  def __post_init__(self):
    for name in ('num_beams', 'num_groups', 'num_return_sequences', 'max_new_tokens'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
    if self.no_repeat_ngram_size is not None and self.no_repeat_ngram_size < 1:
      raise ValueError(f'no_repeat_ngram_size={self.no_repeat_ngram_size} must be at least 1; set '
                       'None to allow repetition')
    for name in ('diversity_penalty', 'min_new_tokens'):
      if not 0 <= getattr(self, name) < float('inf'):
        raise ValueError(f'{name}={getattr(self, name)} must be 0 or more')
    if self.num_beams % self.num_groups:
      raise ValueError(f'num_beams={self.num_beams} is not divisible by num_groups='
                       f'{self.num_groups}; groups are of equal size')
    if self.diversity_penalty and self.num_groups == 1:
      raise ValueError(f'diversity_penalty={self.diversity_penalty} keeps groups apart and '
                       'num_groups=1; set num_groups to num_beams')
    if self.num_return_sequences > self.num_beams:
      raise ValueError(f'num_return_sequences={self.num_return_sequences} of num_beams='
                       f'{self.num_beams} cannot be returned; raise num_beams')
    if self.min_new_tokens > self.max_new_tokens:
      raise ValueError(f'min_new_tokens={self.min_new_tokens} is more than max_new_tokens='
                       f'{self.max_new_tokens}')
    if self.early_stopping not in (True, False, 'never'):
      raise ValueError(f"early_stopping={self.early_stopping!r} must be True, False or 'never'")


class Hypothesis(NamedTuple):
  """A `Completion`, and its score: the log-probability over the length to the length_penalty."""
  tokens: np.ndarray
  log_probs: np.ndarray
  stopped: Stopped
  score: float


def beam_search(decoder: Decoder, params: Any, prompts: Sequence[np.ndarray], config: BeamConfig,
                max_length: int, eos_id: int, bos_id: int | None = BOS_ID,
                words: Sequence[Sequence[Sequence[int]]] | None = None) -> list[list[Hypothesis]]:
  """The best completions of each prompt, best first; they depend on it and `config` alone.

  They are fewer than `num_return_sequences` only where what is forbidden leaves no more.

  Args:
    decoder: of a model of any family.
    params: its parameters.
    prompts: as `generate` takes them.
    config: how to search.
    max_length: the model's context, in tokens.
    eos_id: ends a text.
    bos_id: stands before every prompt, or None.
    words: for each prompt the words, each its tokens, that every completion must hold, in any
      order. A completion that `max_new_tokens` or the context cuts off before is behind all others.

  Raises:
    UserError: a prompt that does not fit, or a forced word that cannot be written.
  """
  prompts = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
  words = [()] * len(prompts) if words is None else words
  if len(words) != len(prompts):
    raise ValueError(f'forced words for {len(words)} prompts, of {len(prompts)}')
  params = decoder.prepare(params)
  found: list[list[Hypothesis]] = [[] for _ in prompts]
  shape = Shape(config.num_groups, config.num_beams // config.num_groups,
                config.no_repeat_ngram_size or 0)
  rules = Rules(config.length_penalty, config.diversity_penalty, config.min_new_tokens,
                config.early_stopping is True, config.early_stopping == 'never', eos_id)
  limits = [config.max_new_tokens] * len(prompts)
  for batch in batches(decoder, prompts, limits, max_length, eos_id, bos_id,
                       max(1, LARGEST_BATCH // config.num_beams)):
    forced = forced_words.pad([words[i] for i in batch.members], len(batch.inputs_BT), eos_id)
    for i, of_word in zip(batch.members, forced.lengths_N.sum(1)):
      if of_word > config.max_new_tokens:
        raise UserError(f'the forced words of prompt {i} have {of_word} tokens and a completion '
                        f'has max_new_tokens={config.max_new_tokens}; raise it')
    results = jax.device_get(_decode(
        decoder, shape, batch.num_places, batch.num_new, params, batch.inputs_BT, batch.lengths_B,
        batch.limits_B, rules, forced))
    for row, i in enumerate(batch.members):
      found[i] = [_hypothesis(*(x[row, beam] for x in results), eos_id, config)
                  for beam in range(config.num_return_sequences) if results[2][row, beam]]
  return found


def _hypothesis(tokens, log_probs, length, score, eos_id, config):
  tokens = tokens[:length]
  return Hypothesis(tokens, log_probs[:length], why_stopped(tokens, eos_id, config.max_new_tokens),
                    float(score))


class Shape(NamedTuple):
  """What a program is compiled for."""
  num_groups: int
  num_beams: int  # of a group
  ngram_size: int


class _State(NamedTuple):
  """Of the decoding loop; searches have leading axes [B, groups], rows are theirs times M."""
  step: jax.Array
  searches: Search
  rows: jax.Array  # from which row of the cache each row goes on
  cache: Any


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _decode(decoder, shape, num_places, num_new, params, inputs_BT, lengths_B, limits_B, rules,
            words):
  """Returns tokens and log-probabilities [B, beams, P], lengths and scores [B, beams]."""
  B, (G, M, ngram_size) = len(inputs_BT), shape
  logits_BV, cache = decoder.start(params, inputs_BT, lengths_B, num_places)
  cache = decoder.take(cache, jnp.repeat(jnp.arange(B), G * M))
  before_BT = _before(decoder, inputs_BT, lengths_B, logits_BV.shape[1]) if ngram_size else (
      inputs_BT[:, :0])

  def choose(state, logits_XV):
    log_probs = jax.nn.log_softmax(logits_XV).reshape(B, G, M, -1)
    mapped = jax.vmap(functools.partial(step, ngram_size), (0, 0, 0, None, 0, 0, None))
    loss_BV, found = jnp.zeros((B, log_probs.shape[-1])), []
    for group in range(G):
      search = jax.tree.map(lambda x, group=group: x[:, group], state.searches)
      found.append(mapped(search, log_probs[:, group], loss_BV, state.step, limits_B, words, rules))
      if group + 1 < G:
        token_BM = found[-1][0].texts.tokens_MS[..., before_BT.shape[1] + state.step]
        taken_BM = rules.diversity_penalty * search.is_open[:, None]
        loss_BV = jax.vmap(lambda loss, token, taken: loss.at[token].add(taken))(
            loss_BV, token_BM, jnp.broadcast_to(taken_BM, token_BM.shape))
    searches, beams_BGM = jax.tree.map(lambda *groups: jnp.stack(groups, 1), *found)
    rows = beams_BGM + M * jnp.arange(B * G).reshape(B, G, 1)
    return state._replace(step=state.step + 1, searches=searches, rows=rows.reshape(-1))

  def decode(state):
    cache = decoder.take(state.cache, state.rows)
    # A search that has ended writes over the first place, as in `generate`.
    is_open = jnp.repeat(state.searches.is_open.reshape(-1), M)
    cache = decoder.rewind(cache, jnp.where(is_open, cache.length_B, 0))
    place = before_BT.shape[1] + state.step - 1
    tokens = lax.dynamic_index_in_dim(state.searches.texts.tokens_MS, place, 3, keepdims=False)
    logits_X1V, cache = decoder.extend(params, tokens.reshape(-1, 1), cache)
    return choose(state._replace(cache=cache), logits_X1V[:, 0])

  searches = _begin(shape, before_BT, num_new, limits_B, words)
  state = _State(jnp.int32(0), searches, jnp.arange(B * G * M), cache)
  state = choose(state, jnp.repeat(logits_BV, G * M, axis=0))
  found = lax.while_loop(lambda state: state.searches.is_open.any(), decode, state).searches
  results = (found.ended.tokens_MS[..., -num_new:], found.ended.log_probs_MP,
             found.ended_lengths_M, found.ended_scores_M, found.ended_lacks_M)
  *results, lacks_BM = (x.reshape(B, G * M, *x.shape[3:]) for x in results)
  order_BM = jnp.lexsort((-results[3], lacks_BM))
  return jax.tree.map(jax.vmap(lambda x, order: x[order]), results, [order_BM] * 4)


def _before(decoder, inputs_BT, lengths_B, num_tokens):
  """What stands before the first new token, at the end of each row; before it the id
  `num_tokens`, which is no token's."""
  if decoder.has_encoder:
    return jnp.full_like(inputs_BT[:, :1], decoder.start_id)
  T = inputs_BT.shape[1]
  rolled_BT = jax.vmap(jnp.roll)(inputs_BT, T - lengths_B)
  return jnp.where(jnp.arange(T) < T - lengths_B[:, None], num_tokens, rolled_BT)


def _begin(shape, before_BT, num_new, limits_B, words):
  """Searches [B, groups] of nothing yet; all beams of one are alike, and so the first goes on
  alone."""
  G, M, _ = shape

  def one(before_T, limit, words):
    tokens_MS = jnp.pad(jnp.tile(before_T, (M, 1)), ((0, 0), (0, num_new)))
    texts = Texts(tokens_MS, jnp.zeros((M, num_new)))
    none_M, zeros_M = jnp.full((M,), -jnp.inf), jnp.zeros((M,), jnp.int32)
    search = Search(texts, none_M.at[0].set(0), forced_words.start(words, M), texts, none_M,
                    zeros_M, zeros_M == 0, limit > 0)
    return jax.tree.map(lambda x: jnp.stack([x] * G), search)

  return jax.vmap(one)(before_BT, limits_B, words)
