"""Documents that hold text of an evaluation are removed, and what they hold is listed.

A document is contaminated if 13 words in a row stand in an evaluation too, as in GPT-3 (Brown et
al. 2020, arXiv 2005.14165, appendix C). Words are lower-cased runs of letters and figures, and each
Chinese or Japanese character by itself; punctuation and spacing do not count. A text of an
evaluation with fewer words is looked for as a whole if it has at least 8 (GPT-3's least). The
document is removed, as in datatrove and Dolma; GPT-3 cut 200 characters around instead.

What stands in Wikipedia and is asked about in a reading test (SQuAD, XQuAD) is found too: GPT-3's
authors saw the same, and an evaluation does not say which of its texts it wrote itself.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import functools
import itertools
import json
import os
from pathlib import Path
import sys
from typing import Any

import numpy as np

from lm.corpus import collect
from lm.corpus.decontaminate_index import Index
from lm.corpus.decontaminate_index import word_hashes
from lm.corpus.document import Document
from lm.corpus.stage import Stage
from lm.errors import UserError

_SPLITS = ('validation', 'test')
_TEXTS = 4096  # of an evaluation that are hashed at a time


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

  tasks: collect.Patterns = ()
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
    hits = self._index.hits(document.text)
    document.judge('decontaminate.hits', hits, not hits)

  @functools.cached_property
  def _index(self) -> Index:
    if self.index:
      return Index.load(Path(self.index))
    return Index.build(self._sequences(), self.min_words)

  def _sequences(self) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (evaluation, word hashes [sequences, words]), of 8 to 13 words, of evaluations."""
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
