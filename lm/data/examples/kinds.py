"""What an example is: one frozen dataclass a kind of task, which checks records and makes them
canonical.

A canonical example is a JSON-able dict with an 'id' and the fields that its kind names. `fields` of
a source have given the record these names already.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Iterator, Mapping, Sequence, Tuple

from lm.errors import UserError

Example = dict[str, Any]


class BadExample(ValueError):
  """What is wrong with a record, to be put behind where it stands."""


@dataclasses.dataclass(frozen=True)
class Kind:
  """What the kinds share.

  Attributes:
    name: in the header of predictions.
    labelled: whether labels are a set that the training split may define.
  """

  name: ClassVar[str] = ''
  labelled: ClassVar[bool] = False

  def canonical(self, record: Mapping[str, Any]) -> Example:
    """Returns the example of a record.

    Raises:
      BadExample: a field is missing, empty, or of the wrong type.
    """
    raise AssertionError(type(self))

  def texts(self, example: Example) -> Iterator[str]:
    """Yields the example's texts: what a vocabulary is trained on."""
    raise AssertionError(type(self))

  def labels_of(self, example: Example) -> Sequence[str]:
    """Returns the labels that the example has."""
    return ()


@dataclasses.dataclass(frozen=True)
class Classification(Kind):
  """A class of a text `a`, or of a pair `a`, `b`: sentiment, topic, intent, inference, paraphrase.

  Attributes:
    labels: all of them; () takes those of the training split, sorted. Where they are bound, a
      record may have the place of its label among them.
  """

  labels: Tuple[str, ...] = ()

  name: ClassVar[str] = 'classification'
  labelled: ClassVar[bool] = True

  def canonical(self, record: Mapping[str, Any]) -> Example:
    """Returns {'a', 'b' where there is one, 'label'}."""
    if record.get('label') in (None, ''):
      raise BadExample(f"has no 'label' among {sorted(record)}")
    example = {'a': _text(record, 'a'), 'label': _label(record['label'], self.labels)}
    if record.get('b') is not None:
      example['b'] = _text(record, 'b')
    return example

  def texts(self, example: Example) -> Iterator[str]:
    """Yields the one or two texts."""
    yield example['a']
    if 'b' in example:
      yield example['b']

  def labels_of(self, example: Example) -> Sequence[str]:
    """Returns the label."""
    return (example['label'],)


@dataclasses.dataclass(frozen=True)
class Similarity(Kind):
  """How alike `a` and `b` are: a number `score`, which becomes (score - low) / (high - low).

  Attributes:
    low, high: the ends of the scale.
  """

  low: float = 0.0
  high: float = 5.0

  name: ClassVar[str] = 'similarity'

  def __post_init__(self) -> None:
    if not self.low < self.high:
      raise UserError(f'low={self.low} must be below high={self.high}.')

  def canonical(self, record: Mapping[str, Any]) -> Example:
    """Returns {'a', 'b', 'score'}, the score on the scale of the file."""
    try:
      score = float(record['score'])
    except KeyError:
      raise BadExample("has no field 'score'") from None
    except (TypeError, ValueError):
      raise BadExample(f'has score={record["score"]!r}, which is no number') from None
    if not (math.isfinite(score) and self.low <= score <= self.high):
      raise BadExample(f'has score={score}, outside of {self.low} to {self.high}')
    return {'a': _text(record, 'a'), 'b': _text(record, 'b'), 'score': score}

  def texts(self, example: Example) -> Iterator[str]:
    """Yields both texts."""
    yield from (example['a'], example['b'])


@dataclasses.dataclass(frozen=True)
class Tagging(Kind):
  """A tag for each word: named entities (BIO), parts of speech, slots.

  Attributes:
    labels: all tags; () takes those of the training split, sorted. Where they are bound, records
      may have their places.
  """

  labels: Tuple[str, ...] = ()

  name: ClassVar[str] = 'tagging'
  labelled: ClassVar[bool] = True

  def canonical(self, record: Mapping[str, Any]) -> Example:
    """Returns {'words', 'tags'}, of one length."""
    words = _list(record, 'words')
    tags = [_label(tag, self.labels) for tag in _list(record, 'tags', (str, int))]
    if len(words) != len(tags):
      raise BadExample(f'has {len(words)} words and {len(tags)} tags')
    if not words:
      raise BadExample('has no word')
    if not all(word.strip() for word in words):
      raise BadExample('has an empty word')
    return {'words': words, 'tags': tags}

  def texts(self, example: Example) -> Iterator[str]:
    """Yields the words, blanks between them."""
    yield ' '.join(example['words'])

  def labels_of(self, example: Example) -> Sequence[str]:
    """Returns the tags."""
    return example['tags']


