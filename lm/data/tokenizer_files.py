"""Tokenizers of other projects, read into the files of a Hugging Face directory.

    a Hugging Face directory, or one file of it      its files, byte for byte
    GPT-2's vocab.json and merges.txt, also .gz      the same two, unpacked
    model.gguf                                       tokenizer.json or tokenizer.model
    llama2.c's tokenizer.bin                         tokenizer.model

What was converted comes with a tokenizer_config.json. No file is ever unpickled.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
import struct
from typing import TYPE_CHECKING, Any, Iterable

from lm.data import tokenizer_pipelines
from lm.errors import UserError

if TYPE_CHECKING:
  import tokenizers

Files = dict[str, bytes]

SENTENCEPIECE = ('spiece.model', 'tokenizer.model')
# One of these sets makes a tokenizer; the first that is there is used, as `transformers` does.
MODELS = (('tokenizer.json',), *((name,) for name in SENTENCEPIECE), ('vocab.json', 'merges.txt'),
          ('vocab.txt',))  # fmt: skip
NAMES = (
    *sorted({name for names in MODELS for name in names}), 'tokenizer_config.json',
    'special_tokens_map.json', 'added_tokens.json', 'chat_template.jinja',
)  # fmt: skip
OWN, OWN_MODEL = 'vocabulary.json', 'vocabulary.model'  # Of `SentencePieceVocabulary.save`.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # SentencePiece's kinds of pieces, and GGUF's.


def read(path: str | os.PathLike[str]) -> Files:
  """Returns the files of the tokenizer that `path`, a directory or a file, holds.

  A file stands alone: what lies beside it (lower-casing, special tokens) is read with its
  directory only.

  Raises:
    UserError: there is no tokenizer, or one of an unknown kind.
  """
  path = Path(path).expanduser()
  try:
    if path.is_dir():
      return _read_directory(path)
    return _read_file(path)
  except (OSError, EOFError) as error:
    raise UserError(f'{path} cannot be read ({error}); name a tokenizer\'s directory or file.'
                    ) from error


def source_files(path: str | os.PathLike[str]) -> list[Path]:
  """Returns the files that `read` would read, for a digest of their contents."""
  path = Path(path).expanduser()
  if not path.is_dir():
    return [path]
  if (path / OWN_MODEL).exists():
    return [path / OWN, path / OWN_MODEL]
  found = [_find(path, name) for name in NAMES]
  return [file for file in found if file is not None] or sorted(path.glob('*.gguf'))


def _read_directory(directory: Path) -> Files:
  found = {name: _find(directory, name) for name in NAMES}
  files = {name: _bytes(file) for name, file in found.items() if file is not None}
  if any(set(names) <= files.keys() for names in MODELS):
    return files
  gguf = sorted(directory.glob('*.gguf'))
  if len(gguf) == 1:
    return _from_gguf(gguf[0])
  raise UserError(
      f'{directory} holds no tokenizer: none of tokenizer.json, spiece.model, tokenizer.model,'
      f' vocab.json with merges.txt, vocab.txt, and {len(gguf)} .gguf; name one of its files.'
  )


def _read_file(path: Path) -> Files:
  kind = Path(path.name.removesuffix('.gz')).suffix
  if kind == '.gguf':
    return _from_gguf(path)
  if kind == '.bin':
    return _from_llama2c(path)
  if kind == '.model':
    return {path.name if path.name in SENTENCEPIECE else 'tokenizer.model': _bytes(path)}
  if kind in ('.json', '.txt') and not path.name.removesuffix('.gz').endswith(
      ('vocab.json', 'merges.txt')
  ):
    return {'tokenizer.json' if kind == '.json' else 'vocab.txt': _bytes(path)}
  raise UserError(
      f'{path} is not a tokenizer of a known kind; name a .json, .txt, .model, .gguf or llama2.c\'s'
      ' .bin file, or the directory of vocab.json and merges.txt.'
  )


def _find(directory: Path, name: str) -> Path | None:
  """Returns the file of this name: itself, packed, or with a prefix such as `gpt2_`."""
  exact = [file for file in (directory / name, directory / f'{name}.gz') if file.exists()]
  prefixed = [*directory.glob(f'*_{name}'), *directory.glob(f'*_{name}.gz')]
  return exact[0] if exact else prefixed[0] if len(prefixed) == 1 else None


def _bytes(path: Path) -> bytes:
  data = path.read_bytes()
  return gzip.decompress(data) if path.suffix == '.gz' else data


def _from_gguf(path: Path) -> Files:
  """Converts the tokenizer that llama.cpp's file of weights holds.

  Reference: the GGUF specification, github.com/ggml-org/ggml, docs/gguf.md, "Tokenizer".
  """
  import gguf

  try:
    fields = gguf.GGUFReader(path).fields
  except (ValueError, IndexError, KeyError) as error:
    raise UserError(f'{path} is no GGUF file, or not all of one ({error}); fetch it again.'
                    ) from error

  def get(key: str, default: Any = None) -> Any:
    field = fields.get(f'tokenizer.{key}')
    return default if field is None else field.contents()

  model, tokens = get('ggml.model'), get('ggml.tokens')
  order = get({'gpt2': 'ggml.merges', 'llama': 'ggml.scores'}.get(model, ''))
  if tokens is None or order is None:
    raise UserError(f"{path} holds a tokenizer of kind {model!r}, and only 'gpt2' (with merges) and"
                    " 'llama' (with scores) are read from GGUF; name a directory with its"
                    ' tokenizer.json.')
  kinds = get('ggml.token_type', [_NORMAL] * len(tokens))
  roles = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}
  ids = {role: get(f'ggml.{name}_token_id') for role, name in roles.items()}
  config = {f'{role}_token': tokens[id_] for role, id_ in ids.items() if id_ is not None}
  bos = model == 'llama' or get('ggml.pre') == 'llama-bpe'  # As llama.cpp does without the key.
  config['add_bos_token'] = get('ggml.add_bos_token', bos)
  config['add_eos_token'] = get('ggml.add_eos_token', False)
  if get('chat_template'):
    config['chat_template'] = get('chat_template')
  if model == 'llama':
    return {
        'tokenizer.model': _sentencepiece(
            zip(tokens, order, kinds), get('ggml.add_space_prefix', True)
        ),
        'tokenizer_config.json': to_json({'tokenizer_class': 'LlamaTokenizer', **config}),
    }
  from tokenizers import AddedToken

  vocabulary = {token: id_ for id_, token in enumerate(tokens)}
  tokenizer = tokenizer_pipelines.byte_level_bpe(vocabulary, order, get('ggml.pre'))
  for token, kind in zip(tokens, kinds):
    if kind not in (_NORMAL, _BYTE):
      tokenizer.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
  return {
      'tokenizer.json': tokenizer.to_str().encode('utf-8'),
      'tokenizer_config.json': to_json({'tokenizer_class': 'PreTrainedTokenizerFast', **config}),
  }


def _from_llama2c(path: Path) -> Files:
  """Converts llama2.c's tokenizer.bin: the longest token's bytes, then (score, bytes) of each.

  llama2.c merges the pair whose piece scores highest, the leftmost first, and spells what is left
  in bytes: SentencePiece's BPE without normalisation. They differ in U+2581 alone, which is a
  space to SentencePiece and three bytes to llama2.c.

  Reference: github.com/karpathy/llama2.c, tokenizer.py (export) and run.c (encode).
  """
  data = path.read_bytes()
  pieces, offset = [], 4
  try:
    while offset < len(data):
      score, length = struct.unpack_from('<fi', data, offset)
      offset += 8 + length
      if length < 1 or offset > len(data):
        raise ValueError(f'a token of {length} bytes')
      pieces.append((data[offset - length : offset].decode('utf-8'), score))
    if [piece.strip() for piece, _ in pieces[:4]] != ['<unk>', '<s>', '</s>', '<0x00>']:
      raise ValueError('it does not begin with <unk>, <s>, </s> and the bytes')
  except (struct.error, ValueError) as error:
    raise UserError(f'{path} is no tokenizer of llama2.c ({error}); weights have a file of their'
                    ' own.') from error
  kinds = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256]
  kinds += [_NORMAL] * (len(pieces) - len(kinds))
  names = [piece.strip() if kind == _CONTROL else piece.replace(' ', '\u2581')
           for (piece, _), kind in zip(pieces, kinds)]  # fmt: skip
  config = {'tokenizer_class': 'LlamaTokenizer', 'add_bos_token': True, 'bos_token': '<s>',
            'eos_token': '</s>', 'unk_token': '<unk>'}  # fmt: skip
  scores = (score for _, score in pieces)
  return {
      'tokenizer.model': _sentencepiece(zip(names, scores, kinds), dummy_prefix=True),
      'tokenizer_config.json': to_json(config),
  }


def _sentencepiece(pieces: Iterable[tuple[str, float, int]], dummy_prefix: bool) -> bytes:
  """Returns the SentencePiece BPE model of (piece, score, kind), without normalisation."""
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto()
  for piece, score, kind in pieces:
    proto.pieces.add(piece=piece, score=score, type=kind)
  proto.trainer_spec.model_type = proto.trainer_spec.BPE
  proto.trainer_spec.vocab_size = len(proto.pieces)
  proto.trainer_spec.byte_fallback = any(piece.type == _BYTE for piece in proto.pieces)
  proto.normalizer_spec.name = 'identity'
  proto.normalizer_spec.add_dummy_prefix = dummy_prefix
  proto.normalizer_spec.remove_extra_whitespaces = False
  return proto.SerializeToString(deterministic=True)


def of_tokenizer(tokenizer: tokenizers.Tokenizer, special: dict[str, str], **config: Any) -> Files:
  """Returns the files of a tokenizer made here, which text can make yield no special token.

  Args:
    tokenizer: knows the special tokens.
    special: 'pad_token' and so on, to the token.
    config: what else stands in tokenizer_config.json.
  """
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', **special, **config,
            'split_special_tokens': True, 'clean_up_tokenization_spaces': False}  # fmt: skip
  return {'tokenizer.json': tokenizer.to_str().encode('utf-8'),
          'tokenizer_config.json': to_json(config)}  # fmt: skip


def to_json(value: dict[str, Any]) -> bytes:
  """Returns the contents of a configuration file."""
  return (json.dumps(value, indent=2, ensure_ascii=False) + '\n').encode('utf-8')


def save(files: Files, directory: str | os.PathLike[str]) -> None:
  """Writes the files into a directory, which is made."""
  Path(directory).mkdir(parents=True, exist_ok=True)
  for name, data in files.items():
    Path(directory, name).write_bytes(data)
