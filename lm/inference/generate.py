"""Completes prompts: fills the cache with the prompts, then decodes token by token, in one program.

A program is compiled once for a bucket of shapes: batch, prompt and number of new tokens are
rounded up to powers of two. A request's bucket of prompt and cache, and its random numbers, depend
on that request alone, so its neighbours in the batch do not change its text. What is not its own is
the number of rows, which may change how a product is rounded: two tokens that tie to the last digit
may then change places.
"""
from collections.abc import Mapping, Sequence
import functools
from typing import Any, NamedTuple, Protocol, TypedDict
import zlib

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError
from lm.inference import constrain, speculative
from lm.inference.decoder import Decoder
from lm.inference.prompts import batches, BOS_ID, Stopped, why_stopped
from lm.inference.sampling import begin, choices, sample, SamplerState, SamplingConfig
from lm.inference.stops import Stop

UNWATCHED = 16        # tokens decoded before those who watch for a stop string see them



class Vocabulary(Protocol):
  """What completing text needs of a vocabulary."""
  eos_id: int

  def encode(self, text: str) -> np.ndarray:
    """Returns int32 ids."""

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of the ids."""


class Chat(Protocol):
  """What completing a conversation needs of a chat template."""
  end_id: int

  def prompt(self, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
    """Returns all int32 ids up to where the assistant's answer begins."""


class Completion(NamedTuple):
  """tokens: int32 [new tokens], the end of document included where it was reached.
  log_probs: float32 [new tokens], nats: of each token under the model itself (temperature 1, no
    filter).
  stopped: at the end of the document, after `max_new_tokens`, because the context was full, or
    where a stop string was complete.
  drafts: what became of them, with a drafter.
  """
  tokens: np.ndarray
  log_probs: np.ndarray
  stopped: Stopped
  drafts: speculative.Drafts | None = None


class CompletedText(TypedDict):
  """A prompt and what follows it."""
  prompt: str
  text: str
  tokens: list[int]
  stopped: Stopped


def generate(module: Any, params: Any, prompts: Sequence[np.ndarray],
             config: SamplingConfig | Sequence[SamplingConfig], seed: int | Sequence[int],
             max_length: int, eos_id: int, bos_id: int | None = BOS_ID,
             stops: Sequence[Stop | None] | None = None,
             constraints: Sequence[constrain.Constraint | None] | None = None,
             drafter: speculative.Drafting | None = None) -> list[Completion]:
  """Completes each prompt; the result for a prompt depends on it, its config and seed alone.

  Args:
    module: the model, from `config.build(rules)`; or what decodes as a `Decoder` does (`Guided`).
    params: its parameters; matrices are cast once to the compute dtype.
    prompts: int [tokens] each, of any length from 0, without the beginning of document. Those of an
      encoder-decoder go to its encoder, and the end of document behind them, as in training (T5).
    config: how to choose tokens, and how many; one for all prompts, or one a prompt. Its stop
      strings and its rule are of `complete` alone.
    seed: one for all prompts (equal prompts then get equal completions), or one a prompt.
    max_length: the model's context: prompt and completion together, in tokens; of an
      encoder-decoder each of them.
    eos_id: ends a completion.
    bos_id: stands before every prompt; None for models that begin with the prompt itself.
    stops: of each prompt what ends its completion besides the end of document, or None.
    constraints: of each prompt what its completion must be, at its beginning, or None. The host
      then looks at each token before the next.
    drafter: decodes speculatively: the same distribution, sooner (see `speculative.py`).

  Raises:
    UserError: a prompt leaves no room in the context for a single new token, or is empty where
      nothing stands before it; or no token can follow by a constraint.
  """
  decoder = Decoder(module) if isinstance(module, nn.Module) else module
  prompts = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
  seeds = each(seed, (int, np.integer), 'seeds', len(prompts))
  configs = each(config, SamplingConfig, 'configs', len(prompts))
  stops = each(stops, type(None), 'stops', len(prompts))
  constraints = each(constraints, type(None), 'constraints', len(prompts))
  params = decoder.prepare(params)
  begin_with, go_on = _start, _decode
  if drafter is not None and any(constraints):
    raise UserError(f'{type(drafter).__name__} drafts several tokens at once, and a rule is asked '
                    'about each before the next; leave one of them out')
  if drafter is not None:
    bound, draft_params = drafter.bind(decoder, params)
    begin_with, go_on = (functools.partial(function, bound)
                         for function in (speculative.start, speculative.decode))
    params = params, draft_params
  completions: list[Completion | None] = [None] * len(prompts)
  limits = [one.max_new_tokens for one in configs]
  for batch in batches(decoder, prompts, limits, max_length, eos_id, bos_id):
    requests = [_Request(prompts[i], seeds[i], configs[i], stops[i], constraints[i])
                for i in batch.members]
    done = _generate_batch(decoder, begin_with, go_on, params, requests, batch, max_length, eos_id)
    for i, completion in zip(batch.members, done):
      completions[i] = completion
  return completions


