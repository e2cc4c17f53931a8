"""Several tasks in one stream of rows, each with its objective, at a rate.

Which component a row is of follows a rule that spreads every component evenly: among the first n
rows, a component of share p has n * p, up to a rounding. So row i and its place in the component's
own stream are found in O(components), and a run resumes at any step.

    Mixture.prepare()           builds the caches of all tasks
    PreparedMixture.loader()    as `Loader`, over the mixed rows
    Mixture.register()          the same mixture in SeqIO's MixtureRegistry
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any, Optional, Sequence, Tuple, Union

import numpy as np

from lm.data import loader
from lm.data import objectives
from lm.data import tasks
from lm.data import vocabularies
from lm.data.examples import ExampleTask
from lm.data.examples import PreparedExamples
from lm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Component:
  """One task of a mixture.

  Attributes:
    task: gives the text; or labelled examples, of the form 'text_to_text' or 'decoder'.
    objective: what is asked of a text; labelled examples ask for themselves.
    rate: relative to the other components'; None for one proportional to the task's examples.
    loss_weight: multiplies the task's loss weights.
  """

  task: Union[tasks.TextTask, ExampleTask]
  objective: objectives.Objective = objectives.CausalLM()
  rate: Optional[float] = None
  loss_weight: float = 1.0

  def __post_init__(self) -> None:
    for name in ('rate', 'loss_weight'):
      value = getattr(self, name)
      if value is not None and not 0 <= value < math.inf:
        raise UserError(f'{name}={value} of task {self.task.name!r} must not be negative.')
    if isinstance(self.task, ExampleTask) and self.task.form not in ('text_to_text', 'decoder'):
      raise UserError(f'form={self.task.form!r} of task {self.task.name!r} does not go into a'
                      " mixture; bind 'text_to_text' or 'decoder'.")
    if self.objective.contiguous:
      raise UserError(f'The objective of task {self.task.name!r} has contiguous=True, but rows of a'
                      ' mixture do not go on from step to step; use a single task, or False.')


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Tasks mixed by rates, of this form where a component has none of its own (e its examples):

      rate = min(e, maximum) ** (1 / temperature)

  Attributes:
    components: the tasks; all of one vocabulary, with objectives that give the same features.
    temperature: 1 is proportional, more is nearer to equal.
    maximum: examples, above which a task counts as no larger; None for no limit.
    name: in SeqIO's registry.

  Reference: Raffel et al. 2020, arXiv:1910.10683 section 3.5.2.
  """

  components: Tuple[Component, ...]
  temperature: float = 1.0
  maximum: Optional[float] = None
  name: str = 'mixture'

  def __post_init__(self) -> None:
    if not self.components:
      raise UserError('Mixture.components is empty; name at least one component.')
    fixed = [component.rate is not None for component in self.components]
    if any(fixed) and not all(fixed):
      raise UserError('Some components have a rate and some have none; give one to all or to none.')
    if all(fixed) and (self.temperature != 1 or self.maximum is not None):
      raise UserError(f'temperature={self.temperature} and maximum={self.maximum} change nothing'
                      ' where every component has a rate; leave out the one or the other.')
    if self.temperature <= 0 or (self.maximum is not None and self.maximum <= 0):
      raise UserError(f'temperature={self.temperature} and maximum={self.maximum} must be above 0.')

  @property
  def cache_dir(self) -> str:
    """Where the first task's products are kept."""
    return self.components[0].task.cache_dir

  def rates(self, examples: Sequence[int]) -> list[float]:
    """Returns the components' rates, not normalised.

    Args:
      examples: documents of each component's training split.
    """
    if self.components[0].rate is not None:
      return [component.rate for component in self.components]
    limit = math.inf if self.maximum is None else self.maximum
    return [min(size, limit) ** (1 / self.temperature) for size in examples]

  def prepare(self, workers: Optional[int] = None, progress: bool = True) -> PreparedMixture:
    """Returns the caches of all tasks, building what is missing; see `TextTask.prepare`.

    Labelled examples take the vocabulary of the text that stands beside them.

    Raises:
      UserError: the tasks do not share one vocabulary.
    """
    found: dict[int, Any] = {
        i: c.task.prepare(workers, progress) for i, c in enumerate(self.components)
        if isinstance(c.task, tasks.TextTask)}
    given = next(iter(found.values())).vocabulary if found else None
    for i, component in enumerate(self.components):
      if i not in found:
        found[i] = component.task.prepare(progress, given)
    prepared = tuple(found[i] for i in range(len(found)))
    first = prepared[0].vocabulary
    for component, other in zip(self.components, prepared):
      if other.vocabulary.digest != first.digest:
        raise UserError(
            f'The vocabularies of tasks {self.components[0].task.name!r} and'
            f' {component.task.name!r} differ; bind the same pretrained or byte vocabulary to both.'
        )
    return PreparedMixture(self, prepared)

  def register(self) -> Any:
    """Returns the `seqio.Mixture` in SeqIO's registry, which imports TensorFlow.

    Raises:
      UserError: texts, which have targets alone there, are mixed with labelled examples.
    """
    if len({isinstance(component.task, ExampleTask) for component in self.components}) > 1:
      raise UserError(f'The mixture {self.name!r} is of texts and of labelled examples, whose'
                      ' features SeqIO does not mix; register the tasks of each alone.')
    rates: dict[Any, float] = {}
    for component, rate in zip(self.components, self.prepare(progress=False).rates):
      rates[component.task] = rates.get(component.task, 0.0) + rate
    return tasks.register_mixture(self.name, rates)


