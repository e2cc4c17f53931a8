"""Conversations as text: chat templates, and which tokens of a conversation are the assistant's.

A template is Jinja, as in the `chat_template` of a tokenizer_config.json, and sees what
`transformers` shows it: `messages`, `add_generation_prompt`, `bos_token` and its like, and
`raise_exception`. There are no `tools`, and no `strftime_now`: a template that asks for the date
has the one that it falls back on, so that the same conversation is the same text tomorrow.

The ids are those of `transformers`' `apply_chat_template`, but where somebody wrote a special token
into a message: `<|im_end|>` in a message is text here, and the end of the message there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
import re
from typing import Any, Mapping, NamedTuple, Optional, Sequence

import numpy as np

from lm.data import tokenizer_config
from lm.data.vocabularies import PAD_ID, Vocabulary
from lm.errors import UserError

Message = Mapping[str, str]

FILE = 'chat.jinja'  # In a vocabulary's directory.
ROLES = ('system', 'user', 'assistant')
# Noncharacters of Unicode: one that no message has is put into special tokens that messages spell.
_GUARDS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

_ALTERNATE = """
{%- for message in turns %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('user and assistant must take turns, the user first') }}
{%- endif %}"""
_NO_SYSTEM = """
{%- if messages and messages[0].role == 'system' %}
{{- raise_exception('this template has no place for a system message') }}
{%- endif %}
{%- set turns = messages %}"""

NAMED = {
    # Any vocabulary whose end of document is a token.
    'plain': """{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}{{- message.content + '\n' }}
{%- elif message.role == 'user' %}{{- 'User: ' + message.content + '\n' }}
{%- else %}{{- 'Assistant: ' + message.content + eos_token + '\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{% endif %}""",
    # Qwen, SmolLM, Yi, OpenHermes; without a system message of their own.
    'chatml': """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}""",
    # Llama 3.
    'llama3': """{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}""",
    # Llama 2: the system message stands in the first of the user's.
    'llama2': """
{%- set system, turns = none, messages %}
{%- if messages and messages[0].role == 'system' %}
{%- set system, turns = messages[0].content, messages[1:] %}
{%- endif %}""" + _ALTERNATE + """
{%- if message.role == 'user' %}
{%- set before = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '' %}
{{- bos_token + '[INST] ' + (before + message.content) | trim + ' [/INST]' }}
{%- else %}
{{- ' ' + message.content | trim + ' ' + eos_token }}
{%- endif %}
{%- endfor %}""",
    # Mistral 7B v0.1 and v0.2, Mixtral.
    'mistral': '{{- bos_token }}' + _NO_SYSTEM + _ALTERNATE + """
{%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{{- message.content + eos_token }}
{%- endif %}
{%- endfor %}""",
    # Gemma, Gemma 2.
    'gemma': '{{- bos_token }}' + _NO_SYSTEM + _ALTERNATE + """
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}""",
}


class BadConversation(ValueError):
  """What is wrong between a conversation and a template."""


class Turns(NamedTuple):
  """A conversation in tokens, from its very first on.

  Attributes:
    ids: int32 [tokens].
    is_answer: bool [tokens], of the assistant's tokens, with the one that ends each answer.
  """

  ids: np.ndarray
  is_answer: np.ndarray


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A template and the vocabulary that spells it.

  Attributes:
    source: Jinja.
    vocabulary: of the model.
    name: of the template, for errors.
  """

  source: str
  vocabulary: Any
  name: str = 'of the tokenizer'

  def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """Returns the text.

    Args:
      messages: of the conversation.
      add_generation_prompt: whether the beginning of an answer follows it.

    Raises:
      BadConversation: the template refuses it.
    """
    names = {id_: token for token, id_ in self.vocabulary.special_tokens.items()}
    special = {f'{role}_token': names.get(getattr(self.vocabulary, f'{role}_id', None), '')
               for role in ('bos', 'eos', 'unk', 'pad')}
    jinja2 = _jinja2()
    try:
      return _compiled(self.source).render(
          messages=list(messages), add_generation_prompt=add_generation_prompt, tools=None,
          documents=None, **special)
    except (jinja2.TemplateError, TypeError) as error:
      raise BadConversation(f'does not go with the chat template {self.name}: {error}') from error

  def prompt(self, messages: Sequence[Message]) -> np.ndarray:
    """Returns the ids up to where the assistant's next answer begins."""
    guard, guarded = self._guarded(messages)
    return self._encode(self.render(guarded, True), guard)

  def encode(self, messages: Sequence[Message]) -> Turns:
    """Returns the ids of a conversation and which of them are the assistant's.

    An answer is what the text has more behind it than before it, where before it stands what
    generation would begin with; and up to the special token that ends it.

    Raises:
      BadConversation: the text of the messages up to an answer is not how the text of all begins.
    """
    guard, guarded = self._guarded(messages)
    text = self.render(guarded)
    ids = self._encode(text, guard)
    is_answer = np.zeros(len(ids), bool)
    for i, message in enumerate(messages):
      if message['role'] == 'assistant':
        before, behind = self.render(guarded[:i], True), self.render(guarded[:i + 1])
        if not (text.startswith(behind) and behind.startswith(before)):
          raise BadConversation(f'has an answer, message {i}, whose text the messages behind it'
                                f' change in the chat template {self.name}')
        end = len(before) + self._answer_end(behind[len(before):])
        start, stop = (self._place(ids, text, place, guard) for place in (len(before), end))
        is_answer[start:stop] = True
    return Turns(ids, is_answer)

  @property
  def end_id(self) -> int:
    """The token with which the assistant ends an answer.

    Raises:
      UserError: there is none.
    """
    try:
      turns = self.encode([{'role': role, 'content': text}
                           for role, text in (('user', 'a'), ('assistant', 'b'))])
    except BadConversation as error:
      raise UserError(f'A message "a" with its answer "b" {error}; bind chat_template to another of'
                      f' {", ".join(NAMED)}, or to a file.') from error
    return int(turns.ids[turns.is_answer][-1])

  def _answer_end(self, text: str) -> int:
    """Returns where the special token ends that ends an answer."""
    last = None
    for last in _pattern(tuple(self.vocabulary.special_tokens)).finditer(text):
      pass
    if last is None or text[last.end():].strip():
      raise BadConversation(
          f'has the end {text[-20:]!r} in the chat template {self.name}, which is no special token'
          f' of the vocabulary, so that a model could not say that its answer is whole')
    return last.end()

  def _place(self, ids: np.ndarray, text: str, place: int, guard: str) -> int:
    """Returns how many ids are those of `text[:place]`; one that goes on behind it is not."""
    behind = self._ids(text[place:], guard)
    if len(behind) < len(ids) and (ids[len(ids) - len(behind):] == behind).all():
      return len(ids) - len(behind)  # What stands behind blanks may change how they are cut.
    before = self._encode(text[:place], guard)
    size = min(len(before), len(ids))
    different = np.flatnonzero(before[:size] != ids[:size])
    return int(different[0]) if len(different) else size

  def _guarded(self, messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """Returns a character that no message has, and the messages with it inside of all that spells a
    special token."""
    whole = ''.join(message['content'] for message in messages)
    guard = next((guard for guard in _GUARDS if guard not in whole), None)
    if guard is None:
      raise BadConversation('has all 32 noncharacters U+FDD0 to U+FDEF in its messages')
    pattern = _pattern(tuple(self.vocabulary.special_tokens))

    def guarded(text: str) -> str:
      while pattern.search(text):
        text = pattern.sub(lambda match: match[0][0] + guard + match[0][1:], text)
      return text

    return guard, [{**message, 'content': guarded(message['content'])} for message in messages]

  def _encode(self, text: str, guard: str) -> np.ndarray:
    """Returns the ids of a text from its beginning."""
    begin = [] if hasattr(self.vocabulary, 'encode_pair') else [PAD_ID]  # As before every document.
    return np.concatenate([np.array(begin, np.int32), self._ids(text, guard)])

  def _ids(self, text: str, guard: str) -> np.ndarray:
    """Returns the ids; a special token that is spelt around a guard is text."""
    parts = [part for piece in text.split(guard) for part in self._spelt(piece)]
    return np.concatenate([np.zeros(0, np.int32), *parts])

  def _spelt(self, text: str) -> list[np.ndarray]:
    """Returns the ids of a text with its special tokens, also of those that the vocabulary takes
    for text itself."""
    special, encode = self.vocabulary.special_tokens, self.vocabulary.encode
    parts = re.split(f'({_unspelt(self.vocabulary).pattern})', text)
    return [np.array([special[part]], np.int32) if i % 2 else encode(part)
            for i, part in enumerate(parts) if part]


def open_template(vocabulary: Vocabulary, name: Optional[str] = None) -> ChatTemplate:
  """Returns a template for a vocabulary.

  Args:
    vocabulary: of the model.
    name: of `NAMED`, or path of a Jinja file; None takes the tokenizer's own.

  Raises:
    UserError: there is no such template, or none of the tokenizer, or no token ends an answer.
  """
  if name in NAMED:
    template = ChatTemplate(NAMED[name], vocabulary, repr(name))
  elif name is not None:
    template = ChatTemplate(_read(name), vocabulary, name)
  else:
    own = _own(vocabulary)
    if own is None:
      raise UserError('The vocabulary comes with no chat template; bind chat_template to one of'
                      f' {", ".join(NAMED)}, or to a file of Jinja.')
    template = ChatTemplate(own, vocabulary)
  template.end_id  # Says what is wrong with it.
  return template


def load(directory: str | os.PathLike[str], vocabulary: Vocabulary) -> ChatTemplate:
  """Returns the template that `save` kept beside a vocabulary, or else the tokenizer's own."""
  kept = Path(directory, FILE)
  return open_template(vocabulary, str(kept) if kept.exists() else None)


def save(template: ChatTemplate, directory: str | os.PathLike[str]) -> None:
  """Keeps a template beside a vocabulary."""
  Path(directory, FILE).write_text(template.source, 'utf-8')


def digest_source(name: Optional[str]) -> Optional[str]:
  """Returns what decides on a named template: its text."""
  return name if name is None else NAMED[name] if name in NAMED else _read(name)


def _read(path: str) -> str:
  try:
    return Path(path).expanduser().read_text('utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'chat_template={path!r} is none of {", ".join(NAMED)}, and no file of text'
                    f' ({error}); write one of these.') from error


def _own(vocabulary: Any) -> Optional[str]:
  """Returns the template in a tokenizer's files: a file of its own goes before tokenizer_config."""
  files = getattr(vocabulary, 'files', {})
  if 'chat_template.jinja' in files:
    return files['chat_template.jinja'].decode('utf-8')
  found = tokenizer_config.read(files).get('chat_template')
  if isinstance(found, list):  # Of several, each with its name.
    found = {one['name']: one['template'] for one in found}.get('default')
  return found


@functools.lru_cache(maxsize=16)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
  """Returns what finds the tokens, the longest first."""
  names = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
  return re.compile('|'.join(map(re.escape, names)) or '(?!)')


@functools.lru_cache(maxsize=16)
def _unspelt(vocabulary: Any) -> re.Pattern[str]:
  """Returns what finds the special tokens that the vocabulary takes for text."""
  return _pattern(tuple(name for name, id_ in vocabulary.special_tokens.items()
                        if vocabulary.encode(name).tolist() != [id_]))


def _jinja2() -> Any:
  try:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
  except ImportError as error:
    raise UserError(f'Chat templates need Jinja ({error}); install it with `pip install'
                    " 'lm[interop]'`.") from error
  return jinja2


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
  """Returns the template in a sandbox, with the settings and helpers of `transformers`."""
  jinja2 = _jinja2()
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  def tojson(value: Any, **options: Any) -> str:
    return json.dumps(value, **({'ensure_ascii': False} | options))

  environment.filters['tojson'] = tojson
  environment.globals['raise_exception'] = raise_exception
  try:
    return environment.from_string(source)
  except jinja2.TemplateError as error:
    raise UserError(f'The chat template is no Jinja that can be read ({error}); mend it, or bind'
                    f' chat_template to one of {", ".join(NAMED)}.') from error
