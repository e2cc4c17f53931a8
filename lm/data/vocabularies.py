"""Text to ids and back, without loss and without TensorFlow.

Ids 0, 1, 2 are padding, end of document, and unknown (never produced: every byte has a piece).
`decode(encode(text)) == text` for every `str` that UTF-8 can spell.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from pathlib import Path
import re
from typing import Iterable, Literal, Protocol, Sequence

import numpy as np

from lm.errors import UserError

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
NUM_SPECIAL = 3
# SentencePiece writes a space as U+2581, so it cannot tell that character from a space. It is spelt
# with an escape instead; the escape character (a private-use one) spells itself as a pair.
_SPACE_MARK, _ESCAPE = '\u2581', '\uf8f1'
# Longer words (of text that has no spaces) are cut: the encoder's time is more than linear in them.
_WORD = re.compile(r' *[^ ]{1,4096}| +')
_MOST_KNOWN_WORDS = 1 << 18


@dataclasses.dataclass(frozen=True)
class VocabularyConfig:
  """What vocabulary a task uses.

  Attributes:
    kind: 'bpe' or 'unigram' (SentencePiece, trained on the training split), or 'byte' (nothing to
      train).
    size: number of ids, special ones included; 'byte' always has 259.
    max_training_bytes: at most about this much text is used for training, sampled evenly.
  """

  kind: Literal['bpe', 'unigram', 'byte'] = 'bpe'
  size: int = 4096
  max_training_bytes: int = 4_000_000

  def __post_init__(self) -> None:
    if self.kind not in ('bpe', 'unigram', 'byte'):
      raise UserError(f"kind={self.kind!r} is not a vocabulary; use 'bpe', 'unigram' or 'byte'.")
    if self.kind != 'byte' and self.size < 256 + NUM_SPECIAL + 1:
      raise UserError(
          f'size={self.size} is too small: a vocabulary holds 3 special ids, 256 bytes and at least'
          ' one piece; use 260 or more.'
      )
    if self.max_training_bytes < 1:
      raise UserError(f'max_training_bytes={self.max_training_bytes} must be positive.')


class Vocabulary(Protocol):
  """What the rest of `lm` knows of a vocabulary."""

  size: int
  pad_id: int
  eos_id: int
  unk_id: int
  digest: str

  def encode(self, text: str) -> np.ndarray:
    """Returns int32 ids [tokens], without end of document."""

  def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
    """Returns the ids of each text."""

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the ids; special ids are skipped, broken UTF-8 becomes U+FFFD."""

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes the vocabulary where `load` finds it."""


class ByteVocabulary:
  """The UTF-8 bytes themselves: byte b has id b + 3."""

  size = 256 + NUM_SPECIAL
  pad_id, eos_id, unk_id = PAD_ID, EOS_ID, UNK_ID
  digest = hashlib.sha256(b'byte').hexdigest()

  def encode(self, text: str) -> np.ndarray:
    """Returns int32 ids [bytes]."""
    return np.frombuffer(text.encode('utf-8'), np.uint8).astype(np.int32) + NUM_SPECIAL

  def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
    """Returns the ids of each text; one thread suffices."""
    del num_threads
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the ids."""
    array = np.asarray(list(ids), np.int64).reshape(-1) - NUM_SPECIAL
    return array[(array >= 0) & (array < 256)].astype(np.uint8).tobytes().decode('utf-8', 'replace')

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes `vocabulary.json`."""
    _save(directory, 'byte', self.size, self.digest, None)


class SentencePieceVocabulary:
  """Pieces learnt by SentencePiece (BPE or unigram), bytes where no piece fits.

  Args:
    model: the serialised SentencePiece model.

  Reference: Kudo and Richardson 2018, arXiv:1808.06226.
  """

  pad_id, eos_id, unk_id = PAD_ID, EOS_ID, UNK_ID

  def __init__(self, model: bytes):
    import sentencepiece  # Not for those who only look at bytes.

    self.model = model
    self.digest = hashlib.sha256(model).hexdigest()
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    self.size = int(self._processor.vocab_size())
    self._known: dict[str, list[int]] = {}
    self._bytes_of = [self._piece_bytes(id_) for id_ in range(self.size)]

  def __getstate__(self) -> bytes:
    return self.model

  def __setstate__(self, model: bytes) -> None:
    self.__init__(model)

  def encode(self, text: str) -> np.ndarray:
    """Returns int32 ids [tokens]."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
    """Returns the ids of each text.

    No piece crosses from a word to the next (a word is a run of spaces and what follows), because
    the trainer saw words alone; so a word's ids are found once and remembered, which encodes 10
    times faster than the whole text at once, to the same ids.
    """
    words = [_words(escape(text)) for text in texts]
    if len(self._known) > _MOST_KNOWN_WORDS:
      self._known = {}
    known = self._known  # Another thread may replace it, not empty it.
    new = sorted(set(itertools.chain(*words)).difference(known))
    known.update(zip(new, self._processor.encode(new, out_type=int, num_threads=num_threads)))
    return [
        np.fromiter(itertools.chain.from_iterable(map(known.__getitem__, text)), np.int32)
        for text in words
    ]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the ids; ids out of range are skipped like the special ones."""
    table = self._bytes_of
    data = b''.join(table[id_] for id_ in map(int, ids) if 0 <= id_ < self.size)
    return _unescape(data.decode('utf-8', 'replace'))

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes `vocabulary.json` and `vocabulary.model`."""
    _save(directory, 'sentencepiece', self.size, self.digest, self.model)

  def _piece_bytes(self, id_: int) -> bytes:
    if self._processor.is_control(id_) or self._processor.is_unknown(id_):
      return b''
    piece = self._processor.id_to_piece(id_)
    if self._processor.is_byte(id_):
      return bytes([int(piece[3:-1], 16)])  # '<0x41>'
    return piece.replace(_SPACE_MARK, ' ').encode('utf-8')


