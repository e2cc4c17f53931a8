"""From requests to jobs, and from the events of jobs to answers in OpenAI's forms."""
import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Sequence
import contextlib
import dataclasses
import json
import secrets
import struct
import time
from typing import Any

from lm.errors import UserError
from lm.serving import schemas
from lm.serving.admission import Queue
from lm.serving.protocol import Event, Job

# What ended a text, in OpenAI's words where they have one.
REASONS = {'eos': 'stop', 'stop': 'stop', 'length': 'length', 'context': 'length'}


class InternalError(Exception):
  """A worker could not answer, by no fault of the request."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """Of a request.

  body: bytes. max_tokens: new ones of a text. max_texts: that one request asks for or sends.
  seconds: for an answer; what is there by then is the answer.
  """
  body: int = 1 << 20
  max_tokens: int = 2048
  max_texts: int = 64
  seconds: float = 120.0


async def events(run: Callable[[Job], AsyncIterator[Event]], queue: Queue, name: str,
                 jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Event]]:
  """Yields (number of a job, event), as they come, of jobs that run beside each other.

  Args:
    run: yields the events of a job.

  Raises:
    UserError: a job is wrong. InternalError: it failed.
    Refused: the queue is full. WorkerLost: the worker died.
  """
  found: asyncio.Queue[Any] = asyncio.Queue()

  async def one(number, job):
    try:
      async with queue.place(name), contextlib.aclosing(run(job)) as told:
        async for event in told:
          if 'error' in event:
            kind = UserError if event['kind'] == 'user' else InternalError
            raise kind(event['error'])
          found.put_nowait((number, event))
    except Exception as error:
      found.put_nowait(error)

  tasks = [asyncio.create_task(one(number, job)) for number, job in enumerate(jobs)]
  left = len(tasks)
  try:
    while left:
      item = await found.get()
      if isinstance(item, Exception):
        raise item
      left -= 'done' in item[1]
      yield item
  finally:
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def sampling(form: schemas.Sampled, max_new_tokens: int, json_schema: Any = None
             ) -> dict[str, Any]:
  """The fields of a `SamplingConfig`."""
  stop = [form.stop] if isinstance(form.stop, str) else form.stop or []
  if not all(stop):
    raise UserError('stop has an empty text, which stands everywhere; leave it out')
  rules = {'regex': form.regex, 'grammar': form.grammar, 'choices': form.choices,
           'json_schema': json_schema}
  rules = {name: value for name, value in rules.items() if value is not None}
  try:
    bias = [(int(token), value) for token, value in (form.logit_bias or {}).items()]
  except ValueError as error:
    raise UserError(f'logit_bias has a key that is no number of a token ({error})') from error
  names = ('temperature', 'top_p', 'top_k', 'min_p', 'typical_p', 'repetition_penalty',
           'presence_penalty', 'frequency_penalty', 'no_repeat_ngram_size')
  return {'max_new_tokens': max_new_tokens, 'stop': stop, 'logit_bias': bias,
          **{name: getattr(form, name) for name in names}, **({'rule': rules} if rules else {})}


def completion_jobs(form: schemas.Completion, limits: Limits) -> list[Job]:
  """A job for each text of `/v1/completions`: n of each prompt, in their order.

  Raises:
    UserError: more is asked than the limits allow.
  """
  prompts = form.prompt
  if isinstance(prompts, str) or not prompts or isinstance(prompts[0], int):
    prompts = [prompts]
  check(len(prompts) * form.n, limits)
  if form.max_tokens == 0:
    if not form.echo or form.stream or not all(isinstance(prompt, str) for prompt in prompts):
      raise UserError('max_tokens=0 writes nothing; with echo=true, without stream, it scores '
                      'prompts that are texts')
    return [{'op': 'score', 'prompt': prompt, 'top': form.logprobs or 0} for prompt in prompts]
  if form.echo and form.logprobs is not None:
    raise UserError('echo with logprobs scores a prompt; set max_tokens=0 for that')
  asked = sampling(form, _tokens(form.max_tokens, limits))
  seed = _seed(form)
  if form.suffix is not None:
    if not all(isinstance(prompt, str) for prompt in prompts) or form.stream:
      raise UserError('suffix needs a prompt that is a text, and no stream')
    return [{'op': 'infill', 'before': prompt, 'after': form.suffix, 'sampling': asked,
             'seed': seed + i, 'seconds': limits.seconds}
            for prompt in prompts for i in range(form.n)]
  return [{'op': 'complete', 'prompt': prompt, 'sampling': asked, 'seed': seed + i,
           'seconds': limits.seconds, 'top': form.logprobs}
          for prompt in prompts for i in range(form.n)]


def chat_jobs(form: schemas.Chat, limits: Limits, max_length: int) -> list[Job]:
  """A job for each answer of `/v1/chat/completions`."""
  check(form.n, limits)
  wanted = form.max_completion_tokens or form.max_tokens
  max_tokens = _tokens(wanted, limits) if wanted else min(limits.max_tokens, max_length)
  schema, format_ = None, form.response_format
  if format_ is not None and format_.type == 'json_object':
    schema = '{}'
  elif format_ is not None and format_.type == 'json_schema':
    if format_.json_schema is None:
      raise UserError('response_format of type json_schema needs json_schema')
    schema = json.dumps(format_.json_schema.schema_)
  messages = [{'role': 'system' if message.role == 'developer' else message.role,
               'content': message.content if isinstance(message.content, str) else
               ''.join(part.text for part in message.content)} for message in form.messages]
  asked, seed = sampling(form, max_tokens, schema), _seed(form)
  return [{'op': 'complete', 'prompt': messages, 'sampling': asked, 'seed': seed + i,
           'seconds': limits.seconds, 'top': 0 if form.logprobs else None} for i in range(form.n)]


def check(number: int, limits: Limits):
  """Raises UserError where a request asks for, or sends, more texts than the limits allow."""
  if number > limits.max_texts:
    raise UserError(f'the request has {number} texts, and {limits.max_texts} are allowed; send '
                    'several requests')


def _tokens(wanted, limits):
  if wanted > limits.max_tokens:
    raise UserError(f'max_tokens={wanted} is more than the {limits.max_tokens} that this server '
                    'allows')
  return wanted


def _seed(form):
  return secrets.randbits(62) if form.seed is None else form.seed


class Texts:
  """The answer to a completion or a chat, whole or in pieces."""

  def __init__(self, form: schemas.Completion | schemas.Chat, jobs: Sequence[Job]):
    self._form, self._jobs = form, jobs
    self._in_chat = isinstance(form, schemas.Chat)
    kind = 'chat.completion' if self._in_chat else 'text_completion'
    prefix = 'chatcmpl-' if self._in_chat else 'cmpl-'
    self._head = {'id': prefix + secrets.token_hex(12), 'object': kind, 'created': int(time.time()),
                  'model': form.model}
    self._texts = [self._echoed(job) for job in jobs]
    self._tokens: list[list[str]] = [[] for _ in jobs]
    self._log_probs: list[list[float]] = [[] for _ in jobs]
    self._ends: list[Event] = [{} for _ in jobs]

  def add(self, number: int, event: Event):
    """Takes an event of a job."""
    self._texts[number] += event.get('text', '')
    self._tokens[number] += event.get('tokens', ())
    self._log_probs[number] += event.get('log_probs', ())
    if 'done' in event:
      self._ends[number] = event

  @property
  def new_tokens(self) -> int:
    """Of all texts."""
    return sum(end.get('new_tokens', 0) for end in self._ends)

  def whole(self) -> dict[str, Any]:
    """The answer when all jobs are done."""
    choices = []
    for i, (text, end) in enumerate(zip(self._texts, self._ends)):
      body = {'message': {'role': 'assistant', 'content': text}} if self._in_chat else (
          {'text': text})
      choices.append({'index': i, **body, 'logprobs': self._log_probs_of(
          self._tokens[i], self._log_probs[i], end.get('top')), 'finish_reason': _reason(end)})
    return {**self._head, 'choices': choices, 'usage': self._usage()}

  def begin(self) -> list[dict[str, Any]]:
    """The pieces before all others."""
    if self._in_chat:
      return [self._piece(i, {'delta': {'role': 'assistant', 'content': ''}})
              for i in range(len(self._jobs))]
    return [self._piece(i, {'text': text}) for i, text in enumerate(self._texts) if text]

  def piece(self, number: int, event: Event) -> list[dict[str, Any]]:
    """What a stream says of an event."""
    self.add(number, event)
    text, found = event.get('text', ''), []
    if text or event.get('tokens'):
      body = {'delta': {'content': text}} if self._in_chat else {'text': text}
      found.append(self._piece(number, body, self._log_probs_of(
          event.get('tokens', ()), event.get('log_probs', ()))))
    if 'done' in event:
      body = {'delta': {}} if self._in_chat else {'text': ''}
      found.append(self._piece(number, body, reason=_reason(event)))
    return found

  def end(self) -> list[dict[str, Any]]:
    """The pieces behind all others."""
    options = self._form.stream_options
    if options is None or not options.include_usage:
      return []
    return [{**self._of_stream(), 'choices': [], 'usage': self._usage()}]

  def _of_stream(self):
    return {**self._head, **({'object': 'chat.completion.chunk'} if self._in_chat else {})}

  def _piece(self, number, body, log_probs=None, reason=None):
    return {**self._of_stream(), 'choices': [
        {'index': number, **body, 'logprobs': log_probs, 'finish_reason': reason}]}

  def _echoed(self, job):
    echo = not self._in_chat and self._form.echo and isinstance(job['prompt'], str)
    return job['prompt'] if echo else ''

  def _log_probs_of(self, tokens, log_probs, top=None):
    if not tokens:
      return None
    if self._in_chat:
      return {'content': [{'token': token, 'logprob': value, 'bytes': list(token.encode()),
                           'top_logprobs': []} for token, value in zip(tokens, log_probs)]}
    offsets = [0]
    for token in tokens[:-1]:
      offsets.append(offsets[-1] + len(token))
    return {'tokens': list(tokens), 'token_logprobs': list(log_probs), 'top_logprobs': top,
            'text_offset': offsets}

  def _usage(self):
    # The n texts of a prompt share it.
    ends = self._ends[::self._form.n]
    prompt = sum(end.get('prompt_tokens', 0) for end in ends)
    return {'prompt_tokens': prompt, 'completion_tokens': self.new_tokens,
            'total_tokens': prompt + self.new_tokens}


def _reason(end):
  return REASONS.get(end['done'], end['done'])


def listed(inputs: Any) -> list[Any]:
  """One input, or several."""
  return [inputs] if isinstance(inputs, str) else list(inputs)


def embeddings(form: schemas.Embeddings, ends: Sequence[Event]) -> dict[str, Any]:
  """The answer of `/v1/embeddings`."""
  def encoded(vector):
    if form.encoding_format == 'float':
      return vector
    return base64.b64encode(struct.pack(f'<{len(vector)}f', *vector)).decode()
  size = sum(end['prompt_tokens'] for end in ends)
  return {'object': 'list', 'model': form.model,
          'data': [{'object': 'embedding', 'index': i, 'embedding': encoded(end['vector'])}
                   for i, end in enumerate(ends)],
          'usage': {'prompt_tokens': size, 'total_tokens': size}}


def results(model: str, ends: Sequence[Event], names: Sequence[str]) -> dict[str, Any]:
  """The answer of `/v1/classify`, `/v1/tag` and `/v1/fill`."""
  size = sum(end['prompt_tokens'] for end in ends)
  return {'object': 'list', 'model': model,
          'data': [{'index': i, **{name: end[name] for name in names}}
                   for i, end in enumerate(ends)],
          'usage': {'prompt_tokens': size, 'total_tokens': size}}
