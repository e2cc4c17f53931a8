"""Documents that hold text of an evaluation are removed, and what they hold is listed.

A document is contaminated if 13 words in a row stand in an evaluation too, as in GPT-3 (Brown et
al. 2020, arXiv 2005.14165, appendix C). Words are lower-cased runs of letters and figures, and each
Chinese or Japanese character by itself; punctuation and spacing do not count. A text of an
evaluation with fewer words is looked for as a whole if it has at least 8 (GPT-3's least). The
document is removed, as in datatrove and Dolma; GPT-3 cut 200 characters around instead.

    index     hash of the first 8 words of each sequence -> 1 bit of a table, a sorted array
    document  words -> 64-bit hashes -> hash of each 8 words -> the table -> the array -> whole
              sequences of 8 to 13 words, each looked up with its length
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from pathlib import Path
import sys
from typing import Any
import unicodedata

import numpy as np

from lm.corpus import collect
from lm.corpus.document import Document
from lm.corpus.stage import Stage
from lm.errors import UserError

RULE = 'decontaminate.hits'
_MOST_HITS = 5  # listed of a document
_LONGEST_HIT = 300  # characters listed of a hit
_SPLITS = ('validation', 'test')

_CHUNK = 1 << 20  # characters that are hashed at a time
_TEXTS = 4096  # of an evaluation that are hashed at a time
_TABLE_BITS = (16, 27)  # least and most; a table of 32 places a sequence lets 3% of words through


@dataclasses.dataclass(frozen=True)
class Decontaminate(Stage):
  """Removes documents that share a sequence of words with an evaluation.

  The verdict 'decontaminate.hits' lists [evaluation, shared words], at most five.

  Attributes:
    tasks: glob patterns of evaluation data: .jsonl, .json (every string in them counts) and text
      files (each line counts), also .gz and .zst. Besides, the validation and test splits of every
      task in `seqio.TaskRegistry` count.
    n: words in a row that make a document contaminated.
    min_words: texts of an evaluation with fewer words are not looked for.
    index: directory of the index that `prepare` built; '' builds it in memory.
    digest: of the evaluations' sequences, so that `repr` says which they were.
  """

  tasks: tuple[str, ...] = ()
  n: int = 13
  min_words: int = 8
  index: str = dataclasses.field(default='', repr=False)
  digest: str = ''

  def __post_init__(self):
    if not 1 <= self.min_words <= self.n:
      raise UserError(
          f'decontaminate.Decontaminate.min_words={self.min_words} is not between 1 and'
          f' n={self.n}; 8 and 13 are those of GPT-3.'
      )

  def prepare(self, directory: Path) -> Decontaminate:
    """Builds the index below `directory`, once for all workers, and returns a stage that reads it.

    Raises:
      UserError: a pattern matches no file, or a file is not what its name says.
    """
    index = Index.build(self._sequences(), self.min_words)
    path = Path(directory) / f'decontaminate-{index.digest}'
    index.save(path)
    return dataclasses.replace(self, index=str(path), digest=index.digest)

  def apply(self, document: Document) -> None:
    hits = self._index.hits(document.text, self.n)
    document.verdicts[RULE] = hits
    if hits:
      document.remove(RULE)

  @functools.cached_property
  def _index(self) -> Index:
    if self.index:
      return Index.load(Path(self.index))
    return Index.build(self._sequences(), self.min_words)

  def _sequences(self) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (evaluation, word hashes [sequences, words]) of 8 to 13 words, from all evaluations."""
    for name, group in itertools.groupby(evaluation_texts(self.tasks), key=lambda pair: pair[0]):
      while texts := [text for _, text in itertools.islice(group, _TEXTS)]:
        words, positions = word_hashes('\n'.join(texts))
        ends = np.cumsum([len(text) + 1 for text in texts])
        text_of_word = np.searchsorted(ends, positions, 'right')
        sizes = np.bincount(text_of_word, minlength=len(texts))[text_of_word]
        for width in range(self.min_words, self.n + 1):
          if words.size >= width:
            inside = text_of_word[: 1 - width or None] == text_of_word[width - 1 :]
            chosen = inside & (np.minimum(sizes, self.n)[: inside.size] == width)
            yield name, np.lib.stride_tricks.sliding_window_view(words, width)[chosen]


