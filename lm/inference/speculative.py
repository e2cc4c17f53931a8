"""Speculative decoding: several cheap drafts of the next tokens, checked by one pass of the model.

A pass over T = 1 + num_tokens places reads the weights once, as a pass over one does, so drafts
that the model agrees with are nearly free. The text follows the model's own distribution, whatever
the drafts were; greedy, it is the plain decoder's, but for the rounding of a pass over more places.

Drafts that are found, as by lookup, are taken where the token that `sample` chooses is the draft:
that accepts a draft x with the probability p(x) that rejection sampling has for one that was not
drawn, and the text is the plain decoder's under the same seed even where it is drawn. Drafts of a
model are drawn, with the request's temperature and filters, and rejected as in the papers.

References: arXiv:2211.17192, algorithm 1; arXiv:2302.01318, algorithm 2.
"""
import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax
import jax.numpy as jnp

from lm.errors import UserError
from lm.inference.decoder import Decoder
from lm.inference.sampling import begin, choose_from, drawn_from, sample, SamplerState


class Drafter(Protocol):
  """Guesses the next tokens of each row; static under jit.

  Attributes:
    num_tokens: K, the most drafts of a turn.
  """
  num_tokens: int

  def start(self, params: Any, inputs_BT: jax.Array, lengths_B: jax.Array, num_places: int) -> Any:
    """Reads the prompts, as `Decoder.start` does; returns the state of the loop."""

  def draft(self, params: Any, state: Any, sampler: SamplerState, choose: Any
            ) -> tuple[jax.Array, jax.Array, jax.Array | None, Any]:
    """Guesses what follows the texts of `sampler`.

    Args:
      choose: (logits_BV, sampler, number of the draft) -> (tokens_B, scores_BV, sampler): draws one
        as the requests ask, from softmax(scores).

    Returns:
      int32 tokens [B, K]; how many of them count [B]; float32 scores [B, K, V] of what was drawn,
      None of what was found; the state.
    """


@dataclasses.dataclass(frozen=True)
class PromptLookup:
  """Drafts what followed the last tokens where they stood before: in the prompt, of an
  encoder-decoder in its input, or in what was written since.

  Of all places the longest match counts, up to `longest` tokens, and of these the first. Where the
  match runs into the end, what stands between is repeated. SmolLM2-135M that rewrites a paragraph
  takes 92 % of 8 drafts, and a third of a plain decoder's CPU time
  (`scripts/benchmark_speculative.py`, where a step over 9 places costs 1.9 times one over 1).

  num_tokens: drafts of a turn.
  shortest, longest: tokens that match. Without a match the model makes a plain step.

  Reference: arXiv:2304.04487; Saxena 2023, prompt lookup decoding.
  """
  num_tokens: int = 8
  shortest: int = 2
  longest: int = 4

  def __post_init__(self):
    _check(self.num_tokens)
    if not 1 <= self.shortest <= self.longest:
      raise ValueError(f'shortest={self.shortest} and longest={self.longest} must be 1 or more, '
                       'and the second not below the first')

  def bind(self, decoder: Decoder, params: Any) -> tuple[Drafter, Any]:
    """The drafter of a model, and its parameters."""
    del params
    return _Lookup(decoder, **dataclasses.asdict(self)), ()


@dataclasses.dataclass(frozen=True)
class EarlyExit:
  """Drafts with the first layers of the model itself, its last norm and its head.

  Only of use in a model trained for it: that paragraph's tokens SmolLM2-135M, which is not, chooses
  behind 20 of its 30 layers in 15 % of places, behind 10 in none.

  num_layers: of them; of an encoder-decoder the decoder's.
  num_tokens: drafts of a turn.

  Reference: LayerSkip, arXiv:2404.16710, section 4.3; here the checking pass computes these layers
  again.
  """
  num_layers: int
  num_tokens: int = 4

  def __post_init__(self):
    _check(self.num_tokens)

  def bind(self, decoder: Decoder, params: Any) -> tuple[Drafter, Any]:
    """The drafter of a model, and its parameters."""
    config = decoder.module.config
    if not hasattr(config, 'first_layers'):
      raise UserError(f'EarlyExit takes the first layers of a GPT or a T5, and the model is of '
                      f'{type(config).__name__}; draft by PromptLookup')
    config, params = config.first_layers(params, self.num_layers)
    shallow = dataclasses.replace(decoder, module=config.build(decoder.module.rules))
    return _Model(shallow, self.num_tokens), params


