"""A task of labelled examples, and its way from files to a standing cache.

    <cache_dir>/<name>-<digest>/
      info.json                     provenance, labels; written last
      train-00000.array_record      an example a record: its canonical form, and its tokens
      train.lengths.npy, train.sizes.npy
      vocabulary/
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
from pathlib import Path
import shutil
import sys
from typing import Any, Iterator, Optional, Tuple

import numpy as np
from tqdm import tqdm

from lm.corpus.document import Document
from lm.data import cache
from lm.data import loader
from lm.data import tasks
from lm.data import vocabularies
from lm.data import vocabulary_training
from lm.data.examples import chat
from lm.data.examples import chat_forms
from lm.data.examples import forms
from lm.data.examples import kinds
from lm.data.examples import sources
from lm.data.examples import spans
from lm.data.examples.rows import ExampleRows
from lm.data.examples.template import Template
from lm.errors import UserError

FORMS = forms.FORMS | {'chat': chat_forms.Chat, 'preference': chat_forms.Preference}
_SOURCES = ('chat.py', 'chat_forms.py', 'conversations.py', 'formats.py', 'forms.py', 'kinds.py',
            'sources.py', 'spans.py', 'task.py', 'template.py')
_FORMAT = 1
_SHOWN = 3  # Bad records that an error names.


@dataclasses.dataclass(frozen=True)
class ExampleTask:
  """Labelled examples: where they lie, what they are, how they are put to a model.

  Attributes:
    source: gives records of each split; see `sources`.
    kind: what a record means; see `kinds`.
    form: 'encoder' for a model with a head, 'text_to_text' for T5, 'decoder' for GPT, 'embedder'
      for two texts compared, 'chat' for conversations, 'preference' for two answers compared.
    template: prompt and target of models that write text.
    decoder_template: those of a decoder; None for the same.
    chat_template: of 'chat' and 'preference': a name of `chat.NAMED`, or a file of Jinja; None is
      the tokenizer's own.
    vocabulary: one trained on the training split, or another project's.
    target_length: tokens of a row of the decoder's side, of 'text_to_text'.
    packed: puts as many examples into a row as it holds.
    scored: evaluates a classification by a model that writes by the likelihood of each label's
      target; False lets it write the label.
    augmentations: change training examples anew in each epoch, in this order; see `augment`.
    cache_dir: where vocabularies and caches are kept; safe to delete, safe to share.
    name: in predictions and in the cache directory's name.
  """

  source: Any
  kind: kinds.Kind
  form: forms.Name = 'encoder'
  template: Template = Template()
  decoder_template: Optional[Template] = None
  chat_template: Optional[str] = None
  vocabulary: vocabularies.VocabularyConfig = vocabularies.VocabularyConfig()
  target_length: int = 128
  packed: bool = True
  scored: bool = True
  augmentations: Tuple[Any, ...] = ()
  cache_dir: str = '~/.cache/lm'
  name: str = 'examples'

  def __post_init__(self) -> None:
    if self.form not in FORMS:
      raise UserError(f'form={self.form!r} must be one of {sorted(FORMS)}.')
    if self.form == 'preference' and self.augmentations:
      raise UserError('The reference model sees the answers of a preference once, before training;'
                      ' bind augmentations=().')
    if self.chat_template and self.form not in ('chat', 'preference'):
      raise UserError(f"chat_template={self.chat_template!r} goes with form='chat' or 'preference',"
                      f' not with form={self.form!r}; bind one alone.')
    if not self.name or not self.name.replace('_', '').isalnum():
      raise UserError(f'name={self.name!r} must be letters, digits and underscores.')
    if self.target_length < 1:
      raise UserError(f'target_length={self.target_length} must be at least 1.')
    for augmentation in self.augmentations:
      augmentation.check(self.kind.name, self.form)

  def prepare(self, progress: bool = True, vocabulary: Optional[vocabularies.Vocabulary] = None
              ) -> PreparedExamples:
    """Returns the task's cache, building what is missing of it.

    Args:
      progress: whether to show a bar.
      vocabulary: takes the place of the task's own.

    Raises:
      UserError: records cannot be read or are no examples of the kind; all are looked at, the first
        ones named.
    """
    root = Path(self.cache_dir).expanduser()
    digest = _digest(self, vocabulary)
    directory = root / f'{self.name}-{digest}'
    if not (directory / 'info.json').exists():
      with cache.lock(root / f'{self.name}-{digest}.lock'):
        if not (directory / 'info.json').exists():
          _build(self, directory, digest, progress, vocabulary)
    info = json.loads((directory / 'info.json').read_text('utf-8'))
    references = {} if self.form != 'preference' else {
        split: np.zeros((found['documents'], 2)) for split, found in info['splits'].items()}
    return PreparedExamples(self, directory, vocabularies.load(directory / 'vocabulary'), info,
                            references)

  def register(self) -> Any:
    """Returns the `seqio.Task` in SeqIO's registry (imports TensorFlow; builds what is missing)."""
    from lm.data import seqio_examples

    return seqio_examples.register(self.prepare(progress=False))


