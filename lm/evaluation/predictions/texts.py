"""Answers of a model that writes: how likely it holds continuations, or what it writes itself.

A model that was tuned on labelled examples gets them as it was trained: prompt and target encoded
apart, the target ended. Another one gets them as lm-evaluation-harness puts them: encoded together,
without an end.
"""
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from lm.data.examples import PreparedExamples, Template
from lm.data.examples.kinds import Example
from lm.evaluation import likelihood
from lm.evaluation.predictions.contract import Batches, chunks, Model, refuse, Row
from lm.inference import methods
from lm.inference.generate import begin_id, without_eos
from lm.inference.prompts import LARGEST_BATCH, round_up
from lm.inference.sampling import SamplingConfig

SCORED = 'classification', 'multiple_choice', 'language_modelling'


def predictor(model: Model, prepared: PreparedExamples, split: str) -> Any:
  """Scores what can be scored, and lets write what must be written.

  Raises:
    UserError: the model does not write, or the kind is not answered by texts.
  """
  module, kind = model.module, prepared.kind.name
  encodes = prepared.task.form == 'text_to_text'
  if hasattr(module.config, 'masked_lm') or not hasattr(module, 'logits') or (
      encodes != hasattr(module, 'decode')):
    raise refuse(model, prepared, 'it needs an encoder-decoder' if encodes else
                 'it needs a decoder')
  if kind == 'retrieval':
    raise refuse(model, prepared, 'documents are ranked by the vectors of an embedder')
  if kind in SCORED and (prepared.task.scored or kind != 'classification'):
    return Scored(model, prepared, split)
  return Generated(model, prepared, split)


