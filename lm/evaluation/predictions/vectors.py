"""Answers of an encoder of two texts: how alike they are, and which document belongs to a query."""
import base64
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.examples import PreparedExamples
from lm.data.examples.forms import Encoded
from lm.evaluation.predictions.contract import Batches, bucket, chunks, Model, refuse, Row
from lm.parallel.batches import GlobalBatch

QUERY, DOCUMENT = 'query', 'document'
DEPTH = 100  # documents of a ranking that are kept
QUERIES = 1024  # compared with all documents at once

Text = tuple[str, str]  # its side, and itself


class Vectors:
  """A predictor that embeds every text of a split once; the items are the different texts.

  Raises:
    UserError: the model embeds nothing, or the kind is not answered by vectors.
  """

  def __init__(self, model: Model, prepared: PreparedExamples, split: str):
    if model.family not in ('EmbedderConfig', 'DualEncoderConfig') or (
        prepared.kind.name not in ('similarity', 'retrieval')):
      raise refuse(model, prepared, 'vectors answer similarity and retrieval, and come from '
                   'EmbedderConfig and DualEncoderConfig')
    self._model, self._prepared, self._form = model, prepared, prepared.form
    self._cache = prepared.cache(split)
    self._is_shared = getattr(model.module.config, 'document', None) is None
    texts = dict.fromkeys(text for i in range(len(self._cache)) for text in self._texts(i))
    self._number = {text: i for i, text in enumerate(texts)}
    self.num_items = len(texts)
    self._programs: dict[int, Callable] = {}

  def _texts(self, index: int) -> list[Text]:
    """Those of an example; of one encoder for both sides, all are of one side."""
    example = self._cache.example(index)
    names = ('a', 'b') if 'a' in example else ('query', 'documents')
    query, documents = (example[name] for name in names)
    documents = [documents] if isinstance(documents, str) else documents
    side = QUERY if self._is_shared else DOCUMENT
    return [(QUERY, query), *((side, document) for document in documents)]

  def batches(self, done: Collection[int]) -> Batches:
    """See `Predictor`. The model embeds two columns of texts at a time: queries and documents or,
    where one encoder embeds both, any."""
    texts, longest = list(self._number), self._model.sequence_length
    tokens = self._prepared.vocabulary.encode_batch([text for _, text in texts])
    framed = [self._form.framed(Encoded(ids, None, ids[:0]), longest)[0] for ids in tokens]
    order = sorted(range(len(framed)), key=lambda i: (-len(framed[i]), i))
    by_length: dict[int, list[int]] = {}
    for i in order:
      by_length.setdefault(bucket(len(framed[i]), longest), []).append(i)
    for length, members in by_length.items():
      columns = ((members[::2], members[1::2]) if self._is_shared else
                 [[i for i in members if texts[i][0] == side] for side in (QUERY, DOCUMENT)])
      size = self._model.rows_of(length)
      parts = [chunks(column, size) for column in columns]
      for number in range(max(map(len, parts))):
        batch = [part[number] if number < len(part) else [] for part in parts]
        if not all(i in done for column in batch for i in column):
          yield self._answer(length, size, framed, batch)

  def _answer(self, length: int, size: int, framed: Sequence[np.ndarray],
              columns: Sequence[Sequence[int]]) -> dict[int, str]:
    where, batch = GlobalBatch(self._model.module.rules, size), {}
    for side, members in zip((QUERY, DOCUMENT), columns):
      rows = np.zeros((size, length), np.int32)
      for row, i in enumerate(members):
        rows[row, :len(framed[i])] = framed[i]
      batch[f'{side}_tokens'] = rows[where.own]
    found = self._program(length)(self._model.params, where.place(batch))
    return {i: base64.b85encode(vector.tobytes()).decode()
            for side, members in zip((QUERY, DOCUMENT), columns)
            for i, vector in zip(members, np.asarray(found[side], np.float32))}

  def _program(self, length: int) -> Callable:
    """From (params, batch) to unit vectors of both sides, float32 [B, E]."""
    if length not in self._programs:
      module = self._model.module

      def run(params, batch):
        outputs, _ = module.apply({'params': params}, batch, method='outputs')
        unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return {side: unit(outputs['embeddings'][side]) for side in (QUERY, DOCUMENT)}

      mesh = module.rules.mesh
      over = {} if mesh is None else {'out_shardings': module.rules.sharding()}
      self._programs[length] = self._model.hosts.same_program(jax.jit(run, **over))
    return self._programs[length]

  def rows(self, answers: Sequence[Any]) -> Iterator[Row]:
    """See `Predictor`. Similarity is the cosine; a ranking is of all documents of the split, each
    of which is there once and has a number in the order of its first mention."""
    vectors = np.stack([np.frombuffer(base64.b85decode(answer), np.float32) for answer in answers])
    if self._prepared.kind.name == 'similarity':
      for index in range(len(self._cache)):
        example = self._cache.example(index)
        a, b = (vectors[self._number[text]] for text in self._texts(index))
        yield {'id': example['id'], 'inputs': f'{example["a"]}\n{example["b"]}',
               'targets': example['score'], 'prediction': float(np.dot(a, b)), 'scores': None}
      return
    yield from self._rankings(vectors)

  def _rankings(self, vectors: np.ndarray) -> Iterator[Row]:
    of = [self._texts(index) for index in range(len(self._cache))]
    documents = dict.fromkeys(document for _, *found in of for document in found)
    name = {document: f'd{i}' for i, document in enumerate(documents)}
    names, places = list(name.values()), [self._number[document] for document in documents]
    for indices in chunks(range(len(of)), QUERIES):
      queries = vectors[[self._number[of[i][0]] for i in indices]]
      for i, scores in zip(indices, queries @ vectors[places].T):
        best = np.argsort(-scores, kind='stable')[:DEPTH]
        example = self._cache.example(i)
        yield {'id': example['id'], 'inputs': example['query'], 'targets': [name[of[i][1]]],
               'prediction': [names[j] for j in best],
               'scores': [round(float(x), 6) for x in scores[best]]}
