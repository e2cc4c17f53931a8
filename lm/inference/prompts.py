"""Prompts in the arrays of a batch: padded to a bucket's length, rows to a power of two.

A prompt's bucket depends on that prompt alone, and a program is compiled once for a bucket.
"""
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from lm.errors import UserError
from lm.inference.decoder import Decoder

BOS_ID = 0         # the first input of every document in training; the id of padding
SHORTEST_BUCKET = 16  # tokens; shorter prompts cost the same
LARGEST_BATCH = 32    # rows decoded at once; their caches are in memory together

Stopped = Literal['eos', 'stop', 'length', 'context', 'cancelled', 'deadline']


def round_up(size: int) -> int:
  """The next power of two."""
  return 1 << (size - 1).bit_length()


def buckets(least: int, most: int, factor: int) -> list[int]:
  """The sizes that programs have, up to `most`."""
  sizes = []
  while least < most:
    sizes.append(least)
    least *= factor
  return [*sizes, most]


def bucket_of(size: int, least: int, most: int, factor: int) -> int:
  """The least of the `buckets` that takes `size`."""
  return next(one for one in buckets(least, most, factor) if one >= size)


class Batch(NamedTuple):
  """Prompts of one bucket.

  members: which prompts these are, one a row; rows behind them are idle.
  inputs_BT: what `Decoder.start` reads, of `lengths_B` tokens.
  limits_B: how many new tokens each row may have; 0 for idle rows.
  num_new: places for new tokens.
  num_places: of a row in the cache.
  """
  members: list[int]
  inputs_BT: np.ndarray
  lengths_B: np.ndarray
  limits_B: np.ndarray
  num_new: int
  num_places: int


def batches(decoder: Decoder, prompts: Sequence[np.ndarray], max_new_tokens: Sequence[int],
            max_length: int, eos_id: int, bos_id: int | None, num_rows: int = LARGEST_BATCH
            ) -> Iterator[Batch]:
  """Cuts prompts into batches of at most `num_rows`; see `generate` for the arguments.

  Args:
    max_new_tokens: of each prompt.

  Raises:
    UserError: a prompt leaves no room in the context for a single new token, or is empty where
      nothing stands before it.
  """
  buckets: dict[tuple[int, int], list[int]] = {}
  for i, prompt in enumerate(prompts):
    if len(prompt) > max_length - 1:
      raise UserError(f'prompt {i} has {len(prompt)} tokens, which leaves no room for a new one in '
                      f'a context of {max_length}; cut it to at most {max_length - 1} tokens')
    if bos_id is None and not len(prompt) and not decoder.has_encoder:
      raise UserError(f'prompt {i} is empty and this model has no token that begins a text; '
                      'give it at least one')
    size = len(prompt) + (decoder.has_encoder or bos_id is not None)  # an encoder's: an eos_id
    bucket = (min(round_up(max(size, SHORTEST_BUCKET)), max_length),
              min(round_up(max_new_tokens[i]), max_length))
    buckets.setdefault(bucket, []).append(i)
  for (bucket, num_new), members in sorted(buckets.items()):
    for start in range(0, len(members), num_rows):
      rows = members[start:start + num_rows]
      inputs_BT, lengths_B = _arrays(decoder, [prompts[i] for i in rows], bucket, eos_id, bos_id)
      limits_B = np.zeros(len(inputs_BT), np.int32)
      limits_B[:len(rows)] = [
          min(max_new_tokens[i], max_length - (0 if decoder.has_encoder else len(prompts[i])))
          for i in rows]
      before = 1 if decoder.has_encoder else bucket
      yield Batch(rows, inputs_BT, lengths_B, limits_B, num_new, min(before + num_new, max_length))


def why_stopped(tokens: np.ndarray, eos_id: int, max_new_tokens: int) -> Stopped:
  """Why a completion ends where it does."""
  if tokens[-1] == eos_id:
    return 'eos'
  return 'length' if len(tokens) == max_new_tokens else 'context'


def _arrays(decoder, prompts, bucket, eos_id, bos_id):
  size = round_up(len(prompts))
  inputs_BT = np.full((size, bucket), BOS_ID if bos_id is None else bos_id, np.int32)
  lengths_B = np.ones(size, np.int32)
  before = [] if decoder.has_encoder or bos_id is None else [bos_id]
  for row, prompt in enumerate(prompts):
    ids = [*before, *prompt, *([eos_id] if decoder.has_encoder else [])]
    inputs_BT[row, :len(ids)] = ids
    lengths_B[row] = len(ids)
  return inputs_BT, lengths_B