def each(value: Any, kind: Any, name: str, size: int) -> list[Any]:
  """One value for all prompts, or one a prompt, as a list."""
  values = [value] * size if isinstance(value, kind) else list(value)
  if len(values) != size:
    raise ValueError(f'{len(values)} {name} for {size} prompts; give one, or one a prompt')
  return values


def begin_id(vocabulary: Vocabulary) -> int | None:
  """What stands before a prompt: of another project's vocabulary what its tokenizer puts there."""
  if not hasattr(vocabulary, 'encode_pair'):
    return BOS_ID
  begins = vocabulary.encode_pair('').ids[:1]
  return int(begins[0]) if len(begins) and begins[0] == vocabulary.bos_id else None


def without_eos(completion: Completion) -> list[int]:
  """The ids of a completion but for the end of document."""
  return completion.tokens[:-1 if completion.stopped == 'eos' else None].tolist()


def request_key(prompt: np.ndarray, seed: int) -> jax.Array:
  """The key of a request, from what it is and not from where it stands in a batch.

  The prompt is folded in so that different prompts under one seed draw independently.
  """
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(prompt.tobytes()))


class _Request(NamedTuple):
  """What `generate` is asked for one prompt."""
  prompt: np.ndarray
  seed: int
  config: SamplingConfig
  stop: Stop | None
  constraint: constrain.Constraint | None


def _generate_batch(decoder, start, go_on, params, requests, batch, max_length, eos_id):
  """Completes the requests of a batch, and reads the results."""
  keys = [request_key(request.prompt, request.seed) for request in requests]
  configs, idle = [request.config for request in requests], len(batch.limits_B) - len(requests)
  asked = choices(configs + configs[:1] * idle, eos_id)
  state = start(decoder, batch.num_new, max_length, params, batch.inputs_BT, batch.lengths_B,
                batch.limits_B, asked)
  keys_B = jnp.stack(keys + keys[:1] * idle)
  decode = lambda state, until, *allowed_BW: go_on(
      decoder, params, state, keys_B, asked, batch.limits_B, eos_id, until, *allowed_BW)
  state, stopped = _watched(decode, state, requests, batch.num_new, eos_id)
  tokens_BP, log_probs_BP, counts_B = jax.device_get(
      (state.tokens_BP, state.log_probs_BP, state.counts_B))
  drafts = getattr(state, 'drafts', None)
  completions = []
  for row, config in enumerate(configs):
    of_row = drafts and speculative.Drafts(*(int(x[row]) for x in drafts))
    count = stopped.get(row, counts_B[row])
    tokens = tokens_BP[row, :count]
    why = 'stop' if row in stopped else why_stopped(tokens, eos_id, config.max_new_tokens)
    completions.append(Completion(tokens, log_probs_BP[row, :count], why, of_row))
  return completions


