"""Sequences of words by hash, on disk and in memory: what evaluations hold.

    beginnings   hash of the first 8 words of each sequence, sorted, and a table of their first bits
    sequences    hash of whole sequences, sorted, with the evaluation of each
    text         words -> 64-bit hashes -> hash of each 8 words -> the table -> the array -> whole
                 sequences
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
import sys
import unicodedata

import numpy as np

_MOST_HITS = 5  # listed of a text
_LONGEST_HIT = 300  # characters listed of a hit
_CHUNK = 1 << 20  # characters that are hashed at a time
_TABLE_BITS = (16, 27)  # least and most; a table of 32 places a sequence lets 3% of words through
_PARTS = ('beginnings', 'table', 'sequences', 'tasks')  # that are arrays
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class Index:
  """Sequences of words, by hash.

  Attributes:
    names: of the evaluations.
    width: words that the hashes of `beginnings` cover.
    beginnings: hashes of the first `width` words of all sequences, sorted.
    table: True at the leading bits of each of `beginnings`.
    sequences: hashes of whole sequences, sorted.
    tasks: index in `names` of each of `sequences`, the first evaluation that holds it.
    lengths: of the sequences, in words.
    digest: of all this.
  """

  names: tuple[str, ...]
  width: int
  beginnings: np.ndarray
  table: np.ndarray
  sequences: np.ndarray
  tasks: np.ndarray
  lengths: tuple[int, ...]
  digest: str

  @classmethod
  def build(cls, sequences: Iterator[tuple[str, np.ndarray]], width: int) -> Index:
    """Returns the index of (evaluation, word hashes [sequences, words])."""
    names: dict[str, int] = {}
    lengths: set[int] = set()
    beginnings, whole = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    tasks = [np.empty(0, np.uint32)]
    for name, windows in sequences:
      if len(windows):
        lengths.add(windows.shape[1])
        beginnings.append(np.unique(_combine(windows.T[:width])))
        whole.append(_combine(windows.T))
        tasks.append(np.full(len(windows), names.setdefault(name, len(names)), np.uint32))
    first = np.unique(np.concatenate(beginnings))
    last, chosen = np.unique(np.concatenate(whole), return_index=True)
    task = np.concatenate(tasks)[chosen]
    bits = min(max(_TABLE_BITS[0], first.size.bit_length() + 5), _TABLE_BITS[1])
    table = np.zeros(1 << bits, bool)
    table[first >> np.uint64(64 - bits)] = True
    digest = hashlib.sha256(repr((list(names), width, sorted(lengths))).encode())
    digest.update(last.tobytes() + task.tobytes())
    of_sequences = tuple(sorted(lengths))
    return cls(tuple(names), width, first, table, last, task, of_sequences, digest.hexdigest()[:16])

  def save(self, path: Path) -> None:
    """Writes it; a directory of that name holds it whole, and is left as it is."""
    if path.exists():
      return
    temporary = path.with_name(f'{path.name}.{os.getpid()}')
    temporary.mkdir(parents=True, exist_ok=True)
    for part in _PARTS:
      np.save(temporary / f'{part}.npy', getattr(self, part))
    about = dict(names=self.names, width=self.width, lengths=self.lengths, digest=self.digest)
    (temporary / 'about.json').write_text(json.dumps(about, indent=2), encoding='utf-8')
    temporary.rename(path)

  @classmethod
  def load(cls, path: Path) -> Index:
    """Maps what `save` wrote into memory, where all workers share it."""
    about = json.loads((path / 'about.json').read_text(encoding='utf-8'))
    parts = {part: np.load(path / f'{part}.npy', mmap_mode='r') for part in _PARTS}
    names, lengths = tuple(about['names']), tuple(about['lengths'])
    return cls(names, about['width'], **parts, lengths=lengths, digest=about['digest'])

  def hits(self, text: str) -> list[list[str]]:
    """Returns [evaluation, shared words] of the text's sequences that it holds, at most five.

    Hits of one evaluation that overlap are one.
    """
    hashes, positions = word_hashes(text)
    if hashes.size < self.width or not self.beginnings.size:
      return []
    windows = np.lib.stride_tricks.sliding_window_view(hashes, self.width)
    beginnings = _combine(windows.T)
    shift = np.uint64(64 - (self.table.size.bit_length() - 1))
    places = np.flatnonzero(self.table[beginnings >> shift])
    places = places[_contains(self.beginnings, beginnings[places]) >= 0]
    if not places.size:
      return []
    task_at, length_at = np.full(places.size, -1), np.zeros(places.size, int)
    for length in self.lengths:  # The longest last, which is the one that is shown.
      inside = np.flatnonzero(places + length <= hashes.size)
      sequences = _combine(hashes[places[inside, None] + np.arange(length)].T)
      held = _contains(self.sequences, sequences)
      inside, held = inside[held >= 0], held[held >= 0]
      task_at[inside], length_at[inside] = self.tasks[held], length
    found: list[list[int]] = []  # evaluation, first word, word after the last
    hit = np.flatnonzero(task_at >= 0)
    columns = (array[hit].tolist() for array in (task_at, places, length_at))
    for task, place, length in zip(*columns):
      if found and found[-1][0] == task and place <= found[-1][2]:
        found[-1][2] = max(found[-1][2], place + length)
      else:
        found.append([task, place, place + length])
    shown = text if len(text.lower()) == len(text) else text.lower()
    limits = [*positions.tolist(), len(shown)] if found else []
    return [
        [self.names[task], shown[limits[first] : limits[last]].strip()[:_LONGEST_HIT]]
        for task, first, last in found[:_MOST_HITS]
    ]


def word_hashes(text: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns a hash (uint64) of each word, and the character in `text.lower()` where it begins.

  Words are lower-cased runs of letters, marks and figures, and each Chinese or Japanese character.
  The hash is the sum over the characters of a random number for the character times one for its
  place in the word, mixed: the same in every process and on every machine.
  """
  characters, places = _random_numbers()
  text = text.lower()
  hashes, positions = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
  begin = 0
  while begin < len(text):
    end = min(begin + _CHUNK, len(text))
    if end < len(text):  # Not within a word, if there is a blank to end at.
      end = max(text.rfind(' ', begin, end), text.rfind('\n', begin, end)) + 1 or end
    codes = np.frombuffer(text[begin:end].encode('utf-32-le', 'surrogatepass'), np.uint32)
    kinds = _kinds()[codes]
    starting = kinds == _ALONE
    starting[1:] |= (kinds[1:] == _WORD) & (kinds[:-1] != _WORD)
    starting[:1] |= kinds[:1] == _WORD
    kept = np.flatnonzero(kinds)
    starts = np.flatnonzero(starting[kept])
    if starts.size:
      place = np.arange(kept.size) - np.repeat(starts, np.diff(starts, append=kept.size))
      terms = characters[codes[kept] & 0xFFFF] * places[np.minimum(place, places.size - 1)]
      hashes.append(_mixed(np.add.reduceat(terms, starts)))
      positions.append(kept[starts] + begin)
    begin = end
  return np.concatenate(hashes), np.concatenate(positions)


