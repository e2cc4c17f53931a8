"""Infilling: what may stand between a text's two parts, by models that learnt to say it.

A decoder of `FillInTheMiddle` reads both parts and goes on with the middle (arXiv:2207.14255,
section 3); an encoder-decoder of span corruption reads a sentinel in the middle's place, and says
what it stands for (arXiv:1910.10683, section 3.1.4).
"""
from collections.abc import Sequence
import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np

from lm.errors import UserError
from lm.inference.generate import generate, Vocabulary
from lm.inference.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class FIM:
  """The ids between which a decoder was shown texts with their middle last.

  order: 'psm' asks in the order prefix, suffix, middle; 'spm' in the order suffix, prefix, middle,
    with the ids in the places that training for both gives them (section 3, SPM variant 2).
  bos_id: stands before every document; None for models that have nothing there.
  """
  prefix_id: int
  middle_id: int
  suffix_id: int
  order: Literal['psm', 'spm'] = 'psm'
  bos_id: int | None = 0

  def prompt(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The ids behind which the middle is written."""
    parts = [[self.prefix_id], before, [self.suffix_id], after, [self.middle_id]]
    if self.order == 'spm':
      parts = [[self.prefix_id], [self.suffix_id], after, [self.middle_id], before]
    return np.concatenate(parts).astype(np.int32)

  def length(self, tokens: np.ndarray, eos_id: int) -> int:
    """How many of these tokens are the middle."""
    return _until(tokens, (eos_id, self.prefix_id, self.suffix_id, self.middle_id))


@dataclasses.dataclass(frozen=True)
class Spans:
  """The sentinels of span corruption: that of the missing span, and the one behind it."""
  first_id: int
  second_id: int
  bos_id: None = None

  def prompt(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """What the encoder reads."""
    return np.concatenate([before, [self.first_id], after]).astype(np.int32)

  def length(self, tokens: np.ndarray, eos_id: int) -> int:
    """How many of these tokens are the first sentinel and its span."""
    return _until(tokens, (eos_id, self.second_id))


class Middle(NamedTuple):
  """text: of the middle. tokens: its ids. log_prob: of them and of the end of the span, given what
  stands around them, nats. is_whole: whether it ended before `max_new_tokens`.
  """
  text: str
  tokens: list[int]
  log_prob: float
  is_whole: bool


def infill(module: Any, params: Any, vocabulary: Vocabulary, sentinels: FIM | Spans, before: str,
           after: str, config: SamplingConfig, num_candidates: int, seed: int, max_length: int
           ) -> list[Middle]:
  """What may stand between `before` and `after`: different middles, the likeliest first.

  Where the context has no room for all of the text, the model reads what is nearest to the gap.

  Args:
    sentinels: that the model was trained with.
    config: how to draw; the first candidate is greedy.
    num_candidates: at most so many; of equal ones one is kept.
    max_length: the model's context, in tokens.

  Raises:
    UserError: the context has no room for the middle.
  """
  left, prompt = asked(vocabulary, sentinels, before, after, config.max_new_tokens, max_length)
  configs = [dataclasses.replace(config, temperature=0)] + [config] * (num_candidates - 1)
  completions = generate(module, params, [prompt] * num_candidates, configs,
                         [*range(seed, seed + num_candidates)], max_length, vocabulary.eos_id,
                         sentinels.bos_id)
  found = {}
  for done in completions:
    middle = middle_of(vocabulary, sentinels, left, done.tokens.tolist(), done.log_probs.tolist())
    known = found.setdefault(middle.text, middle)
    if (known.is_whole, known.log_prob) < (middle.is_whole, middle.log_prob):
      found[middle.text] = middle
  return sorted(found.values(), key=lambda middle: (-middle.is_whole, -middle.log_prob))


def asked(vocabulary: Vocabulary, sentinels: FIM | Spans, before: str, after: str,
          max_new_tokens: int, max_length: int) -> tuple[np.ndarray, np.ndarray]:
  """The ids of what is read of `before`, and those behind which the middle is written.

  Raises:
    UserError: the context has no room for the middle.
  """
  room = max_length - 5 - (0 if isinstance(sentinels, Spans) else max_new_tokens)
  if room < 1:
    raise UserError(f'max_new_tokens={max_new_tokens} leave no room for the text around the '
                    f'span in a context of {max_length} tokens; ask for at most {max_length - 6}')
  left, right = nearest(vocabulary.encode(before), vocabulary.encode(after), room)
  return left, sentinels.prompt(left, right)


def middle_of(vocabulary: Vocabulary, sentinels: FIM | Spans, left: np.ndarray,
              tokens: Sequence[int], log_probs: Sequence[float]) -> Middle:
  """What a completion of the ids of `asked` says; `left` is the first of these."""
  length = sentinels.length(tokens, vocabulary.eos_id)
  ids = list(tokens[:length])
  if isinstance(sentinels, Spans) and ids[:1] == [sentinels.first_id]:
    ids = ids[1:]
  return Middle(text_behind(vocabulary, left.tolist(), ids), ids, sum(log_probs[:length + 1]),
                length < len(tokens))


class End:
  """Ends a completion of the ids of `asked` where the middle ends; a `Stop`."""

  def __init__(self, sentinels: FIM | Spans):
    self._sentinels = sentinels

  def advance(self, token: int) -> bool:
    """Whether the middle ends with this token."""
    return self._sentinels.length([token], -1) == 0


def nearest(before: np.ndarray, after: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
  """The last tokens of `before` and the first of `after`: half of the room each, and what the other
  leaves of its half."""
  left = max(min(len(before), room - min(len(after), room // 2)), 0)
  return before[len(before) - left:], after[:room - left]


def text_behind(vocabulary: Vocabulary, left: Sequence[int], ids: Sequence[int]) -> str:
  """What these ids add to the text of those before them: a decoder may drop the space with which a
  text begins, but not one within it."""
  whole, start = vocabulary.decode([*left, *ids]), vocabulary.decode(left)
  return whole[len(start):] if whole.startswith(start) else vocabulary.decode(ids)


def _until(tokens: Sequence[int], ends: Sequence[int]) -> int:
  return next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
