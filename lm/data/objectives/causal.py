"""Objectives of decoders: next token, next token after a prefix, and text with its middle last."""

from __future__ import annotations

import dataclasses
from typing import Callable, Optional

import numpy as np

from lm.data.objectives.contract import Base, Features, pad
from lm.data.packing import Packed
from lm.data.vocabularies import PAD_ID
from lm.errors import UserError


def decoder_features(packed: Packed, bos_id: int = PAD_ID) -> Features:
  """Returns the features of next-token prediction, [length] each; see `CausalLM`."""
  tokens, segment_ids, positions = packed.tokens, packed.segment_ids, packed.positions
  inputs = np.empty_like(tokens)
  inputs[1:] = tokens[:-1]
  inputs[positions == 0] = bos_id  # First tokens, and padding, which has position 0 throughout.
  if packed.previous >= 0:
    inputs[0] = packed.previous
  return {
      'decoder_input_tokens': inputs,
      'decoder_target_tokens': tokens,
      'decoder_loss_weights': (segment_ids > 0).astype(np.float32),
      'decoder_segment_ids': segment_ids,
      'decoder_positions': positions,
  }


@dataclasses.dataclass(frozen=True)
class CausalLM(Base):
  """The next token, given all before it in the same document.

  Example, `CausalLM()`: the end of a document that began in an earlier row (its ids 7 8 1; the id
  before them was 6), a whole document, and padding. 1 ends a document, 0 is padding and beginning.

      tokens                   7   8   1   4   9   1   0   0
      previous                 6
      decoder_target_tokens    7   8   1   4   9   1   0   0
      decoder_input_tokens     6   7   8   0   4   9   0   0
      decoder_loss_weights     1   1   1   1   1   1   0   0
      decoder_segment_ids      1   1   1   2   2   2   0   0
      decoder_positions        0   1   2   0   1   2   0   0

  Attributes:
    contiguous: row r of a step goes on where row r of the step before ended, for models that carry
      a memory from batch to batch (Transformer-XL, arXiv:1901.02860 section 3.2); adds
      `decoder_restart`, int32 [], 1 where the row goes on from nothing.
  """

  contiguous: bool = False

  def __call__(
      self, packed: Packed, rng: np.random.Generator, draw: Callable[[], Packed]
  ) -> Features:
    """Returns the features above, [length] each."""
    features = decoder_features(packed, self.bos_id)
    if self.contiguous:
      features['decoder_restart'] = packed.restart
    return features


