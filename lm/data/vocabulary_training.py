"""Training of vocabularies: which text is shown to SentencePiece, with which settings."""

from __future__ import annotations

import collections
import hashlib
import io
import itertools
import re
from typing import Iterable, Iterator

from lm.corpus.document import Document
from lm.data import pretrained_vocabularies
from lm.data import vocabularies
from lm.errors import UserError

_SENTENCE_BYTES = 4000  # The trainer ignores longer ones (its max_sentence_length is 4192).


def train(
    config: vocabularies.VocabularyConfig, documents: Iterable[Document], total_bytes: int
) -> vocabularies.Vocabulary:
  """Trains a vocabulary, or opens the one that `config.path` names.

  The same documents give the same vocabulary, bit for bit.

  Pieces may hold punctuation next to letters (`(self`, `):\\n`) and runs of spaces, which makes
  tokens of Python source 7 % longer than SentencePiece's defaults do (3.75 against 3.51 bytes at
  4096 pieces).

  Args:
    config: kind, size, extra ids.
    documents: the training split.
    total_bytes: its size, to sample `config.max_training_bytes` of it evenly.

  Raises:
    UserError: the documents are too few for so many pieces, or the path holds no tokenizer.
  """
  if config.kind == 'byte':
    return vocabularies.ByteVocabulary(config.extra_ids)
  if config.kind == 'pretrained':
    return pretrained_vocabularies.open_pretrained(config.path, config.extra_ids)
  sentences = list(_sentences(documents, config.max_training_bytes / max(total_bytes, 1)))
  try:
    model = _fit(config.kind, config.size - config.extra_ids, sentences)
    return vocabularies.SentencePieceVocabulary(model, config.extra_ids)
  except _TooManyPieces as error:
    raise UserError(_too_small(config, error.largest, sentences)) from error


class _TooManyPieces(Exception):
  """The text has fewer pieces; `largest` is what SentencePiece believes it has."""

  def __init__(self, largest: int):
    super().__init__(largest)
    self.largest = largest


def _fit(kind: str, size: int, sentences: list[str]) -> bytes:
  """Returns a serialised SentencePiece model of `size` pieces."""
  import sentencepiece

  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_drop_rare(sentences, size)),
        model_writer=model,
        model_type=kind,
        vocab_size=size,
        pad_id=vocabularies.PAD_ID,
        eos_id=vocabularies.EOS_ID,
        unk_id=vocabularies.UNK_ID,
        bos_id=-1,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name='identity',
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        split_by_unicode_script=False,
        max_sentencepiece_length=32,
        num_threads=2,  # A constant: unigram sums in the order of threads.
        minloglevel=2,
    )
  except RuntimeError as error:
    limit = re.search(r'value <= (\d+)', str(error))
    if limit is None:
      raise
    raise _TooManyPieces(int(limit.group(1))) from error
  return model.getvalue()


def _sentences(documents: Iterable[Document], share: float) -> Iterator[str]:
  """Yields pieces of documents below the trainer's limit, a `share` of them, chosen by hash."""
  for document in documents:
    for index, sentence in enumerate(_short(vocabularies.escape(document.text))):
      key = hashlib.sha256(f'{index}\0{document.name}'.encode('utf-8')).digest()
      if int.from_bytes(key[:8], 'big') < share * 2**64:
        yield sentence


def _short(text: str) -> Iterator[str]:
  lines: list[str] = []
  size = 0
  for line in text.splitlines(keepends=True):
    for start in range(0, len(line), _SENTENCE_BYTES // 4):  # A character has at most four bytes.
      part = line[start : start + _SENTENCE_BYTES // 4]
      length = len(part.encode('utf-8'))
      if size + length > _SENTENCE_BYTES:
        yield ''.join(lines)
        lines, size = [], 0
      lines.append(part)
      size += length
  if lines:
    yield ''.join(lines)


def _drop_rare(sentences: list[str], size: int) -> list[str]:
  """Replaces the rarest characters by spaces, so that those left take at most half of the pieces.

  Dropped are the rarest 0.05 % of the text (SentencePiece's own default) and, where a script has
  more characters than the vocabulary has room for, all beyond that room: they are spelt in bytes.
  """
  counts = collections.Counter(itertools.chain(*sentences))
  total, most = sum(counts.values()), max(1, (size - 256 - vocabularies.NUM_SPECIAL) // 2)
  rare, seen = {}, 0
  for rank, (character, count) in enumerate(sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))):
    if rank >= most or seen >= 0.9995 * total:
      rare[ord(character)] = ' '
    seen += count
  return [sentence.translate(rare) for sentence in sentences] if rare else sentences


def _too_small(config: vocabularies.VocabularyConfig, largest: int, sentences: list[str]) -> str:
  """Says which size works: tried, because fewer pieces also leave fewer characters to count."""
  while largest >= 256 + vocabularies.NUM_SPECIAL + 1:
    try:
      _fit(config.kind, largest, sentences)
    except _TooManyPieces as error:
      largest = min(error.largest, largest - 1)
    else:
      fix = f'set it to {largest + config.extra_ids} or less, or add text'
      break
  else:
    fix = "add text, or use kind='byte'"
  return f'size={config.size} is too large a vocabulary for so small a corpus; {fix}.'
