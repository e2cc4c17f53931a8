"""The SeqIO side of a task: what happens to a document before it is cached.

The only file of this room that imports TensorFlow (through SeqIO); it is imported when a cache is
built, never at training time. Every change to this file makes a new cache, because its source is
part of the cache's digest: put preprocessors here and nothing else.

    source        {'name': 'lib/abc.py', 'targets': 'import os\\n'}
    tokenize      {..., 'targets_pretokenized': 'import os\\n', 'targets': [87, 301, 13]}
    append_eos    {..., 'targets': [87, 301, 13, 1]}
    CacheDatasetPlaceholder: here the offline cache is cut; what is random happens after it, in
      numpy.
"""

from __future__ import annotations

from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from lm.corpus.document import Document
from lm.data import splits
from lm.data import vocabularies

PREPROCESSORS: tuple[Callable[..., tf.data.Dataset], ...] = (
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos,
)


class SeqioVocabulary(seqio.Vocabulary):
  """One of `lm.data.vocabularies` as SeqIO wants it."""

  def __init__(self, vocabulary: vocabularies.Vocabulary):
    super().__init__()
    self.vocabulary = vocabulary

  @property
  def eos_id(self) -> int:
    return self.vocabulary.eos_id

  @property
  def unk_id(self) -> int:
    return self.vocabulary.unk_id

  @property
  def _base_vocab_size(self) -> int:
    return self.vocabulary.size

  def _encode(self, s: str) -> Sequence[int]:
    return self.vocabulary.encode(s).tolist()

  def _decode(self, ids: Sequence[int]) -> str:
    return self.vocabulary.decode(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    ids = tf.numpy_function(
        lambda text: self.vocabulary.encode(text.decode('utf-8')), [s], tf.int32, stateful=False
    )
    return tf.ensure_shape(ids, [None])

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    decode = lambda array: self.vocabulary.decode(array).encode('utf-8')
    text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
    return tf.ensure_shape(text, [])

  def __eq__(self, other: object) -> bool:
    return isinstance(other, SeqioVocabulary) and other.vocabulary.digest == self.vocabulary.digest

  def __hash__(self) -> int:
    return hash(self.vocabulary.digest)


def bits_per_byte(targets: Sequence[str], scores: Sequence[float]) -> Mapping[str, float]:
  """Returns -sum(log2 p) over the bytes of all documents.

  Args:
    targets: the documents' texts.
    scores: the log likelihood of each whole document, in nats.
  """
  num_bytes = sum(len(text.encode('utf-8')) for text in targets)
  return {'bits_per_byte': float(-np.sum(scores) / np.log(2) / num_bytes)}


def to_dataset(make: Callable[[], Iterator[Document]]) -> tf.data.Dataset:
  """Returns the documents that `make()` streams as {'name', 'targets'} of strings."""

  def examples() -> Iterator[dict[str, bytes]]:
    for document in make():
      yield {'name': document.name.encode('utf-8', 'surrogateescape'),
             'targets': document.text.encode('utf-8')}

  text = tf.TensorSpec([], tf.string)
  return tf.data.Dataset.from_generator(examples, output_signature={'name': text, 'targets': text})


def register(
    name: str, files: splits.Files, held_out_fraction: float, vocabulary: vocabularies.Vocabulary
) -> seqio.Task:
  """Registers the task in `seqio.TaskRegistry`, in place of an older one of its name."""

  def dataset_fn(split: str, shuffle_files: bool = False, seed: Any = None) -> tf.data.Dataset:
    del shuffle_files, seed
    rule = splits.survey(splits.documents(files), held_out_fraction)

    def stream() -> Iterator[Document]:
      for part, document in splits.split(splits.documents(files), rule, held_out_fraction):
        if part == split:
          yield document

    return to_dataset(stream)

  seqio_vocabulary = SeqioVocabulary(vocabulary)
  if name in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(name)
  return seqio.TaskRegistry.add(
      name,
      source=seqio.FunctionDataSource(dataset_fn, splits=(splits.TRAIN, splits.VALIDATION)),
      preprocessors=[*PREPROCESSORS, seqio.CacheDatasetPlaceholder()],
      output_features={'targets': seqio.Feature(seqio_vocabulary, add_eos=True)},
      postprocess_fn=lambda target, example=None, is_target=False, **_: (
          example['targets_pretokenized'].decode('utf-8') if is_target else target
      ),
      metric_fns=[bits_per_byte],
  )


def tokenized(
    task: seqio.Task, make: Callable[[], Iterator[Document]]
) -> Iterator[tuple[np.ndarray, str, str]]:
  """Yields (ids, name, text): the task's preprocessors up to the placeholder."""
  dataset = task.preprocess_precache(to_dataset(make))
  for example in dataset.as_numpy_iterator():
    yield (
        example['targets'],
        example['name'].decode('utf-8', 'surrogateescape'),
        example['targets_pretokenized'].decode('utf-8'),
    )
