"""Where a text that is still being written may be looked at: behind its sentences.

The pieces of a text depend on the text alone, not on how it arrived.
"""
from collections.abc import Iterator
import re

WINDOW = 280  # characters, about 70 tokens: a tweet, which is what the harm classifier knows
_END = re.compile(r'''[.!?…]+["'”’)\]]*\s|[。！？]|\n''')


def end(text: str, begin: int) -> int | None:
  """Where the sentence that begins at `begin` ends: behind its full stop and a blank, or a line
  end, and after WINDOW characters at the latest, between two words if it has several.

  Returns:
    None where more of the text must be known.
  """
  found = _END.search(text, begin, begin + WINDOW)
  if found:
    return found.end()
  if len(text) - begin < WINDOW:
    return None
  blank = max(text.rfind(character, begin, begin + WINDOW) for character in ' \t')
  return blank + 1 if blank >= 0 else begin + WINDOW


class Windows:
  """Gathers sentences into windows of at most WINDOW characters."""

  def __init__(self, begin: int = 0):
    """begin: of the first sentence."""
    self._window = self._sentence = begin

  def add(self, end: int) -> tuple[int, int]:
    """The window of the sentence that ends there: it, and as many before it as there is room for.
    """
    if end - self._window > WINDOW:
      self._window = self._sentence
    self._sentence = end
    return self._window, end

  def shift(self, by: int):
    """Counts from `by` characters further on."""
    self._window, self._sentence = self._window - by, self._sentence - by


def windows(text: str) -> Iterator[tuple[int, int]]:
  """Yields the windows of a whole text: (begin, end) of each, one behind the other."""
  gathered, last, begin = Windows(), None, 0
  while begin < len(text):
    begin = end(text, begin) or len(text)
    window = gathered.add(begin)
    if last is not None and last[0] != window[0]:
      yield last
    last = window
  if last is not None:
    yield last
