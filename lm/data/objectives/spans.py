"""Objectives of encoder-decoders: spans of the text go missing, and the decoder says which."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, Literal, Tuple

import numpy as np

from lm.data.objectives import noise
from lm.data.objectives.causal import decoder_features
from lm.data.objectives.contract import Base, Features, pad
from lm.data.packing import Packed
from lm.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Spans(Base):
  """Text whose spans of noise are each one sentinel; sentinels count down from the top.

  Attributes:
    num_sentinels: extra ids to tell spans apart.
  """

  num_sentinels: int = 100

  @property
  def sentinel_ids(self) -> np.ndarray:
    """What stands for the spans, the first one first; known after `bind`."""
    return self._ids('sentinels')

  def _special(self) -> tuple[str, ...]:
    return ('sentinels',)

  def _count(self, name: str) -> int:
    return self.num_sentinels if name == 'sentinels' else super()._count(name)

  def _check_sentinels(self, length: int, spans: int) -> None:
    if spans > self.num_sentinels:
      raise UserError(
          f'num_sentinels={self.num_sentinels} are too few for the {spans} spans of noise in'
          f' {length} tokens; raise it, or shorten sequence_length.'
      )

  def _features(
      self, text: np.ndarray, mask: np.ndarray, mode: np.ndarray, lengths: tuple[int, int]
  ) -> Features:
    """Returns the encoder's features [lengths[0]] and the decoder's [lengths[1]], of which
    `decoder_span_ids` says to which span a target belongs, counted from 1; it serves metrics."""
    sentinels, end = self._ids('sentinels'), np.array([self.eos_id], np.int32)
    inputs = np.concatenate([mode, noise.replace_spans(text, mask, sentinels), end])
    targets = np.concatenate([noise.replace_spans(text, ~mask, sentinels), end])
    pack = lambda tokens, length: Packed(
        pad(tokens, length),
        pad(np.ones(len(tokens), np.int32), length),
        pad(np.arange(len(tokens), dtype=np.int32), length),
        np.int32(-1),
    )
    encoder = pack(inputs, lengths[0])
    num_spans = int((mask & ~np.concatenate([[False], mask[:-1]])).sum())
    is_sentinel = np.isin(targets, sentinels[:num_spans])
    span_ids = np.where(is_sentinel, 0, np.cumsum(is_sentinel, dtype=np.int32))
    span_ids[-1] = 0  # The end belongs to no span.
    return {
        'encoder_input_tokens': encoder.tokens,
        'encoder_segment_ids': encoder.segment_ids,
        'encoder_positions': encoder.positions,
        **decoder_features(pack(targets, lengths[1]), self.bos_id),
        'decoder_span_ids': pad(span_ids, lengths[1]),
    }


@dataclasses.dataclass(frozen=True)
class SpanCorruption(_Spans):
  """Spans of the text are replaced by a sentinel each, and follow it in the target, as in T5.

  A row is one stream of text, whatever documents it is of: as many tokens as make
  `sequence_length` inputs (568 for 512, and 114 targets). Unlike T5's, documents end in `eos_id`
  inside it. Both sides end in `eos_id` too.

  Example, `SpanCorruption(vocab_size=100, noise_density=0.4, mean_span_length=2.0)` with
  `default_rng(0)`, whose sentinels are 99, 98, ...:

      tokens                  10  11  12  13  14  15  16  17  18   1
      encoder_input_tokens    10  11  12  99  16  17  18  98   1
      encoder_segment_ids      1   1   1   1   1   1   1   1   1
      encoder_positions        0   1   2   3   4   5   6   7   8
      decoder_target_tokens   99  13  14  15  98   1   1
      decoder_input_tokens     0  99  13  14  15  98   1
      decoder_loss_weights     1   1   1   1   1   1   1
      decoder_segment_ids      1   1   1   1   1   1   1
      decoder_positions        0   1   2   3   4   5   6
      decoder_span_ids         0   1   1   1   0   2   0

  Attributes:
    noise_density: share of the tokens that go missing.
    mean_span_length: tokens a span.

  Reference: Raffel et al. 2020, arXiv:1910.10683 section 3.1.4.
  """

  noise_density: float = 0.15
  mean_span_length: float = 3.0

  def __post_init__(self) -> None:
    noise.check(self.noise_density, self.mean_span_length)

  def source_length(self, sequence_length: int) -> int:
    """Returns the most tokens whose inputs are no longer than `sequence_length`."""
    length = noise.source_length(sequence_length, self.noise_density, self.mean_span_length)
    self._check_sentinels(length, noise.counts(length, *self._noise)[1])
    return length

  def __call__(
      self, packed: Packed, rng: np.random.Generator, draw: Callable[[], Packed]
  ) -> Features:
    """Returns the features above: the encoder's [sequence_length], the decoder's shorter."""
    text = packed.tokens[packed.segment_ids > 0]
    mask = noise.mask(len(text), *self._noise, rng)
    lengths = noise.encoded_lengths(len(packed.tokens), *self._noise)
    return self._features(text, mask, text[:0], lengths)

  @property
  def _noise(self) -> tuple[float, float]:
    return self.noise_density, self.mean_span_length


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """One of UL2's denoisers.

  Attributes:
    mode: 'R' regular and 'X' extreme span corruption, 'S' one span that reaches the end.
    noise_density: share of the tokens that go missing; of 'S' on average.
    mean_span_length: tokens a span; nothing to 'S'.
    rate: of its rows, relative to the other denoisers'.
  """

  mode: Literal['R', 'S', 'X'] = 'R'
  noise_density: float = 0.15
  mean_span_length: float = 3.0
  rate: float = 1.0

  def __post_init__(self) -> None:
    noise.check(self.noise_density, self.mean_span_length)
    if self.rate < 0:
      raise UserError(f'rate={self.rate} of a denoiser must not be negative.')

  def mask(self, length: int, rng: np.random.Generator) -> np.ndarray:
    """Returns what goes missing, bool [length]."""
    if self.mode != 'S':
      return noise.mask(length, self.noise_density, self.mean_span_length, rng)
    return np.arange(length) >= length - rng.integers(1, self._longest(length) + 1)

  def lengths(self, length: int) -> tuple[int, int]:
    """Returns the most inputs and targets that a text gives, ends included, the mode not."""
    if self.mode != 'S':
      return noise.encoded_lengths(length, self.noise_density, self.mean_span_length)
    return length + 1, self._longest(length) + 2

  def _longest(self, length: int) -> int:
    """The longest span of 'S': its length is uniform from 1, so that half of it is the mean."""
    return min(max(round(2 * self.noise_density * length) - 1, 1), max(length - 1, 1))


@functools.lru_cache
def _denoisers(fields: tuple[tuple[Any, ...], ...]) -> tuple[Denoiser, ...]:
  return tuple(Denoiser(*each) for each in fields)


@dataclasses.dataclass(frozen=True)
class UL2(_Spans):
  """Mixture of denoisers: each row is corrupted in one of several ways, told by a mode token.

  The mode tokens [R], [S], [X] stand below the sentinels. A row has as many tokens as every
  denoiser of spans can encode in `sequence_length`; 'S', which drops the least, cuts what does not
  fit off the text's end. Targets are padded to the longest of all denoisers.

  Example, `UL2(vocab_size=20, num_sentinels=4, denoisers=(('S', 0.25, 1.0, 1.0),))`
  with `default_rng(1)`, whose sentinels are 19 to 16 and whose modes are 15 R, 14 S, 13 X:

      tokens                   5   6   7   8   9  10  11   1
      encoder_input_tokens    14   5   6   7   8   9  19   1   0   0
      encoder_segment_ids      1   1   1   1   1   1   1   1   0   0
      encoder_positions        0   1   2   3   4   5   6   7   0   0
      decoder_target_tokens   19  10  11   1   1
      decoder_input_tokens     0  19  10  11   1
      decoder_loss_weights     1   1   1   1   1
      decoder_segment_ids      1   1   1   1   1
      decoder_positions        0   1   2   3   4
      decoder_span_ids         0   1   1   1   0

  Attributes:
    denoisers: (mode, noise_density, mean_span_length, rate) of each, see `Denoiser`; unless given,
      the paper's seven (its table 1), equally often.

  Reference: Tay et al. 2022, arXiv:2205.05131 section 3.1.
  """

  denoisers: Tuple[Tuple[Literal['R', 'S', 'X'], float, float, float], ...] = (
      ('R', 0.15, 3.0, 1.0),
      ('R', 0.15, 8.0, 1.0),
      ('S', 0.25, 1.0, 1.0),
      ('X', 0.5, 3.0, 1.0),
      ('X', 0.5, 8.0, 1.0),
      ('X', 0.15, 64.0, 1.0),
      ('X', 0.5, 64.0, 1.0),
  )

  def __post_init__(self) -> None:
    if sum(denoiser.rate for denoiser in _denoisers(self.denoisers)) <= 0:
      raise UserError('The rates of UL2.denoisers sum to 0; give one of them a positive rate.')

  def source_length(self, sequence_length: int) -> int:
    """Returns the most tokens that every denoiser of spans encodes in `sequence_length`."""
    spans = [d for d in _denoisers(self.denoisers) if d.mode != 'S']
    room = sequence_length - 1  # For the mode token.
    length = min(
        (noise.source_length(room, d.noise_density, d.mean_span_length) for d in spans),
        default=room - 2,
    )
    for d in spans:
      self._check_sentinels(length, noise.counts(length, d.noise_density, d.mean_span_length)[1])
    return length

  def __call__(
      self, packed: Packed, rng: np.random.Generator, draw: Callable[[], Packed]
  ) -> Features:
    """Returns the features above, of one denoiser."""
    denoisers = _denoisers(self.denoisers)
    rates = np.cumsum([denoiser.rate for denoiser in denoisers])
    denoiser = denoisers[np.searchsorted(rates, rng.random() * rates[-1], side='right')]
    lengths = self._lengths(len(packed.tokens))
    text = packed.tokens[packed.segment_ids > 0]
    if denoiser.mode == 'S':
      text = text[: lengths[0] - 2]
    mode = self._ids('modes')['RSX'.index(denoiser.mode)]
    return self._features(text, denoiser.mask(len(text), rng), mode[None], lengths)

  def _special(self) -> tuple[str, ...]:
    return ('sentinels', 'modes')

  def _count(self, name: str) -> int:
    return 3 if name == 'modes' else super()._count(name)

  def _lengths(self, length: int) -> tuple[int, int]:
    denoisers = _denoisers(self.denoisers)
    inputs = [d.lengths(length)[0] for d in denoisers if d.mode != 'S'] or [length + 1]
    return 1 + max(inputs), max(d.lengths(length)[1] for d in denoisers)
