"""The text of a completion while it grows, and the strings at which it stops.

A token may hold a part of a character, or the end of one word and the beginning of a stop string.
So tokens become text only when their characters are whole, and text is given out only when it is no
part of a stop string.
"""
from collections.abc import Callable, Sequence
from typing import Protocol

BROKEN = '\N{REPLACEMENT CHARACTER}'  # What a decoder makes of bytes that are no character yet.


class Stop(Protocol):
  """What ends a completion besides the end of document."""

  def advance(self, token: int) -> bool:
    """The text goes on with this token; returns whether it shall end there."""


class Detokenizer:
  """Tokens in, text out, character by character.

  Attributes:
    ids: all tokens so far.
  """

  def __init__(self, decode: Callable[[Sequence[int]], str]):
    """Begins a text.

    Args:
      decode: of a vocabulary: the text of ids. Spaces at the border of tokens may depend on those
        before them, so it is given the last ones too.
    """
    self.ids: list[int] = []
    self._decode = decode
    self._context = self._known = 0  # ids from which to decode, and up to which text was given out.

  def feed(self, token: int) -> str:
    """What is new of the text: '' while a character is not whole."""
    self.ids.append(int(token))
    text, length = self._rest()
    if len(text) <= length or text.endswith(BROKEN):
      return ''
    self._context, self._known = self._known, len(self.ids)
    return text[length:]

  def finish(self) -> str:
    """What is left at the end: a character that never became whole."""
    text, length = self._rest()
    self._context = self._known = len(self.ids)
    return text[length:]

  def _rest(self):
    """The text from the context on, and how much of it was given out."""
    decode = lambda end: self._decode(self.ids[self._context:end])
    return decode(None), len(decode(self._known))


class StopStrings:
  """Text in, text out, up to the first of some strings.

  What comes out is the same however the text is cut into pieces: of several strings that which ends
  first counts, and of those the longest.

  Attributes:
    stopped_by: the string that was found; None before.
  """

  def __init__(self, stops: Sequence[str]):
    if not all(stops):
      raise ValueError('an empty stop string stops everything; leave it out')
    self.stopped_by: str | None = None
    self._stops, self._held = tuple(stops), ''

  def feed(self, piece: str) -> str:
    """What may be given out: neither a stop string, nor a part of one, nor what is behind it."""
    if self.stopped_by is not None:
      return ''
    text = self._held + piece
    found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops
             if stop in text]
    if found:
      end, length, self.stopped_by = min(found)
      self._held = ''
      return text[:end + length]
    longest = max(map(len, self._stops), default=1) - 1
    begin = next((i for i in range(max(0, len(text) - longest), len(text))
                  if any(stop.startswith(text[i:]) for stop in self._stops)), len(text))
    self._held = text[begin:]
    return text[:begin]

  def finish(self) -> str:
    """What was held back and became no stop string."""
    held, self._held = self._held, ''
    return held


class Stream:
  """The text of a completion: its tokens in, text out, up to a stop string.

  Attributes:
    text: all that was given out.
    stopped: whether a stop string was found.
  """

  def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
    """Begins a completion; see `Detokenizer`, `StopStrings`."""
    self.text = ''
    self._tokens, self._stops = Detokenizer(decode), StopStrings(stops)

  @property
  def stopped(self) -> bool:
    return self._stops.stopped_by is not None

  def feed(self, token: int) -> str:
    """What may be given out now."""
    return self._give(self._stops.feed(self._tokens.feed(token)))

  def advance(self, token: int) -> bool:
    """Feeds a token and returns whether a stop string is complete: what `Stop` asks."""
    self.feed(token)
    return self.stopped

  def finish(self) -> str:
    """What is left when no more tokens come."""
    return self._give(self._stops.feed(self._tokens.finish()) + self._stops.finish())

  def _give(self, piece):
    self.text += piece
    return piece
