"""How probable each token of a text is, and which others would have been.

For the likelihood of many texts as a whole see `lm.evaluation.likelihood`, which packs them; here
each token's distribution is looked at, in programs of a few shapes.
"""
from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError
from lm.inference.decoder import Decoder
from lm.inference.generate import begin_id
from lm.inference.prompts import (
    bucket_of, buckets, LARGEST_BATCH, round_up, SHORTEST_BUCKET)

CHUNK = 32  # tokens whose distributions are in memory at once
PIECE = 64  # tokens that a `Scorer` reads at once

Ids = Sequence[int] | np.ndarray


class Scores(NamedTuple):
  """Of the n tokens of a text, under the model itself: temperature 1, no filter.

  tokens: int32 [n].
  log_probs: float32 [n], nats.
  top_tokens: int32 [n, k], the k most probable at each place, the most probable first.
  top_log_probs: float32 [n, k].
  """
  tokens: np.ndarray
  log_probs: np.ndarray
  top_tokens: np.ndarray
  top_log_probs: np.ndarray


def score(module: Any, params: Any, requests: Sequence[tuple[Ids, Ids]], num_top: int = 0,
          max_length: int | None = None) -> list[Scores]:
  """Scores the tokens of each continuation behind its context; see `Scores`.

  Args:
    module: the model, from `config.build(rules)`, or a `Decoder` of it.
    params: its parameters.
    requests: (context, continuation), ids. Contexts are complete: with what begins a text, or for
      an encoder with what ends one. A continuation that the model's context does not take at once
      is cut, and each part scored behind as much as there is room for.
    num_top: k.
    max_length: the model's context, in tokens; None is its own.

  Raises:
    UserError: a context is empty.
  """
  decoder = module if hasattr(module, 'extend') else Decoder(module)
  config = decoder.module.config
  longest = max_length or config.max_length
  if not 0 <= num_top <= config.vocab_size:
    raise UserError(f'{num_top} alternatives must be from 0 to vocab_size={config.vocab_size}')
  parts, buckets = [], {}
  for number, (context, continuation) in enumerate(requests):
    if not len(context):
      raise UserError(f'request {number} has an empty context, and nothing scores a first token; '
                      'put the token that begins a text before it')
    for part in _parts(context, continuation, longest, decoder.has_encoder):
      sizes = [round_up(max(len(ids), SHORTEST_BUCKET)) for ids in part]
      bucket = min(sizes[0], longest), min(sizes[1], longest)
      buckets.setdefault(bucket, []).append(len(parts))
      parts.append((number, *part))
  params, found = decoder.prepare(params), [None] * len(parts)
  for bucket, members in sorted(buckets.items()):
    for start in range(0, len(members), LARGEST_BATCH):
      rows = members[start:start + LARGEST_BATCH]
      for i, scores in zip(rows, _score_batch(decoder, params, [parts[i][1:] for i in rows], bucket,
                                              num_top, longest)):
        found[i] = scores
  of = lambda number: [one for (owner, _, _), one in zip(parts, found) if owner == number]
  empty = [np.zeros((0, *tail), kind) for tail, kind in (
      ((), np.int32), ((), np.float32), ((num_top,), np.int32), ((num_top,), np.float32))]
  return [Scores(*map(np.concatenate, zip(empty, *of(number)))) for number in range(len(requests))]


def score_texts(module: Any, params: Any, vocabulary: Any, texts: Sequence[str], num_top: int = 0,
                max_length: int | None = None) -> list[Scores]:
  """Scores the tokens of whole texts, of any length, behind the token that begins texts.

  Args:
    vocabulary: its `begin_id` stands before a text; where it has none, the first token is context,
      and `Scores` begin with the second.
    max_length: see `score`.

  Raises:
    UserError: a text is too short to be scored.
  """
  own = getattr(module, 'module', module)
  if hasattr(own, 'decode'):
    raise UserError(f'{type(own).__name__} scores an output behind an input, and not a text alone; '
                    'take a model that reads from left to right')
  return score(module, params, [of_text(vocabulary, text) for text in texts], num_top, max_length)


