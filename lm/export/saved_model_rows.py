"""Texts written by the signatures `prefill` and `decode` of a SavedModel: many at once.

XLA compiles for each size, so a row has room for so many tokens as one of a few sizes says, and
rows of equal room decode together, by batches of a few sizes; others in turns.
"""
from collections.abc import Sequence
import itertools
import pathlib

import numpy as np

from lm.export import saved_model
from lm.export.past import NUM_ROWS, Past
from lm.inference.prompts import bucket_of, buckets

LEAST_ROOM = 32  # tokens of a row; less costs the same


class SavedModelRows:
  """See `lm.inference.rows.Rows`; prompts are read whole.

  Attributes:
    num_rows, vocab_size, max_length, has_encoder, chunk: see there.
  """

  def __init__(self, directory: pathlib.Path, max_length: int, num_rows: int = NUM_ROWS):
    """Loads the model.

    Raises:
      UserError: TensorFlow cannot, or it has no such signatures.
    """
    loaded = saved_model.load(directory, ('prefill', 'decode'))
    self._prefill, self._decode = (saved_model.answer(loaded, name)
                                   for name in ('prefill', 'decode'))
    outputs = loaded.signatures['prefill'].structured_outputs
    takes = loaded.signatures['prefill'].structured_input_signature[1]
    self.has_encoder, self.vocab_size = 'decoder_input_ids' in takes, outputs['logits'].shape[-1]
    self.num_rows, self.max_length = num_rows, max_length
    self.chunk = max_length + self.has_encoder
    self._past, self._lengths, self._rooms = Past(), {}, {}

  def warm_up(self):
    """See `Rows`."""
    rooms, inputs = buckets(*self._room(self.max_length)), [None]
    if self.has_encoder:
      inputs = buckets(*self._room(self.chunk))
    for room, size in itertools.product(rooms, inputs):
      for count in buckets(1, self.num_rows, 4):
        rows = range(count)
        for row in rows:
          # The end of the room is that of the prompt, or of what is written.
          self.read(row, np.zeros(1 if size is None else size, np.int32),
                    room - (size is None))
        self.extend(rows, [0] * count)
        for row in rows:
          self.drop(row)

  def read(self, row: int, tokens: np.ndarray, num_new: int) -> np.ndarray:
    """See `Rows`."""
    places = num_new if self.has_encoder else len(tokens) + num_new
    room = bucket_of(min(places, self.max_length), *self._room(self.max_length))
    size = bucket_of(len(tokens), *self._room(self.chunk)) if self.has_encoder else room
    ids, mask = np.zeros((2, 1, size), np.int32)
    ids[0, :len(tokens)], mask[0, :len(tokens)] = tokens, 1
    inputs = {'input_ids': ids, 'attention_mask': mask}
    if self.has_encoder:
      first = np.zeros((2, 1, room), np.int32)
      first[1, 0, 0] = 1  # The first token, of id 0, is read.
      inputs.update(decoder_input_ids=first[0], decoder_attention_mask=first[1])
    found = self._prefill(inputs)
    self._lengths[row], self._rooms[row] = int(found.pop('cache_length')[0]), (room, size)
    logits_1V = found.pop('logits')
    self._past.put([row], found | ({'attention_mask': mask} if self.has_encoder else {}))
    return logits_1V[0]

  def extend(self, rows: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """See `Rows`."""
    logits = {}
    for room in {self._rooms[row] for row in rows}:
      members = [i for i, row in enumerate(rows) if self._rooms[row] == room]
      idle = [None] * (bucket_of(len(members), 1, self.num_rows, 4) - len(members))
      alike = [rows[i] for i in members] + idle
      past = self._past.take(alike)
      column = lambda values: np.array([*values, *[0] * len(idle)], np.int32)
      found = self._decode({
          'input_ids': column(tokens[i] for i in members)[:, None],
          'cache_length': column(self._lengths[rows[i]] for i in members), **past})
      logits.update(zip(members, found.pop('logits')))
      del found['cache_length']
      self._past.put(alike, past | found)
    for row in rows:
      self._lengths[row] += 1
    return np.stack([logits[i] for i in range(len(rows))])

  def drop(self, row: int):
    """See `Rows`."""
    self._past.drop(row)
    self._lengths.pop(row, None)
    self._rooms.pop(row, None)

  def _room(self, longest):
    return min(LEAST_ROOM, longest), longest, 4
