"""The process that speaks HTTP: workers up, a socket, signals, and all down again."""
import asyncio
import logging
import math
import signal
import socket

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lm.errors import UserError
from lm.serving import app
from lm.serving.app import Service
from lm.serving.pool import WorkerLost

log = logging.getLogger('lm.serving')
HEADER_SECONDS = 10  # for the header and body of a request to arrive


class Protocol(HttpToolsProtocol):
  """Closes connections on which a request arrives too slowly."""

  def connection_made(self, transport):
    super().connection_made(transport)
    self._slow = None
    self._watch()

  def data_received(self, data):
    self._watch()
    super().data_received(data)

  def on_message_complete(self):
    super().on_message_complete()
    self._slow.cancel()
    self._slow = None

  def connection_lost(self, exc):
    if self._slow is not None:
      self._slow.cancel()
    super().connection_lost(exc)

  def _watch(self):
    if self._slow is None:
      self._slow = self.loop.call_later(HEADER_SECONDS, self.transport.close)


class Server(uvicorn.Server):
  """Tells when it can be reached."""

  def __init__(self, config: uvicorn.Config, service: Service):
    super().__init__(config)
    self._service = service

  async def startup(self, sockets=None):
    await super().startup(sockets)
    if self.started:
      host, port = sockets[0].getsockname()[:2]
      print(f'serves {", ".join(self._service.models)} at http://{host}:{port}', flush=True)
      if self._service.guard is not None:
        print(f'filters by {self._service.guard.described()}', flush=True)


def serve(service: Service, host: str, port: int, drain_seconds: float):
  """Serves until SIGTERM or SIGINT: then no request is taken any more, and those that are there are
  answered, for so many seconds. SIGHUP changes every worker for one of its run's newest checkpoint.

  Raises:
    UserError: a model cannot be loaded, or the port is taken.
  """
  asyncio.run(_serve(service, host, port, drain_seconds))


async def _serve(service, host, port, drain_seconds):
  config = uvicorn.Config(
      app.create(service), host=host, port=port, http=Protocol, lifespan='off', ws='none',
      timeout_graceful_shutdown=math.ceil(drain_seconds), timeout_keep_alive=20, backlog=1024,
      log_level='warning', access_log=False, server_header=False)
  loop, changing = asyncio.get_running_loop(), set()

  def change():
    task = loop.create_task(_change(service))
    changing.add(task)
    task.add_done_callback(changing.discard)

  try:
    with _bound(host, port) as bound:  # before models are loaded, which takes long
      await asyncio.gather(*(served.start() for served in service.workers))
      loop.add_signal_handler(signal.SIGHUP, change)
      await Server(config, service).serve([bound])
  except WorkerLost as error:
    raise UserError(f'a worker does not come up: {error}; what it said stands above') from error
  finally:
    await asyncio.gather(*(served.close(drain_seconds) for served in service.workers))


def _bound(host, port):
  try:
    listener = socket.create_server((host, port), family=(
        socket.AF_INET6 if ':' in host else socket.AF_INET), backlog=1024)
    # Connections inherit it. asyncio sets it for sockets of a named protocol alone, and without it
    # the body of an answer waits up to 40 ms until the client has acknowledged its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
  except OSError as error:
    raise UserError(f'--port={port} of {host} cannot be opened ({error.strerror}); choose another'
                    ) from error


async def _change(service):
  for served in service.workers:
    try:
      await served.swap()
      log.warning('%s is of a newer worker now', served.name)
    except WorkerLost as error:
      log.error('%s keeps its worker: %s', served.name, error)
