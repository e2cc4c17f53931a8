"""What goes between server and worker: lines of JSON.

A job to the worker is an object with a number `id` that names it and an `op`:

  complete  prompt (text, ids or messages), sampling (fields of SamplingConfig), seed, seconds;
            top, if log-probabilities of the tokens are asked for with so many others each
  score     prompt, top: log-probabilities of the text's own tokens
  infill    before, after, sampling, seed, seconds: what may stand between
  embed, classify, tag, fill
            input: a text; tag takes a list of words too
  judge     text, start, windows, final: see `filters`
  cancel    of the job `id`; what it has by then is lost
  stop      ends the worker when all jobs are done

An event from the worker carries the `id` of its job, or `ready` once at the start. `text` is what
came behind the text so far, with `tokens` (texts) and `log_probs` if they are asked for, and with
how many `prompt_tokens` were read and `new_tokens` written by then; the last event of a job has
`done`, or `error`, a sentence, with `kind` 'user' for a mistake of the request.
"""
from collections.abc import Callable
import json
from typing import Any, Protocol

Job = dict[str, Any]
Event = dict[str, Any]
Tell = Callable[[Event], None]

LONGEST_LINE = 64 << 20  # bytes


class Backend(Protocol):
  """What a worker computes with. All methods are called by one thread.

  abilities: the ops that it takes.
  facts: what clients may know of the model: JSON.
  """
  abilities: tuple[str, ...]
  facts: dict[str, Any]

  def warm_up(self) -> None:
    """Compiles what requests will need, before the first of them."""

  def submit(self, job: Job, tell: Tell) -> None:
    """Takes a job; `tell` is called with its events, the last with `done` or `error`.

    Raises:
      UserError, ValueError: the job is wrong; `tell` has not been called.
    """

  def cancel(self, number: int) -> None:
    """Ends a job, if it still goes on, without more events but one with `done`."""

  def step(self) -> float | None:
    """Works for a moment; returns after how many seconds, if no job comes before, there is more to
    do: 0 for at once, None for never."""


def dump(message: dict[str, Any]) -> bytes:
  """A line."""
  return json.dumps(message, ensure_ascii=False, separators=(',', ':')).encode(
      'utf-8', 'replace') + b'\n'