@dataclasses.dataclass(frozen=True)
class PreparedExamples:
  """A standing cache of examples: what training and evaluation need of a task.

  Attributes:
    task: as it was bound.
    directory: of the cache.
    vocabulary: made its ids.
    info: provenance, `info['splits'][split]['documents']` (examples), `info['labels']`.
    references: of preferences, for each split the nats [examples, 2] of the chosen and the rejected
      answer under the reference model, to be filled in before rows are read.
  """

  task: ExampleTask
  directory: Path
  vocabulary: vocabularies.Vocabulary
  info: dict[str, Any]
  references: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  @property
  def kind(self) -> Any:
    """The task's kind, its labels resolved."""
    return _resolved(self.task.kind, self.info['labels'])

  @property
  def label_counts(self) -> list[int]:
    """How many training examples (of tags, words) have each label, in the order of the labels."""
    counts = self.info['splits'].get(sources.TRAIN, {'labels': {}})['labels']
    return [counts.get(label, 0) for label in self.info['labels'] or ()]

  @property
  def form(self) -> forms.Form:
    """The task's form, bound."""
    return _bind(self.task, self.kind, self.vocabulary, self.info['shown'])

  @property
  def vocab_size(self) -> int:
    """Ids of the vocabulary and of what the form adds to it."""
    return self.form.vocab_size

  def cache(self, split: str) -> ExampleCache:
    """Opens a split.

    Raises:
      UserError: the task has no such split.
    """
    if split not in self.info['splits']:
      raise UserError(f'The task {self.task.name!r} has no split {split!r}; it has'
                      f' {sorted(self.info["splits"])}; bind files to it, or held_out to a share'
                      ' of the training examples.')
    return ExampleCache(self.directory, split, self.references.get(split))

  def lengths(self, sequence_length: int, split: str = sources.TRAIN) -> forms.Lengths:
    """Returns the lengths of a row of a split."""
    form, kind = self.task.form, self.task.kind.name
    one = (form == 'embedder' and kind != 'similarity'
           or form == 'encoder' and kind == 'span_extraction')
    many = self.task.packed and not one
    least, most = self.info['splits'].get(split, {}).get('parts', (1, 1))
    return forms.Lengths(sequence_length, self.task.target_length,
                         max(sequence_length // 4 if many else 1, most), least, many)

  def rows(self, split: str, sequence_length: int, seed: int) -> ExampleRows:
    """Returns the stream of rows of a split; see `rows`. Training rows are augmented."""
    examples, form = self.cache(split), self.form
    used = self.task.augmentations if split == sources.TRAIN else ()
    augmentations = [each for each in used if each.rate]
    growth = max([each.growth for each in augmentations], default=1.0)
    augment = _Augmented(examples, form, augmentations) if augmentations else None
    for each in augmentations:
      each.open(text for i in range(len(examples)) for text in self.kind.texts(examples.example(i)))
    return ExampleRows(examples, form, self.lengths(sequence_length, split), seed, augment, growth)

  def loader(self, split: str, sequence_length: int, batch_size: int, seed: int) -> loader.Loader:
    """Returns the batches of a split; `batch_size` counts rows."""
    return loader.Loader.of_rows(self.rows(split, sequence_length, seed), batch_size)

  def tell(self, split: str, sequence_length: int) -> Optional[str]:
    """Returns a sentence about the examples that are too long for a row, if there are any."""
    examples, form = self.cache(split), self.form
    if form.windows(examples.sizes[:1], self.lengths(sequence_length)) is not None:
      return None
    inputs, targets = form.size(*examples.sizes.T)
    limit = self.task.target_length if self.task.form == 'text_to_text' else np.inf
    cut = int(((inputs > sequence_length) | (targets > limit)).sum())
    if not cut:
      return None
    return (f'{cut} of {len(inputs)} {split} examples of {self.task.name} are longer than'
            f' sequence_length={sequence_length}'
            + (f' or target_length={limit}' if self.task.form == 'text_to_text' else '')
            + f' and are cut (the longest has {inputs.max()} tokens'
            + (f', its target {targets.max()}' if self.task.form == 'text_to_text' else '') + ')')


class ExampleCache:
  """One split: `example(i)` is canonical, `encoded(i)` its tokens.

  Safe to share between threads and to pickle to other processes.

  Args:
    directory: of the cache.
    split: of it.
    references: [examples, 2]; see `PreparedExamples`.

  Attributes:
    sizes: int32 [examples, 3], tokens of a, of b (-1: none), and targets.
  """

  def __init__(self, directory: Path, split: str, references: Optional[np.ndarray] = None):
    self._cache, self._references = cache.TokenCache(directory, split), references
    self.sizes = np.load(directory / f'{split}.sizes.npy')

  def __len__(self) -> int:
    return len(self.sizes)

  def example(self, index: int) -> kinds.Example:
    """Returns the canonical example."""
    return json.loads(self._cache[index]['text'])['example']

  def encoded(self, index: int) -> forms.Encoded:
    """Returns the tokens."""
    record = self._cache[index]
    tokens, rest = record['tokens'], json.loads(record['text'])
    size_a, size_b, _ = self.sizes[index]
    b = None if size_b < 0 else tokens[size_a:]  # Of several texts, all; size_b is the longest.
    reference = (0.0, 0.0) if self._references is None else tuple(self._references[index])
    return forms.Encoded(tokens[:size_a], b, np.array(rest['targets'], np.int32), rest['value'],
                         reference, rest['example'])


@dataclasses.dataclass(frozen=True)
class _Augmented:
  """Makes changed tokens of an example, given its number."""

  examples: ExampleCache
  form: forms.Form
  augmentations: list[Any]

  def __call__(self, index: int, rng: np.random.Generator) -> forms.Encoded:
    example = self.examples.example(index)
    for augmentation in self.augmentations:
      example = augmentation(example, rng)
    encoded = self.form.encode(example)
    for augmentation in self.augmentations:
      encoded = augmentation.tokens(encoded, rng)
    return encoded


def _resolved(kind: kinds.Kind, labels: Optional[list[str]]) -> kinds.Kind:
  return dataclasses.replace(kind, labels=tuple(labels)) if kind.labelled else kind


def _bind(task: ExampleTask, kind: kinds.Kind, vocabulary: vocabularies.Vocabulary,
          shown: list[kinds.Example]) -> forms.Form:
  template = dataclasses.replace(_template(task), shown=tuple(shown))
  options: dict[str, Any] = {'kind': kind, 'vocabulary': vocabulary, 'template': template}
  form = FORMS[task.form]
  if task.form == 'encoder' and kind.name == 'span_extraction':
    form = spans.SpanForm
  if issubclass(form, chat_forms.Chat):
    options['chat'] = chat.open_template(vocabulary, task.chat_template)
  return form(**options).bind(vocabulary)


def _template(task: ExampleTask) -> Template:
  """Returns the template of the task's form."""
  own = task.decoder_template if task.form == 'decoder' else None
  return task.template if own is None else own


def _digest(task: ExampleTask, given: Optional[vocabularies.Vocabulary] = None) -> str:
  """What a cache depends on: the files, the task but for augmentations and lengths, our code."""
  own = Path(__file__).parent
  parts = [
      _FORMAT, task.source.digest(),
      type(task.kind).__name__, dataclasses.asdict(task.kind), task.form,
      dataclasses.asdict(_template(task)), chat.digest_source(task.chat_template),
      given.digest if given else [dataclasses.asdict(task.vocabulary),
                                  tasks.digests_of_vocabulary(task.vocabulary)],
      [hashlib.sha256((own / name).read_bytes()).hexdigest() for name in _SOURCES],
  ]
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _build(task: ExampleTask, directory: Path, digest: str, progress: bool,
           given: Optional[vocabularies.Vocabulary]) -> None:
  """Reads all splits, then writes the cache, whole or not at all."""
  found = {split: _read(task, split, progress) for split in task.source.splits()}
  if not found.get(sources.TRAIN) and not any(found.values()):
    raise UserError(f'The task {task.name!r} has no example; name files with some.')
  labels = _labels(task, found)
  vocabulary = given or _vocabulary(task, found)
  shown = _shown(task, found)
  form = _bind(task, _resolved(task.kind, labels), vocabulary, shown)
  temporary = directory.with_name(f'{directory.name}.{os.getpid()}.part')
  shutil.rmtree(temporary, ignore_errors=True)
  with cache.writing(directory):
    temporary.mkdir(parents=True)
    vocabulary.save(temporary / 'vocabulary')
  splits = {split: _write(temporary, split, examples, form, progress)
            for split, examples in found.items()}
  info = {
      'splits': splits, 'labels': labels, 'shown': shown, 'digests': {'texts': digest},
      'vocabulary': {'digest': vocabulary.digest, 'size': vocabulary.size},
  }
  cache.write_whole(temporary / 'info.json', (json.dumps(info, indent=2) + '\n').encode())
  shutil.rmtree(directory, ignore_errors=True)
  os.replace(temporary, directory)


def _read(task: ExampleTask, split: str, progress: bool) -> list[kinds.Example]:
  """Returns the canonical examples of a split."""
  examples, wrong = [], []
  known = set(getattr(task.kind, 'labels', ()))
  for where, record in tqdm(task.source.records(split), f'reading {split}', unit=' examples',
                            disable=not progress, mininterval=0.5):
    try:
      example = task.kind.canonical(record)
      strange = set(task.kind.labels_of(example)) - known if known else ()
      if strange:
        raise kinds.BadExample(f'has the label {min(strange)!r}, which is none of the'
                               f' {len(known)} labels')
      examples.append({'id': str(record.get('id', f'{split}-{len(examples)}')), **example})
    except kinds.BadExample as error:
      wrong.append(f'{where} {error}{task.source.hint(record)}')
  if wrong:
    more = f', and {len(wrong) - _SHOWN} more' if len(wrong) > _SHOWN else ''
    raise UserError(f'{len(wrong)} of {len(wrong) + len(examples)} records of {split} are no'
                    f' example of {task.name!r}: {"; ".join(wrong[:_SHOWN])}{more}; mend them or'
                    ' the names of the fields.')
  return examples


def _labels(task: ExampleTask, found: dict[str, list[kinds.Example]]) -> Optional[list[str]]:
  """Returns the labels: those that are bound, else those of the training split, sorted.

  Raises:
    UserError: another split has a label that training has not.
  """
  if not task.kind.labelled:
    return None
  if task.kind.labels:
    return list(task.kind.labels)
  of = lambda examples: {label for e in examples for label in task.kind.labels_of(e)}
  known = of(found.get(sources.TRAIN) or next(iter(found.values())))
  for split, examples in found.items():
    strange = sorted(of(examples) - known)
    if strange:
      raise UserError(f'The label {strange[0]!r} of split {split!r} is none of the {len(known)} of'
                      f' the training split of {task.name!r}; bind labels to all of them, or mend'
                      ' the file.')
  return sorted(known)


def _shown(task: ExampleTask, found: dict[str, list[kinds.Example]]) -> list[kinds.Example]:
  """Returns the training examples that are shown before prompts, and one more.

  Raises:
    UserError: there are not as many.
  """
  template, train = _template(task), found.get(sources.TRAIN, [])
  if not template.shots or template.shown:
    return list(template.shown)
  if len(train) <= template.shots:
    raise UserError(f'shots={template.shots} must be fewer than the training examples of'
                    f' {task.name!r}, which has {len(train)}; bind its training files.')
  rng = np.random.default_rng(template.shots_seed)
  return [train[i] for i in rng.choice(len(train), template.shots + 1, replace=False)]


def _vocabulary(task: ExampleTask, found: dict[str, list[kinds.Example]]
                ) -> vocabularies.Vocabulary:
  """Returns the vocabulary; one that is trained learns from prompts and targets of training."""
  def texts() -> Iterator[str]:
    for example in found.get(sources.TRAIN, ()):
      if task.form in ('text_to_text', 'decoder', 'chat') and task.kind.name != 'conversation':
        yield _template(task).prompt(example)
        yield _template(task).target(example)
      else:
        yield from task.kind.texts(example)

  documents = (Document(str(number), text) for number, text in enumerate(texts()))
  size = sum(len(text.encode('utf-8')) for text in texts())
  return vocabulary_training.train(task.vocabulary, documents, size)


def _write(directory: Path, split: str, examples: list[kinds.Example], form: forms.Form,
           progress: bool) -> dict[str, Any]:
  """Writes a split and returns what info.json says of it."""
  sizes, parts, lengths, counts = [], [], [], collections.Counter()

  def records() -> Iterator[bytes]:
    for example in tqdm(examples, f'tokenising {split}', unit=' examples', disable=not progress,
                        mininterval=0.5, file=sys.stderr):
      encoded = form.encode(example)
      tokens = encoded.a if encoded.b is None else np.concatenate([encoded.a, encoded.b])
      sizes.append(form.measure(encoded))
      parts.append(form.parts(np.array([sizes[-1]])).item())
      lengths.append(len(tokens))
      counts.update(form.kind.labels_of(example))
      text = json.dumps({'example': example, 'targets': encoded.targets.tolist(),
                         'value': encoded.value}, ensure_ascii=False)
      yield from cache.split_records(tokens, example['id'], text)

  file = f'{split}-00000.array_record'
  number = cache.write_array_record(directory / file, records())
  cache.write_array(directory / f'{split}.lengths.npy', np.array(lengths, np.int64))
  cache.write_array(directory / f'{split}.sizes.npy', np.array(sizes, np.int32).reshape(-1, 3))
  return {'documents': len(examples), 'tokens': int(sum(lengths)), 'labels': dict(counts),
          'parts': [min(parts, default=1), max(parts, default=1)],
          'shards': [{'file': file, 'records': number}]}