def of_text(vocabulary: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
  """(context, continuation) that scores a text; see `score_texts`."""
  ids, begin = vocabulary.encode(text), begin_id(vocabulary)
  if begin is None:
    return ids[:1], ids[1:]
  return np.array([begin], np.int32), ids


class Scorer:
  """`score` of one text at a time, in pieces of one shape: what goes on beside others' work.

  For models that read from left to right over keys and values (GPT).
  """

  def __init__(self, decoder: Decoder, params: Any, num_top: int, max_length: int):
    """Takes a model.

    Args:
      params: as `decoder.prepare` gives them.
      num_top: other tokens at each place.
      max_length: the model's context, in tokens.
    """
    # A piece that is read again would be taken back further than a rolling cache can.
    whole = decoder.cache and dataclasses.replace(decoder.cache, rolling=False)
    self._decoder, self._params = dataclasses.replace(decoder, cache=whole), params
    self._num_top, self._longest = num_top, max_length
    self._piece = min(PIECE, max_length)

  def warm_up(self):
    """Compiles all that any text will need."""
    for room in buckets(self._piece, self._longest, 4):
      for _ in self._read(np.zeros(room, np.int32), room):
        break

  def pieces(self, context: Ids, continuation: Ids) -> Iterator[Scores | None]:
    """Works piece by piece; yields None after each, and at the end the continuation's `Scores`.

    Raises:
      UserError: the context is empty.
    """
    if not len(context):
      raise UserError('the text is empty, or its only token is its first, which nothing scores; '
                      'send a longer one')
    return self._pieces(context, continuation)

  def _pieces(self, context, continuation):
    found = [(np.zeros(0, np.float32), *(np.zeros((0, self._num_top), kind)
                                         for kind in (np.int32, np.float32)))]
    for before, part in _parts(context, continuation, self._longest, False):
      results, whole = [], np.concatenate([before, part])
      for piece in self._read(whole, len(whole) - 1):
        results.append(piece)
        yield None
      found.append([np.concatenate(x)[-len(part):] for x in zip(*results)])
    yield Scores(np.asarray(continuation, np.int32), *map(np.concatenate, zip(*found)))

  def _read(self, tokens, size):
    """Yields log-probabilities of what follows the first `size` tokens, and the top, in pieces."""
    room = bucket_of(size, self._piece, self._longest, 4)
    padded = np.zeros(room + 1, np.int32)
    padded[:len(tokens)] = tokens
    cache = _empty(self._decoder, room)
    for start in range(0, size, self._piece):
      # Where its padding would leave the room, a piece begins earlier, with tokens that stand.
      first = min(start, room - self._piece)
      read, behind = (padded[None, first + i:first + i + self._piece] for i in (0, 1))
      cache, *results = _score_piece(self._decoder, self._num_top, self._params, cache,
                                     np.full(1, first, np.int32), read, behind)
      end = min(size, start + self._piece) - first
      yield [x[0, start - first:end] for x in jax.device_get(results)]


def _parts(context, continuation, longest, encodes):
  """(context, continuation) each, that the model takes, together the whole continuation."""
  context, continuation = (np.asarray(ids, np.int32).reshape(-1) for ids in (context, continuation))
  if encodes:
    if len(continuation) > longest:
      raise UserError(f'a text of {len(continuation)} tokens is longer than what the decoder '
                      f'writes, {longest}; cut it')
    return [(context[-longest:], continuation)] if len(continuation) else []
  whole, parts, done = np.concatenate([context, continuation]), [], len(context)
  room = len(whole) if len(whole) <= longest + 1 else longest // 2 + 1
  while done < len(whole):
    end = min(done + room, len(whole))
    parts.append((whole[max(0, end - longest - 1):done], whole[done:end]))
    done = end
  return parts


def _score_batch(decoder, params, parts, bucket, num_top, longest):
  """Yields `Scores` of (context, continuation) of one bucket of sizes."""
  (T, N), size = bucket, round_up(len(parts))
  inputs_BT, lengths_B = np.zeros((size, T), np.int32), np.ones(size, np.int32)
  read_BN, next_BN, first_B = (np.zeros(shape, np.int32) for shape in ((size, N), (size, N), size))
  starts = []
  for row, (context, continuation) in enumerate(parts):
    inputs_BT[row, :len(context)], lengths_B[row] = context, len(context)
    before = [decoder.start_id] if decoder.has_encoder else context
    whole = np.concatenate([before, continuation])
    # Places behind the context's last are beyond what positions there are, also for padding: so
    # the end of the context is read again where the last of N places would be there.
    first_B[row] = first = min(len(before) - 1, longest - N)
    read, behind = whole[first:first + N], whole[first + 1:first + 1 + N]
    read_BN[row, :len(read)], next_BN[row, :len(behind)] = read, behind
    starts.append(len(before) - 1 - first)
  results = jax.device_get(_score(decoder, num_top, min(T + N, longest), params, inputs_BT,
                                  lengths_B, first_B, read_BN, next_BN))
  for row, (start, (_, continuation)) in enumerate(zip(starts, parts)):
    yield [continuation, *(x[row, start:start + len(continuation)] for x in results)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty(decoder, num_places):
  """A cache of one row."""
  options = () if decoder.cache is None else (decoder.cache,)
  return decoder.module.config.init_cache(1, num_places, *options)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _score_piece(decoder, num_top, params, cache, first_B, read_BN, next_BN):
  """Behind `first` places of the cache reads tokens; returns the cache, and as `_score` does."""
  logits_BNV, cache = decoder.extend(params, read_BN, decoder.rewind(cache, first_B))
  return cache, *_chosen(logits_BNV, next_BN, num_top)


def _chosen(logits_BPV, next_BP, num_top):
  """Log-probabilities [B, P] of the next tokens, and the top [B, P, K]: tokens and theirs."""
  log_probs_BPV = jax.nn.log_softmax(logits_BPV)
  chosen_BP = jnp.take_along_axis(log_probs_BPV, next_BP[..., None], axis=-1)[..., 0]
  top_BPK, tokens_BPK = lax.top_k(log_probs_BPV, num_top)
  return chosen_BP, tokens_BPK, top_BPK


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score(decoder, num_top, num_places, params, inputs_BT, lengths_B, first_B, read_BN, next_BN):
  """Behind `first` places of the inputs reads tokens; returns the log-probabilities [B, N] of what
  follows each, and the top [B, N, K]: tokens and theirs."""
  B, N = read_BN.shape
  _, cache = decoder.start(params, inputs_BT, lengths_B, num_places)
  chunk = next(size for size in range(min(N, CHUNK), 0, -1) if N % size == 0)

  def step(cache, tokens):
    read_BP, next_BP = tokens
    logits_BPV, cache = decoder.extend(params, read_BP, cache)
    return cache, _chosen(logits_BPV, next_BP, num_top)

  chunks = [jnp.moveaxis(x_BN.reshape(B, -1, chunk), 1, 0) for x_BN in (read_BN, next_BN)]
  _, results = lax.scan(step, decoder.rewind(cache, first_B), tuple(chunks))
  return tuple(jnp.moveaxis(x, 0, 1).reshape(B, N, *x.shape[3:]) for x in results)
