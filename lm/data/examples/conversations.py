"""Kinds of conversations: what an assistant shall answer, and which of two answers is better."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Iterator, Mapping, Optional

from lm.data.examples.chat import ROLES
from lm.data.examples.kinds import BadExample, Example, Kind

_ROLES = {role: role for role in ROLES} | {'human': 'user', 'gpt': 'assistant'}
Messages = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Conversation(Kind):
  """Messages, of which the assistant's are what a model learns. A record has one of

      messages: [{'role': 'user', 'content': ...}, {'role': 'assistant', 'content': ...}, ...]
      conversations: [{'from': 'human', 'value': ...}, {'from': 'gpt', ...}, ...] (ShareGPT)
      instruction, output, and maybe input, which goes behind the instruction, and system (Alpaca)
  """

  name: ClassVar[str] = 'conversation'

  def canonical(self, record: Mapping[str, Any]) -> Example:
    """Returns {'messages'}."""
    if 'messages' not in record and 'conversations' not in record:
      parts = [record.get(name) for name in ('instruction', 'input')]
      user = '\n\n'.join(part for part in parts if part)
      messages = [{'role': 'user', 'content': user},
                  {'role': 'assistant', 'content': record.get('output')}]
      if record.get('system'):
        messages = [{'role': 'system', 'content': record['system']}, *messages]
      if 'instruction' not in record or 'output' not in record:
        raise BadExample("has none of 'messages', 'conversations', and 'instruction' with 'output',"
                         f' among {sorted(record)}')
    else:
      messages = record['messages' if 'messages' in record else 'conversations']
    messages = checked(messages)
    if not any(message['role'] == 'assistant' for message in messages):
      raise BadExample("has no message of the role 'assistant', so that nothing is to be learnt")
    return {'messages': messages}

  def texts(self, example: Example) -> Iterator[str]:
    """Yields what the messages say."""
    yield from (message['content'] for message in example['messages'])


@dataclasses.dataclass(frozen=True)
class Preference(Kind):
  """Two answers to a prompt, of which `chosen` is the better one. In a record `prompt` is a user's
  message or a list of messages, and an answer is a text or a list of messages that ends in it; of
  two lists without a prompt what they share is the prompt.

  Attributes:
    prompt: the user's message where records have none.
  """

  prompt: Optional[str] = None

  name: ClassVar[str] = 'preference'

  def canonical(self, record: Mapping[str, Any]) -> Example:
    """Returns {'prompt': messages, 'chosen', 'rejected'}, both answers as text."""
    for name in ('chosen', 'rejected'):
      if name not in record:
        raise BadExample(f'has no field {name!r} among {sorted(record)}')
    answers = [record['chosen'], record['rejected']]
    prompt = record.get('prompt', self.prompt)
    lists = [checked(answer) for answer in answers if isinstance(answer, list)]
    if prompt is None and len(lists) == 2 and lists[0][:-1] == lists[1][:-1]:
      prompt = lists[0][:-1]
    if not prompt:
      raise BadExample("has no 'prompt', nor two answers that share one")
    for messages in lists:
      if not messages or messages[-1]['role'] != 'assistant':
        raise BadExample("has an answer that does not end in a message of the role 'assistant'")
    prompt = checked([{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt)
    chosen, rejected = (answer[-1].get('content', answer[-1].get('value'))
                        if isinstance(answer, list) else answer for answer in answers)
    for answer in (chosen, rejected):
      if not isinstance(answer, str) or not answer.strip():
        raise BadExample(f'has an empty answer {answer!r}')
    if chosen == rejected:
      raise BadExample(f'has the same answer {chosen!r} as chosen and as rejected')
    return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}

  def texts(self, example: Example) -> Iterator[str]:
    """Yields the prompt's messages and the chosen answer."""
    yield from (message['content'] for message in example['prompt'])
    yield example['chosen']


def checked(messages: Any) -> Messages:
  """Returns messages as {'role', 'content'}.

  Raises:
    BadExample: they are no list of them, a role is unknown, or a message is empty.
  """
  if not isinstance(messages, list) or not all(isinstance(one, Mapping) for one in messages):
    raise BadExample(f'has {messages!r}, which is no list of messages')
  found = []
  for i, message in enumerate(messages):
    role = message.get('role', message.get('from'))
    content = message.get('content', message.get('value'))
    if role not in _ROLES:
      raise BadExample(f'has the role {role!r} in message {i}, none of {", ".join(_ROLES)}')
    if not isinstance(content, str) or not content.strip():
      raise BadExample(f'has an empty message {i}, of the role {role!r}')
    found.append({'role': _ROLES[role], 'content': content})
  return found


def without_oldest(messages: Messages) -> Optional[Messages]:
  """Returns the messages without the oldest exchange (a user's messages and the answers to them),
  the system's kept; None where there is but one."""
  system = [message for message in messages[:1] if message['role'] == 'system']
  rest = messages[len(system):]
  starts = [i for i in range(1, len(rest))
            if rest[i]['role'] == 'user' and rest[i - 1]['role'] == 'assistant']
  return [*system, *rest[starts[0]:]] if starts else None