@dataclasses.dataclass(frozen=True, eq=False)
class DraftModel:
  """Drafts with another, smaller model of the same vocabulary.

  module: from `config.build(rules)`.
  params: its parameters.
  num_tokens: drafts of a turn.
  """
  module: Any
  params: Any
  num_tokens: int = 4

  def __post_init__(self):
    _check(self.num_tokens)

  def bind(self, decoder: Decoder, params: Any) -> tuple[Drafter, Any]:
    """The drafter of a model, and its parameters."""
    del params
    ours, theirs = decoder.module.config.vocab_size, self.module.config.vocab_size
    if ours != theirs:
      raise UserError(f'the draft model has vocab_size={theirs} and the model {ours}; take one of '
                      'the same vocabulary')
    smaller = dataclasses.replace(decoder, module=self.module)
    return _Model(smaller, self.num_tokens), smaller.prepare(self.params)


Drafting = PromptLookup | EarlyExit | DraftModel


def _check(num_tokens):
  if num_tokens < 1:
    raise ValueError(f'num_tokens={num_tokens} must be at least 1: drafts of a turn')


@dataclasses.dataclass(frozen=True)
class _Model:
  """A decoder that drafts; its state is its cache."""
  decoder: Decoder
  num_tokens: int

  def start(self, params, inputs_BT, lengths_B, num_places):
    return self.decoder.start(params, inputs_BT, lengths_B, num_places)[1]

  def draft(self, params, state, sampler, choose):
    # The text but its last token is what the model's cache holds. Of a turn whose drafts were all
    # accepted this cache lacks the last one, so two tokens are read at first.
    start_B = jnp.maximum(sampler.length_B - 2, 0)
    last_B2 = jnp.take_along_axis(sampler.tokens_BS, start_B[:, None] + jnp.arange(2), axis=1)
    logits_B2V, cache = self.decoder.extend(params, last_B2, self.decoder.rewind(state, start_B))
    cache = self.decoder.rewind(cache, sampler.length_B)  # a text of one token has no two
    index_B11 = (sampler.length_B - start_B - 1)[:, None, None]
    *first, sampler = choose(jnp.take_along_axis(logits_B2V, index_B11, axis=1)[:, 0], sampler, 0)

    def step(carry, number):
      token_B, cache, sampler = carry
      logits_B1V, cache = self.decoder.extend(params, token_B[:, None], cache)
      token_B, scores_BV, sampler = choose(logits_B1V[:, 0], sampler, number)
      return (token_B, cache, sampler), [token_B, scores_BV]

    (_, cache, _), others = lax.scan(step, (first[0], cache, sampler),
                                     jnp.arange(1, self.num_tokens))
    join = lambda one, more: jnp.swapaxes(jnp.concatenate([one[None], more]), 0, 1)
    tokens_BK, scores_BKV = map(join, first, others)
    return tokens_BK, jnp.full_like(first[0], self.num_tokens), scores_BKV, cache


@dataclasses.dataclass(frozen=True)
class _Lookup:
  """The drafter of `PromptLookup`; its state is the encoder's input, if there is one."""
  decoder: Decoder
  num_tokens: int
  shortest: int
  longest: int

  def start(self, params, inputs_BT, lengths_B, num_places):
    del params, num_places
    if not self.decoder.has_encoder:
      return inputs_BT[:, :0], jnp.zeros_like(lengths_B)
    ends_right = jax.vmap(jnp.roll)(inputs_BT, inputs_BT.shape[1] - lengths_B)
    return ends_right, inputs_BT.shape[1] - lengths_B

  def draft(self, params, state, sampler, choose):
    del params, choose
    source_BT, first_B = state
    text_BS = jnp.concatenate([source_BT, sampler.tokens_BS], axis=1)
    find = functools.partial(_continuation, self.num_tokens, self.longest)
    tokens_BK, matched_B = jax.vmap(find)(text_BS, first_B, source_BT.shape[1] + sampler.length_B)
    return tokens_BK, jnp.where(matched_B >= self.shortest, self.num_tokens, 0), None, state


