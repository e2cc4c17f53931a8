"""How an example is put to a model: to an encoder with a head, to a text-to-text model, to a
decoder, or to an encoder of two texts.

A form is bound to a kind, its labels and a vocabulary. `encode` makes tokens of an example, without
what frames them; `features` puts several of these into one row. In between examples are cached,
augmented, cut to length and packed.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, ClassVar, Literal, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from lm.data.examples import kinds
from lm.data.examples.template import Template
from lm.data.objectives.causal import decoder_features
from lm.data.objectives.contract import Base, Features, pad
from lm.data.packing import Packed
from lm.data.vocabularies import Vocabulary
from lm.errors import UserError

Name = Literal['encoder', 'text_to_text', 'decoder', 'embedder', 'chat', 'preference']


class Encoded(NamedTuple):
  """Tokens of an example, int32 each, not framed.

  An encoder's token -1 is one that is cut off: its place is kept and nobody sees it.

  Attributes:
    a: the first text, or the prompt, or the words; or the contexts of all choices.
    b: the second text, or None; or all continuations, or all documents.
    targets: ids of the target text, or a label, or a tag for each token of `a` (-1: none); of
      choices the right one, then the lengths of context and continuation of each; of documents
      their lengths; of an answer its first and last token in `b`, -1 if there is none.
    value: the number to be predicted.
    reference: of two answers, the nats of each under the reference model.
    example: what was encoded, for forms that cut more than tokens.
  """

  a: np.ndarray
  b: Optional[np.ndarray]
  targets: np.ndarray
  value: float = 0.0
  reference: Tuple[float, float] = (0.0, 0.0)
  example: Optional[kinds.Example] = None


class Lengths(NamedTuple):
  """Of a row.

  Attributes:
    inputs, targets: tokens, and tokens of the decoder's side.
    examples: how many it may hold; where these have several parts (choices), how many of those.
    parts: how many the least example has.
    packed: puts more than one example into a row.
  """

  inputs: int
  targets: int
  examples: int
  parts: int = 1
  packed: bool = True


_NONE = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class Form(Base):
  """What the forms share.

  Attributes:
    kind: of the task, its labels resolved.
    vocabulary: makes the tokens.
    template: of prompts and targets.
  """

  kind: Any = None
  vocabulary: Any = None
  template: Template = Template()

  kinds: ClassVar[Tuple[str, ...]] = ()

  def __post_init__(self) -> None:
    if self.kind is not None and self.kind.name not in self.kinds:
      raise UserError(f'A task of kind {self.kind.name!r} has no form {type(self).__name__}, which'
                      f' takes {", ".join(self.kinds)}; bind another form.')

  def encode(self, example: kinds.Example) -> Encoded:
    """Returns the tokens of an example."""
    raise AssertionError(type(self))

  def size(self, a: np.ndarray, b: np.ndarray, targets: np.ndarray
           ) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many tokens examples take on both sides of a row, [n] each.

    Args:
      a, b, targets: lengths [n] of the encoded; -1 where there is no b.
    """
    raise AssertionError(type(self))

  def measure(self, encoded: Encoded) -> tuple[int, int, int]:
    """Returns the lengths that `size` takes."""
    return len(encoded.a), -1 if encoded.b is None else len(encoded.b), len(encoded.targets)

  def parts(self, sizes: np.ndarray) -> np.ndarray:
    """Returns into how many segments [n] examples fall, by what `measure` gave [n, 3]."""
    return np.ones(len(sizes), np.int64)

  def windows(self, sizes: np.ndarray, lengths: Lengths) -> Optional[np.ndarray]:
    """Returns (example, first token of `b`) of every window that is a row, or None where examples
    are cut to the length of a row."""
    return None

  def window(self, example: Encoded, first: int, lengths: Lengths) -> Encoded:
    """Returns an example as it stands in a window."""
    raise AssertionError(type(self))

  def features(self, examples: Sequence[Encoded], lengths: Lengths) -> Features:
    """Returns the features of a row that holds these examples, without a batch axis."""
    raise AssertionError(type(self))

  def label_id(self, label: str) -> int:
    """Returns the place of a label among the kind's."""
    return self.kind.labels.index(label)