def load(directory: str | os.PathLike[str]) -> Vocabulary:
  """Returns the vocabulary that `save` wrote.

  Raises:
    UserError: there is none, or the model is not the one that was saved.
  """
  try:
    info = json.loads(Path(directory, 'vocabulary.json').read_text(encoding='utf-8'))
    if info['kind'] == 'byte':
      return ByteVocabulary()
    model = Path(directory, 'vocabulary.model').read_bytes()
  except (OSError, ValueError, KeyError) as error:
    raise UserError(
        f'{directory} holds no vocabulary ({error}); name the directory of one.'
    ) from error
  if hashlib.sha256(model).hexdigest() != info['digest']:
    raise UserError(
        f'{directory}/vocabulary.model is damaged; delete the directory and build it again.'
    )
  return SentencePieceVocabulary(model)


def _save(
    directory: str | os.PathLike[str], kind: str, size: int, digest: str, model: bytes | None
) -> None:
  Path(directory).mkdir(parents=True, exist_ok=True)
  if model is not None:
    Path(directory, 'vocabulary.model').write_bytes(model)
  info = {'kind': kind, 'size': size, 'digest': digest}
  Path(directory, 'vocabulary.json').write_text(json.dumps(info) + '\n', encoding='utf-8')


def escape(text: str) -> str:
  """Returns the text without U+2581, which SentencePiece would take for a space."""
  if _SPACE_MARK in text or _ESCAPE in text:
    text = text.replace(_ESCAPE, _ESCAPE + 'e').replace(_SPACE_MARK, _ESCAPE + 's')
  return text


def _unescape(text: str) -> str:
  if _ESCAPE in text:
    text = text.replace(_ESCAPE + 's', _SPACE_MARK).replace(_ESCAPE + 'e', _ESCAPE)
  return text


def _words(text: str) -> list[str]:
  """Returns a text's words, very long ones cut."""
  return _WORD.findall(text)