def _watched(decode, state, requests, num_new, eos_id):
  """Decodes to the end; returns the state, and how many tokens each row has that was stopped."""
  is_constrained = any(request.constraint for request in requests)
  stride = 1 if is_constrained else UNWATCHED if any(x.stop for x in requests) else num_new
  stopped, allowed_BW, done_B = {}, None, np.zeros(len(state.done_B), bool)
  for done in range(0, num_new, stride):
    if is_constrained:
      words = -(-state.logits_BV.shape[1] // 32)
      allowed_BW = np.full((len(done_B), words), 0xffffffff, np.uint32)
      for row, request in enumerate(requests):
        if request.constraint and not done_B[row]:
          allowed_BW[row] = request.constraint.mask()
    state = decode(state, min(done + stride, num_new), *([allowed_BW] if is_constrained else []))
    tokens_BP, counts_B, done_B = jax.device_get((state.tokens_BP, state.counts_B, state.done_B))
    for row, request in enumerate(requests):
      for place in range(done, counts_B[row] if row not in stopped else 0):
        token = int(tokens_BP[row, place])
        if request.constraint:
          request.constraint.advance(token)
        if request.stop and token != eos_id and request.stop.advance(token):
          stopped[row] = place + 1
          break
    done_B = done_B | np.isin(np.arange(len(done_B)), list(stopped))
    if done_B.all():
      break
    state = state._replace(done_B=jnp.asarray(done_B))
  return state, stopped


class _State(NamedTuple):
  """Of the decoding loop, P = the most new tokens."""
  step: jax.Array  # tokens chosen so far
  counts_B: jax.Array  # tokens of each row's completion
  done_B: jax.Array
  tokens_BP: jax.Array
  log_probs_BP: jax.Array
  logits_BV: jax.Array  # of the next token
  cache: Any
  sampler: SamplerState


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(decoder, num_new, max_length, params, inputs_BT, lengths_B, limits_B, asked):
  """Reads the prompts; limits [B] are those of `_decode`."""
  B, T = inputs_BT.shape
  inputs = 1 if decoder.has_encoder else T
  logits_BV, cache = decoder.start(params, inputs_BT, lengths_B, min(inputs + num_new, max_length))
  if decoder.has_encoder:
    inputs_BT, lengths_B = decoder.first(B)
  table_BP = jnp.zeros((B, num_new))
  return _State(jnp.int32(0), jnp.zeros(B, jnp.int32), limits_B == 0, table_BP.astype(jnp.int32),
                table_BP, logits_BV, cache, begin(asked, inputs_BT, lengths_B, inputs + num_new))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(decoder, params, state, keys_B, asked, limits_B, eos_id, until,
            allowed_BW=None):
  """Chooses tokens up to step `until`, up to `limits_B` a row, of those that are allowed."""
  def decode(state):
    step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.step)
    token_B, log_prob_B, sampler = sample(state.logits_BV, step_keys_B, asked, state.sampler,
                                          allowed_BW)
    put = lambda table, column: lax.dynamic_update_slice(table, column[:, None], (0, state.step))
    counts_B = state.counts_B + ~state.done_B
    done_B = state.done_B | (token_B == eos_id) | (counts_B >= limits_B)
    # A finished row writes over its own first place: its cache will not be read again, and its
    # position stays within the context however long the others go on.
    cache = decoder.rewind(state.cache, jnp.where(done_B, 0, state.cache.length_B))
    # What follows the last token is computed and not read: one step more, but one program of
    # sampling less.
    logits_B1V, cache = decoder.extend(params, token_B[:, None], cache)
    return _State(state.step + 1, counts_B, done_B, put(state.tokens_BP, token_B),
                  put(state.log_probs_BP, log_prob_B), logits_B1V[:, 0], cache, sampler)

  return lax.while_loop(lambda state: ~state.done_B.all() & (state.step < until), decode, state)
