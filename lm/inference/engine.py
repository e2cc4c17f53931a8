"""Continuous batching: requests come and go while a loop of steps decodes all that are there.

    engine = Engine(module, params, EngineConfig(), max_length)
    engine.warm_up()
    ticket = engine.submit(Request(prompt, SamplingConfig(), seed=1, eos_id=eos))  # any thread
    while engine.step(): ...                                                     # one thread
    ticket.result()

A request's text is that of `generate`: it depends on the request alone (Orca, OSDI 2022, for
batches that change at every step; vLLM, arXiv:2309.06180, for pages).
"""
from collections.abc import Callable
import dataclasses
import functools
import itertools
import threading
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
import numpy as np

from lm.errors import UserError
from lm.inference import paged
from lm.inference.decoder import Decoder
from lm.inference.pages import PagePool
from lm.inference.prompts import bucket_of, buckets
from lm.inference.requests import asked_of, key_data, Request, Ticket
from lm.inference.sampling import SamplingConfig
from lm.inference.scheduler import Row, Scheduler

LEAST_CHUNK = 16    # tokens of a prompt; fewer cost the same
LEAST_PLACES = 128  # of a row in a program; fewer cost nearly the same
PATIENCE = 8        # steps that a request waits for the place of one that has ended
IDLE = SamplingConfig(temperature=0)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """How much is worked on at once; a request's text does not depend on it.

  num_rows: texts that are decoded together.
  page_size: tokens of a page; what texts share are whole pages.
  cache_tokens: tokens whose keys and values there is room for, together; one text of the full
    context fits in any case.
  host_tokens: of those that do not fit any more, so many stay in the host's memory, in whole pages,
    until a text that begins with them, or was pre-empted, needs them. The others are read anew.
  chunk: tokens of prompts that are read before all rows decode again.
  steps: that are decoded at once while no prompt is to be read; their tokens come together.
  """
  num_rows: int = 16
  page_size: int = 16
  cache_tokens: int = 16384
  host_tokens: int = 0
  chunk: int = 256
  steps: int = 8

  def __post_init__(self):
    for field in dataclasses.fields(self):
      least = 0 if field.name == 'host_tokens' else 1
      if getattr(self, field.name) < least:
        raise ValueError(f'{field.name}={getattr(self, field.name)} must be at least {least}')


@dataclasses.dataclass
class Counts:
  """What an engine has done: tokens that were chosen, read, found in pages, and of these brought
  from the host; steps; requests that were pre-empted, and that ended."""
  chosen: int = 0
  read: int = 0
  known: int = 0
  brought: int = 0
  steps: int = 0
  preempted: int = 0
  finished: int = 0


