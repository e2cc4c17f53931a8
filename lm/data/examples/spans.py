"""Answers that stand in a text: from characters to tokens for training, and back for an answer.

A context that is longer than a row is put there in windows, one a row, that overlap. A window in
which the answer does not stand whole trains as one without an answer, which is [CLS] (BERT,
arXiv:1810.04805, sections 4.2 and 4.3).

    SpanForm     examples to rows
    windows      the rows of one example, and where in the context each begins
    best         from the logits of an example's windows to the text of its answer
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from lm.data.examples.forms import Encoded, EncoderForm, Lengths
from lm.errors import UserError

_N_BEST = 20  # Starts, and ends, of a window that are looked at, as in SQuAD's reference code.


@dataclasses.dataclass(frozen=True)
class SpanForm(EncoderForm):
  """Question and context between [CLS] and [SEP], one window a row, for a head of spans.

  Features: those of the encoder [length], and start_positions, end_positions int32 []: the first
  and the last token of the answer, 0 where the window has none. Of several answers the first.
  """

  kinds: ClassVar[Tuple[str, ...]] = ('span_extraction',)

  def encode(self, example):
    """Returns tokens of question and context, and the place of the answer among the latter's."""
    question = self.vocabulary.encode(example['question'])
    ids, offsets = self.vocabulary.encode_offsets(example['context'])
    place = -1, -1
    if example['answers']:
      start = example['starts'][0]
      place = tokens_of(offsets, start, start + len(example['answers'][0]))
    return Encoded(question, ids, np.array(place, np.int32))

  def windows(self, sizes, lengths):
    """Returns (example, first token of its context) [n, 2] of every window."""
    found = []
    for example, (question, context, _) in enumerate(sizes.tolist()):
      room = self._room(question, lengths)
      step = min(self.kind.stride, room)
      count = 1 + max(0, -(-(context - room) // step))
      found += [(example, window * step) for window in range(count)]
    return np.array(found, np.int64).reshape(-1, 2)

  def window(self, example, first, lengths):
    """Returns the example with what of its context stands in the window."""
    room = self._room(len(example.a), lengths)
    start, end = example.targets.tolist()
    is_inside = first <= start and end < first + room
    place = (start - first, end - first) if is_inside else (-1, -1)
    return Encoded(example.a[:self._longest(lengths)], example.b[first:first + room],
                   np.array(place, np.int32))

  def features(self, examples, lengths):
    """Returns the features above."""
    example, = examples
    before, between, _ = self._frames[1]
    first = len(before) + len(example.a) + len(between)  # Of the context in the row.
    start, end = example.targets.tolist()
    features = super().features([example._replace(targets=np.zeros(1, np.int32))], lengths)
    features.pop('class_weights')
    features.pop('class_labels')
    return features | {'start_positions': np.int32(start + first if start >= 0 else 0),
                       'end_positions': np.int32(end + first if start >= 0 else 0)}

  def context_begins(self, question: np.ndarray, lengths: Lengths) -> int:
    """Returns the place of the context's first token in a row."""
    before, between, _ = self._frames[1]
    return len(before) + min(len(question), self._longest(lengths)) + len(between)

  def _longest(self, lengths: Lengths) -> int:
    """The longest question; of a longer one the end is cut."""
    return max(1, (lengths.inputs - sum(map(len, self._frames[1]))) // 2)

  def _room(self, question: int, lengths: Lengths) -> int:
    """Tokens of a context beside a question."""
    frame = sum(map(len, self._frames[1]))
    if lengths.inputs < frame + 2:
      raise UserError(f'sequence_length={lengths.inputs} leaves no room for question and context;'
                      ' raise it.')
    return lengths.inputs - frame - min(question, self._longest(lengths))


def tokens_of(offsets: np.ndarray, start: int, end: int) -> tuple[int, int]:
  """Returns the first and the last token that have characters of start to end; -1 if none has.

  Args:
    offsets: characters of each token [n, 2].
  """
  inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
  return (int(inside[0]), int(inside[-1])) if len(inside) else (-1, -1)


def text_of(context: str, offsets: np.ndarray, first: int, last: int) -> str:
  """Returns the characters of tokens first to last, without blanks around them."""
  return context[offsets[first, 0]:offsets[last, 1]].strip()


class Window(NamedTuple):
  """A row of an example.

  Attributes:
    first: token of the context that it begins with.
    begins: place of that token in the row.
    length: tokens of the context in it.
  """

  first: int
  begins: int
  length: int


def windows(form: SpanForm, example: Encoded, lengths: Lengths) -> list[tuple[Window, Encoded]]:
  """Returns the windows of an encoded example in order, each with what `features` takes."""
  found = []
  for _, first in form.windows(np.array([form.measure(example)]), lengths):
    part = form.window(example, int(first), lengths)
    begins = form.context_begins(example.a, lengths)
    found.append((Window(int(first), begins, len(part.b)), part))
  return found


class Answer(NamedTuple):
  """What `best` finds.

  Attributes:
    text: '' for no answer.
    score: its logits, of start and end, together.
    null: the least of [CLS]'s logits over the windows.
  """

  text: str
  score: float
  null: float


def best(found: Sequence[tuple[Window, np.ndarray, np.ndarray]], context: str,
         offsets: np.ndarray, longest: int = 30, threshold: Optional[float] = None) -> Answer:
  """Returns the answer of the highest sum of the logits of its start and its end.

  Args:
    found: windows of one example, each with the logits [T] of starts and of ends.
    context: of the example.
    offsets: characters of the context's tokens [n, 2], from `encode_offsets`.
    longest: tokens of an answer.
    threshold: answers '' where [CLS] has more than this above the best span; None always answers.

  Reference: Devlin et al. 2018, arXiv:1810.04805, section 4.3.
  """
  answer, null = Answer('', -np.inf, 0.0), np.inf
  for window, starts, ends in found:
    null = min(null, float(starts[0] + ends[0]))
    inside = slice(window.begins, window.begins + window.length)
    first = np.argsort(-starts[inside], kind='stable')[:_N_BEST]
    last = np.argsort(-ends[inside], kind='stable')[:_N_BEST]
    scores = starts[inside][first][:, None] + ends[inside][last]
    width = last - first[:, None] + 1
    scores = np.where((width >= 1) & (width <= longest), scores, -np.inf)
    if not scores.size or scores.max() <= answer.score:
      continue
    i, j = np.unravel_index(scores.argmax(), scores.shape)
    span = window.first + int(first[i]), window.first + int(last[j])
    answer = Answer(text_of(context, offsets, *span), float(scores[i, j]), 0.0)
  is_none = threshold is not None and null - answer.score > threshold
  return Answer('' if is_none else answer.text, answer.score, null)
