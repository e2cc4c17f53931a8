"""Pipelines of the package `tokenizers`: WordPiece, byte-level BPE, and `lm`'s own vocabularies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterable, Sequence

from lm.errors import UserError

if TYPE_CHECKING:
  import tokenizers

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_MARKS_AND_SPACES = r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_LLAMA3 = _WORDS + r'\p{N}{1,3}' + _MARKS_AND_SPACES
_QWEN2 = _WORDS + r'\p{N}' + _MARKS_AND_SPACES
_NEVER = -1e6  # Log probability of a piece that no text may yield.


def wordpiece(vocabulary: bytes) -> tokenizers.Tokenizer:
  """Returns BERT's tokenizer of a vocab.txt, one token a line, without a normalizer.

  Reference: Devlin et al. 2018, arXiv:1810.04805, section 3.
  """
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  lines = vocabulary.decode('utf-8').replace('\r\n', '\n').removesuffix('\n').split('\n')
  ids = {token: id_ for id_, token in enumerate(lines)}
  tokenizer = Tokenizer(models.WordPiece(ids, unk_token='[UNK]', max_input_chars_per_word=100))
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece()
  return tokenizer


def bert_normalizer(config: dict[str, Any]) -> tokenizers.normalizers.Normalizer:
  """Returns BERT's lower-casing and cleaning as a tokenizer_config.json asks for."""
  from tokenizers import normalizers

  return normalizers.BertNormalizer(
      handle_chinese_chars=config.get('tokenize_chinese_chars', True),
      strip_accents=config.get('strip_accents'),
      lowercase=config.get('do_lower_case', True),
  )


def byte_level_bpe(
    vocabulary: dict[str, int], merges: Iterable[str], cut: str, prefix_space: bool = False
) -> tokenizers.Tokenizer:
  """Returns a BPE of bytes, spelt as GPT-2 spells them.

  Args:
    vocabulary: token to id.
    merges: 'left right', the first merged first.
    cut: how text is cut into words: 'gpt-2', 'smollm' (each digit alone, then as GPT-2),
      'llama-bpe' (Llama 3) or 'qwen2'; the names are GGUF's.
    prefix_space: encodes the first word as if a space stood before it.

  Raises:
    UserError: the way to cut is not known.

  Reference: Radford et al. 2019, "Language models are unsupervised multitask learners", 2.2.
  """
  from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

  steps = {
      'gpt-2': [],
      'smollm': [pre_tokenizers.Digits(individual_digits=True)],
      'llama-bpe': [pre_tokenizers.Split(Regex(_LLAMA3), 'isolated')],
      'qwen2': [pre_tokenizers.Split(Regex(_QWEN2), 'isolated')],
  }
  if cut not in steps:
    raise UserError(f'a BPE that cuts text as {cut!r} is not known, only {", ".join(steps)}; name'
                    ' a directory with its tokenizer.json.')
  pairs = [tuple(merge.split(' ')) for merge in merges]
  tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=cut == 'llama-bpe'))
  spell = pre_tokenizers.ByteLevel(prefix_space, use_regex=cut in ('gpt-2', 'smollm'))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps[cut], spell])
  if cut == 'qwen2':
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def surround(
    tokenizer: tokenizers.Tokenizer, single: Sequence[str], pair: Sequence[str]
) -> None:
  """Lets special tokens stand around a text ($A) or two ($B), each 'token:type'.

  Raises:
    UserError: the tokenizer has no such token.
  """
  from tokenizers import processors

  names = {part.rpartition(':')[0] for part in pair} - {'$A', '$B'}
  special = [(name, tokenizer.token_to_id(name)) for name in sorted(names)]
  for name, id_ in special:
    if id_ is None:
      raise UserError(f'the tokenizer has no {name!r} to put around a text; add its'
                      ' tokenizer.json.')
  tokenizer.post_processor = processors.TemplateProcessing(
      single=list(single), pair=list(pair), special_tokens=special
  )


def own(
    pieces: Sequence[tuple[str, float]], kind: str, escapes: Sequence[tuple[str, str]], word: int,
    extra_ids: int, symbols: Sequence[str] = (),
) -> tokenizers.Tokenizer:  # fmt: skip
  """Returns a tokenizer that encodes as `lm`'s own vocabularies do.

  BPE and bytes give the same ids. Unigram gives pieces of the same likelihood, which in runs of
  spaces may stand in another order; and text that spells `</s>` or `<0x41>` in characters that no
  piece has is that piece.

  Args:
    pieces: (piece, score) by id: <pad>, </s>, <unk>, `symbols`, 256 bytes or none, and what was
      learnt.
    kind: 'bpe' or 'unigram'.
    escapes: (text, what it is spelt as), the first replaced first and U+2581 at last what a space
      is spelt as; none if all is spelt in bytes.
    word: characters at which a longer word is cut.
    extra_ids: how many <extra_id_n> follow, the 0th at the top.
    symbols: pieces that are one id wherever text spells them.
  """
  from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

  ids = {piece: id_ for id_, (piece, _) in enumerate(pieces)}
  special, num_bytes = [piece for piece, _ in pieces[:3]], 256 * ('<0x00>' in ids)
  num_given = 3 + len(symbols) + num_bytes
  if kind == 'bpe':
    merges = [
        (piece[:cut], piece[cut:])
        for piece, _ in sorted(pieces[num_given:], key=lambda pair: -pair[1])
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    model = models.BPE(ids, merges, unk_token=special[2], byte_fallback=num_bytes > 0,
                       fuse_unk=True)  # fmt: skip
  else:
    never = [(piece, _NEVER) for piece, _ in pieces[:num_given]]
    model = models.Unigram([*never, *pieces[num_given:]], unk_id=2, byte_fallback=num_bytes > 0)
  tokenizer = Tokenizer(model)
  if escapes:
    steps = [normalizers.Replace(text, spelt) for text, spelt in escapes]
    tokenizer.normalizer = normalizers.Sequence(steps)
    words = Regex(f'\u2581*[^\u2581]{{1,{word}}}|\u2581+')
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, 'isolated')
  unescape = [decoders.Replace(spelt, text) for text, spelt in reversed(escapes)]
  tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), *unescape])
  add_given(tokenizer, special, symbols, extra_ids)
  return tokenizer


def add_given(
    tokenizer: tokenizers.Tokenizer, special: Sequence[str], symbols: Sequence[str], extra_ids: int
) -> None:
  """Tells a tokenizer which of its tokens are special, and which are one wherever they are spelt.

  Above all others it gets `extra_ids` special ones: <extra_id_n>, the 0th at the top, as T5's.
  """
  from tokenizers import AddedToken

  extra = [f'<extra_id_{n}>' for n in reversed(range(extra_ids))]
  tokenizer.add_special_tokens([*special, *extra])
  tokenizer.add_tokens([AddedToken(symbol, special=False, normalized=False) for symbol in symbols])