@dataclasses.dataclass(frozen=True)
class EncoderForm(Form):
  """Texts between [CLS] and [SEP], as the vocabulary frames them, for a head.

  Examples of a row are segments 1, 2, ... Features, [length] or [examples] of a row:

      encoder_input_tokens, encoder_segment_ids, encoder_positions, encoder_token_types [length]
      classification    class_labels, class_weights [examples]
      multiple_choice   the same: each choice is a segment, of class 1 if it is right, else 0
      similarity        class_values, class_weights [examples]
      tagging           tag_labels, tag_weights [length]; the first token of a word has its tag

  Attributes:
    cls_id: begins a text. sep_id: ends it. Where the vocabulary frames texts itself, they are its.
  """

  cls_id: Optional[int] = None
  sep_id: Optional[int] = None

  kinds: ClassVar[Tuple[str, ...]] = ('classification', 'similarity', 'tagging',
                                      'multiple_choice')

  def _special(self) -> tuple[str, ...]:
    return () if self.vocabulary is None or _frames(self.vocabulary) else ('cls_id', 'sep_id')

  def encode(self, example: kinds.Example) -> Encoded:
    """Returns tokens of `a` and `b`, and the label, the value or the tags."""
    if self.kind.name == 'tagging':
      return self._encode_words(example)
    if self.kind.name == 'multiple_choice':
      return self._encode_choices(example)
    encode = self.vocabulary.encode
    b = encode(example['b']) if 'b' in example else None
    if self.kind.name == 'similarity':
      low, high = self.kind.low, self.kind.high
      return Encoded(encode(example['a']), b, _NONE, (example['score'] - low) / (high - low))
    label = np.array([self.label_id(example['label'])], np.int32)
    return Encoded(encode(example['a']), b, label)

  def _encode_words(self, example: kinds.Example) -> Encoded:
    pieces, tags = word_tokens(self.vocabulary, example['words']), []
    for piece, tag in zip(pieces, example['tags']):
      tags += [self.label_id(tag)] + [-1] * (len(piece) - 1)
    return Encoded(np.concatenate(pieces), None, np.array(tags, np.int32))

  def _encode_choices(self, example: kinds.Example) -> Encoded:
    encode = self.vocabulary.encode_batch
    contexts, continuations = encode(example['contexts']), encode(example['continuations'])
    lengths = [len(ids) for pair in zip(contexts, continuations) for ids in pair]
    return Encoded(np.concatenate(contexts), np.concatenate(continuations),
                   np.array([example['label'], *lengths], np.int32))

  def parts(self, sizes):
    """Returns the number of choices, or 1."""
    return (sizes[:, 2] - 1) // 2 if self.kind.name == 'multiple_choice' else super().parts(sizes)

  def _apart(self, example: Encoded, room: int) -> list[tuple[Encoded, int]]:
    """Returns the segments of an example, each with the tokens that it may take."""
    if self.kind.name != 'multiple_choice':
      return [(example, room)]
    label, *sizes = example.targets.tolist()
    contexts = np.split(example.a, np.cumsum(sizes[::2])[:-1])
    continuations = np.split(example.b, np.cumsum(sizes[1::2])[:-1])
    whole = sum(sizes) + len(contexts) * sum(map(len, self._frames[1])) <= room
    return [(Encoded(a, b, np.array([i == label], np.int32)),
             room if whole else room // len(contexts))
            for i, (a, b) in enumerate(zip(contexts, continuations))]

  def size(self, a, b, targets):
    """Returns tokens with those that frame them; nothing on the decoder's side."""
    single, pair = (sum(map(len, frame)) for frame in self._frames)
    if self.kind.name == 'multiple_choice':
      return a + b + (targets - 1) // 2 * pair, np.zeros_like(a)
    return np.where(b < 0, a + single, a + np.maximum(b, 0) + pair), np.zeros_like(a)

  def features(self, examples, lengths):
    """Returns the features above."""
    T, K = lengths.inputs, lengths.examples
    tokens, segments, positions, types, labels = np.zeros((5, T), np.int32)
    weights, place, apart = np.zeros(T, np.float32), 0, []
    for example in examples:
      for part, room in self._apart(example, T - place):
        apart.append(part)
        ids, of_type, start, kept = self.framed(part, room)
        end = place + len(ids)
        tokens[place:end], segments[place:end], types[place:end] = ids, len(apart), of_type
        positions[place:end] = np.arange(len(ids))
        if self.kind.name == 'tagging':
          tags, first = example.targets[:kept], place + start
          labels[first:first + kept] = np.maximum(tags, 0)
          weights[first:first + kept] = tags >= 0
        place = end
    weights *= _hide(tokens, segments)
    features = {'encoder_input_tokens': tokens, 'encoder_segment_ids': segments,
                'encoder_positions': positions, 'encoder_token_types': types}
    if self.kind.name == 'tagging':
      return features | {'tag_labels': labels, 'tag_weights': weights}
    features['class_weights'] = pad(np.ones(len(apart), np.float32), K)
    if self.kind.name == 'similarity':
      return features | {'class_values': pad(np.array([e.value for e in examples], np.float32), K)}
    return features | {'class_labels': pad(np.array([e.targets[0] for e in apart], np.int32), K)}

  def framed(self, example: Encoded, length: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Returns ids and token types of an example cut to `length`, where `a` begins in it, and how
    many of its tokens are left. The longer of two texts is cut first."""
    frame = self._frames[example.b is not None]
    room, (a, b) = length - sum(map(len, frame)), (example.a, example.b)
    if b is None:
      parts = [frame[0], a := a[:max(room, 0)], frame[1]]
      kinds_ = [0, 0, 0]
    else:
      keep = min(len(a), max(room - len(b), room // 2))
      a, b = a[:keep], b[:room - keep]
      parts, kinds_ = [frame[0], a, frame[1], b, frame[2]], [0, 0, 0, 1, 1]
    sizes = [len(part) for part in parts]
    types = np.repeat(kinds_, sizes) if self._has_types else np.zeros(sum(sizes), np.int32)
    return np.concatenate(parts), types, len(frame[0]), len(a)

  @property
  def _frames(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What stands around one text, and around two."""
    if not _frames(self.vocabulary):
      cls, sep = self._ids('cls_id'), self._ids('sep_id')
      return [cls, sep], [cls, sep, sep]
    return _framing(self.vocabulary)[:2]

  @property
  def _has_types(self) -> bool:
    return not _frames(self.vocabulary) or _framing(self.vocabulary)[2]


@dataclasses.dataclass(frozen=True)
class TextToText(Form):
  """The template's prompt for the encoder, its target for the decoder, as in T5; both end in eos.

  Features: encoder_input_tokens, encoder_segment_ids, encoder_positions [inputs] and the decoder's
  [targets] of next-token prediction; examples of a row are segments on both sides.
  """

  kinds: ClassVar[Tuple[str, ...]] = (
      'classification', 'similarity', 'tagging', 'span_extraction', 'generation',
      'multiple_choice', 'retrieval', 'language_modelling')

  def encode(self, example):
    """Returns tokens of prompt and target."""
    encode = self.vocabulary.encode
    return Encoded(encode(self.template.prompt(example)), None,
                   encode(self.template.target(example)))

  def size(self, a, b, targets):
    """Returns both lengths with their ends."""
    return a + 1, targets + 1

  def features(self, examples, lengths):
    """Returns the features above."""
    inputs = [self._ended(e.a, lengths.inputs) for e in examples]
    encoder = pack(inputs, lengths.inputs)
    _hide(encoder.tokens, encoder.segment_ids)
    decoder = pack([self._ended(e.targets, lengths.targets) for e in examples], lengths.targets)
    return {'encoder_input_tokens': encoder.tokens, 'encoder_segment_ids': encoder.segment_ids,
            'encoder_positions': encoder.positions, **decoder_features(decoder, self.bos_id)}

  def _ended(self, ids: np.ndarray, length: int) -> np.ndarray:
    return np.append(ids[:length - 1], np.int32(self.eos_id))


@dataclasses.dataclass(frozen=True)
class Decoder(TextToText):
  """Prompt and target one after the other, ended by eos; the loss counts the target alone."""

  def size(self, a, b, targets):
    """Returns the length of both together, with the end."""
    return a + targets + 1, np.zeros_like(a)

  def features(self, examples, lengths):
    """Returns the features of next-token prediction, [inputs] each."""
    rows, weights = [], []
    for example in examples:
      target = self._ended(example.targets, lengths.inputs)
      room = lengths.inputs - len(target)
      prompt = example.a[len(example.a) - min(room, len(example.a)):]  # Its end is the question.
      rows.append(np.concatenate([prompt, target]))
      weights.append(np.repeat(np.float32([0, 1]), [len(prompt), len(target)]))
    features = decoder_features(pack(rows, lengths.inputs), self.bos_id)
    features['decoder_loss_weights'] = pad(np.concatenate(weights), lengths.inputs)
    return features


@dataclasses.dataclass(frozen=True)
class Embedder(EncoderForm):
  """Two texts, one a row each, for a dual encoder: query_tokens and document_tokens [length].

  Of a similarity also `pair_values` []; of a retrieval `negative_tokens` [n, length] of the
  documents behind the first, as many as the least example of the split has. Packed similarities
  have the features of an encoder, where segments 1 and 2 are the first pair, 3 and 4 the second,
  and `pair_values`, `pair_weights` [examples].
  """

  kinds: ClassVar[Tuple[str, ...]] = ('similarity', 'classification', 'retrieval')

  def encode(self, example):
    """Returns tokens of both texts."""
    if self.kind.name == 'retrieval':
      documents = self.vocabulary.encode_batch(example['documents'])
      return Encoded(self.vocabulary.encode(example['query']), np.concatenate(documents),
                     np.array([len(ids) for ids in documents], np.int32))
    if 'b' not in example:
      raise UserError(f'The example {example["a"]!r} has one text, and an embedder compares two;'
                      ' bind another form.')
    return super().encode(example)

  def measure(self, encoded):
    """Returns the lengths of `a` and of the longest of the texts of `b`, and how many these are."""
    if self.kind.name != 'retrieval':
      return super().measure(encoded)
    return len(encoded.a), int(encoded.targets.max()), len(encoded.targets)

  def parts(self, sizes):
    """Returns the number of documents, or 1."""
    return sizes[:, 2] if self.kind.name == 'retrieval' else super().parts(sizes)

  def size(self, a, b, targets):
    """Returns the length of the longest text, framed; of a similarity, of both."""
    frame = sum(map(len, self._frames[0]))
    if self.kind.name == 'similarity':
      return a + b + 2 * frame, np.zeros_like(a)
    return np.maximum(a, b) + frame, np.zeros_like(a)

  def features(self, examples, lengths):
    """Returns the features above."""
    if lengths.packed:
      return self._packed(examples, lengths)
    example, = examples
    frame = lambda ids: pad(
        self.framed(Encoded(ids, None, _NONE), lengths.inputs)[0], lengths.inputs)
    documents = [example.b]
    if self.kind.name == 'retrieval':
      documents = np.split(example.b, np.cumsum(example.targets)[:-1])[:lengths.parts]
    features = {'query_tokens': frame(example.a), 'document_tokens': frame(documents[0])}
    if len(documents) > 1:
      features['negative_tokens'] = np.stack([frame(ids) for ids in documents[1:]])
    if self.kind.name == 'similarity':
      features['pair_values'] = np.float32(example.value)
    return features

  def _packed(self, examples: Sequence[Encoded], lengths: Lengths) -> Features:
    texts = []
    for example in examples:
      both, room = (example.a, example.b), lengths.inputs
      if int(self.size(*map(len, both), 0)[0]) > room:  # Alone in its row, and both are cut.
        room //= 2
      texts += [self.framed(Encoded(ids, None, _NONE), room)[0] for ids in both]
    row, values = pack(texts, lengths.inputs), np.array([e.value for e in examples], np.float32)
    return {'encoder_input_tokens': row.tokens, 'encoder_segment_ids': row.segment_ids,
            'encoder_positions': row.positions, 'pair_values': pad(values, lengths.examples),
            'pair_weights': pad(np.ones(len(examples), np.float32), lengths.examples)}


FORMS: dict[str, Callable[..., Form]] = {
    'encoder': EncoderForm, 'text_to_text': TextToText, 'decoder': Decoder, 'embedder': Embedder}


def pack(pieces: Sequence[np.ndarray], length: int) -> Packed:
  """Returns the pieces one after the other as segments 1, 2, ... of a row."""
  sizes = [len(piece) for piece in pieces]
  return Packed(
      pad(np.concatenate(pieces).astype(np.int32), length),
      pad(np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes), length),
      pad(np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]), length),
      np.int32(-1))