@dataclasses.dataclass(frozen=True)
class PreparedMixture:
  """Standing caches of a mixture: what training needs of it."""

  mixture: Mixture
  prepared: tuple[Union[tasks.Prepared, PreparedExamples], ...]

  @property
  def vocabulary(self) -> vocabularies.Vocabulary:
    """The vocabulary of all tasks."""
    return self.prepared[0].vocabulary

  @property
  def info(self) -> dict[str, Any]:
    """Provenance as of a task's cache; the digest of the texts also covers the rates."""
    texts = [each.info['digests']['texts'] for each in self.prepared]
    digest = hashlib.sha256(json.dumps([texts, self.rates]).encode('utf-8')).hexdigest()[:16]
    return {'digests': {'texts': digest}, 'vocabulary': self.prepared[0].info['vocabulary'],
            'components': [each.info for each in self.prepared]}

  @property
  def rates(self) -> list[float]:
    """The components' rates, not normalised."""
    return self.mixture.rates([p.info['splits']['train']['documents'] for p in self.prepared])

  @property
  def bound_objectives(self) -> list[objectives.Objective]:
    """The components' objectives, bound to the vocabulary, with the same ids at its top."""
    unbound = [
        dataclasses.replace(prepared.form, vocab_size=None)
        if isinstance(prepared, PreparedExamples) else component.objective
        for component, prepared in zip(self.mixture.components, self.prepared)
    ]
    size = max(objective.bind(self.vocabulary).vocab_size for objective in unbound)
    sized = [dataclasses.replace(o, vocab_size=o.vocab_size or size) for o in unbound]
    return [objective.bind(self.vocabulary) for objective in sized]

  def loader(
      self, split: str, sequence_length: int, batch_size: int, seed: int
  ) -> loader.Loader:
    """Returns the batches of 'train' or 'validation'; the arguments are `Loader`'s."""
    seeds = component_seeds(seed, len(self.prepared))
    rows: list[Any] = [
        None if isinstance(prepared, PreparedExamples) else
        loader.ObjectiveRows(prepared.cache(split), sequence_length, batch_size, own, objective)
        for prepared, objective, own in zip(self.prepared, self.bound_objectives, seeds)
    ]
    like = next((each[0] for each in rows if each is not None), {})
    for i, (prepared, own) in enumerate(zip(self.prepared, seeds)):
      if rows[i] is None:
        rows[i] = _examples_like(like, prepared, split, sequence_length, own)
    components = self.mixture.components
    names = [f'{c.task.name}, {type(o).__name__}'
             for c, o in zip(components, self.bound_objectives)]
    weights = [component.loss_weight for component in components]
    return loader.Loader.of_rows(MixedRows(rows, self.rates, weights, names), batch_size)