@dataclasses.dataclass(frozen=True)
class Index:
  """Sequences of words, by hash.

  Attributes:
    names: of the evaluations.
    width: words that the hashes of `beginnings` cover.
    beginnings: hashes of the first `width` words of all sequences, sorted.
    sequences: structured, 'hash' of whole sequences (with their length), 'task' index of a name;
      sorted.
    table: True at the leading bits of each of `beginnings`.
    lengths: of the sequences, in words.
    digest: of all this.
  """

  names: tuple[str, ...]
  width: int
  beginnings: np.ndarray
  sequences: np.ndarray
  table: np.ndarray
  lengths: tuple[int, ...]
  digest: str

  @classmethod
  def build(cls, sequences: Iterator[tuple[str, np.ndarray]], width: int) -> Index:
    """Returns the index of (evaluation, word hashes [sequences, words])."""
    names: dict[str, int] = {}
    beginnings, whole, lengths = [np.empty(0, np.uint64)], [np.empty(0, _SEQUENCE)], set()
    for name, windows in sequences:
      if not len(windows):
        continue
      task = names.setdefault(name, len(names))
      length = windows.shape[1]
      lengths.add(length)
      beginnings.append(np.unique(_combine(windows.T[:width])))
      records = np.empty(len(windows), _SEQUENCE)
      records['hash'], records['task'] = _combine(windows.T), task
      whole.append(records)
    first = np.unique(np.concatenate(beginnings))
    last = np.concatenate(whole)
    last = last[np.unique(last['hash'], return_index=True)[1]]
    bits = min(max(_TABLE_BITS[0], first.size.bit_length() + 5), _TABLE_BITS[1])
    table = np.zeros(1 << bits, bool)
    table[first >> np.uint64(64 - bits)] = True
    digest = hashlib.sha256(repr((list(names), width, sorted(lengths))).encode())
    digest.update(last.tobytes())
    return cls(
        tuple(names), width, first, last, table, tuple(sorted(lengths)), digest.hexdigest()[:16]
    )

  def save(self, path: Path) -> None:
    """Writes it; a directory of that name holds it whole, and is left as it is."""
    if path.exists():
      return
    temporary = path.with_name(f'{path.name}.{os.getpid()}')
    temporary.mkdir(parents=True, exist_ok=True)
    for part in ('beginnings', 'sequences', 'table'):
      np.save(temporary / f'{part}.npy', getattr(self, part))
    about = dict(
        names=self.names, width=self.width, lengths=self.lengths, digest=self.digest
    )
    (temporary / 'about.json').write_text(json.dumps(about, indent=2), encoding='utf-8')
    temporary.rename(path)

  @classmethod
  def load(cls, path: Path) -> Index:
    """Maps what `save` wrote into memory, where all workers share it."""
    about = json.loads((path / 'about.json').read_text(encoding='utf-8'))
    parts = {
        part: np.load(path / f'{part}.npy', mmap_mode='r')
        for part in ('beginnings', 'sequences', 'table')
    }
    return cls(
        names=tuple(about['names']), width=about['width'], lengths=tuple(about['lengths']),
        digest=about['digest'], **parts,
    )  # fmt: skip

  def hits(self, text: str, longest: int) -> list[list[str]]:
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
    found: list[list[Any]] = []  # evaluation, first word, word after the last
    for place in places.tolist():
      for length in reversed(self.lengths):
        sequence = hashes[place : place + length]
        if sequence.size < length:
          continue
        at = _contains(self.sequences['hash'], _combine(sequence[:, None]))[0]
        if at >= 0:
          name = self.names[self.sequences['task'][at]]
          if found and found[-1][0] == name and place <= found[-1][2]:
            found[-1][2] = max(found[-1][2], place + length)
          else:
            found.append([name, place, place + length])
          break
    shown = text if len(text.lower()) == len(text) else text.lower()
    limits = [*positions.tolist(), len(shown)] if found else []
    return [
        [name, shown[limits[first] : limits[last]].strip()[:_LONGEST_HIT]]
        for name, first, last in found[:_MOST_HITS]
    ]


_SEQUENCE = np.dtype([('hash', np.uint64), ('task', np.uint32)])
_ODD = np.uint64(0x9E3779B97F4A7C15)


def evaluation_texts(patterns: tuple[str, ...]) -> Iterator[tuple[str, str]]:
  """Yields (evaluation, text) of the files and of SeqIO's registry.

  The registry is empty as long as nobody imported SeqIO, so that this need not.
  """
  files = collect.paths(patterns) if patterns else []
  for path, name in zip(files, collect.names(files) if files else []):
    for text in _texts_of_file(path):
      yield name, text
  seqio = sys.modules.get('seqio')
  for name in sorted(seqio.TaskRegistry.names()) if seqio else ():
    task = seqio.TaskRegistry.get(name)
    for split in _SPLITS:
      if split in task.splits and _is_local(task.source):
        for example in task.source.get_dataset(split, shuffle=False).as_numpy_iterator():
          for text in _strings(example):
            yield f'{name}:{split}', text


def _is_local(source: Any) -> bool:
  """Whether it can be read without the network: TFDS must have prepared it."""
  dataset = getattr(source, 'tfds_dataset', None)
  return dataset is None or os.path.isdir(str(dataset.builder.data_dir))


def _texts_of_file(path: str) -> Iterator[str]:
  stem, suffix = os.path.splitext(path)
  kind = os.path.splitext(stem)[1] if suffix in ('.gz', '.zst') else suffix
  with _open(path, suffix) as file:
    try:
      if kind == '.json':
        yield from _strings(json.load(file))
      for line in file:
        if kind != '.jsonl':
          yield line
        elif line.strip():
          yield from _strings(json.loads(line))
    except ValueError as error:  # of JSON and of UTF-8
      raise UserError(
          f'decontaminate.Decontaminate.tasks names {path}, which is not what its name says'
          f' ({error}); .jsonl holds JSON a line, .json one JSON, other files text in UTF-8.'
      ) from error


def _open(path: str, suffix: str) -> Any:
  if suffix == '.gz':
    import gzip

    return gzip.open(path, 'rt', encoding='utf-8')
  if suffix == '.zst':
    import zstandard

    return zstandard.open(path, 'rt', encoding='utf-8')
  return open(path, encoding='utf-8')


def _strings(value: Any) -> Iterator[str]:
  """Yields every string in nested JSON or in a SeqIO example."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, bytes):
    yield value.decode('utf-8', 'replace')
  elif isinstance(value, dict):
    for part in value.values():
      yield from _strings(part)
  elif isinstance(value, (list, tuple)):
    for part in value:
      yield from _strings(part)
  elif isinstance(value, np.ndarray) and value.dtype == object:
    yield from _strings(value.tolist())


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
  """Returns a hash of each column of word hashes [words, sequences]; it depends on their number."""
  total = np.full(words.shape[1], len(words), np.uint64)
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
