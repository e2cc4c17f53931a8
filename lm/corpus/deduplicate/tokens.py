"""Tokens of many texts at once as numbers of 64 bits, and hashes of any runs of them.

Every hash is a polynomial modulo 2**64 of what the run holds, read off prefix sums (Karp and Rabin
1987): the characters of a token and the tokens of a shingle alike, without a loop over either. So
nothing is hashed as a Python string. Texts are taken 100,000 characters at a time; a longer one
needs 25 bytes of memory a character, in scripts without spaces 100.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import re
import unicodedata

import numpy as np

PIECE = 1 << 17  # Characters at a time: what is computed of them stays in a core's cache.
# Odd numbers of 64 bits drawn once (from the digits of pi); hashes and their order rest on them.
_OF_CHARACTERS = 0x243F6A8885A308D3
_OF_TOKENS = 0x13198A2E03707345
_ALONE = np.uint32(1 << 31)  # The flag of a character that is a token by itself.
_CHARACTERS = 0x110000
_ASSIGNED = 0x34000  # Beyond stand private characters, tags and variation selectors.
# Scripts whose words are not set apart by spaces: Thai, Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x19E0, 0x19FF), (0x3040, 0x30FF),
    (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F),
    (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1B000, 0x1B16F), (0x20000, 0x33FFF),
)  # fmt: skip
# Behind a space, or before a character that is a token by itself, a text may be cut.
_CUT = re.compile(r'(?<=\s)|(?=[%s])' % ''.join(f'{chr(a)}-{chr(b)}' for a, b in _UNSPACED))


def mix(values: np.ndarray) -> np.ndarray:
  """Returns a bijection of uint64 in which each bit depends on all (splitmix64's finaliser)."""
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))


