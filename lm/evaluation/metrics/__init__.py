"""Predictions in, numbers out: a pure function of the header and the rows, without the model.

    header, rows = metrics.read('R/predictions/snips-validation.jsonl')
    metrics.compute(header, rows)                      # {'accuracy': ..., 'f1_macro': ..., ...}
    metrics.scorer(header, rows).notes                 # signatures, conventions, what is absent

The arithmetic is that of the reference libraries (scikit-learn, SciPy, seqeval, sacrebleu,
rouge-score) in their own units, a file a kind of task: `labels` (with `calibration`), `similarity`,
`tags`, `answers`, `generation`, `choices`, `retrieval`, `language_modelling`. `contract` says what
predictions are. A metric that is not defined is absent, with a note why, and never NaN.
"""
from collections.abc import Sequence
import pathlib

from lm.errors import UserError
from lm.evaluation.metrics import answers
from lm.evaluation.metrics import choices
from lm.evaluation.metrics import generation
from lm.evaluation.metrics import labels
from lm.evaluation.metrics import language_modelling
from lm.evaluation.metrics import retrieval
from lm.evaluation.metrics import similarity
from lm.evaluation.metrics import tags
from lm.evaluation.metrics.contract import check, Header, read, Row, Scorer

_SCORERS = {
    'classification': labels.scorer, 'similarity': similarity.scorer, 'tagging': tags.scorer,
    'span_extraction': answers.scorer, 'generation': generation.scorer,
    'multiple_choice': choices.scorer, 'retrieval': retrieval.scorer,
    'language_modelling': language_modelling.scorer}


def scorer(header: Header, rows: Sequence[Row]) -> Scorer:
  """What computes the metrics of these predictions, and of any choice of them.

  Raises:
    UserError: the predictions are not as `contract` says, or a package of the extra [eval] is not
      installed.
  """
  check(header, rows)
  try:
    return _SCORERS[header['kind']](header, rows)
  except ModuleNotFoundError as error:
    raise UserError(f'metrics of {header["kind"]} need the package {error.name}; '
                    'pip install "lm[eval]"') from error


def compute(header: Header, rows: Sequence[Row]) -> dict[str, float]:
  """All metrics by name, of the kind that the header says. Raises as `scorer` does."""
  return scorer(header, rows).metrics()


def of_file(path: str | pathlib.Path) -> dict[str, float]:
  """All metrics of predictions that lie on disk. Raises as `read` and `scorer` do."""
  return compute(*read(path))
