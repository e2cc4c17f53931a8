"""What a server does with the verdicts of `filters.py`: on what comes in, and on what goes out.

A text goes out by sentences, of at most 280 characters (about 70 tokens), each only when all that
was written so far was judged; where a blocked phrase or personal information may have begun, it
waits for what follows, for 272 characters at most behind a figure. What goes out is the same
whether it is streamed or not, and however the model cut it into pieces. The usage of a text that is
cut counts the tokens up to the one with which it was refused. Log-probabilities of an answer's
tokens, and other tokens beside those of a prompt, would tell words that were not judged: who asks
for them is refused.

Every decision is logged and counted, by whose key, route, side, verdict, rule and score: never the
text, nor what of it was found.
"""
import asyncio
import collections
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
import contextlib
import logging
from typing import Any

from lm.errors import UserError
from lm.serving import sentences
from lm.serving.admission import Queue
from lm.serving.pool import Served, WorkerLost
from lm.serving.protocol import Event, Job

log = logging.getLogger('lm.serving.filter')
SECONDS = 10.0  # for a verdict
CUT = 'content_filter'  # what ended a text, in OpenAI's words
CONTEXT = 4096  # characters before what is judged, that go with it
FIELDS = {'complete': ('prompt',), 'score': ('prompt',), 'infill': ('before', 'after')}

Spans = Sequence[Sequence[Any]]
Count = Callable[[str, str, str], None]
Run = Callable[[Job], AsyncIterator[Event]]


class Blocked(Exception):
  """A request that is refused for what it says."""


class FilterLost(WorkerLost):
  """Nobody can judge now, so nothing goes through."""

  def __init__(self):
    super().__init__('the filter of this server cannot answer now, and nothing goes through '
                     'without it; send it again')


