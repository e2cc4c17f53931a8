"""Many texts at once over a model that reads and writes rows: what the paged engine does not take.

    engine = RowEngine(rows)      # of a T5 or Transformer-XL, or of an exported decoder
    engine.warm_up()
    ticket = engine.submit(Request(prompt, SamplingConfig(), seed=1, eos_id=eos))
    while engine.step(): ...      # one thread
    ticket.result()

A row is one text, and all rows go on together, a token each at a step; one that ends makes room for
the next. What a token is depends on the request alone, as in `generate`: both choose by `sample`,
under the same keys.
"""
from collections import deque
from collections.abc import Callable, Sequence
import functools
import itertools
import time
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lm.inference import paged
from lm.inference.prompts import bucket_of, buckets
from lm.inference.requests import asked_of, key_data, Request, Ticket
from lm.inference.sampling import sample, SamplerState, SamplingConfig
from lm.inference.scheduler import Row

CHUNK = 256  # tokens of prompts that are read before all rows go on
IDLE = SamplingConfig(temperature=0)


class Rows(Protocol):
  """A model that goes on with several texts. Rows are numbered from 0.

  num_rows: texts at once.
  vocab_size: of the logits. max_length: the model's context, in tokens.
  has_encoder: whether prompts are an encoder's, and do not count in the context of the text.
  chunk: tokens of a prompt that `read` takes at once.
  """
  num_rows: int
  vocab_size: int
  max_length: int
  has_encoder: bool
  chunk: int

  def warm_up(self) -> None:
    """Compiles what any text will need."""

  def read(self, row: int, tokens: np.ndarray, num_new: int) -> np.ndarray:
    """Puts tokens of a prompt behind those that a row has; returns logits [V] of what follows.

    num_new: tokens that the row will get at most behind its prompt.
    """

  def extend(self, rows: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """Puts a token behind each of these rows; returns logits [len(rows), V] of what follows."""

  def drop(self, row: int) -> None:
    """The row is over, and its next `read` begins another."""


class RowEngine:
  """Decodes requests together over `Rows`; `submit` and `step` are called by one thread."""

  def __init__(self, rows: Rows, clock: Callable[[], float] = time.monotonic):
    self.num_rows, self.max_length = rows.num_rows, rows.max_length
    self.vocab_size = rows.vocab_size
    self._rows, self._clock = rows, clock
    self._numbers, self._free = itertools.count(), list(range(rows.num_rows - 1, -1, -1))
    self._waiting: deque[Ticket] = deque()
    self._running: list[Ticket] = []
    # One more than rows: that of those that are idle.
    self._samplers = jax.tree.map(lambda x: jnp.repeat(x, rows.num_rows + 1, 0), self._sampler(
        IDLE, []))
    self._idle_key = key_data(np.zeros(1, np.int32), 0)
    self._asked = functools.lru_cache(64)(asked_of)

  def submit(self, request: Request) -> Ticket:
    """Puts a request behind those that wait.

    Raises:
      UserError: see `Request.read`.
    """
    tokens = request.read(self.max_length, self._rows.has_encoder)
    prompt = np.asarray(request.prompt, np.int32).reshape(-1)
    room = self.max_length - (0 if self._rows.has_encoder else len(prompt))
    row = Row(next(self._numbers), tokens, min(request.sampling.max_new_tokens, room))
    ticket = Ticket(request, row, key_data(prompt, request.seed))
    self._waiting.append(ticket)
    return ticket

  def step(self) -> bool:
    """Reads a chunk of prompts and chooses a token for all rows that have read theirs; returns
    whether there is more to do."""
    self._end_late()
    going = [ticket for ticket in self._running if ticket.tokens]
    logits = {}
    if going:
      found = self._rows.extend([ticket._row.slot for ticket in going],
                                [ticket.tokens[-1] for ticket in going])
      logits = {ticket: found[i] for i, ticket in enumerate(going)}
    logits.update(self._read())
    if logits:
      self._choose(logits)
    return bool(self._waiting or self._running)

  def warm_up(self, constrained: bool = False):
    """Compiles all that any request will need; before the first of them.

    Args:
      constrained: also what those with a constraint need.
    """
    self._rows.warm_up()
    for size in buckets(1, self.num_rows, 4):
      for masks in (None, {})[:1 + constrained]:
        self._sample([], np.zeros((size, self.vocab_size), np.float32), masks)
    self._put(self.num_rows, self._sampler(IDLE, []))

  def _end_late(self):
    """Ends what was cancelled or is overdue."""
    now = self._clock()
    for ticket in [*self._waiting, *self._running]:
      deadline = ticket.request.deadline
      if ticket._cancelled:
        self._end(ticket, 'cancelled')
      elif deadline is not None and now >= deadline:
        self._end(ticket, 'deadline')

  def _read(self):
    """Reads prompts, the first first, up to a chunk of tokens; yields (ticket, logits) of each that
    is read to its end."""
    left = CHUNK
    while left > 0:
      ticket = next((one for one in self._running if one._row.num_read < len(one._row.tokens)),
                    None)
      if ticket is None and self._waiting and self._free:
        ticket = self._waiting.popleft()
        self._running.append(ticket)
        row = ticket._row
        row.slot = self._free.pop()
        inputs = [] if self._rows.has_encoder else row.tokens
        self._put(row.slot, self._sampler(ticket.request.sampling, inputs))
      if ticket is None:
        return
      row = ticket._row
      tokens = np.asarray(row.tokens[row.num_read:row.num_read + self._rows.chunk], np.int32)
      logits_V = self._rows.read(row.slot, tokens, row.num_left)
      row.num_read += len(tokens)
      left -= len(tokens)
      if row.num_read == len(row.tokens):
        yield ticket, logits_V

  def _choose(self, logits):
    """Chooses the next token of each ticket by its logits."""
    masks = {}
    for ticket in list(logits):
      if ticket.request.constraint is not None:
        try:
          masks[ticket] = ticket.request.constraint.mask()
        except Exception as raised:  # The others go on.
          self._end(ticket, 'cancelled', raised)
          del logits[ticket]
    if not logits:
      return
    size = bucket_of(len(logits), 1, self.num_rows, 4)
    logits_BV = np.zeros((size, self.vocab_size), np.float32)
    logits_BV[:len(logits)] = np.stack(list(logits.values()))
    tokens_B, log_probs_B = self._sample(list(logits), logits_BV, masks or None)
    for ticket, token, log_prob, logits_V in zip(logits, tokens_B.tolist(), log_probs_B.tolist(),
                                                 logits_BV):
      if ticket.request.num_top:
        ticket.top.append(_top(logits_V, ticket.request.num_top))
      _, stopped, error = ticket.extend([token], [log_prob], ticket._row.num_left)
      ticket._row.num_left -= 1
      if stopped:
        self._end(ticket, stopped, error)

  def _sample(self, tickets, logits_BV, masks):
    """Tokens and log-probabilities [B] of the tickets, and of idle rows behind them."""
    idle = len(logits_BV) - len(tickets)
    column = lambda values, rest: np.asarray([*values, *[rest] * idle], np.int32)
    allowed_BW = None
    if masks is not None:
      allowed_BW = np.full((len(logits_BV), -(-self.vocab_size // 32)), 0xffffffff, np.uint32)
      for i, ticket in enumerate(tickets):
        allowed_BW[i] = masks.get(ticket, allowed_BW[i])
    asked = self._asked(*((ticket.request.sampling, ticket.request.eos_id) for ticket in tickets),
                        *[(IDLE, -1)] * idle)
    token_B, log_prob_B, self._samplers = _sample(
        self._samplers, column((ticket._row.slot for ticket in tickets), self.num_rows), logits_BV,
        np.stack([*(ticket._key for ticket in tickets), *[self._idle_key] * idle]),
        column((len(ticket.tokens) for ticket in tickets), 0), asked, allowed_BW)
    return jax.device_get((token_B, log_prob_B))

  def _sampler(self, config, tokens):
    """The sampler's state of a text that begins with these tokens."""
    tokens_1T = np.zeros((1, self.max_length), np.int32)
    tokens_1T[0, :len(tokens)] = tokens
    # An encoder-decoder's text begins with a token that it never writes.
    length_1 = np.full(1, max(1, len(tokens)), np.int32)
    return paged.begin_row(asked_of((config, -1)), tokens_1T, length_1, self.max_length + 1)

  def _put(self, slot, row):
    self._samplers = paged.put_row(self._samplers, np.int32(slot), row)

  def _end(self, ticket, stopped, error=None):
    """A request is over: its row is free, and who waits for it is told."""
    if ticket._row.slot is None:
      self._waiting.remove(ticket)
    else:
      self._running.remove(ticket)
      self._rows.drop(ticket._row.slot)
      self._free.append(ticket._row.slot)
    ticket.end(stopped, error)


@functools.partial(jax.jit, donate_argnums=0)
def _sample(samplers: SamplerState, slots_B, logits_BV, keys_BX, step_B, asked, allowed_BW):
  """Tokens and log-probabilities of rows whose state stands in these slots, and all states."""
  keys_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys_BX), step_B)
  state = jax.tree.map(lambda x: x[slots_B], samplers)
  token_B, log_prob_B, state = sample(logits_BV, keys_B, asked, state, allowed_BW)
  samplers = jax.tree.map(lambda x, new: x.at[slots_B].set(new), samplers, state)
  return token_B, log_prob_B, samplers


def _top(logits_V, count):
  """The most probable tokens and their log-probabilities."""
  logits_V = np.asarray(logits_V, np.float32)
  largest = logits_V.max()
  tokens = np.argsort(-logits_V, kind='stable')[:count]
  return tokens, logits_V[tokens] - largest - np.log(np.exp(logits_V - largest).sum())
