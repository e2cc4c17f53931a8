"""A backend that writes texts: an engine's batches of requests that come and go, token by token."""
from collections import deque
from collections.abc import Iterator
import importlib.util
import sys
import time
import traceback
from typing import Any, Protocol

from lm.data.token_bytes import token_bytes
from lm.errors import UserError
from lm.inference import infill, SamplingConfig
from lm.inference.constrain import Rule
from lm.inference.requests import Request, Ticket
from lm.inference.scores import of_text, Scorer
from lm.inference.stops import Detokenizer
from lm.inference.texts import Texts
from lm.serving.protocol import Job, Tell

NUM_TOP = 5  # tokens that may be asked for beside each of a text, at most


class Engine(Protocol):
  """What decodes: `lm.inference.engine.Engine`, or a `RowEngine`."""
  num_rows: int
  vocab_size: int
  max_length: int

  def warm_up(self, constrained: bool) -> None: ...
  def submit(self, request: Request) -> Ticket: ...
  def step(self) -> bool: ...


class Writer:
  """Completes prompts and conversations of any number of clients together.

  What is no work of the engine, scores of texts, is done in pieces, one between two of its steps.

  Attributes:
    abilities, facts: see `protocol.Backend`.
  """

  def __init__(self, engine: Engine, vocabulary: Any, chat: Any = None, sentinels: Any = None,
               scorer: Scorer | None = None):
    """Takes a model and all that belongs to it.

    Args:
      chat: template of conversations, if it knows any.
      sentinels: `infill.FIM` or `Spans`, if the model was trained with them.
      scorer: with NUM_TOP others at each place; None for an engine that keeps them itself.
    """
    self._engine, self._scorer = engine, scorer
    self._texts = {False: Texts(vocabulary, engine.vocab_size)}
    if chat is not None:
      self._texts[True] = Texts(vocabulary, engine.vocab_size, chat)
    self._vocabulary, self._sentinels = vocabulary, sentinels
    self._bytes = token_bytes(vocabulary).within
    self._tickets: dict[int, Ticket] = {}
    self._side: deque[tuple[int, Tell, Iterator[dict[str, Any] | None]]] = deque()
    self.abilities = ('complete', *(['score'] if scorer else []), *(['chat'] if chat else []),
                      *(['infill'] if sentinels else []))
    self.facts = {'max_length': engine.max_length, 'num_rows': engine.num_rows}

  def warm_up(self):
    """See `Backend`."""
    has_rules = importlib.util.find_spec('llguidance') is not None
    self._engine.warm_up(constrained=has_rules)
    if self._scorer is not None:
      self._scorer.warm_up()

  def submit(self, job: Job, tell: Tell):
    """See `Backend`."""
    if job['op'] == 'infill' and self._sentinels is None:
      raise UserError('this model was not trained to fill spans in; leave out suffix')
    if job['op'] not in self.abilities:
      raise UserError(f'this model can {", ".join(self.abilities)}, and not {job["op"]}')
    if job['op'] == 'score':
      self._side.append((job['id'], tell, self._scores(job['prompt'], job['top'])))
    elif job['op'] == 'infill':
      self._infill(job, tell)
    else:
      self._complete(job, tell)

  def cancel(self, number: int):
    """See `Backend`."""
    if number in self._tickets:
      self._tickets[number].cancel()
    for one in [one for one in self._side if one[0] == number]:
      self._side.remove(one)
      one[1]({'done': 'cancelled'})

  def step(self) -> float | None:
    """See `Backend`."""
    is_busy = self._engine.step()
    if self._side:
      number, tell, pieces = self._side.popleft()
      try:
        found = next(pieces)
        if found is None:
          self._side.append((number, tell, pieces))
        else:
          tell(found)
      except Exception as error:  # The others go on.
        traceback.print_exc(file=sys.stderr)
        tell({'error': f'{type(error).__name__} in the worker; its log says where',
              'kind': 'internal'})
    return 0 if is_busy or self._side else None

  def _complete(self, job, tell):
    number, sent, written = job['id'], 0, 0
    in_chat = isinstance(job['prompt'], list) and isinstance([*job['prompt'], 0][0], dict)
    if in_chat not in self._texts:
      raise UserError('this model has no chat template; send a prompt to /v1/completions')
    texts, wants_tokens = self._texts[in_chat], job.get('top') is not None
    pieces = Detokenizer(self._vocabulary.decode)

    def on_tokens(tokens, log_probs):
      nonlocal sent, written
      text = stream.text[sent:]
      written += len(tokens)
      if text or wants_tokens:
        sent += len(text)
        parts = {'tokens': [*map(pieces.feed, tokens)], 'log_probs': log_probs}
        tell({'text': text, 'new_tokens': written, 'prompt_tokens': len(request.prompt),
              **(parts if wants_tokens else {})})

    def on_end(ticket):
      del self._tickets[number]
      stream.finish()
      if ticket.error is not None:
        tell({'error': f'a rule or stop of the request failed: {ticket.error}', 'kind': 'user'})
        return
      end = {'text': stream.text[sent:], 'done': ticket.stopped, 'new_tokens': len(ticket.tokens),
             'prompt_tokens': len(request.prompt)}
      if not job.get('top') or not ticket.tokens or ticket.stopped == 'cancelled':
        tell(end)
      elif self._scorer is None:
        tell(end | {'top': self._top(*zip(*ticket.top), job['top'])})
      else:
        self._side.append((number, tell, self._with_top(end, request, ticket.tokens, job['top'])))

    options = {'num_top': job.get('top') or 0} if self._scorer is None else {}
    deadline = time.monotonic() + job['seconds']
    request, stream = texts.request(
        job['prompt'], _sampling(job['sampling']), job['seed'], streamed=True, deadline=deadline,
        on_tokens=on_tokens, on_end=on_end, **options)
    self._tickets[number] = self._engine.submit(request)

  def _with_top(self, end, request, tokens, num_top):
    """Yields None until the most probable tokens in the place of each of a completion are found,
    and then its last event with them."""
    whole = [*([] if request.bos_id is None else [request.bos_id]), *request.prompt.tolist(),
             *tokens]
    for found in self._scorer.pieces(whole[:1], whole[1:]):
      yield None if found is None else end | {'top': self._top(
          found.top_tokens[-len(tokens):], found.top_log_probs[-len(tokens):], num_top)}

  def _scores(self, text, num_top):
    """Yields None until the log-probabilities of a text's tokens, and of others in their place, are
    found, and then the event that tells them.

    Raises:
      UserError: the text is too short.
    """
    def event(found):
      pieces = Detokenizer(self._vocabulary.decode)
      return {'done': 'score', 'text': '', 'tokens': [*map(pieces.feed, found.tokens.tolist())],
              'log_probs': found.log_probs.tolist(),
              'top': self._top(found.top_tokens, found.top_log_probs, num_top),
              'prompt_tokens': len(found.tokens), 'new_tokens': 0}

    return (None if found is None else event(found)
            for found in self._scorer.pieces(*of_text(self._vocabulary, text)))

  def _top(self, tokens, log_probs, count):
    """{text: log-probability} at each place; of tokens of one text the more probable counts."""
    return [{self._piece(token): float(value) for token, value in zip(
        [*of_place[:count]][::-1], [*values[:count]][::-1])}
            for of_place, values in zip(tokens, log_probs)]

  def _piece(self, token):
    """The text of a token by itself."""
    data = self._bytes[token] if token < len(self._bytes) else b''
    return data.decode('utf-8', 'replace')

  def _infill(self, job, tell):
    number, sampling = job['id'], _sampling(job['sampling'])
    left, prompt = infill.asked(self._vocabulary, self._sentinels, job['before'], job['after'],
                                sampling.max_new_tokens, self._engine.max_length)
    size = sum(len(self._vocabulary.encode(job[side])) for side in ('before', 'after'))

    def on_end(ticket):
      del self._tickets[number]
      found = infill.middle_of(self._vocabulary, self._sentinels, left, ticket.tokens,
                               ticket.log_probs)
      why = 'eos' if found.is_whole else ticket.stopped
      tell({'text': found.text, 'done': why, 'new_tokens': len(found.tokens),
            'prompt_tokens': size})

    self._tickets[number] = self._engine.submit(Request(
        prompt, sampling, job['seed'], self._vocabulary.eos_id, self._sentinels.bos_id,
        time.monotonic() + job['seconds'], infill.End(self._sentinels), on_end=on_end))


def _sampling(fields: dict[str, Any]) -> SamplingConfig:
  """A config of what JSON holds.

  Raises:
    ValueError: a field is out of range.
  """
  tuples = lambda x: tuple(map(tuples, x)) if isinstance(x, list) else x
  values = {name: tuples(value) for name, value in fields.items()}
  if values.get('rule') is not None:
    values['rule'] = Rule(**{name: tuples(value) for name, value in values['rule'].items()})
  return SamplingConfig(**values)