def _hide(tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
  """Makes padding of the tokens that are cut off, in place; returns which are left, [length]."""
  seen = tokens >= 0
  tokens *= seen
  segments *= seen
  return seen


def word_tokens(vocabulary: Vocabulary, words: Sequence[str]) -> list[np.ndarray]:
  """Returns the tokens of each word as it stands behind another, at least one each."""
  before = _before_word(vocabulary)
  pieces = vocabulary.encode_batch([before + word for word in words])
  unknown = np.array([vocabulary.unk_id], np.int32)
  return [piece if len(piece) else unknown for piece in pieces]


_framings: dict[str, Any] = {}
_before: dict[str, str] = {}


def _before_word(vocabulary: Vocabulary) -> str:
  """Returns ' ' where a vocabulary tells by it that a word begins."""
  if vocabulary.digest not in _before:
    first, second, both = (vocabulary.encode(text).tolist() for text in ('one', 'two', 'one two'))
    _before[vocabulary.digest] = '' if first + second == both else ' '
  return _before[vocabulary.digest]


def _frames(vocabulary: Vocabulary) -> bool:
  """Whether the vocabulary knows how texts are framed."""
  return hasattr(vocabulary, 'encode_pair')


def _framing(vocabulary: Any) -> tuple[list[np.ndarray], list[np.ndarray], bool]:
  """Returns what `encode_pair` puts around one text and around two, and whether the second has
  another token type."""
  if vocabulary.digest not in _framings:
    word = vocabulary.encode('one')
    places = lambda ids: [i for i in range(len(ids)) if (ids[i:i + len(word)] == word).all()
                          and i + len(word) <= len(ids)]
    single, pair = vocabulary.encode_pair('one'), vocabulary.encode_pair('one', 'one')
    (start,), (first, second) = places(single.ids), places(pair.ids)
    end = len(word)
    _framings[vocabulary.digest] = (
        [single.ids[:start], single.ids[start + end:]],
        [pair.ids[:first], pair.ids[first + end:second], pair.ids[second + end:]],
        bool(pair.token_types[second]))
  return _framings[vocabulary.digest]
