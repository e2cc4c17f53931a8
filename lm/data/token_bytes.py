"""The bytes that each token of a vocabulary stands for: what automata over text need."""

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple

from lm.data import pretrained_vocabularies
from lm.data import vocabularies

_MARK = '\u2581'  # A space, as SentencePiece spells it.


class TokenBytes(NamedTuple):
  """Bytes of each id; b'' of those that are no text: special, extra, unknown.

  within: behind another token.
  first: as the first token of a text, where `decode` drops a space.
  """

  within: tuple[bytes, ...]
  first: tuple[bytes, ...]


def token_bytes(vocabulary: Any) -> TokenBytes:
  """Returns the bytes of a vocabulary's tokens, so that joined they are what it decodes.

  What stands here for U+2581 in a SentencePiece vocabulary of ours is `vocabularies.escape`'s.
  """
  within = _within(vocabulary)
  special = set(vocabulary.special_tokens.values())
  within = [b'' if id_ in special else data for id_, data in enumerate(within)]
  within += [b''] * (vocabulary.size - len(within))
  spaced = next((id_ for id_, data in enumerate(within) if data.startswith(b' ') and data.strip()),
                None)
  if spaced is None or vocabulary.decode([spaced]).startswith(' '):
    return TokenBytes(tuple(within), tuple(within))
  first = [data[1:] if data.startswith(b' ') else data for data in within]
  if getattr(vocabulary, '_tokenizer', None) and _decoder(vocabulary)['type'] == 'WordPiece':
    first = [vocabulary.decode([id_]).encode() if data else b'' for id_, data in enumerate(within)]
  return TokenBytes(tuple(within), tuple(first))


def _within(vocabulary):
  if isinstance(vocabulary, vocabularies.ByteVocabulary):
    return [b''] * vocabularies.NUM_SPECIAL + [bytes([byte]) for byte in range(256)]
  if isinstance(vocabulary, vocabularies.SentencePieceVocabulary):
    return list(vocabulary._bytes_of)
  if isinstance(vocabulary, pretrained_vocabularies.PlainSentencePieceVocabulary):
    return _sentencepiece(vocabulary._processor)
  return _tokenizer(vocabulary)


def _sentencepiece(processor):
  """Bytes of a SentencePiece model's pieces."""
  found = []
  for id_ in range(processor.vocab_size()):
    piece = processor.id_to_piece(id_)
    if processor.is_control(id_) or processor.is_unknown(id_):
      found.append(b'')
    elif processor.is_byte(id_):
      found.append(bytes([int(piece[3:-1], 16)]))  # '<0x41>'
    else:
      found.append(piece.replace(_MARK, ' ').encode())
  return found


def _tokenizer(vocabulary):
  """Bytes of the tokens of a tokenizer.json, by its decoder."""
  tokenizer, decoder = vocabulary._tokenizer, _decoder(vocabulary)
  kinds = {part['type'] for part in decoder.get('decoders', [decoder])}
  added = tokenizer.get_added_tokens_decoder()
  found = [b''] * vocabulary.size
  special = set(vocabulary.special_tokens.values())
  anchor = next(id_ for id_ in range(vocabulary.size) if id_ not in special)
  alone = vocabulary.decode([anchor])
  for token, id_ in tokenizer.get_vocab(with_added_tokens=True).items():
    if id_ in added:
      found[id_] = token.encode()
    elif 'ByteLevel' in kinds:
      found[id_] = b''.join(_byte_of().get(c, c.encode()) for c in token)
    elif 'WordPiece' in kinds:  # Which spaces it leaves out depends on the token.
      found[id_] = vocabulary.decode([anchor, id_]).removeprefix(alone).encode()
    elif 'ByteFallback' in kinds and len(token) == 6 and token.startswith('<0x'):
      found[id_] = bytes([int(token[3:5], 16)])
    else:
      found[id_] = token.replace(_MARK, ' ').encode()
  return found


def _decoder(vocabulary):
  """The decoder of a tokenizer.json."""
  return json.loads(vocabulary._tokenizer.to_str())['decoder'] or {'type': None}


@functools.cache
def _byte_of():
  """The byte of each character of byte-level BPE (GPT-2): printable ones are themselves."""
  printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1),
               *range(ord('®'), ord('ÿ') + 1)]
  others = [byte for byte in range(256) if byte not in printable]
  characters = {chr(byte): bytes([byte]) for byte in printable}
  return characters | {chr(256 + place): bytes([byte]) for place, byte in enumerate(others)}
