"""Metrics of a tag a word: spans by seqeval where the tags are BIO, words by scikit-learn."""
from collections.abc import Sequence
import re

import numpy as np

from lm.errors import UserError
from lm.evaluation.metrics.contract import Header, name, Row, Scorer
from lm.evaluation.metrics.labels import Pairs

_BIO = re.compile(r'O|[BI]-.+')
NOTE = ("seqeval's strict mode, scheme IOB2: a span begins with B-, and counts where its type, "
        'first and last word are right; an I- that continues no span of its type is no span')


def scorer(header: Header, rows: Sequence[Row]) -> Scorer:
  """Of tagging: the share of sentences without a mistake; of BIO tags the accuracy of words, and
  span precision, recall and F1, micro (as CoNLL) and macro; of other tags (parts of speech) the
  metrics of classification, of words.

  Raises:
    UserError: there is not one predicted tag a word, or no word.
  """
  targets, predictions = ([list(row[field]) for row in rows] for field in ('targets', 'prediction'))
  for number, (tags, found) in enumerate(zip(targets, predictions)):
    if len(tags) != len(found):
      raise UserError(f'row {number} (id {rows[number].get("id")!r}) of {name(header)} has '
                      f'{len(found)} predicted tags for {len(tags)} words; predict one tag a word')
  if not any(targets):
    raise UserError(f'{name(header)} has no words to tag; evaluate a split that has some')
  flat = lambda sequences: [tag for tags in sequences for tag in tags]
  labels = header.get('labels') or sorted({*flat(targets)})
  sentence = np.repeat(np.arange(len(rows)), [len(tags) for tags in targets])
  words = Pairs.count(flat(targets), flat(predictions), sentence, labels)
  each = np.array([tags == found for tags, found in zip(targets, predictions)])
  is_bio = all(_BIO.fullmatch(tag) for tag in words.names)
  types, counts = _spans(targets, predictions) if is_bio else ([], None)

  def score(indices):
    found = {'sentence_accuracy': float(np.mean(each[indices]))}
    weights = words.weights(indices, len(rows))
    if weights.any():  # a resample may hold empty sentences only
      found |= {'accuracy': words.accuracy(weights)} if is_bio else words.metrics(weights)
    if is_bio:
      times = np.bincount(indices, minlength=len(rows))
      found = _f1(types, np.tensordot(times, counts, 1)) | found
    return found

  notes = {'accuracy': 'of words', 'sentence_accuracy': 'sentences without a mistake'}
  if is_bio:
    notes['span_f1'] = NOTE
  return Scorer(each, 'sentence_accuracy', score, notes=notes)


def _spans(targets, predictions) -> tuple[list[str], np.ndarray]:
  """The types, and of each sentence by type how many spans are predicted, right, and targets: int
  [sentences, types, 3]."""
  from seqeval.scheme import Entities, IOB2
  true, found = (Entities(sequences, IOB2).entities for sequences in (targets, predictions))
  types = sorted({span.tag for sequences in (true, found) for spans in sequences for span in spans})
  column = {tag: i for i, tag in enumerate(types)}
  counts = np.zeros((len(targets), len(types), 3), np.int64)
  for i, pair in enumerate(zip(found, true)):
    predicted, gold = ({(span.tag, span.start, span.end) for span in spans} for spans in pair)
    for j, spans in enumerate((predicted, predicted & gold, gold)):
      for tag, *_ in spans:
        counts[i, column[tag], j] += 1
  return types, counts


def _f1(types, counts) -> dict[str, float]:
  """seqeval's precision, recall and F1 of counts [types, 3]; 0 where there is no case."""
  from seqeval.metrics import v1
  kept = counts.any(axis=1)
  columns = tuple(counts[kept].T)
  # The function that seqeval's own reports call, with counts in place of its reading of tags.
  divide = lambda average: v1._precision_recall_fscore_support(  # pylint: disable=protected-access
      [[]], [[]], average=average, zero_division=0,
      extract_tp_actual_correct=lambda *_: columns)[:3]
  kinds = 'precision', 'recall', 'f1'
  if not kept.any():
    return {f'span_{kind}': 0.0 for kind in kinds}
  found = {f'span_{kind}': value for kind, value in zip(kinds, divide('micro'))}
  found |= {f'span_{kind}_macro': value for kind, value in zip(kinds, divide('macro'))}
  of_types = [tag for tag, is_kept in zip(types, kept) if is_kept]
  found |= {f'{kind}/{tag}': value for kind, values in zip(kinds, divide(None))
            for tag, value in zip(of_types, values)}
  return {key: float(value) for key, value in found.items()}
