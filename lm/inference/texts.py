"""Requests of an engine from texts, and texts from what it answers."""
from typing import Any

from lm.inference.engine import Request
from lm.inference.generate import begin_id, Chat, CompletedText, Completion, Vocabulary, without_eos
from lm.inference.sampling import SamplingConfig, with_ids
from lm.inference.stops import Stream


class Texts:
  """Turns prompts into requests as `complete` does; in a `chat` they are a user's messages."""

  def __init__(self, vocabulary: Vocabulary, chat: Chat | None = None):
    self.vocabulary, self.chat = vocabulary, chat
    # Of a conversation the template says what it begins with.
    self._bos_id = begin_id(vocabulary) if chat is None else None

  def request(self, prompt: str, sampling: SamplingConfig, seed: int, **options: Any
              ) -> tuple[Request, Stream | None]:
    """Returns the request, and what stops it where `sampling` has stop strings.

    Args:
      options: other fields of `Request`.
    """
    if self.chat is None:
      ids, eos_id = self.vocabulary.encode(prompt), self.vocabulary.eos_id
    else:
      ids, eos_id = self.chat.prompt([{'role': 'user', 'content': prompt}]), self.chat.end_id
    stream = Stream(self.vocabulary.decode, sampling.stop) if sampling.stop else None
    return Request(ids, with_ids(sampling, self.vocabulary.encode), seed, eos_id, self._bos_id,
                   stop=stream, **options), stream

  def answer(self, prompt: str, done: Completion, stream: Stream | None) -> CompletedText:
    """The text of what the engine answered."""
    if stream is not None:
      stream.finish()
    text = self.vocabulary.decode(without_eos(done)) if stream is None else stream.text
    return CompletedText(prompt=prompt, text=text, tokens=done.tokens.tolist(),
                         stopped=done.stopped)
