"""Answers of an encoder's head: classes and numbers of texts, tags of words, choices, spans."""
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.examples import PreparedExamples, spans
from lm.data.examples.forms import Encoded, Lengths
from lm.data.examples.rows import pack_first_fit
from lm.errors import UserError
from lm.evaluation import likelihood
from lm.evaluation.predictions.contract import Batches, bucket, chunks, Model, refuse, Row
from lm.parallel.batches import GlobalBatch

# What a kind asks of which model: the config's name, and what of its outputs.
HEADS = {'classification': ('ClassifierConfig', 'classes'),
         'similarity': ('ClassifierConfig', 'classes'),
         'multiple_choice': ('ClassifierConfig', 'classes'), 'tagging': ('TaggerConfig', 'tags'),
         'span_extraction': ('SpanConfig', 'spans')}
CLASSES = {'similarity': 1, 'multiple_choice': 2}  # where they do not follow from labels


class Item(NamedTuple):
  """Tokens `start` to `end` of an example, or the window of its context that begins at `start`; of
  tags, which of its words are asked for here."""
  example: int
  start: int = 0
  end: int | None = None
  words: tuple[int, int] = (0, 0)


class Heads:
  """A predictor with a head: short examples are packed into rows, as in training.

  Raises:
    UserError: the model has another head, or one of another number of classes.
  """

  def __init__(self, model: Model, prepared: PreparedExamples, split: str):
    self._model, self._prepared, self._form = model, prepared, prepared.form
    self._kind, self._cache = prepared.kind, prepared.cache(split)
    self._check()
    self._may_be_none = False
    self._lengths = prepared.lengths(model.sequence_length, split)
    self._items = list(self._cut())
    self.num_items = len(self._items)
    self._programs: dict[tuple, Callable] = {}

  def _check(self):
    model, name = self._model, self._kind.name
    family, _ = HEADS.get(name, ('', ''))
    if model.family != family:
      raise refuse(model, self._prepared, f'it needs {family}' if family else
                   'ask a model that writes text, or bind another form')
    if name == 'span_extraction':
      return
    needed = CLASSES.get(name) or len(self._kind.labels)
    if model.module.config.num_classes != needed:
      raise UserError(f'the task {self._prepared.task.name!r} needs {needed} outputs of the head '
                      f'and the model has num_classes={model.module.config.num_classes}; evaluate '
                      'a task of the same labels')

  def _cut(self) -> Iterator[Item]:
    """Examples; of sentences and contexts that are longer than a row, windows."""
    windows = self._form.windows(self._cache.sizes, self._lengths)
    if windows is not None:
      yield from (Item(int(example), int(first)) for example, first in windows)
      return
    room = self._lengths.inputs - int(self._form.size(*np.array([[0], [-1], [0]]))[0][0])
    for index, (size, _, _) in enumerate(self._cache.sizes.tolist()):
      if self._kind.name != 'tagging':
        yield Item(index)
      elif size <= room:
        yield Item(index, 0, size)
      else:
        is_first = self._cache.encoded(index).targets >= 0
        for window in word_windows(is_first, room):
          yield window._replace(example=index)

  def _encoded(self, item: Item) -> Encoded:
    encoded = self._cache.encoded(item.example)
    if self._kind.name == 'span_extraction':
      return self._form.window(encoded, item.start, self._lengths)
    if item.end is None:
      return encoded
    targets = encoded.targets[item.start:item.end].copy()
    if item.words != (0, 0):
      place = np.cumsum(encoded.targets >= 0)[item.start:item.end] - 1
      targets[(place < item.words[0]) | (place >= item.words[1])] = -1
    return Encoded(encoded.a[item.start:item.end], None, targets)

  def _plan(self) -> Iterator[tuple[Lengths, Sequence[np.ndarray]]]:
    """Batches: the lengths of a row, and which items stand in each."""
    a, b, targets = self._cache.sizes[[item.example for item in self._items]].T
    a = np.array([size if item.end is None else item.end - item.start
                  for item, size in zip(self._items, a.tolist())])
    size = np.minimum(self._form.size(a, b, targets)[0], self._lengths.inputs)
    if self._kind.name == 'span_extraction':
      size = np.full_like(size, self._lengths.inputs)
    order = np.argsort(-size, kind='stable')
    parts = self._form.parts(self._cache.sizes[[item.example for item in self._items]])
    if self._lengths.packed and self._lengths.examples > 1:
      lengths = dict.fromkeys([self._lengths.inputs], order)
    else:
      of = np.array([bucket(n, self._lengths.inputs) for n in size.tolist()])
      lengths = {length: order[of[order] == length] for length in sorted({*of.tolist()})[::-1]}
    for length, members in lengths.items():
      row = self._lengths._replace(inputs=length)
      rows = pack_first_fit(members, (size, np.zeros_like(size)), row, parts)
      for batch in chunks(rows, self._model.rows_of(length)):
        yield row, batch

  def batches(self, done: Collection[int]) -> Batches:
    """See `Predictor`."""
    for lengths, rows in self._plan():
      if not all(int(i) in done for row in rows for i in row):
        yield self._answer(lengths, rows)

  def _answer(self, lengths: Lengths, rows: Sequence[np.ndarray]) -> dict[int, Any]:
    model = self._model
    where = GlobalBatch(model.module.rules, model.rows_of(lengths.inputs))
    own = rows[where.own] or rows[:1]  # a host without rows lays zeros, of a row's shapes
    features = [self._form.features([self._encoded(self._items[i]) for i in row], lengths)
                for row in own]
    batch = {name: np.stack([row[name] for row in features]) for name in features[0]}
    missing = where.own.stop - where.own.start - len(own)
    batch = {name: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for name, x in batch.items()}
    if not rows[where.own]:
      batch = {name: np.zeros_like(x) for name, x in batch.items()}
    found = np.asarray(self._program(lengths)(model.params, where.place(batch)))
    return {int(i): answer for row, values in zip(rows, found)
            for i, answer in zip(row, self._read(row, values), strict=True)}

  def _program(self, lengths: Lengths) -> Callable:
    """From (params, batch) to logits [B, K, C], to tags [B, T], or to starts and ends [B, 2, T]."""
    if lengths not in self._programs:
      module, (_, name) = self._model.module, HEADS[self._kind.name]

      def run(params, batch):
        outputs, _ = module.apply({'params': params}, batch, method='outputs')
        if name == 'spans':
          return jnp.stack([outputs['starts'], outputs['ends']], axis=1)
        return outputs[name].argmax(-1).astype(jnp.int32) if name == 'tags' else outputs[name]

      mesh = module.rules.mesh
      over = {} if mesh is None else {'out_shardings': module.rules.sharding()}
      self._programs[lengths] = self._model.hosts.same_program(jax.jit(run, **over))
    return self._programs[lengths]

  def _read(self, row: np.ndarray, values: np.ndarray) -> Iterator[Any]:
    """The answers to the items of a row, from what the head gives for it."""
    place, kind = 0, self._kind.name
    for number in row:
      item = self._items[number]
      if kind == 'classification':
        yield log_p(values[place])
      elif kind == 'similarity':
        yield float(values[place, 0])
      elif kind == 'multiple_choice':
        count = int(self._form.parts(self._cache.sizes[[item.example]])[0])
        yield [log_p(logits)[1] for logits in values[place:place + count]]
        place += count - 1
      elif kind == 'span_extraction':
        yield self._span(item, *values)
      else:
        encoded = self._encoded(item)
        ids, _, start, kept = self._form.framed(encoded, len(values) - place)
        first = np.flatnonzero(encoded.targets[:kept] >= 0)
        yield values[place + start + first].tolist()
        place += len(ids) - 1
      place += 1

  def _span(self, item: Item, starts: np.ndarray, ends: np.ndarray) -> tuple[str, float, float]:
    """The best answer of a window, its score, and that of none."""
    context = self._cache.example(item.example)['context']
    _, offsets = self._prepared.vocabulary.encode_offsets(context)
    encoded = self._cache.encoded(item.example)
    window = spans.Window(item.start, self._form.context_begins(encoded.a, self._lengths),
                          len(self._encoded(item).b))
    found = spans.best([(window, starts, ends)], context, offsets)
    return found.text, float(found.score), float(found.null)

  def rows(self, answers: Sequence[Any]) -> Iterator[Row]:
    """See `Predictor`."""
    mine: list[list[Any]] = [[] for _ in range(len(self._cache))]
    for item, answer in zip(self._items, answers):
      mine[item.example].append(answer)
    # A question of a set where some have no answer (SQuAD 2.0) has none where [CLS] says so.
    self._may_be_none = self._kind.name == 'span_extraction' and any(
        not self._cache.example(i)['answers'] for i in range(len(self._cache)))
    for index, found in enumerate(mine):
      example = self._cache.example(index)
      yield {'id': example['id'], **self._row(example, found)}

  def _row(self, example, found) -> Row:
    kind = self._kind
    if kind.name == 'tagging':
      tags = [kind.labels[tag] for window in found for tag in window]
      return {'inputs': example['words'], 'targets': example['tags'], 'prediction': tags,
              'scores': None}
    if kind.name == 'span_extraction':
      text, score, _ = max(found, key=lambda answer: answer[1])
      is_none = self._may_be_none and min(null for _, _, null in found) > score
      return {'inputs': f'{example["question"]}\n{example["context"]}',
              'targets': example['answers'], 'prediction': '' if is_none else text, 'scores': None}
    if kind.name == 'multiple_choice':
      return likelihood.choices_row(example, [likelihood.Likelihood(x, False) for x in found[0]])
    inputs = '\n'.join(example[name] for name in ('a', 'b') if name in example)
    if kind.name == 'similarity':
      return {'inputs': inputs, 'targets': example['score'],
              'prediction': kind.low + (kind.high - kind.low) * found[0], 'scores': None}
    return {'inputs': inputs, 'targets': example['label'],
            'prediction': kind.labels[int(np.argmax(found[0]))], 'scores': found[0]}