class Scored:
  """A predictor by log-likelihoods of labels, of choices or of whole texts; the items are
  continuations behind contexts."""

  def __init__(self, model: Model, prepared: PreparedExamples, split: str):
    self._model, self._prepared, self._kind = model, prepared, prepared.kind
    cache = prepared.cache(split)
    self._examples = [cache.example(i) for i in range(len(cache))]
    self._encodes = hasattr(model.module, 'decode')
    found = [self._requests(example) for example in self._together()]
    self._ends = np.cumsum([0, *map(len, found)])
    self._asked = [request for requests in found for request in requests]
    self.num_items = len(self._asked)

  def _together(self) -> list[Any]:
    """What `_requests` makes requests of, for each example: tokens are made of all at once."""
    vocabulary = self._prepared.vocabulary
    if self._kind.name == 'language_modelling':
      return vocabulary.encode_batch([example['text'] for example in self._examples])
    labels = getattr(self._kind, 'labels', ())
    pairs = [self._prepared.form.template.choices(example, labels) for example in self._examples]
    if self._model.is_tuned:
      return pairs
    tokens = iter(likelihood.tokenize(vocabulary, [pair for some in pairs for pair in some],
                                      self._encodes))
    return [[next(tokens) for _ in some] for some in pairs]

  def _requests(self, found: Any) -> list[tuple[Any, Any]]:
    """(context, continuation) in ids."""
    vocabulary, form = self._prepared.vocabulary, self._prepared.form
    if self._kind.name == 'language_modelling':
      first = likelihood.first_id(vocabulary)
      return list(likelihood.windows(found, first, self._model.sequence_length))
    if not self._model.is_tuned:
      return found
    ended = lambda ids: np.append(ids, np.int32(vocabulary.eos_id))
    contexts = [vocabulary.encode(prompt) for prompt in dict.fromkeys(pair[0] for pair in found)]
    if self._encodes:
      contexts = [ended(ids[:self._model.sequence_length - 1]) for ids in contexts]
    else:
      contexts = [np.append(np.int32(form.bos_id), ids) for ids in contexts]
    of = dict(zip(dict.fromkeys(pair[0] for pair in found), contexts))
    return [(of[prompt], ended(vocabulary.encode(target))) for prompt, target in found]

  def batches(self, done: Collection[int]) -> Batches:
    """See `Predictor`."""
    model = self._model
    size = max(1, model.batch_size * model.sequence_length // 128)
    for found in likelihood.batches(model.module, model.params, self._asked, size,
                                    model.sequence_length, model.hosts, done):
      yield {i: [answer.log_likelihood, answer.greedy] for i, answer in found.items()}

  def rows(self, answers: Sequence[Any]) -> Iterator[Row]:
    """See `Predictor`."""
    tokens = self._prepared.vocabulary.encode_batch
    for number, example in enumerate(self._examples):
      start, end = self._ends[number:number + 2]
      found = [likelihood.Likelihood(*answer) for answer in answers[start:end]]
      if self._kind.name == 'multiple_choice':
        yield likelihood.choices_row(example, found)
      elif self._kind.name == 'language_modelling':
        total = sum(answer.log_likelihood for answer in found)
        yield {**likelihood.text_row(example, total, len(tokens([example['text']])[0])),
               'words': self._kind.words(example['text'])}
      else:
        scores = np.array([answer.log_likelihood for answer in found])
        scores -= np.logaddexp.reduce(scores)
        yield {'id': example['id'], 'inputs': self._prepared.form.template.prompt(example),
               'targets': example['label'],
               'prediction': self._kind.labels[int(np.argmax(scores))],
               'scores': [round(float(score), 6) + 0.0 for score in scores]}


class Generated:
  """A predictor by what the model writes behind a prompt.

  Every host decodes batches of its own on one of its devices.
  """

  def __init__(self, model: Model, prepared: PreparedExamples, split: str):
    self._model, self._prepared, self._kind = model, prepared, prepared.kind
    self._cache = prepared.cache(split)
    self.num_items = len(self._cache)

  def batches(self, done: Collection[int]) -> Batches:
    """See `Predictor`."""
    hosts, (module, params) = self._model.hosts, self._model.alone()
    new, prompts = self._prompts(module)
    by_bucket: dict[int, list[int]] = {}
    for i in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)):
      by_bucket.setdefault(round_up(len(prompts[i]) + 1), []).append(i)
    batches = [batch for members in by_bucket.values()
               for batch in chunks(members, LARGEST_BATCH)]
    batches = [batch for batch in batches if not all(i in done for i in batch)]
    vocabulary = self._prepared.vocabulary
    config = SamplingConfig(temperature=0.0, max_new_tokens=new)
    begin = self._prepared.form.bos_id if self._model.is_tuned else begin_id(vocabulary)
    for together in chunks(batches, hosts.count):
      mine, texts = together[hosts.index:hosts.index + 1], {}
      for batch in mine:
        found = methods.decode(self._model.method, module, params, [prompts[i] for i in batch],
                               config, 0, module.config.max_length, vocabulary.eos_id, begin)
        texts = {i: vocabulary.decode(without_eos(one)).strip()
                 for i, one in zip(batch, found)}
      every = hosts.gather('what is written', list(texts.items()))
      yield {i: text for one in every for i, text in one}

  def _prompts(self, module: Any) -> tuple[int, list[np.ndarray]]:
    """How many tokens may be written, and what stands before; a decoder keeps the end of what is
    too long, where the question is."""
    longest, new = self._model.sequence_length, self._prepared.task.target_length
    prompts = [self._cache.encoded(i).a for i in range(len(self._cache))]
    if hasattr(module, 'decode'):
      return min(new, module.config.max_length), [ids[:longest - 1] for ids in prompts]
    new = min(new, max(1, longest // 2))
    return new, [ids[max(0, len(ids) - (longest - new)):] for ids in prompts]

  def rows(self, answers: Sequence[Any]) -> Iterator[Row]:
    """See `Predictor`."""
    for index, text in enumerate(answers):
      example = self._cache.example(index)
      row = answer_row(self._kind, self._prepared.form.template, example, text)
      yield {'id': example['id'], **row, 'scores': None}


def answer_row(kind: Any, template: Template, example: Example, text: str) -> Row:
  """The fields of a row of predictions that follow from what a model wrote for an example."""
  prompt = template.prompt(example)
  if kind.name == 'classification':
    words = {template.target(example, label).strip().casefold(): label for label in kind.labels}
    prediction = words.get(text.casefold(), text)  # What is no label is wrong.
    return {'inputs': prompt, 'targets': example['label'], 'prediction': prediction}
  if kind.name == 'similarity':
    return {'inputs': prompt, 'targets': example['score'],
            'prediction': number(text, kind.low, kind.high)}
  if kind.name == 'tagging':
    return {'inputs': example['words'], 'targets': example['tags'],
            'prediction': tags(text, len(example['words']), kind.labels)}
  if kind.name == 'span_extraction':
    answer = '' if text == template.no_answer else text
    return {'inputs': prompt, 'targets': example['answers'], 'prediction': answer}
  return {'inputs': prompt, 'targets': example['targets'], 'prediction': text}


def number(text: str, low: float, high: float) -> float:
  """The number that a text is, within the scale; what is no number is the scale's low end."""
  try:
    return min(max(float(text), low), high)
  except ValueError:
    return low


def tags(text: str, count: int, labels: Sequence[str]) -> list[str]:
  """The tags that a text names, one a word; what is absent or unknown is 'O', or the first tag."""
  other = 'O' if 'O' in labels else labels[0]
  found = [tag if tag in labels else other for tag in text.split()[:count]]
  return found + [other] * (count - len(found))
