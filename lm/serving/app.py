"""The routes of the server: OpenAI's API and our own in its manner, health, metrics, a web page."""
import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
import contextlib
import functools
import json
import pathlib
import time
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

import lm
from lm.errors import UserError
from lm.serving import answers, clouds, schemas
from lm.serving.admission import Keys, Queue, Rates, Refused
from lm.serving.answers import InternalError, Limits
from lm.serving.guard import Blocked, FilterLost, Guard
from lm.serving.metrics import Metrics
from lm.serving.pool import Served, WorkerLost
from lm.serving.protocol import Event, Job

PAGE = pathlib.Path(__file__).with_name('page.html')
_ERROR = {'type': 'object', 'required': ['error'], 'properties': {'error': {
    'type': 'object', 'required': ['message', 'type', 'param', 'code'], 'properties': {
        'message': {'type': 'string'}, 'type': {'type': 'string'}, 'param': {},
        'code': {}}}}}
_TOLD = {400: 'a mistake of the request', 401: 'no such key', 404: 'no such model',
         413: 'a body that is too long', 422: 'a mistake of the request',
         429: 'too many requests; Retry-After says when', 503: 'the model is not there now'}
RESPONSES = {code: {'description': text, 'content': {'application/json': {'schema': _ERROR}}}
             for code, text in _TOLD.items()}

Answered = TypeVar('Answered')


class Service:
  """The models of a server and who may ask them.

  Attributes:
    models: by name; queues: of each. guard: of what they read and write, or None.
  """

  def __init__(self, models: Sequence[tuple[Served, Queue]], keys: Keys, rates: Rates,
               limits: Limits, guard: Guard | None = None):
    self.models = {served.name: served for served, _ in models}
    self.queues = {served.name: queue for served, queue in models}
    self.keys, self.rates, self.limits = keys, rates, limits
    self.metrics, self.guard = Metrics(self._state), guard
    if guard is not None:
      guard.count = lambda *labels: self.metrics.decisions.labels(*labels).inc()

  @property
  def workers(self) -> list[Served]:
    """Of the models, and of the guard."""
    return [*self.models.values(), *([self.guard.served] if self.guard else [])]

  def _state(self):
    for name, queue in self.queues.items():
      labels = {'model': name}
      yield 'lm_running', labels, queue.num_running
      yield 'lm_waiting', labels, queue.num_waiting
    for served in self.workers:
      yield 'lm_ready', {'model': served.name}, served.is_ready
      yield 'lm_worker_restarts', {'model': served.name}, served.restarts

  def caller(self, request: Request) -> str:
    """Who asks.

    Raises:
      HTTPException: nobody that is known. Refused: too often.
    """
    scheme, _, key = request.headers.get('authorization', '').partition(' ')
    name = self.keys.name(key.strip() if scheme.lower() == 'bearer' else '')
    if name is None:
      self.metrics.refused.labels('key').inc()
      raise HTTPException(401, 'the request has no key that this server knows; send '
                          'Authorization: Bearer KEY')
    self.rates.take(name)
    return name

  def model(self, name: str, op: str) -> Served:
    """The model of a request.

    Raises:
      HTTPException: there is none of this name. UserError: it does something else.
    """
    served = self.models.get(name)
    if served is None:
      raise HTTPException(404, f'there is no model {name[:200]!r}; there are '
                          f'{", ".join(self.models)}')
    able = served.facts.get('abilities', ())
    if able and op not in able:
      what = op if op != 'score' else (
          'score a prompt, as echo with max_tokens=0 asks; the run of a GPT can')
      raise UserError(f'the model {name!r} can {", ".join(able)}, and not {what}')
    return served

  async def _admitted(self, name, caller, route, jobs):
    """What runs jobs of a model, and the jobs; both as the guard allows."""
    run = self.models[name].run
    if self.guard is None:
      return run, jobs
    jobs = await self.guard.admit(caller, route, jobs)
    return functools.partial(self.guard.checked, run, caller, route), jobs

  async def all(self, name: str, caller: str, route: str, jobs: Sequence[Job]) -> list[Event]:
    """The last events of jobs that have one each."""
    ends: list[Event] = [{}] * len(jobs)
    run, jobs = await self._admitted(name, caller, route, jobs)
    async for number, event in answers.events(run, self.queues[name], caller, jobs):
      ends[number] = event
    self._count(name, sum(end['prompt_tokens'] for end in ends), 0)
    return ends

  async def texts(self, form: Any, caller: str, route: str, jobs: Sequence[Job]
                  ) -> AsyncIterator[list[dict[str, Any]]]:
    """Yields the pieces of a stream, or at the end the whole answer alone."""
    run, jobs = await self._admitted(form.model, caller, route, jobs)
    found, begun, first = answers.Texts(form, jobs), time.perf_counter(), None
    async for number, event in answers.events(run, self.queues[form.model], caller, jobs):
      if first is None:
        first = time.perf_counter()
        self.metrics.first_token.labels(form.model).observe(first - begun)
        if form.stream:
          yield found.begin()
      if form.stream:
        yield found.piece(number, event)
      else:
        found.add(number, event)
    answer = found.whole()
    usage = answer['usage']
    self._count(form.model, usage['prompt_tokens'], usage['completion_tokens'])
    if first is not None and usage['completion_tokens'] > len(jobs):
      self.metrics.per_token.labels(form.model).observe(
          (time.perf_counter() - first) / (usage['completion_tokens'] / len(jobs)))
    yield found.end() if form.stream else [answer]

  def _count(self, name, read, written):
    self.metrics.tokens.labels(name, 'prompt').inc(read)
    self.metrics.tokens.labels(name, 'completion').inc(written)


