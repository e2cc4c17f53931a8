"""A request to an engine, and what its caller holds meanwhile."""
from collections.abc import Callable
import dataclasses
import threading
from typing import NamedTuple, Protocol

import jax
import numpy as np

from lm.errors import UserError
from lm.inference.generate import Completion, request_key
from lm.inference.prompts import BOS_ID, Stopped
from lm.inference.sampling import choices, Choices, SamplingConfig, Sizes, sizes
from lm.inference.scheduler import Row
from lm.inference.stops import Stop


class Constraint(Protocol):
  """What may follow; it is asked before each token and told what was chosen."""

  def mask(self) -> np.ndarray:
    """Returns uint32 [ceil(V / 32)], a bit a token, the lowest first."""

  def advance(self, token: int) -> None:
    """The text goes on with this token."""


@dataclasses.dataclass(frozen=True)
class Request:
  """A text to go on with.

  prompt: int [tokens], without what stands before every prompt: bos_id, None for nothing.
  eos_id: the token that ends the text.
  deadline: of the engine's clock (`time.monotonic`), in seconds; what is chosen by then is kept.
  on_tokens: called in the engine's thread with new tokens and their log-probabilities.
  on_end: called there when it is over; it must not raise.
  num_top: so many most probable tokens at each place are kept in `Ticket.top`; `RowEngine` alone
    does so.
  """
  prompt: np.ndarray
  sampling: SamplingConfig = SamplingConfig()
  seed: int = 0
  eos_id: int = -1
  bos_id: int | None = BOS_ID
  deadline: float | None = None
  stop: Stop | None = None
  constraint: Constraint | None = None
  on_tokens: Callable[[list[int], list[float]], None] | None = None
  on_end: Callable[['Ticket'], None] | None = None
  num_top: int = 0

  def read(self, max_length: int, has_encoder: bool = False) -> list[int]:
    """All tokens that a model of this context reads before the first new one.

    Raises:
      UserError: its prompt leaves no room in the context, or is empty where nothing stands before;
        or it has more bad words than there is room for, or forced words.
    """
    prompt = np.asarray(self.prompt, np.int32).reshape(-1).tolist()
    if len(prompt) >= max_length:
      raise UserError(f'the prompt has {len(prompt)} tokens, which leaves no room for a new one in '
                      f'a context of {max_length}; cut it to at most {max_length - 1}')
    tokens = ([*prompt, self.eos_id] if has_encoder else
              [*([] if self.bos_id is None else [self.bos_id]), *prompt])
    if not tokens:
      raise UserError('the prompt is empty and this model has no token that begins a text; give it '
                      'at least one')
    if sizes([self.sampling]) != Sizes():
      raise UserError(f'a request may have {Sizes().sequences} bad words and biased tokens, of at '
                      f'most {Sizes().words} tokens; leave some out')
    if self.sampling.forced_words:
      raise UserError('forced words are a matter of beam search, and the engine does not search; '
                      'leave them out')
    return tokens


class Ticket:
  """A request that was handed in.

  Attributes:
    tokens, log_probs: what has been chosen so far.
    stopped: why it ended; None while it goes on.
    error: what its `on_tokens`, `stop` or `constraint` raised; that ended it, as if cancelled.
    top: (tokens, log-probabilities) of each place, the most probable first, if it asks for them.
  """

  def __init__(self, request: Request, row: Row, key: np.ndarray):
    self.request, self.tokens, self.log_probs, self.top = request, [], [], []
    self.stopped: Stopped | None = None
    self.error: Exception | None = None
    self._ended, self._cancelled = threading.Event(), False
    self._row, self._key, self._sampler = row, key, None

  def cancel(self):
    """Ends it before the next step; from any thread, at any time."""
    self._cancelled = True

  def result(self, timeout: float | None = None) -> Completion:
    """Waits for the end.

    Raises:
      TimeoutError: that took longer than `timeout` seconds.
    """
    if not self._ended.wait(timeout):
      raise TimeoutError(f'no end after {timeout} s')
    return Completion(np.asarray(self.tokens, np.int32), np.asarray(self.log_probs, np.float32),
                      self.stopped)

  def extend(self, tokens: list[int], log_probs: list[float], num_left: int) -> 'Extended':
    """Puts chosen tokens behind it, up to where it ends; for the engine.

    Args:
      num_left: how many it may still have.
    """
    request, error, stopped, count = self.request, None, None, 0
    try:
      for count, token in enumerate(tokens, 1):
        if request.constraint is not None:
          request.constraint.advance(token)
        if token == request.eos_id:
          stopped = 'eos'
        elif request.stop is not None and request.stop.advance(token):
          stopped = 'stop'
        elif count == num_left:
          is_whole = len(self.tokens) + count == request.sampling.max_new_tokens
          stopped = 'length' if is_whole else 'context'
        if stopped:
          break
      tokens, log_probs = tokens[:count], log_probs[:count]
      if request.on_tokens is not None:
        request.on_tokens(tokens, log_probs)
    except Exception as raised:  # The others go on.
      error, stopped = raised, 'cancelled'
    self.tokens += tokens
    self.log_probs += log_probs
    return Extended(tokens, stopped, error)

  def end(self, stopped: Stopped, error: Exception | None = None):
    """It is over, and who waits for it is told; for the engine."""
    self.stopped, self.error, self._sampler = stopped, error, None
    self._ended.set()
    if self.request.on_end is not None:
      self.request.on_end(self)


class Extended(NamedTuple):
  """tokens: that a request got. stopped: why it ended with them, if it did; error: what ended it.
  """
  tokens: list[int]
  stopped: Stopped | None
  error: Exception | None


def key_data(prompt: np.ndarray, seed: int) -> np.ndarray:
  """The data of a request's key."""
  return np.asarray(jax.random.key_data(request_key(prompt, seed)))


def asked_of(*asked: tuple[SamplingConfig, int]) -> Choices:
  """What (config, end of text) each asks, in tables of one size: the programs are those of all."""
  configs, ends = zip(*asked)
  return choices(configs, ends, Sizes())