@dataclasses.dataclass(frozen=True)
class SpanExtraction(Kind):
  """An answer to `question` that stands in `context`, as in SQuAD; none where it has none.

  Attributes:
    stride: tokens from the beginning of a window of a long context to that of the next.
  """

  stride: int = 128

  name: ClassVar[str] = 'span_extraction'

  def __post_init__(self) -> None:
    if self.stride < 1:
      raise UserError(f'stride={self.stride} must be at least 1.')

  def canonical(self, record: Mapping[str, Any]) -> Example:
    """Returns {'question', 'context', 'answers', 'starts'}; starts count characters."""
    question, context = _text(record, 'question'), _text(record, 'context')
    answers, starts = _list(record, 'answers'), [int(x) for x in record.get('starts') or ()]
    if len(answers) != len(starts):
      raise BadExample(f'has {len(answers)} answers and {len(starts)} starts')
    for answer, start in zip(answers, starts):
      if context[start : start + len(answer)] != answer:
        raise BadExample(f'has the answer {answer!r}, which does not stand at character {start}')
    return {'question': question, 'context': context, 'answers': answers, 'starts': starts}

  def texts(self, example: Example) -> Iterator[str]:
    """Yields question and context."""
    yield from (example['question'], example['context'])


@dataclasses.dataclass(frozen=True)
class Generation(Kind):
  """A text for a text: translation, summary, data in words.

  Attributes:
    language: of the targets, where a metric must know ('zh').
  """

  language: str = 'en'

  name: ClassVar[str] = 'generation'

  def canonical(self, record: Mapping[str, Any]) -> Example:
    """Returns {'source', 'targets'}; the first of several targets is what a model learns."""
    targets = record.get('targets', record.get('target'))
    targets = [targets] if isinstance(targets, str) else targets
    targets = _list({'targets': targets}, 'targets')
    if not targets or not all(target.strip() for target in targets):
      raise BadExample('has an empty target')
    return {'source': _text(record, 'source'), 'targets': targets}

  def texts(self, example: Example) -> Iterator[str]:
    """Yields the source and the targets."""
    yield example['source']
    yield from example['targets']


@dataclasses.dataclass(frozen=True)
class MultipleChoice(Kind):
  """Which of several texts goes on: `contexts[i]` with `continuations[i]`, of which `label` is
  right.

  A context may be '' (minimal pairs), and one continuation alone asks whether it is the likeliest
  (LAMBADA).
  """

  name: ClassVar[str] = 'multiple_choice'

  def canonical(self, record: Mapping[str, Any]) -> Example:
    """Returns {'contexts', 'continuations', 'label'}; one context stands for all."""
    continuations = _list(record, 'continuations')
    contexts = record.get('contexts', record.get('context', ''))
    contexts = [contexts] * len(continuations) if isinstance(contexts, str) else list(contexts)
    if not continuations or len(contexts) != len(continuations):
      raise BadExample(f'has {len(contexts)} contexts and {len(continuations)} continuations')
    if not all(continuations):
      raise BadExample('has an empty continuation')
    label = int(record.get('label', 0))
    if not 0 <= label < len(continuations):
      raise BadExample(f'has label={label} and {len(continuations)} continuations')
    return {'contexts': contexts, 'continuations': continuations, 'label': label}

  def texts(self, example: Example) -> Iterator[str]:
    """Yields the right text."""
    yield example['contexts'][example['label']] + example['continuations'][example['label']]


@dataclasses.dataclass(frozen=True)
class Retrieval(Kind):
  """Which document belongs to `query`: the first of `documents`; the others are hard negatives."""

  name: ClassVar[str] = 'retrieval'

  def canonical(self, record: Mapping[str, Any]) -> Example:
    """Returns {'query', 'documents'}, of a record with 'documents' or one 'document'."""
    one = 'documents' not in record and 'document' in record
    documents = [_text(record, 'document')] if one else _list(record, 'documents')
    if not documents or not all(document.strip() for document in documents):
      raise BadExample('has an empty document')
    return {'query': _text(record, 'query'), 'documents': documents}

  def texts(self, example: Example) -> Iterator[str]:
    """Yields the query and the documents."""
    yield example['query']
    yield from example['documents']


@dataclasses.dataclass(frozen=True)
class LanguageModelling(Kind):
  """Text whose probability is asked.

  Attributes:
    line_ends: counts a line end as a word, as WikiText's <eos>.
  """

  line_ends: bool = False

  name: ClassVar[str] = 'language_modelling'

  def canonical(self, record: Mapping[str, Any]) -> Example:
    """Returns {'text'}."""
    return {'text': _text(record, 'text')}

  def texts(self, example: Example) -> Iterator[str]:
    """Yields the text."""
    yield example['text']

  def words(self, text: str) -> int:
    """Counts what stands between blanks, and line ends if they are words."""
    return len(text.split()) + self.line_ends * text.count('\n')


def _text(record: Mapping[str, Any], name: str) -> str:
  value = record.get(name)
  if value is None:
    raise BadExample(f'has no field {name!r} among {sorted(record)}')
  if not isinstance(value, str):
    raise BadExample(f'has {name}={value!r}, which is no text')
  if not value.strip():
    raise BadExample(f'has an empty {name!r}')
  return value


def _label(value: Any, labels: Sequence[str]) -> str:
  name = str(value)
  if labels and name not in labels and name.isdecimal() and int(name) < len(labels):
    return labels[int(name)]
  return name


def _list(record: Mapping[str, Any], name: str, types: Any = str) -> list[Any]:
  value = record.get(name)
  if value is None:
    raise BadExample(f'has no field {name!r} among {sorted(record)}')
  if isinstance(value, str) or not all(isinstance(item, types) for item in value):
    raise BadExample(f'has {name}={value!r}, which is no list of texts')
  return list(value)