def _examples_like(like: objectives.Features, prepared: PreparedExamples, split: str,
                   sequence_length: int, seed: int) -> Any:
  """Returns the rows of labelled examples with targets as long as a row of text has them."""
  if 'encoder_input_tokens' in like:
    length = len(like['decoder_target_tokens'])
    task = dataclasses.replace(prepared.task, target_length=length)
    prepared = dataclasses.replace(prepared, task=task)
  rows = prepared.rows(split, sequence_length, seed)
  return _WithoutSpans(rows) if 'decoder_span_ids' in like else rows


class _WithoutSpans:
  """Rows whose targets belong to no span of noise."""

  def __init__(self, rows: loader.Rows):
    self._rows, self.examples = rows, rows.examples

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, row: int) -> objectives.Features:
    features = self._rows[row]
    return features | {'decoder_span_ids': np.zeros_like(features['decoder_target_tokens'])}


class MixedRows:
  """Rows of several streams, each at its rate; an epoch lasts until each has been shown whole.

  Args:
    streams: where the rows come from.
    rates: of the streams, positive or 0, in any unit.
    loss_weights: multiply each stream's features that end in `_weights`.
    names: of the streams, for errors.

  Raises:
    UserError: no rate is positive, streams give different features, or a loss weight has nothing to
      multiply.
  """

  def __init__(
      self,
      streams: Sequence[loader.Rows],
      rates: Sequence[float],
      loss_weights: Sequence[float],
      names: Sequence[str],
  ):
    if not sum(rates) > 0:
      raise UserError(f'The rates {list(rates)} of the mixture sum to 0; make one positive.')
    _check_features(streams, loss_weights, names)
    self._streams, self._loss_weights = streams, loss_weights
    left = np.cumsum(rates[::-1])[::-1]  # Of a stream and all after it.
    self._shares = [rate / rest if rest else 0.0 for rate, rest in zip(rates, left)]
    self._shares[int(np.flatnonzero(rates)[-1])] = 1.0
    epochs = [len(s) * sum(rates) / rate for s, rate in zip(streams, rates) if rate]
    self._length = math.ceil(max(epochs))

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, row: int) -> objectives.Features:
    stream, place = self.locate(row)
    features = self._streams[stream][place]
    weight = np.float32(self._loss_weights[stream])
    if weight == 1:
      return features
    return {k: v * weight if k.endswith('_weights') else v for k, v in features.items()}

  def examples(self, row: int) -> list[loader.Example]:
    """Returns what a row was made of; see `loader.Rows`."""
    stream, place = self.locate(row)
    return [example._replace(stream=stream) for example in self._streams[stream].examples(place)]

  def locate(self, row: int) -> tuple[int, int]:
    """Returns (stream, row of it): each stream takes its share of what those before it left."""
    for stream, share in enumerate(self._shares):
      taken = math.floor(row * share)
      if math.floor((row + 1) * share) > taken:
        return stream, taken
      row -= taken
    raise AssertionError('The last stream of a positive rate takes all that is left.')


def component_seeds(seed: int, count: int) -> list[int]:
  """Returns a seed for each component, so that two of one cache do not show the same rows."""
  return [int(s) for s in np.random.SeedSequence(seed).generate_state(count, np.uint64)]


def _check_features(
    streams: Sequence[loader.Rows], loss_weights: Sequence[float], names: Sequence[str]
) -> None:
  firsts = [stream[0] for stream in streams]
  forms = [{key: (value.shape, value.dtype.name) for key, value in row.items()} for row in firsts]
  for name, form, weight in zip(names, forms, loss_weights):
    for key in sorted(form.keys() | forms[0].keys()):
      ours, theirs = form.get(key, 'no such feature'), forms[0].get(key, 'no such feature')
      if ours != theirs:
        raise UserError(
            f'The components of a mixture must give the same features, but {key} is {theirs} of'
            f' ({names[0]}) and {ours} of ({name}); mix objectives of one kind.'
        )
    if weight != 1 and not any(key.endswith('_weights') for key in form):
      raise UserError(f'loss_weight={weight} of ({name}) has no loss weights to multiply; use 1.')
