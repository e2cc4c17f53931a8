"""Training of byte-level BPE and WordPiece, by the package `tokenizers`.

Its trainers number pieces in the order of a hash table where they may, and break ties by these
numbers; here every character is numbered beforehand, so that the same text gives the same
vocabulary in every process, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Any, Sequence

from lm.data import pretrained_vocabularies
from lm.data import tokenizer_files
from lm.data import tokenizer_pipelines as pipelines
from lm.data import vocabularies
from lm.data import vocabulary_training
from lm.errors import UserError

if TYPE_CHECKING:
  import tokenizers

_BERT = {'do_lower_case': False, 'strip_accents': False, 'tokenize_chinese_chars': True}


@dataclasses.dataclass(frozen=True)
class _Learnt:
  """What a trainer found.

  Attributes:
    pieces: by id, in the order in which they were made; the given ones are the first.
    merges: (left, right) in the order in which they were made; of BPE only.
  """

  pieces: list[str]
  merges: list[tuple[str, str]]

  def cut(self, size: int) -> _Learnt:
    """Returns the beginning: `size` pieces, and the merges up to the one that made the last."""
    known = set(self.pieces[:size])
    made = [left + right in known for left, right in self.merges]
    last = self.pieces[size - 1]
    ends = [n for n, (left, right) in enumerate(self.merges) if left + right == last]
    end = ends[0] + 1 if ends else 0
    assert all(made[:end])
    return _Learnt(self.pieces[:size], self.merges[:end])


def train_sizes(
    config: vocabularies.VocabularyConfig, sizes: Sequence[int], sentences: Sequence[str]
) -> dict[int, vocabularies.Vocabulary]:
  """Returns the vocabulary of each size, as `vocabulary_training.train_sizes` does.

  Args:
    config: of kind 'byte_bpe' or 'wordpiece'.
    sizes: of the vocabularies.
    sentences: text to learn of.

  Raises:
    UserError: the package is missing, or the sentences are too few for so many pieces.
  """
  try:
    import tokenizers
  except ImportError as error:
    raise UserError(f'kind={config.kind!r} needs the package tokenizers, which is not installed:'
                    " pip install 'lm[interop]'") from error
  del tokenizers
  learn, build = {'byte_bpe': (_learn_bytes, _build_bytes),
                  'wordpiece': (_learn_words, _build_words)}[config.kind]  # fmt: skip
  found: dict[int, vocabularies.Vocabulary] = {}
  learnt, rare = _Learnt([], []), frozenset[str]()
  for size in sorted(sizes, reverse=True):
    each = dataclasses.replace(config, size=size)
    now = _rare(each, sentences)
    if not found or now != rare:
      learnt, rare = learn(each, sentences, now), now
    own = size - config.extra_ids
    if len(learnt.pieces) < own:
      most = len(learnt.pieces)
      fix = f'set it to {most + config.extra_ids} or less, or add text'
      raise UserError(f'size={size} is too large a vocabulary for so small a corpus; '
                      + (fix if most > config.num_given else "add text, or use kind='byte'") + '.')
    files = build(each, learnt.cut(own))
    found[size] = pretrained_vocabularies.TokenizerVocabulary(files)
  return found


def _rare(
    config: vocabularies.VocabularyConfig, sentences: Sequence[str]
) -> frozenset[str]:
  """Returns the characters that are unknown to a WordPiece: at most two pieces are one of them."""
  if config.kind == 'byte_bpe':
    return frozenset()
  normalize = pipelines.bert_normalizer(_BERT).normalize_str
  most = (config.size - config.extra_ids - config.num_given) // 2
  return vocabulary_training.rare(map(normalize, sentences), most) - {' '}


def _learn_bytes(
    config: vocabularies.VocabularyConfig, sentences: Sequence[str], rare: frozenset[str]
) -> _Learnt:
  """Trains a byte-level BPE."""
  from tokenizers import pre_tokenizers, trainers

  del rare
  given = [*vocabularies.SPECIAL, *config.user_defined_symbols]
  bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokenizer = pipelines.byte_level_bpe({}, (), _way_to_cut(config))
  _leave_out(tokenizer, config.user_defined_symbols)
  num_pieces = config.size - config.extra_ids - len(given)
  trainer = trainers.BpeTrainer(
      vocab_size=num_pieces, special_tokens=bytes_, initial_alphabet=bytes_, show_progress=False
  )
  model = _train(tokenizer, sentences, trainer)
  merges = [(left, right) for left, right in model['merges']]
  return _Learnt([*given, *sorted(model['vocab'], key=model['vocab'].get)], merges)


def _build_bytes(
    config: vocabularies.VocabularyConfig, learnt: _Learnt
) -> tokenizer_files.Files:
  ids = {piece: id_ for id_, piece in enumerate(learnt.pieces)}
  merges = [' '.join(pair) for pair in learnt.merges]
  tokenizer = pipelines.byte_level_bpe(ids, merges, _way_to_cut(config))
  special = dict(zip(('pad_token', 'eos_token', 'unk_token'), vocabularies.SPECIAL))
  pipelines.add_given(
      tokenizer, vocabularies.SPECIAL, config.user_defined_symbols, config.extra_ids
  )
  return tokenizer_files.of_tokenizer(tokenizer, special)


def _way_to_cut(config: vocabularies.VocabularyConfig) -> str:
  return 'smollm' if config.split_digits else 'gpt-2'


def _learn_words(
    config: vocabularies.VocabularyConfig, sentences: Sequence[str], rare: frozenset[str]
) -> _Learnt:
  """Trains a WordPiece, which `tokenizers` does by merging pairs as for a BPE.

  A character has two pieces, `a` at a word's begin and `##a` within, unless it is a word itself.
  """
  from tokenizers import trainers

  given = [*vocabularies.WORDPIECE_SPECIAL, *config.user_defined_symbols]
  tokenizer = _wordpiece(given, config.split_digits)
  normalize, split = tokenizer.normalizer.normalize_str, tokenizer.pre_tokenizer.pre_tokenize_str
  known = set().union(*map(normalize, sentences)) - rare
  characters = sorted(character for character in known if split(character))
  within = [c for c in characters if len(split(normalize(f'a{c}a'))) == 1]
  _leave_out(tokenizer, config.user_defined_symbols)
  pieces = [*given, *characters, *(f'##{character}' for character in within)]
  trainer = trainers.WordPieceTrainer(
      vocab_size=config.size - config.extra_ids, special_tokens=pieces, show_progress=False,
      limit_alphabet=len(characters), initial_alphabet=characters,
  )  # fmt: skip
  normal = vocabulary_training.drop(rare, list(map(normalize, sentences)))
  ids = _train(tokenizer, normal, trainer)['vocab']
  return _Learnt(sorted(ids, key=ids.get), [])


def _build_words(
    config: vocabularies.VocabularyConfig, learnt: _Learnt
) -> tokenizer_files.Files:
  tokenizer = _wordpiece(learnt.pieces, config.split_digits)
  special = vocabularies.WORDPIECE_SPECIAL
  pipelines.add_given(tokenizer, special, config.user_defined_symbols, config.extra_ids)
  one = ['[CLS]:0', '$A:0', '[SEP]:0']
  pipelines.surround(tokenizer, one, [*one, '$B:1', '[SEP]:1'])
  roles = dict(zip(('pad_token', 'unk_token', 'cls_token', 'sep_token', 'mask_token'), special))
  lines = map(tokenizer.id_to_token, range(config.size))
  return tokenizer_files.of_tokenizer(tokenizer, roles, **_BERT) | {
      'vocab.txt': ''.join(f'{token}\n' for token in lines).encode('utf-8')
  }


def _wordpiece(pieces: Sequence[str], split_digits: bool) -> tokenizers.Tokenizer:
  from tokenizers import pre_tokenizers

  tokenizer = pipelines.wordpiece('\n'.join(pieces).encode('utf-8'))
  tokenizer.normalizer = pipelines.bert_normalizer(_BERT)
  if split_digits:
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, digits])
  return tokenizer


def _leave_out(tokenizer: tokenizers.Tokenizer, symbols: Sequence[str]) -> None:
  """Lets a tokenizer that is trained cut text at the symbols, and learn nothing of them."""
  from tokenizers import Regex, pre_tokenizers

  if symbols:
    words = Regex('|'.join(map(re.escape, sorted(symbols, key=len, reverse=True))))
    cut = pre_tokenizers.Split(words, 'removed')
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, tokenizer.pre_tokenizer])


def _train(
    tokenizer: tokenizers.Tokenizer, sentences: Sequence[str], trainer: Any
) -> dict[str, Any]:
  """Returns what tokenizer.json says of the trained model."""
  tokenizer.train_from_iterator(sentences, trainer)
  return json.loads(tokenizer.to_str())['model']