def create(service: Service) -> FastAPI:
  """The application."""
  app = FastAPI(title='lm', version=lm.__version__, docs_url=None, redoc_url=None,
                responses=RESPONSES, description='Language models, in the forms of the OpenAI API.')
  caller = Annotated[str, Depends(service.caller)]
  handlers = {**_add_texts(app, service, caller), **_add_readings(app, service, caller)}
  clouds.add(app, service, handlers, _add_state(app, service, caller))
  _add_errors(app, service)
  app.openapi = functools.partial(_described, app.openapi, list(service.models))
  app.add_middleware(_Counted, service=service)
  app.add_middleware(_Bounded, most=service.limits.body)
  return app


def _described(openapi, names):
  """The OpenAPI description, with the models of this server by name."""
  found = openapi()
  for schema in found['components']['schemas'].values():
    if 'model' in schema.get('properties', {}):
      schema['properties']['model'] = {'type': 'string', 'enum': names}
  return found


def _add_texts(app, service, caller):
  async def answer(request, form, name, jobs):
    pieces = service.texts(form, name, _route(request.scope), jobs)
    if not form.stream:
      async def whole():
        return [piece async for piece in pieces][-1][0]
      return JSONResponse(await while_connected(request, whole()))
    first = await while_connected(request, anext(pieces))
    return StreamingResponse(_lines(first, pieces), media_type='text/event-stream',
                             headers={'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'})

  @app.post('/v1/completions')
  async def completions(form: schemas.Completion, request: Request, name: caller) -> Response:
    """Goes on with prompts; with `suffix` fills the gap before it."""
    jobs = answers.completion_jobs(form, service.limits)
    service.model(form.model, jobs[0]['op'])
    return await answer(request, form, name, jobs)

  @app.post('/v1/chat/completions')
  async def chat(form: schemas.Chat, request: Request, name: caller) -> Response:
    """Answers a conversation."""
    facts = service.model(form.model, 'chat').facts
    jobs = answers.chat_jobs(form, service.limits, facts.get('max_length', 1 << 20))
    return await answer(request, form, name, jobs)

  return {'complete': (schemas.Completion, completions), 'chat': (schemas.Chat, chat)}


def _add_readings(app, service, caller):
  async def read(request, form, name, op):
    service.model(form.model, op)
    inputs = answers.listed(form.input)
    answers.check(len(inputs), service.limits)
    if not inputs:
      raise UserError('input has no text; send one at least')
    return await while_connected(request, service.all(
        form.model, name, _route(request.scope),
        [{'op': op, 'input': text} for text in inputs]))

  @app.post('/v1/embeddings')
  async def embeddings(form: schemas.Embeddings, request: Request, name: caller) -> Response:
    """A vector for each text."""
    ends = await read(request, form, name, 'embed')
    return JSONResponse(answers.embeddings(form, ends))

  @app.post('/v1/classify')
  async def classify(form: schemas.Texts, request: Request, name: caller) -> Response:
    """The class of each text, and how probable each is."""
    ends = await read(request, form, name, 'classify')
    return JSONResponse(answers.results(form.model, ends, ('label', 'scores')))

  @app.post('/v1/tag')
  async def tag(form: schemas.Words, request: Request, name: caller) -> Response:
    """A tag for each word of each text."""
    ends = await read(request, form, name, 'tag')
    return JSONResponse(answers.results(form.model, ends, ('words', 'tags')))

  @app.post('/v1/fill')
  async def fill(form: schemas.Texts, request: Request, name: caller) -> Response:
    """What may stand in each blank, [MASK], of each text."""
    ends = await read(request, form, name, 'fill')
    return JSONResponse(answers.results(form.model, ends, ('blanks',)))

  return {'embed': (schemas.Embeddings, embeddings), 'classify': (schemas.Texts, classify),
          'tag': (schemas.Words, tag), 'fill': (schemas.Texts, fill)}


def _add_state(app, service, caller):
  @app.get('/v1/models')
  async def models(name: caller) -> Response:
    """The models, what each can, and whether texts are `filtered`: then logprobs are refused."""
    del name
    return JSONResponse({'object': 'list', 'data': [
        {'id': served.name, 'object': 'model', 'created': 0, 'owned_by': 'lm',
         'filtered': service.guard is not None, **served.facts}
        for served in service.models.values()]})

  @app.get('/health')
  async def health() -> Response:
    """Whether the server lives."""
    return JSONResponse({'status': 'alive'})

  @app.get('/ready')
  async def ready() -> Response:
    """Whether every model can answer."""
    missing = [served.name for served in service.workers if not served.is_ready]
    if missing:
      return error(503, f'{", ".join(missing)} cannot answer now')
    return JSONResponse({'status': 'ready'})

  @app.get('/metrics', response_class=Response)
  async def metrics() -> Response:
    """Counters, for Prometheus."""
    return Response(service.metrics.text(), media_type='text/plain; version=0.0.4')

  @app.get('/', response_class=HTMLResponse)
  async def page() -> Response:
    """The web page."""
    return HTMLResponse(PAGE.read_text('utf-8'))

  return ready


