"""Training of vocabularies: which text is shown to the trainers, with which settings.

SentencePiece's stand here, those of the package `tokenizers` in `tokenizer_training`.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import itertools
import re
from typing import Iterable, Iterator, Sequence

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

  Pieces of SentencePiece may hold punctuation next to letters (`(self`, `):\\n`) and runs of
  spaces, which makes tokens of Python source 7 % longer than its defaults do (3.75 against 3.51
  bytes at 4096 pieces).

  Args:
    config: kind, size, extra ids.
    documents: the training split.
    total_bytes: its size, to sample `config.max_training_bytes` of it evenly.

  Raises:
    UserError: the documents are too few for so many pieces, or the path holds no tokenizer.
  """
  trained = config.kind in vocabularies.TRAINED
  sentences = list(sample(documents, total_bytes, config.max_training_bytes)) if trained else []
  return train_sizes(config, [config.size], sentences)[config.size]


def train_sizes(
    config: vocabularies.VocabularyConfig, sizes: Sequence[int], sentences: Sequence[str]
) -> dict[int, vocabularies.Vocabulary]:
  """Returns the vocabulary of each size, what `train` would give for it.

  Pairs are merged one by one, so a small vocabulary of a BPE is the beginning of a large one, as
  long as both know the same characters: it is cut out, not trained.

  Args:
    config: all but the size.
    sizes: of the vocabularies; those of 'byte' and 'pretrained' have their own.
    sentences: what `sample` gives of the training split.

  Raises:
    UserError: the sentences are too few for so many pieces, or the path holds no tokenizer.
  """
  config = dataclasses.replace(config, size=max(sizes))
  if config.kind == 'byte':
    return dict.fromkeys(sizes, vocabularies.ByteVocabulary(config.extra_ids))
  if config.kind == 'pretrained':
    opened = pretrained_vocabularies.open_pretrained(config.path, config.extra_ids)
    return dict.fromkeys(sizes, opened)
  if config.kind in vocabularies.TOKENIZERS:
    from lm.data import tokenizer_training

    plain = list(map(vocabularies.unescape, sentences))
    return tokenizer_training.train_sizes(config, sizes, plain)
  models: dict[int, bytes] = {}
  for size in sorted(sizes, reverse=True):
    each = dataclasses.replace(config, size=size)
    try:
      models[size] = _fit(each, sentences, models)
    except _TooManyPieces as error:
      raise UserError(_too_small(each, error.largest, sentences)) from error
  return {size: vocabularies.SentencePieceVocabulary(models[size], config.extra_ids)
          for size in sizes}  # fmt: skip


class _TooManyPieces(Exception):
  """The text has fewer pieces; `largest` is what SentencePiece believes it has."""

  def __init__(self, largest: int):
    super().__init__(largest)
    self.largest = largest


def _fit(
    config: vocabularies.VocabularyConfig, sentences: Sequence[str], larger: dict[int, bytes]
) -> bytes:
  """Returns a serialised SentencePiece model: trained, or cut out of one that is larger.

  Raises:
    _TooManyPieces: the sentences have fewer.
  """
  rare = _rare(config, sentences)
  if config.kind == 'bpe' and larger:
    nearest = min(larger)
    if _rare(dataclasses.replace(config, size=nearest), sentences) == rare:
      return _cut(larger[nearest], config.size - config.extra_ids)
  return _fit_alone(config, drop(rare, sentences))


def _fit_alone(config: vocabularies.VocabularyConfig, sentences: Iterable[str]) -> bytes:
  """Returns a serialised SentencePiece model that is trained on these sentences."""
  import sentencepiece

  model = io.BytesIO()
  symbols = config.user_defined_symbols
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type=config.kind,
        vocab_size=config.size - config.extra_ids,
        pad_id=vocabularies.PAD_ID,
        eos_id=vocabularies.EOS_ID,
        unk_id=vocabularies.UNK_ID,
        bos_id=-1,
        byte_fallback=config.byte_fallback,
        character_coverage=1.0,
        normalization_rule_name='identity',
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=config.split_digits,
        split_by_unicode_script=False,
        max_sentencepiece_length=32,
        num_threads=2,  # A constant: unigram sums in the order of threads.
        minloglevel=2,
        **({'user_defined_symbols': list(symbols)} if symbols else {}),
    )
  except RuntimeError as error:
    limit = re.search(r'value <= (\d+)', str(error))
    if limit is None:
      raise
    raise _TooManyPieces(int(limit.group(1)) + config.extra_ids) from error
  return model.getvalue()


def _cut(model: bytes, size: int) -> bytes:
  """Returns the BPE model of `size` pieces that the same sentences would give.

  A model's pieces are the given ones, then merges in their order, then single characters; scores
  count down over the last two.
  """
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  pieces = list(sentencepiece_model_pb2.ModelProto.FromString(model).pieces)
  given = next(n for n, piece in enumerate(pieces) if piece.type == piece.NORMAL)
  merges = [piece for piece in pieces[given:] if len(piece.piece) > 1]
  characters = pieces[given + len(merges) :]
  kept = merges[: size - given - len(characters)] + characters
  del proto.pieces[:]
  proto.pieces.extend([*pieces[:given], *kept])
  for rank, piece in enumerate(proto.pieces[given:]):
    piece.score = -float(rank)
  proto.trainer_spec.vocab_size = size
  return proto.SerializeToString(deterministic=True)


def sample(
    documents: Iterable[Document], total_bytes: int, max_bytes: int
) -> Iterator[str]:
  """Yields pieces of documents below SentencePiece's limit, about `max_bytes`, chosen by hash.

  They are escaped: `vocabularies.escape`.
  """
  share = max_bytes / max(total_bytes, 1)
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


def _rare(config: vocabularies.VocabularyConfig, sentences: Iterable[str]) -> frozenset[str]:
  return rare(sentences, (config.size - config.extra_ids - config.num_given) // 2)


def rare(sentences: Iterable[str], most: int) -> frozenset[str]:
  """Returns the characters that a vocabulary shall not know, so that `most` are left, at least 1.

  They are the rarest 0.05 % of the text (SentencePiece's own default) and, where a script has more
  characters than the vocabulary has room for, all beyond that room: they are spelt in bytes.
  """
  counts = collections.Counter(itertools.chain(*sentences))
  total, found, seen = sum(counts.values()), set(), 0
  for rank, (character, count) in enumerate(sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))):
    if rank >= max(1, most) or seen >= 0.9995 * total:
      found.add(character)
    seen += count
  return frozenset(found)


def drop(characters: frozenset[str], sentences: Sequence[str]) -> Sequence[str]:
  """Returns the sentences with these characters replaced by spaces."""
  spaces = dict.fromkeys(map(ord, characters), ' ')
  return [sentence.translate(spaces) for sentence in sentences] if spaces else sentences


def _too_small(
    config: vocabularies.VocabularyConfig, largest: int, sentences: Sequence[str]
) -> str:
  """Says which size works: tried, because fewer pieces also leave fewer characters to count."""
  while largest > config.num_given + config.extra_ids:
    try:
      _fit(dataclasses.replace(config, size=largest), sentences, {})
    except _TooManyPieces as error:
      largest = min(error.largest, largest - 1)
    else:
      fix = f'set it to {largest} or less, or add text'
      break
  else:
    fix = "add text, or use kind='byte'"
  return f'size={config.size} is too large a vocabulary for so small a corpus; {fix}.'
