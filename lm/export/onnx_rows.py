"""Texts written by the graphs of an ONNX artefact, in ONNX Runtime: many at once.

A GPT's rows decode together whatever their lengths: their keys and values are padded behind, and
the mask says how many they are. Those of an encoder-decoder do where they have written equally
many tokens, and in turns otherwise: its graph has one length for all rows.
"""
from collections.abc import Sequence
import pathlib

import numpy as np

from lm.export.onnx_format import run, session
from lm.export.past import NUM_ROWS, Past

START_ID = 0  # the first token that a decoder with an encoder reads


def _vocab_size(graph) -> int:
  return next(x.shape[-1] for x in graph.get_outputs() if x.name == 'logits')


def _renamed(found):
  return {name.replace('present', 'past_key_values'): x for name, x in found.items()
          if name.startswith('present')}


class GPTRows:
  """Those of a decoder; see `lm.inference.rows.Rows`."""
  has_encoder, chunk = False, 128

  def __init__(self, directory: pathlib.Path, max_length: int, num_rows: int = NUM_ROWS):
    """Opens the graph.

    Raises:
      UserError: ONNX Runtime cannot.
    """
    self.num_rows, self.max_length = num_rows, max_length
    self._graph = session(directory / 'model.onnx')
    self.vocab_size = _vocab_size(self._graph)
    self._empty = {x.name: np.zeros((1, x.shape[1], 0, x.shape[3]), np.float32)
                   for x in self._graph.get_inputs() if x.name.startswith('past_key_values')}
    self._past, self._lengths = Past(), {}

  def warm_up(self):
    """See `Rows`; nothing is compiled here."""

  def read(self, row: int, tokens: np.ndarray, num_new: int) -> np.ndarray:
    """See `Rows`."""
    del num_new
    past = self._past.take([row]) if row in self._lengths else self._empty
    length = self._lengths[row] = self._lengths.get(row, 0) + len(tokens)
    found = run(self._graph, {'input_ids': tokens[None], **past,
                              'attention_mask': np.ones((1, length), np.int32)})
    self._past.put([row], _renamed(found))
    return found['logits'][0, -1]

  def extend(self, rows: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """See `Rows`."""
    past = self._past.take(rows)
    lengths_B1 = np.array([[self._lengths[row]] for row in rows])
    places = next(iter(past.values())).shape[2]
    mask = np.concatenate([np.arange(places) < lengths_B1, lengths_B1 > 0], axis=1)
    found = run(self._graph, {'input_ids': np.array(tokens)[:, None], 'attention_mask': mask,
                              **past})
    longest = lengths_B1.max() + 1
    self._past.put(rows, {name: x[:, :, :longest] for name, x in _renamed(found).items()})
    for row in rows:
      self._lengths[row] += 1
    return found['logits'][:, 0]

  def drop(self, row: int):
    """See `Rows`."""
    self._past.drop(row)
    self._lengths.pop(row, None)


class T5Rows:
  """Those of an encoder-decoder; see `lm.inference.rows.Rows`. Prompts are read whole."""
  has_encoder = True

  def __init__(self, directory: pathlib.Path, max_length: int, num_rows: int = NUM_ROWS):
    """Opens the graphs.

    Raises:
      UserError: ONNX Runtime cannot.
    """
    self.num_rows, self.max_length, self.chunk = num_rows, max_length, max_length + 1
    self._encoder, self._first, self._later = (session(directory / f'{name}.onnx') for name in (
        'encoder_model', 'decoder_model', 'decoder_with_past_model'))
    self.vocab_size = _vocab_size(self._first)
    self._past, self._lengths = Past(), {}

  def warm_up(self):
    """See `Rows`; nothing is compiled here."""

  def read(self, row: int, tokens: np.ndarray, num_new: int) -> np.ndarray:
    """See `Rows`."""
    del num_new
    mask = np.ones((1, len(tokens)), np.int32)
    memory = run(self._encoder, {'input_ids': tokens[None], 'attention_mask': mask})
    found = run(self._first, {
        'input_ids': np.array([[START_ID]]), 'encoder_attention_mask': mask,
        'encoder_hidden_states': memory['last_hidden_state']})
    self._past.put([row], {'encoder_attention_mask': mask, **_renamed(found)})
    self._lengths[row] = 1
    return found['logits'][0, -1]

  def extend(self, rows: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """See `Rows`."""
    logits = {}
    for length in {self._lengths[row] for row in rows}:
      members = [i for i, row in enumerate(rows) if self._lengths[row] == length]
      alike = [rows[i] for i in members]
      past = self._past.take(alike)
      found = run(self._later, {'input_ids': np.array([[tokens[i]] for i in members]), **past})
      self._past.put(alike, past | _renamed(found))
      logits.update(zip(members, found['logits'][:, 0]))
    for row in rows:
      self._lengths[row] += 1
    return np.stack([logits[i] for i in range(len(rows))])

  def drop(self, row: int):
    """See `Rows`."""
    self._past.drop(row)
    self._lengths.pop(row, None)