def _add_errors(app, service):
  def handler(kind, code):
    async def handle(request: Request, raised: Exception) -> Response:
      del request
      return error(code, str(raised))
    app.add_exception_handler(kind, handle)

  handler(UserError, 400)
  handler(InternalError, 500)

  @app.exception_handler(WorkerLost)
  async def lost(request: Request, raised: WorkerLost) -> Response:
    del request, raised
    return error(503, 'the worker that held this request died, and it may have computed a part of '
                 'the answer; send it again', retry=1)

  @app.exception_handler(FilterLost)
  async def unjudged(request: Request, raised: FilterLost) -> Response:
    del request
    return error(503, str(raised), retry=1)

  @app.exception_handler(Blocked)
  async def blocked(request: Request, raised: Blocked) -> Response:
    del request
    return error(400, str(raised), name='content_filter')

  @app.exception_handler(Refused)
  async def refused(request: Request, raised: Refused) -> Response:
    del request
    service.metrics.refused.labels('busy').inc()
    return error(429, str(raised), retry=raised.seconds)

  @app.exception_handler(RequestValidationError)
  async def wrong(request: Request, raised: RequestValidationError) -> Response:
    del request
    first = raised.errors()[0]
    where = '.'.join(str(part) for part in first['loc'] if part != 'body') or 'the body'
    return error(400, f'{where}: {first["msg"]}', param=where)

  @app.exception_handler(HTTPException)
  async def other(request: Request, raised: HTTPException) -> Response:
    del request
    return error(raised.status_code, str(raised.detail), headers=raised.headers)


def error(code: int, message: str, param: str | None = None, retry: int | None = None,
          headers: Mapping[str, str] | None = None, name: str | None = None) -> JSONResponse:
  """An error as OpenAI's API tells it; its `code` is `name`, or that of HTTP."""
  kind = {401: 'authentication_error', 404: 'not_found_error', 429: 'rate_limit_error'}.get(
      code, 'invalid_request_error' if code < 500 else 'server_error')
  headers = {**(headers or {}), **({'Retry-After': str(retry)} if retry else {})}
  return JSONResponse({'error': {'message': message, 'type': kind, 'param': param,
                                 'code': name or code}}, code, headers)


async def _lines(first, pieces):
  """Server-sent events; an error in the middle is the last of them."""
  line = lambda piece: f'data: {json.dumps(piece, ensure_ascii=False)}\n\n'.encode(
      'utf-8', 'replace')
  async with contextlib.aclosing(pieces):
    for piece in first:
      yield line(piece)
    try:
      async for some in pieces:
        for piece in some:
          yield line(piece)
    except (UserError, InternalError, Refused, WorkerLost) as raised:
      message = str(raised) or 'the worker that held this request died; send it again'
      yield line({'error': {'message': message, 'type': 'server_error', 'param': None,
                            'code': 503 if isinstance(raised, WorkerLost) else 500}})
    yield b'data: [DONE]\n\n'


def _route(scope):
  return getattr(scope.get('route'), 'path', 'other')


async def while_connected(request: Request, work: Awaitable[Answered]) -> Answered:
  """Waits for work, and leaves it when the client has left."""
  async def left():
    while (await request.receive())['type'] != 'http.disconnect':
      pass
  tasks = asyncio.ensure_future(work), asyncio.ensure_future(left())
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if tasks[0].done():
      return tasks[0].result()
    raise HTTPException(499, 'the client left')
  finally:
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Bounded:
  """Refuses bodies of more than so many bytes, without reading them."""

  def __init__(self, app: Any, most: int):
    self._app, self._most = app, most

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    length = dict(scope['headers']).get(b'content-length', b'0')
    too_long = error(413, f'the body is longer than {self._most} bytes; send less')
    if not length.isdigit() or int(length) > self._most:
      await too_long(scope, receive, send)
      return
    read = 0

    async def counted():
      nonlocal read
      message = await receive()
      read += len(message.get('body', b''))
      if read > self._most:
        raise HTTPException(413, f'the body is longer than {self._most} bytes; send less')
      return message

    await self._app(scope, counted, send)


class _Counted:
  """Counts requests, by route and status, and their seconds."""

  def __init__(self, app: Any, service: Service):
    self._app, self._metrics = app, service.metrics

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    status, begun = 499, time.perf_counter()

    async def noted(message):
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
      await send(message)

    try:
      await self._app(scope, receive, noted)
    finally:
      route = _route(scope)
      self._metrics.requests.labels(route, str(status)).inc()
      self._metrics.seconds.labels(route).observe(time.perf_counter() - begun)