_BETWEEN, _WORD, _ALONE = 0, 1, 2  # what a character is


@functools.cache
def _kinds() -> np.ndarray:
  """Returns by code point whether it separates words, is part of one, or is one."""
  word = bytes(unicodedata.category(chr(code))[0] in 'LNM' for code in range(sys.maxunicode + 1))
  kinds = np.frombuffer(word, np.uint8).copy()
  for first, last in ((0x3041, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x20000, 0x323AF)):
    kinds[first : last + 1] *= _ALONE
  return kinds


def _combine(words: np.ndarray) -> np.ndarray:
  """Returns a hash of each column of word hashes [words, sequences]."""
  total = np.zeros(words.shape[1], np.uint64)
  for row in words:
    total = total * _ODD + row
  return _mixed(total)


def _mixed(hashes: np.ndarray) -> np.ndarray:
  """Returns the hashes with every bit depending on all (the finaliser of MurmurHash3)."""
  hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
  hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
  return hashes ^ (hashes >> np.uint64(33))


@functools.cache
def _random_numbers() -> tuple[np.ndarray, np.ndarray]:
  """Returns odd numbers by character and by place in a word; a raw PCG64's never change."""
  numbers = np.random.PCG64(13).random_raw((1 << 16) + 256) | np.uint64(1)
  return numbers[: 1 << 16], numbers[1 << 16 :]


def _contains(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
  """Returns where each value stands in an ascending array, -1 where it does not."""
  places = np.searchsorted(ordered, values)
  places[places == ordered.size] = 0
  return np.where(ordered[places] == values, places, -1) if ordered.size else places - 1
