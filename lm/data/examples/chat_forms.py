"""Conversations put to a decoder: rendered by a chat template, with a weight for each token."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Sequence, Tuple

import numpy as np

from lm.data.examples import chat
from lm.data.examples import conversations
from lm.data.examples import kinds
from lm.data.examples.forms import Encoded, Form, pack
from lm.data.objectives.causal import decoder_features
from lm.data.objectives.contract import Features, pad
from lm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chat(Form):
  """A conversation whose next tokens are predicted; the loss counts the assistant's alone.

  Other kinds are conversations of one prompt of the template and its target as the answer. A
  conversation that is too long for a row loses its oldest exchanges, the system's message kept, and
  is rendered anew; what is then still too long is cut at its end. Features of a row are those of
  next-token prediction, conversations its segments. Inputs begin with the first token of the text,
  so that nothing stands before it that the chat template does not name; e.g. of one conversation

      text                    <s>  User  :  hi  \\n  Assistant  :  Hello  </s>
      decoder_input_tokens    <s>  User  :  hi  \\n  Assistant  :  Hello
      decoder_target_tokens  User     :  hi \\n  Assistant  :  Hello  </s>
      decoder_loss_weights      0     0  0   0          0  0      1     1

  Attributes:
    chat: the chat template.
  """

  chat: Any = None

  kinds: ClassVar[Tuple[str, ...]] = (
      'conversation', 'classification', 'similarity', 'tagging', 'span_extraction', 'generation')

  def encode(self, example: kinds.Example) -> Encoded:
    """Returns all tokens as `a`, and as targets 1 for each that is the assistant's, else 0."""
    messages = example.get('messages') or [
        {'role': 'user', 'content': self.template.prompt(example)},
        {'role': 'assistant', 'content': self.template.target(example)}]
    turns = self._turns(messages, example)
    return Encoded(turns.ids, None, turns.is_answer.astype(np.int32), example=example)

  def size(self, a, b, targets):
    """Returns the tokens but for the first, which is no target."""
    return a - 1, np.zeros_like(a)

  def features(self, examples, lengths):
    """Returns the features above."""
    return _features([self._fitting(example, lengths.inputs) for example in examples],
                     lengths.inputs)

  def _turns(self, messages: Sequence[chat.Message], example: kinds.Example) -> chat.Turns:
    try:
      return self.chat.encode(messages)
    except chat.BadConversation as error:
      raise UserError(f'The example {example["id"]!r} {error}; mend it, or bind another'
                      ' chat_template.') from error

  def _fitting(self, encoded: Encoded, length: int) -> chat.Turns:
    turns = chat.Turns(encoded.a, encoded.targets)
    messages = encoded.example.get('messages')
    while messages and len(turns.ids) - 1 > length:
      messages = conversations.without_oldest(messages)
      if messages:
        turns = self._turns(messages, encoded.example)
    return chat.Turns(*(x[:length + 1] for x in turns))


@dataclasses.dataclass(frozen=True)
class Preference(Chat):
  """Two answers to a prompt as two conversations beside each other in a row: segments 1 and 2 are
  the chosen and the rejected of the row's first pair, 3 and 4 of its second. Their last answers
  alone are counted. Beside the features of `Chat` each pair [examples] has

      pair_weights             1, or 0 where there is no such pair
      reference_chosen_logps, reference_rejected_logps
                               nats of each answer under the reference model; see `lm/evaluation/
                               reference.py`, which finds them before training
  """

  kinds: ClassVar[Tuple[str, ...]] = ('preference',)

  def encode(self, example: kinds.Example) -> Encoded:
    """Returns both conversations as `a` and `b`, and as targets 1 for each token of the answers."""
    chosen, rejected = self._pair(example['prompt'], example)
    return Encoded(chosen.ids, rejected.ids,
                   np.concatenate([chosen.is_answer, rejected.is_answer]).astype(np.int32),
                   example=example)

  def size(self, a, b, targets):
    """Returns the tokens of both, but for the first of each."""
    return a + b - 2, np.zeros_like(a)

  def features(self, examples, lengths):
    """Returns the features above."""
    pairs = [turns for example in examples for turns in self._fitting_pair(example, lengths.inputs)]
    reference = np.array([example.reference for example in examples], np.float32)
    return _features(pairs, lengths.inputs) | {
        'pair_weights': pad(np.ones(len(examples), np.float32), lengths.examples),
        'reference_chosen_logps': pad(reference[:, 0], lengths.examples),
        'reference_rejected_logps': pad(reference[:, 1], lengths.examples)}

  def _pair(self, prompt: Any, example: kinds.Example) -> list[chat.Turns]:
    found = []
    for name in ('chosen', 'rejected'):
      turns = self._turns([*prompt, {'role': 'assistant', 'content': example[name]}], example)
      others = np.flatnonzero(~turns.is_answer)
      begin = others[others < np.flatnonzero(turns.is_answer)[-1]].max(initial=-1) + 1
      found.append(turns._replace(is_answer=turns.is_answer & (np.arange(len(turns.ids)) >= begin)))
    return found

  def _fitting_pair(self, encoded: Encoded, length: int) -> list[chat.Turns]:
    is_answer = np.split(encoded.targets, [len(encoded.a)])
    pair = [chat.Turns(*one) for one in zip((encoded.a, encoded.b), is_answer)]
    prompt, sizes = encoded.example['prompt'], [len(turns.ids) - 1 for turns in pair]
    while prompt and sum(sizes) > length:
      prompt = conversations.without_oldest(prompt)
      if prompt:
        pair = self._pair(prompt, encoded.example)
        sizes = [len(turns.ids) - 1 for turns in pair]
    first = min(sizes[0], max(length - sizes[1], length // 2))
    return [chat.Turns(*(x[:size + 1] for x in turns))
            for turns, size in zip(pair, (first, length - first))]


def _features(conversations_: Sequence[chat.Turns], length: int) -> Features:
  """Returns the features of next-token prediction, [length] each, of conversations side by side."""
  features = decoder_features(pack([turns.ids[1:] for turns in conversations_], length))
  features['decoder_input_tokens'] = pack([turns.ids[:-1] for turns in conversations_],
                                          length).tokens
  weights = np.concatenate([turns.is_answer[1:] for turns in conversations_])
  features['decoder_loss_weights'] = pad(weights.astype(np.float32), length)
  return features