@dataclasses.dataclass(frozen=True)
class PrefixLM(Base):
  """The next token after a prefix, all of which every token of its document sees.

  Of each document in the row, a prefix of 1 to length - 1 tokens, uniformly, carries no loss (T5's
  split, arXiv:1910.10683 section 3.3.1). The inputs up to the prefix's last token, one place after
  its target, are `decoder_prefix`.

  Example, `PrefixLM()` with `default_rng(1)`:

      tokens                   7   8   9   5   1   4   9   1   0   0
      decoder_target_tokens    7   8   9   5   1   4   9   1   0   0
      decoder_input_tokens     0   7   8   9   5   0   4   9   0   0
      decoder_loss_weights     0   0   1   1   1   0   0   1   0   0
      decoder_prefix           1   1   1   0   0   1   1   1   0   0
      decoder_segment_ids      1   1   1   1   1   2   2   2   0   0
      decoder_positions        0   1   2   3   4   0   1   2   0   0
  """

  def __call__(
      self, packed: Packed, rng: np.random.Generator, draw: Callable[[], Packed]
  ) -> Features:
    """Returns the features above, [length] each; `decoder_prefix` is boolean."""
    features = decoder_features(packed, self.bos_id)
    lengths = np.bincount(packed.segment_ids)
    lengths[0] = 0  # Padding's.
    prefixes = rng.integers(1, np.maximum(lengths, 2))[packed.segment_ids]
    real = packed.segment_ids > 0
    features['decoder_prefix'] = real & (packed.positions <= prefixes)
    features['decoder_loss_weights'] = (real & (packed.positions >= prefixes)).astype(np.float32)
    return features


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle(Base):
  """The next token, where some documents' middles are moved behind their ends.

  Each document of the row is rearranged with probability `rate`: two places, uniform, cut its
  tokens (the paper cuts characters) in prefix p, middle m and suffix s, which become

      prefix_id p suffix_id s middle_id m eos     PSM, or with probability spm_rate
      prefix_id suffix_id s middle_id p m eos     SPM, the paper's variant for training with both

  and all of it is predicted. Documents are rearranged in the row, the paper's context level
  (section 4.4). The row has room for one document's three ids; what more of them add is cut off
  its end.

  Example, `FillInTheMiddle(vocab_size=23, rate=1.0, spm_rate=0.0)` with `default_rng(0)`, whose ids
  are 22 prefix, 21 middle, 20 suffix:

      tokens                   5   6   7   8   9  10   1
      decoder_target_tokens   22   5  20   8   9  10  21   6   7   1
      decoder_input_tokens     0  22   5  20   8   9  10  21   6   7
      decoder_loss_weights     1   1   1   1   1   1   1   1   1   1
      decoder_segment_ids      1   1   1   1   1   1   1   1   1   1
      decoder_positions        0   1   2   3   4   5   6   7   8   9

  Attributes:
    rate: of documents rearranged.
    spm_rate: of those, in the order suffix, prefix, middle.
    fim_prefix_id: before the prefix. fim_middle_id: before the middle. fim_suffix_id: before the
      suffix.

  Reference: Bavarian et al. 2022, arXiv:2207.14255 section 3.
  """

  rate: float = 0.5
  spm_rate: float = 0.5
  fim_prefix_id: Optional[int] = None
  fim_middle_id: Optional[int] = None
  fim_suffix_id: Optional[int] = None

  def __post_init__(self) -> None:
    for name in ('rate', 'spm_rate'):
      if not 0 <= getattr(self, name) <= 1:
        raise UserError(f'{name}={getattr(self, name)} must lie between 0 and 1.')

  def source_length(self, sequence_length: int) -> int:
    """Returns `sequence_length` less one document's three ids."""
    if sequence_length < 4:
      raise UserError(f'sequence_length={sequence_length} has no room for three ids and a token;'
                      ' raise it.')
    return sequence_length - 3

  def __call__(
      self, packed: Packed, rng: np.random.Generator, draw: Callable[[], Packed]
  ) -> Features:
    """Returns the features above, [sequence_length] each."""
    length = len(packed.tokens) + 3
    text = packed.tokens[packed.segment_ids > 0]
    pieces = np.split(text, np.flatnonzero(packed.positions[: len(text)] == 0)[1:])
    moved = rng.random(len(pieces)) < self.rate
    pieces = [self._rearrange(p, rng) if m else p for p, m in zip(pieces, moved)]
    sizes = [len(piece) for piece in pieces]
    segment_ids = np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)
    positions = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
    previous = np.int32(-1) if moved[0] else packed.previous
    tokens = np.concatenate(pieces)
    row = (pad(values, length) for values in (tokens, segment_ids, positions))
    return decoder_features(Packed(*row, previous), self.bos_id)

  @property
  def fim_ids(self) -> tuple[int, int, int]:
    """The ids before prefix, middle and suffix; known after `bind`."""
    before, middle, after = (int(self._ids(name)[0]) for name in self._special())
    return before, middle, after

  def _special(self) -> tuple[str, ...]:
    return ('fim_prefix_id', 'fim_middle_id', 'fim_suffix_id')

  def _rearrange(self, piece: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    before, middle, after = (self._ids(name) for name in self._special())
    size = len(piece) - int(piece[-1] == self.eos_id)
    start, stop = np.sort(rng.integers(0, size + 1, 2))
    p, m, s, end = np.split(piece, [start, stop, size])
    if rng.random() < self.spm_rate:
      return np.concatenate([before, after, s, middle, p, m, end])
    return np.concatenate([before, p, after, s, middle, m, end])