class Runs:
  """Hashes of runs of `values`: two runs of the same values have the same hash, wherever they are.

  Two other runs have the same with a probability of about 2**-64. Not against an adversary who
  knows the constants.
  """

  def __init__(self, values: np.ndarray, base: int = _OF_TOKENS):
    self._inverse, powers = _powers(base, len(values))
    self._sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * powers[: len(values)], out=self._sums[1:])

  def hash(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns the hash of each `values[start:end]`."""
    return (self._sums[ends] - self._sums[starts]) * self._inverse[starts]


def _powers(base: int, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the powers of base**-1 and of base, from the 0th, at least `count`."""
  size = 1 << max(16, count.bit_length())
  return (_powers_of_size if size <= 4 * PIECE else _powers_of_size.__wrapped__)(base, size)


@functools.lru_cache(maxsize=4)
def _powers_of_size(base: int, size: int) -> tuple[np.ndarray, np.ndarray]:
  def powers(number: int) -> np.ndarray:
    factors = np.full(size, number, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)

  return powers(pow(base, -1, 1 << 64)), powers(base)


@dataclasses.dataclass(frozen=True)
class Tokens:
  """The tokens of some texts, one text after the other.

  Attributes:
    hashes: of each token, uint64; not mixed.
    bounds: text i has the tokens bounds[i]:bounds[i + 1].
    starts: the place of each token's first character in its text.
    ends: the place behind its last character.
  """

  hashes: np.ndarray
  bounds: np.ndarray
  starts: np.ndarray
  ends: np.ndarray

  def runs(self, length: int, short: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the runs of `length` tokens that lie within one text.

    Args:
      length: of a run, tokens.
      short: whether a text with fewer tokens, but some, is one run.

    Returns:
      The first token of each run, the one behind its last, and how many runs each text has.
    """
    sizes = np.diff(self.bounds)
    counts = np.maximum(sizes - (length - 1), np.minimum(sizes, 1) if short else 0)
    first = np.repeat(self.bounds[:-1] - (np.cumsum(counts) - counts), counts)
    starts = first + np.arange(len(first))
    if not short or (sizes >= length).all():
      return starts, starts + length, counts
    return starts, np.minimum(starts + length, np.repeat(self.bounds[1:], counts)), counts


def words(texts: Sequence[str]) -> Tokens:
  """Returns the words of each text: letters, digits and their marks, in any case.

  In scripts that write no spaces each character is a word.
  """
  return _tokens(texts, _words_table())


def pieces_between_spaces(texts: Sequence[str]) -> Tokens:
  """Returns what stands between the spaces of each text, as it stands.

  In scripts that write no spaces each character is by itself.
  """
  return _tokens(texts, _spaces_table())


def batches(sizes: Sequence[int], limit: int) -> Iterator[slice]:
  """Yields runs of neighbours whose sizes come to about `limit` together."""
  first = total = 0
  for index, size in enumerate(sizes):
    if total and total + size > limit:
      yield slice(first, index)
      first, total = index, 0
    total += size
  if first < len(sizes):
    yield slice(first, len(sizes))


def _tokens(texts: Sequence[str], table: np.ndarray) -> Tokens:
  parts = [_tokens_of_batch(texts[at], table) for at in batches([len(t) for t in texts], PIECE)]
  if len(parts) == 1:
    return parts[0]
  sizes = [np.diff(part.bounds) for part in parts]
  return Tokens(
      np.concatenate([part.hashes for part in parts] or [np.empty(0, np.uint64)]),
      np.concatenate([[0], np.cumsum(np.concatenate(sizes or [np.empty(0, np.int64)]))]),
      np.concatenate([part.starts for part in parts] or [np.empty(0, np.int64)]),
      np.concatenate([part.ends for part in parts] or [np.empty(0, np.int64)]),
  )


def _tokens_of_batch(texts: Sequence[str], table: np.ndarray) -> Tokens:
  """Returns the tokens of short texts together, or of a long one by pieces cut at spaces."""
  if len(texts) == 1 and len(texts[0]) > 2 * PIECE:
    found = [(at, *_spans(piece, table)) for at, piece in _pieces(texts[0])]
    hashes = np.concatenate([hashes for _, hashes, _, _ in found])
    starts = np.concatenate([at + starts for at, _, starts, _ in found])
    ends = np.concatenate([at + ends for at, _, _, ends in found])
    return Tokens(hashes, np.array([0, len(hashes)]), starts, ends)
  hashes, starts, ends = _spans('\n'.join(texts), table)
  offsets = np.cumsum([0] + [len(text) + 1 for text in texts])
  bounds = np.searchsorted(starts, offsets)
  places = np.repeat(offsets[:-1], np.diff(bounds))
  return Tokens(hashes, bounds, starts - places, ends - places)


def _pieces(text: str) -> Iterator[tuple[int, str]]:
  """Yields where each piece begins, and the piece; a text that cannot be cut is one."""
  start = 0
  while start < len(text):
    cut = _CUT.search(text, start + PIECE)
    end = cut.start() if cut else len(text)
    yield start, text[start:end]
    start = end


def _spans(text: str, table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns each token's hash, the place of its first character and the one behind its last."""
  if text.isascii():  # A third of the time.
    ascii_table = table[:128].astype(np.uint8).tobytes() + bytes(128)
    codes = np.frombuffer(text.encode('ascii').translate(ascii_table), np.uint8)
    inside = codes != 0
    joined = inside[1:] & inside[:-1]
  else:
    encoded = text.encode('utf-32-le', 'surrogatepass')
    codes = table[np.frombuffer(encoded, np.uint32)]
    inside = codes != 0
    spaced = inside & (codes < _ALONE)
    joined = spaced[1:] & spaced[:-1]
  first, last = inside.copy(), inside.copy()
  first[1:] &= ~joined
  last[:-1] &= ~joined
  starts, ends = np.flatnonzero(first), np.flatnonzero(last) + 1
  return Runs(codes.astype(np.uint64), _OF_CHARACTERS).hash(starts, ends), starts, ends


@functools.lru_cache(maxsize=1)
def _words_table() -> np.ndarray:
  """Code of each character: 0 between words, otherwise its lower case and whether it is alone."""
  table = np.zeros(_CHARACTERS, np.uint32)
  for code in range(_ASSIGNED):
    character = chr(code)
    if character.isalnum() or unicodedata.category(character)[0] == 'M':
      lower = character.lower()
      table[code] = ord(lower) if len(lower) == 1 else code
  return _with_unspaced(table)


@functools.lru_cache(maxsize=1)
def _spaces_table() -> np.ndarray:
  """Code of each character: 0 for a space, otherwise itself and whether it is alone."""
  table = np.arange(_CHARACTERS, dtype=np.uint32)
  table[[code for code in range(_ASSIGNED) if chr(code).isspace()]] = 0
  table[0] = _CHARACTERS  # NUL is a character as others are.
  return _with_unspaced(table)


def _with_unspaced(table: np.ndarray) -> np.ndarray:
  for first, last in _UNSPACED:
    codes = table[first : last + 1]
    codes[codes != 0] |= _ALONE
  return table