class Guard:
  """Judges requests and answers.

  Attributes:
    served: the worker of the filter.
  """

  def __init__(self, served: Served, queue: Queue, count: Count = lambda *_: None):
    """queue: of requests that wait for a verdict. count: called with the side, verdict and rule of
    each decision."""
    self.served, self._queue, self.count = served, queue, count

  def described(self) -> str:
    """What it judges by; of a classifier, how well."""
    facts, found = self.served.facts, []
    if 'blocklist' in facts:
      found.append(f'a list of {facts["blocklist"]:,} words and phrases')
    if 'threshold' in facts:
      measured = '; '.join(
          f'on {one["task"]}, {one["split"]}, {one["examples"]:,} texts: precision '
          f'{one["precision"]:.3f}, recall {one["recall"]:.3f}' for one in facts['measured'])
      found.append(f'harm of probability {facts["threshold"]:g} or more (' + (
          measured or 'its precision and recall are not recorded; of a run, `lm evaluate` records '
          'them') + ')')
    if facts.get('redacts'):
      found.append('personal information, which is replaced')
    return ', '.join(found)

  async def admit(self, caller: str, route: str, jobs: Sequence[Job]) -> list[Job]:
    """The jobs of a request, without personal information where that is redacted.

    Raises:
      Blocked: one holds what is refused. UserError: one cannot be judged, or asks for what cannot.
      FilterLost: none can. Refused: too many wait.
    """
    for job in jobs:
      _check_top(job)
    texts = list(dict.fromkeys(text for job in jobs for text in _texts(job)))
    async with self._queue.place(caller):
      verdicts = [await self._judge(text, list(sentences.windows(text))) for text in texts]
    kinds = [span[2] for verdict in verdicts for span in verdict['spans']]
    worst = next((verdict for verdict in verdicts if verdict['rule']),
                 max(verdicts, key=lambda verdict: verdict['score'] or 0.0, default={}))
    self._decide(caller, route, 'input', worst, kinds)
    if worst.get('rule'):
      raise Blocked(f'the request holds what this server refuses (rule: {worst["rule"]}); send '
                    'another')
    spans = {text: verdict['spans'] for text, verdict in zip(texts, verdicts)}
    return [_changed(job, spans) for job in jobs]

  async def checked(self, run: Run, caller: str, route: str, job: Job) -> AsyncIterator[Event]:
    """The events of an admitted job, as far as they may go out.

    Raises:
      FilterLost: it cannot be judged. WorkerLost: as `run`.
    """
    async with contextlib.aclosing(run(job)) as events:
      if job['op'] in ('complete', 'infill'):
        async for event in self._written(events, caller, route, job):
          yield event
      else:
        async for event in events:
          yield await self._filled(caller, route, job, event) if 'blanks' in event else event

  async def _written(self, events, caller, route, job):
    prompt = job.get('prompt')
    outlet = _Outlet(self._judge, _end_of(prompt) if isinstance(prompt, str) else '')
    async for event in events:
      if 'error' in event:
        yield event
        return
      text = await outlet.feed(event.get('text', ''), 'done' in event)
      if outlet.refused:
        self._decide(caller, route, 'output', outlet.worst, outlet.kinds)
        yield {**event, 'text': text, 'done': CUT}
        return
      if text or 'done' in event:
        yield {**event, 'text': text}
    self._decide(caller, route, 'output', outlet.worst, outlet.kinds)

  async def _filled(self, caller, route, job, event):
    """The candidates of blanks without those with which the text would be refused, or of which
    personal information would be made."""
    parts, blanks, worst, kinds = job['input'].split('[MASK]'), [], {}, []
    for number, blank in enumerate(event['blanks'], 1):
      before, after = ('[MASK]'.join(part) for part in (parts[:number], parts[number:]))
      kept = []
      for candidate in blank:
        begin, end = len(before), len(before + candidate['text'])
        text = before + candidate['text'] + after
        verdict = await self._judge(text, list(sentences.windows(text)))
        worst = verdict if verdict['rule'] or not worst else worst
        private = [kind for first, last, kind in verdict['spans'] if first < end and begin < last]
        kinds += private
        kept += [] if verdict['rule'] or private else [candidate]
      blanks.append(kept)
    self._decide(caller, route, 'output', worst, kinds)
    return {**event, 'blanks': blanks}

  async def _judge(self, text: str, windows: Sequence[tuple[int, int]], start: int = 0,
                   final: bool = True) -> Event:
    """The answer of the filter's worker: see `filters.py`."""
    job = {'op': 'judge', 'text': text, 'start': start, 'windows': windows, 'final': final}

    async def last():
      event = {}
      async with contextlib.aclosing(self.served.run(job)) as events:
        async for event in events:
          pass
      return event
    if not self.served.is_ready:
      raise FilterLost
    try:
      event = await asyncio.wait_for(last(), SECONDS)
    except (WorkerLost, TimeoutError) as error:
      raise FilterLost from error
    if event.get('kind') == 'user':
      raise UserError(event['error'])
    if 'rule' not in event:
      raise FilterLost
    return event

  def _decide(self, caller, route, side, verdict, kinds):
    rule, score = verdict.get('rule'), verdict.get('score')
    name = 'block' if rule else 'redact' if kinds else 'pass'
    counts = ','.join(f'{kind}:{n}' for kind, n in sorted(collections.Counter(kinds).items()))
    log.info('caller=%s route=%s side=%s verdict=%s rule=%s score=%s redacted=%s', caller, route,
             side, name, rule or '-', '-' if score is None else f'{score:.4f}', counts or '-')
    self.count(side, name, rule or ('privacy' if kinds else ''))