def _continuation(num_tokens, longest, text_S, first, end):
  """What followed the longest earlier match of the last tokens of text[first:end], [num_tokens],
  and how many tokens match."""
  places_S = jnp.arange(len(text_S))
  equal_SN = jnp.stack([(jnp.roll(text_S, n) == text_S[end - 1 - n]) & (places_S - n >= first)
                        for n in range(longest)], axis=1)
  matched_S = jnp.where(places_S < end - 1, jnp.cumprod(equal_SN, axis=1).sum(1), 0)
  place = jnp.argmax(matched_S)
  ahead_K = jnp.arange(num_tokens) % (end - 1 - place)
  return text_S[place + 1 + ahead_K].astype(jnp.int32), matched_S[place]


class Drafts(NamedTuple):
  """What drafts came to, of a row.

  made, accepted: tokens. passes: of the model, behind that over the prompt.
  """
  made: jax.Array | int
  accepted: jax.Array | int
  passes: jax.Array | int


class State(NamedTuple):
  """Of the decoding loop; P = the most new tokens. The cache holds the text but its last token."""
  num_places: jax.Array  # of a row in the cache
  step: jax.Array  # tokens that all rows have that are not done
  counts_B: jax.Array
  done_B: jax.Array
  tokens_BP: jax.Array
  log_probs_BP: jax.Array
  cache: Any
  sampler: SamplerState
  drafter: Any
  drafts: Drafts


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def start(drafter: Drafter, decoder: Decoder, num_new: int, max_length: int, params: Any,
          inputs_BT: Any, lengths_B: Any, limits_B: Any, asked: Any) -> State:
  """Reads the prompts, as `generate._start` does.

  Args:
    drafter: from `bind`, as the second of `params`, behind those of the model.

  Raises:
    UserError: no turn's drafts fit into the context.
  """
  (params, draft_params), (B, T), K = params, inputs_BT.shape, drafter.num_tokens
  inputs = 1 if decoder.has_encoder else T
  num_places = min(inputs + num_new + K, max_length)
  if K >= num_places:
    raise UserError(f'num_tokens={K} drafts do not fit into a context of {num_places} tokens; make '
                    f'it at most {num_places - 1}')
  _, cache = decoder.start(params, inputs_BT, lengths_B, num_places)
  own = drafter.start(draft_params, inputs_BT, lengths_B, num_places)
  if decoder.has_encoder:
    inputs_BT, lengths_B = decoder.first(B)
  none_B, table_BP = jnp.zeros(B, jnp.int32), jnp.zeros((B, num_new))
  sampler = begin(asked, inputs_BT, lengths_B, inputs + num_new)
  return State(jnp.int32(num_places), jnp.int32(0), none_B, limits_B == 0,
               table_BP.astype(jnp.int32), table_BP, cache, sampler, own,
               Drafts(none_B, jnp.copy(none_B), jnp.copy(none_B)))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def decode(drafter: Drafter, decoder: Decoder, params: Any, state: State, keys_B: Any, asked: Any,
           limits_B: Any, eos_id: Any, until: Any) -> State:
  """Chooses tokens until each row has `until`, or `limits_B`, each row at its own pace; see
  `generate._decode`."""
  (params, draft_params), K, num_new = params, drafter.num_tokens, state.tokens_BP.shape[1]
  B = len(keys_B)

  def rests_B(state):
    return state.done_B | (state.counts_B >= until)

  def read_B(state):
    """Tokens in the cache; of finished rows, none, so that their places stay within the context
    however long the others go on."""
    return jnp.where(state.done_B, 0, state.sampler.length_B - 1)

  def keys_of(step_B):
    return jax.vmap(jax.random.fold_in)(keys_B, step_B)

  def put(state, logits_BV, goes_on_B, choose):
    """Adds the token that these scores choose to the rows that go on; returns it too."""
    token_B, log_prob_B, sampler = sample(logits_BV, keys_of(state.counts_B), asked, state.sampler,
                                          choose=choose)
    rows_B, places_B = jnp.arange(B), jnp.where(goes_on_B, state.counts_B, num_new)
    write = lambda table, column: table.at[rows_B, places_B].set(column, mode='drop')
    keep = lambda new, old: jnp.where(goes_on_B.reshape(B, *[1] * (old.ndim - 1)), new, old)
    counts_B = state.counts_B + goes_on_B
    done_B = state.done_B | goes_on_B & ((token_B == eos_id) | (counts_B >= limits_B))
    return token_B, state._replace(
        counts_B=counts_B, done_B=done_B, tokens_BP=write(state.tokens_BP, token_B),
        log_probs_BP=write(state.log_probs_BP, log_prob_B),
        sampler=jax.tree.map(keep, sampler, state.sampler))

  def check(state, drafts_BK, num_B, scores_BKV):
    """One pass over the last token of each row and its drafts, which are taken as far as the model
    chooses them too, and the token behind them."""
    last_B1 = jnp.take_along_axis(state.sampler.tokens_BS, state.sampler.length_B[:, None] - 1, 1)
    cache = decoder.rewind(state.cache, read_B(state))
    logits_BTV, cache = decoder.extend(params, jnp.concatenate([last_B1, drafts_BK], 1), cache)
    drafts = state.drafts._replace(made=state.drafts.made + num_B,
                                   passes=state.drafts.passes + ~rests_B(state))
    state = state._replace(cache=cache, drafts=drafts)
    # Behind the last draft there is none.
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 1), *[(0, 0)] * (x.ndim - 2)))
    ends_BT, scores_BTV = jax.tree.map(pad, (drafts_BK, scores_BKV))

    def follow(carry):
      t, goes_on_B, state = carry
      is_drafted_B, draft_B = goes_on_B & (t < num_B), ends_BT[:, t]
      choose = None if scores_BTV is None else functools.partial(
          _or_reject, draft_B, scores_BTV[:, t], is_drafted_B)
      token_B, state = put(state, logits_BTV[:, t], goes_on_B, choose)
      is_taken_B = is_drafted_B & (token_B == draft_B)
      drafts = state.drafts._replace(accepted=state.drafts.accepted + is_taken_B)
      return t + 1, is_taken_B & ~rests_B(state), state._replace(drafts=drafts)

    return lax.while_loop(lambda carry: carry[1].any(), follow, (0, ~rests_B(state), state))[2]

  def turn(state):
    def choose(logits_BV, sampler, number):
      keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_of(state.counts_B + number), 2)
      token_B, _, after = sample(logits_BV, keys_B, asked, sampler)
      return token_B, drawn_from(logits_BV, asked, sampler), after

    draft = lambda: drafter.draft(draft_params, state.drafter, state.sampler, choose)
    shapes = jax.eval_shape(lambda: draft()[:3])
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    fits = (read_B(state) + K + 1 <= state.num_places).all()
    tokens_BK, num_B, scores_BKV, own = lax.cond(fits, draft, lambda: (*empty, state.drafter))
    num_B, state = jnp.where(rests_B(state), 0, num_B), state._replace(drafter=own)
    # Where no row has a draft, a plain step costs less.
    return lax.cond(num_B.any(), lambda state: check(state, tokens_BK, num_B, scores_BKV),
                    lambda state: check(state, tokens_BK[:, :0], num_B, None), state)

  state = lax.while_loop(lambda state: ~rests_B(state).all(), turn, state)
  return state._replace(step=jnp.asarray(until, jnp.int32))


def _or_reject(draft_B, draft_scores_BV, is_drafted_B, scores_BV, keys_B):
  """Draws from p = softmax(scores) by rejection: the draft x, drawn from q = softmax(draft_scores),
  is taken with probability min(1, p(x) / q(x)), else a token is drawn from max(p - q, 0)."""
  p_BV = jax.nn.softmax(scores_BV)
  q_BV = jnp.where(is_drafted_B[:, None], jax.nn.softmax(draft_scores_BV), 0)
  of_draft = lambda x_BV: jnp.take_along_axis(x_BV, draft_B[:, None], axis=1)[:, 0]
  share_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(keys_B)
  takes_B = is_drafted_B & (share_B * of_draft(q_BV) < of_draft(p_BV))
  return jnp.where(takes_B, draft_B, choose_from(jnp.log(jnp.maximum(p_BV - q_BV, 0)), keys_B))