class Engine:
  """Decodes requests together over paged keys and values.

  `submit`, `wait` and `Ticket.cancel` may be called from any thread; `step` from one.

  Attributes:
    decoder: the model. params: as its `prepare` gives them.
    max_length: its context, in tokens.
  """

  def __init__(self, module: Any, params: Any, config: EngineConfig, max_length: int,
               clock: Callable[[], float] = time.monotonic):
    """module: the model, or a `Decoder` of it that says how its weights are kept; max_length: its
    context, in tokens.

    Raises:
      UserError: the model is of no family whose cache is keys and values of its own tokens.
    """
    decoder = Decoder(module) if isinstance(module, nn.Module) else module
    module = decoder.module
    if not hasattr(module.config, 'init_pages'):
      raise UserError(f'{type(module).__name__} has no cache that can be kept in pages; the engine '
                      'takes decoders (GPT), and `generate` every family')
    if decoder.cache is not None and decoder.cache.window is not None:
      raise UserError(f'{decoder.cache} forgets tokens that layers see; the engine keeps them all, '
                      'so leave the window out, or take `generate`')
    self.config, self.counts, self._clock = config, Counts(), clock
    self.max_length, size = max_length, config.page_size
    self._chunk = min(config.chunk, max_length)
    # Of a model whose layers all have it, and texts that are longer.
    window = None if module.config.local_layers is not None else module.config.window
    self._window = window if window is not None and window < max_length else None
    # Of a row in a program; what is behind the window has no place there.
    self._most_places = max_length if self._window is None else (
        self._window + size + max(self._chunk, config.steps))
    pages = -(-max(config.cache_tokens, self._most_places) // size) + 1
    self.pool = PagePool(pages, size, config.host_tokens // size, self)
    self.scheduler = Scheduler(self.pool, config.num_rows, config.steps, self._window, self._chunk)
    self.decoder, self.params = decoder, decoder.prepare(params)
    self._in_place = paged.reads_in_place()
    # Where arrays without a sharding of their own are: always said, so that no program is compiled
    # for arrays that are anywhere too.
    mesh, leaf = module.rules.mesh, jax.tree.leaves(self.params)[0]
    self._everywhere = module.rules.sharding() if mesh else SingleDeviceSharding(*leaf.devices())
    pool = paged.begin_pool(decoder, pages, config.page_size, self._in_place)
    self._pool = pool if mesh else jax.device_put(pool, self._everywhere)
    row = self._sampler(IDLE, [0])  # One more than rows: that of those that are idle.
    self._samplers = jax.device_put(
        jax.tree.map(lambda x: jnp.repeat(x, config.num_rows + 1, 0), row), self._everywhere)
    self._idle_key = key_data(np.zeros(1, np.int32), 0)
    self._asked = functools.lru_cache(64)(asked_of)
    self._numbers, self._lock = itertools.count(), threading.Condition()
    self._new: list[Ticket] = []
    self._tickets: dict[Row, Ticket] = {}

  @property
  def num_rows(self) -> int:
    """Texts that are decoded together."""
    return self.config.num_rows

  @property
  def vocab_size(self) -> int:
    """Of the model, which may be more than the vocabulary's."""
    return self.decoder.module.config.vocab_size

  @property
  def num_waiting(self) -> int:
    """Requests that are not worked on yet."""
    return len(self._new) + len(self.scheduler.waiting)

  def submit(self, request: Request) -> Ticket:
    """Puts a request behind those that wait.

    Raises:
      UserError: see `Request.read`.
    """
    if request.num_top:
      raise UserError(f'num_top={request.num_top}: the engine knows the chosen tokens alone; ask '
                      '`scores.Scorer` for others')
    prompt = np.asarray(request.prompt, np.int32).reshape(-1)
    tokens = request.read(self.max_length)
    limit = min(request.sampling.max_new_tokens, self.max_length - len(prompt))
    row = Row(next(self._numbers), tokens, limit)
    ticket = Ticket(request, row, key_data(prompt, request.seed))
    with self._lock:
      self._new.append(ticket)
      self._lock.notify_all()
    return ticket

  def wait(self, timeout: float | None = None) -> bool:
    """Waits until there is something to do; returns whether there is."""
    with self._lock:
      return self._lock.wait_for(lambda: bool(self._new or self._tickets), timeout)

  def run(self):
    """Steps until nothing is left to do."""
    while self.step():
      pass

  def step(self) -> bool:
    """Reads a chunk of prompts and decodes all rows that have read theirs, by one token or by
    several; returns whether there is more to do."""
    self._receive()
    self._decode(self._read())
    return bool(self._tickets or self._new)

  def keep(self, page: int) -> Any:
    """Keys and values of a page, in the host's memory."""
    return paged.to_host(paged.take_page(self._pool, np.int32(page)))

  def bring(self, kept: Any, page: int):
    """Puts them into a page."""
    self._pool = paged.put_page(self.decoder, self._pool, np.int32(page), paged.to_device(kept))
    self.counts.brought += self.config.page_size

  def warm_up(self, constrained: bool = False):
    """Compiles all that any request will need; before the first of them.

    Args:
      constrained: also what those with a constraint need.
    """
    for places in buckets(LEAST_PLACES, self._most_places, 2):
      for size in buckets(LEAST_CHUNK, self._chunk, 4):
        if size <= places:
          self._run_read(np.zeros(size, np.int32), [], 0, 0, 0, 0, places)
      for size in buckets(1, self.config.num_rows, 4):
        for masks in (None, {})[:1 + constrained]:
          self._run_decode([], size, places, 1, masks)
    if self.config.host_tokens:
      self._pool = paged.put_page(self.decoder, self._pool, np.int32(0),
                                  paged.to_device(self.keep(0)))
    scratch = np.int32(self.config.num_rows)
    row = paged.take_row(self._samplers, scratch)
    self._samplers = paged.put_row(self._samplers, scratch, row)
    jax.block_until_ready(self._pool)

  def _receive(self):
    """Takes what was handed in, and ends what was cancelled or is overdue."""
    with self._lock:
      new, self._new = self._new, []
      self._tickets.update((ticket._row, ticket) for ticket in new)
    for ticket in new:
      self.scheduler.add(ticket._row)
    now = self._clock()
    for ticket in list(self._tickets.values()):
      deadline = ticket.request.deadline
      if ticket._cancelled:
        self._end(ticket, 'cancelled')
      elif deadline is not None and now >= deadline:
        self._end(ticket, 'deadline')

  def _read(self) -> bool:
    """Reads prompts, the first first, up to a chunk of tokens; returns whether that was spent."""
    left = self.config.chunk
    while left > 0:
      row = self.scheduler.reading
      if row is None:
        row = self.scheduler.admit()
        if row is None:
          return False
        self._begin(row)
      if row.num_unread:
        count = min(row.num_unread, left)
        if not self.scheduler.make_room(row, count):
          return False
        size = bucket_of(count, LEAST_CHUNK, self._chunk, 4)
        shift = row.first_page * self.config.page_size
        # Where its padding would leave the places, a chunk begins earlier, with tokens that stand.
        start = min(row.num_read - shift, self._most_places - size)
        tokens = np.zeros(size, np.int32)
        known = row.tokens[shift + start:row.num_read + count]
        tokens[:len(known)] = known
        places = bucket_of(start + size, LEAST_PLACES, self._most_places, 2)
        self._run_read(tokens, row.pages, shift, start, row.num_read - shift, count, places)
        self.scheduler.has_read(row, row.num_read + count)
        self.counts.read += count
        left -= size
    return True

  def _begin(self, row):
    """Gives an admitted row its sampler's state: a new one, or what it had."""
    ticket = self._tickets[row]
    self.counts.known += row.num_known
    if ticket._sampler is None:
      ticket._sampler = self._sampler(ticket.request.sampling, row.tokens)
    self._samplers = paged.put_row(self._samplers, np.int32(row.slot), ticket._sampler)

  def _sampler(self, config, tokens):
    """The sampler's state of a text that begins with these tokens."""
    tokens_1T = np.zeros((1, self.max_length), np.int32)
    tokens_1T[0, :len(tokens)] = tokens
    row = paged.begin_row(asked_of((config, -1)), tokens_1T, np.full(1, len(tokens), np.int32),
                          self.max_length + 1)
    return jax.device_put(row, self._everywhere)

  def _decode(self, reads: bool):
    """Goes on with all rows that have read their prompts.

    Args:
      reads: whether prompts are left to be read, which shall not wait for long.
    """
    constrained = any(self._tickets[row].request.constraint for row in self.scheduler.running)
    most = PATIENCE if self.scheduler.waiting else self.config.steps
    rows, steps, stopped = self.scheduler.reserve(
        1 if reads or constrained else min(most, self.config.steps))
    for row, slot in stopped:
      self._tickets[row]._sampler = paged.take_row(self._samplers, np.int32(slot))
    self.counts.preempted += len(stopped)
    masks = self._masks(rows)
    rows = [row for row in rows if row in self._tickets]
    if not rows:
      return
    size = bucket_of(len(rows), 1, self.config.num_rows, 4)
    longest = max(self._num_held(row) + min(steps, row.num_left) for row in rows)
    places = bucket_of(min(longest + 1, self._most_places), LEAST_PLACES, self._most_places, 2)
    tokens_BX, log_probs_BX, counts_B = self._run_decode(
        rows, size, places, steps, masks if constrained else None)
    self.counts.steps += int(counts_B.max())
    for i, row in enumerate(rows):
      self._extend(row, tokens_BX[i, :counts_B[i]].tolist(), log_probs_BX[i].tolist())

  def _masks(self, rows):
    """What may follow, of the rows that have a constraint."""
    masks = {}
    for row in rows:
      ticket = self._tickets[row]
      if ticket.request.constraint is not None:
        try:
          masks[row] = ticket.request.constraint.mask()
        except Exception as raised:  # The others go on.
          self._end(ticket, 'cancelled', raised)
    return masks

  def _extend(self, row, tokens, log_probs):
    """Puts chosen tokens behind a row, up to where it ends."""
    ticket = self._tickets[row]
    tokens, stopped, error = ticket.extend(tokens, log_probs, row.num_left)
    row.tokens += tokens
    row.num_left -= len(tokens)
    self.counts.chosen += len(tokens)
    self.scheduler.has_read(row, len(row.tokens) - 1)
    if stopped:
      self._end(ticket, stopped, error)

  def _end(self, ticket, stopped, error=None):
    """A request is over: what it held is free, and who waits for it is told."""
    self.scheduler.remove(ticket._row)
    with self._lock:
      del self._tickets[ticket._row]
    self.counts.finished += 1
    ticket.end(stopped, error)

  def _num_held(self, row):
    """Tokens that stand in a row's pages."""
    return row.num_read - row.first_page * self.config.page_size

  def _run_read(self, tokens, pages, shift, start, first, count, places):
    numbers = [np.full(1, number, np.int32) for number in (shift, start, first, count)]
    self._pool = paged.read(self.decoder, self.max_length, self.params, self._pool, tokens[None],
                            self._table([pages], 1, places), *numbers)

  def _run_decode(self, rows, size, places, steps, masks):
    """Returns tokens and log-probabilities [size, X] and how many they are [size]."""
    tickets = [self._tickets[row] for row in rows]
    idle = size - len(rows)
    column = lambda values, rest: np.asarray([*values, *[rest] * idle], np.int32)
    keys = [ticket._key for ticket in tickets] + [self._idle_key] * idle
    arrays = paged.Rows(
        column((row.slot for row in rows), self.config.num_rows),
        self._table([row.pages for row in rows], size, places),
        column((row.first_page * self.config.page_size for row in rows), 0),
        column((self._num_held(row) for row in rows), 0),
        column((row.tokens[-1] for row in rows), 0), column((row.num_left for row in rows), 0),
        column((len(ticket.tokens) for ticket in tickets), 0), np.stack(keys),
        column((ticket.request.eos_id for ticket in tickets), -1))
    allowed = None
    if masks is not None:
      words = -(-self.decoder.module.config.vocab_size // 32)
      allowed = np.full((size, words), 0xffffffff, np.uint32)
      for i, row in enumerate(rows):
        allowed[i] = masks.get(row, allowed[i])
    asked = self._asked(*((ticket.request.sampling, ticket.request.eos_id) for ticket in tickets),
                        *[(IDLE, -1)] * idle)
    *results, self._pool, self._samplers = paged.decode(
        self.decoder, self.max_length, self.config.steps, self._in_place, self.params,
        self._pool, self._samplers, arrays, asked, allowed, np.int32(steps))
    return jax.device_get(results)

  def _table(self, pages, size, places):
    """The pages of each row, [size, P] for so many places, with page 0 behind them."""
    width = -(-places // self.config.page_size)
    table_BP = np.zeros((size, width), np.int32)
    for row, own in enumerate(pages):
      own = own[:width]
      table_BP[row, :len(own)] = own
    return table_BP