def log_p(logits: np.ndarray) -> list[float]:
  """Log probabilities of classes, to six places."""
  logits = logits.astype(np.float64)
  return [round(float(x), 6) + 0.0 for x in logits - np.logaddexp.reduce(logits)]


def word_windows(is_first: np.ndarray, room: int) -> list[Item]:
  """Cuts a sentence into windows so that every word has one that asks for its tag.

  Windows begin and end with words and overlap by half. A word is asked for where it has the most
  words on its poorer side (the maximum context of Devlin et al. 2019's SQuAD code). A word longer
  than a window is cut behind its beginning, which has its tag.

  Args:
    is_first: bool [tokens], whether a word begins.
    room: tokens of a window.
  """
  bounds = np.append(np.flatnonzero(is_first), len(is_first))
  windows, word, number = [], 0, len(bounds) - 1
  while True:
    last = max(word + 1, int(np.searchsorted(bounds, bounds[word] + room, 'right')) - 1)
    windows.append((word, last))
    if last >= number:
      break
    half = int(np.searchsorted(bounds, bounds[word] + room // 2, 'right')) - 1
    word = min(max(word + 1, half), last)
  context = np.full((len(windows), number), -1)
  for i, (first, last) in enumerate(windows):
    places = np.arange(first, last)
    context[i, first:last] = np.minimum(places - first, last - 1 - places)
  chosen = context.argmax(0)
  items = []
  for i, (first, last) in enumerate(windows):
    own = np.flatnonzero(chosen == i)
    if len(own):
      assert (np.diff(own) == 1).all()
      items.append(Item(0, int(bounds[first]), int(bounds[last]), (int(own[0]), int(own[-1]) + 1)))
  return items