class _Outlet:
  """A text that goes out as far as it was judged.

  Attributes:
    refused: whether it ends here.
    worst: verdict so far.
    kinds: of personal information that was replaced.
  """

  def __init__(self, judge: Callable[..., Any], context: str):
    """context: of the prompt; judged with the text, and not given out."""
    self._judge, self._text = judge, context
    self._sentence = self._out = len(context)  # where the next begins, and what has gone out
    self._windows = sentences.Windows(len(context))
    self.refused, self.worst, self.kinds = False, {}, []

  async def feed(self, piece: str, final: bool) -> str:
    """What may go out now that `piece` has come."""
    self._text += piece
    found = ''
    while not self.refused and (end := sentences.end(self._text, self._sentence)) is not None:
      found += await self._next(end, False)
    if final and not self.refused:
      found += await self._next(len(self._text), True)
    return found

  async def _next(self, end, final):
    window = self._windows.add(end)
    verdict = await self._judge(self._text[:end], [window], self._out, final)
    if verdict['rule'] or (verdict['score'] or 0.0) >= (self.worst.get('score') or 0.0):
      self.worst = verdict
    self._sentence = end
    if verdict['rule']:
      self.refused = True
      return ''
    found = redacted(self._text, verdict['spans'], self._out, verdict['upto'])
    self.kinds += [span[2] for span in verdict['spans']]
    self._out = verdict['upto']
    self._forget()
    return found

  def _forget(self):
    """Keeps between CONTEXT and twice as many characters of what has gone out."""
    if self._out < 2 * CONTEXT:
      return
    gone = len(self._text) - len(_end_of(self._text, self._out - CONTEXT))
    self._text = self._text[gone:]
    self._sentence, self._out = self._sentence - gone, self._out - gone
    self._windows.shift(gone)


def _end_of(text, begin=None):
  """The text from the word on that stands there: CONTEXT characters before its end."""
  return text[text.rfind(' ', 0, max(0, len(text) - CONTEXT if begin is None else begin)) + 1:]


def redacted(text: str, spans: Spans, begin: int, end: int) -> str:
  """`text[begin:end]` with `<KIND>` for each (begin, end, kind) of `spans`."""
  pieces = []
  for first, last, kind in spans:
    pieces += text[begin:max(first, begin)], f'<{kind.upper()}>'
    begin = last
  return ''.join(pieces) + text[begin:end]


def _texts(job: Job) -> Iterable[str]:
  """What of a job a client wrote."""
  for name in FIELDS.get(job['op'], ('input',)):
    value = job[name]
    if isinstance(value, str):
      yield value
    elif value and isinstance(value[0], dict):
      yield from (message['content'] for message in value)
    elif value and isinstance(value[0], str):
      yield ' '.join(value)
    elif value:
      raise UserError('this server filters texts, and cannot judge the ids of tokens; send a text')


def _check_top(job: Job):
  """Raises UserError where a job asks for tokens that nobody judges."""
  if job['op'] == 'complete' and job['top'] is not None:
    raise UserError('this server filters texts, and logprobs would tell tokens that were not '
                    'judged; leave logprobs out')
  if job['op'] == 'score' and job['top']:
    raise UserError(f'this server filters texts, and logprobs={job["top"]} would tell tokens that '
                    'were not judged beside those of the prompt; set logprobs=0')


def _changed(job: Job, spans: dict[str, Spans]) -> Job:
  """A job without the personal information in it."""
  clean = lambda text: redacted(text, spans[text], 0, len(text))
  changed = dict(job)
  for name in FIELDS.get(job['op'], ('input',)):
    value = job[name]
    if isinstance(value, str):
      changed[name] = clean(value)
    elif value and isinstance(value[0], dict):
      changed[name] = [{**message, 'content': clean(message['content'])} for message in value]
    elif value:
      changed[name] = _words(value, spans[' '.join(value)])
  return changed


def _words(words: Sequence[str], spans: Spans) -> list[str]:
  """Words, of which there stay as many, each that a span touches replaced."""
  found, begin = [], 0
  for word in words:
    end = begin + len(word)
    kind = next((kind for first, last, kind in spans if first < end and begin < last), None)
    found.append(f'<{kind.upper()}>' if kind else word)
    begin = end + 1
  return found
