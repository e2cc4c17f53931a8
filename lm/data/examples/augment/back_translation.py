"""Paraphrases that a model made before training."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
import threading

from lm.data.examples.augment.base import Augmentation
from lm.errors import UserError

_LOOKED_AT = 1000


@dataclasses.dataclass(frozen=True)
class BackTranslation(Augmentation):
  """A text is replaced by one of its paraphrases in a file, each as likely as the others.

  `scripts/back_translate.py` makes the file: it translates the training examples there and back
  with two runs. It has a JSON object a line, {"id", "text", "paraphrases": [...]}, and is asked by
  the text, so that it also serves another split or subset of the same examples; a text that it does
  not have stays as it is.

  Reference: Sennrich et al. 2016, arXiv:1511.06709; for classification Xie et al. 2020,
  arXiv:1904.12848.

  Attributes:
    path: of the file.
  """

  growth: float = 1.3
  path: str = ''

  kinds = ('classification', 'similarity', 'generation', 'retrieval')

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.path:
      raise UserError('BackTranslation needs path, a file of paraphrases; make one with'
                      ' scripts/back_translate.py.')

  def open(self, texts):
    """Reads the file, once a process.

    Raises:
      UserError: it is no such file, or has none of the texts.
    """
    known, looked_at = _load(self.path), 0
    for text in texts:
      if text in known:
        return
      looked_at += 1
      if looked_at == _LOOKED_AT:
        break
    raise UserError(f'{self.path} has none of the first {looked_at} texts of the training split;'
                    ' make it of this task with scripts/back_translate.py.')

  def text(self, text, rng):
    """Returns a paraphrase, if there is any."""
    paraphrases = _load(self.path).get(text)
    return text if paraphrases is None else paraphrases[int(rng.integers(len(paraphrases)))]


_lock = threading.Lock()


def _load(path: str) -> dict[str, tuple[str, ...]]:
  with _lock:
    return _read(path)


@functools.lru_cache
def _read(path: str) -> dict[str, tuple[str, ...]]:
  """Returns the paraphrases of each text that has some."""
  found: dict[str, tuple[str, ...]] = {}
  try:
    lines = Path(path).expanduser().read_text('utf-8').splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'The paraphrases {path!r} cannot be read ({error}); make them with'
                    ' scripts/back_translate.py.') from error
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
      paraphrases = tuple(each for each in row['paraphrases'] if each.strip())
      if paraphrases:
        found[row['text']] = found.get(row['text'], ()) + paraphrases
    except (ValueError, KeyError, TypeError, AttributeError):
      raise UserError(f'{path}:{number} is no JSON object with "text" and a list "paraphrases";'
                      ' make the file with scripts/back_translate.py.') from None
  return found
