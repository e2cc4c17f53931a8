"""A line between the hosts, beside JAX's own: who is there, what each has to say, who is gone.

Every host holds one TCP connection to host 0, on which lines of JSON go:

  to host 0    ["hello", index, count, name]   ["value", key, value]
  from host 0  ["welcome", names]              ["all", key, values]
  both ways    ["alive"], every two seconds    ["failed", status, text]    ["bye"]

A connection that closes without a bye, or is silent for `SILENCE` seconds, is a host that is gone:
all others say which, and end with status `GONE`, since the next collective would wait for ever.
"""
from collections.abc import Callable, Sequence
import json
import os
import selectors
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from lm.errors import HostError, UserError

BEAT, SILENCE, PATIENCE = 2.0, 30.0, 10.0  # seconds
LOOPBACK = ('localhost', '127.0.0.1')
GONE = 75  # EX_TEMPFAIL of sysexits.h: start again


class Peer:
  """One end of a connection; sends and receives whole messages."""

  def __init__(self, connection: socket.socket, index: int = -1, name: str = ''):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(SILENCE)
    self.connection, self.index, self.name = connection, index, name
    self.heard, self._rest, self._lock = time.monotonic(), b'', threading.Lock()

  def __str__(self) -> str:
    return f'host {self.index} ({self.name})'

  def send(self, *message: Any):
    """Sends a message; a connection that is closed is `receive`'s to find."""
    try:
      with self._lock:
        self.connection.sendall(json.dumps(message).encode() + b'\n')
    except OSError:
      pass

  def receive(self) -> list[list] | None:
    """The messages that came, after waiting for some bytes; None when the connection closed."""
    try:
      data = self.connection.recv(1 << 16)
    except OSError:
      data = b''
    self.heard = time.monotonic()
    *lines, self._rest = (self._rest + data).split(b'\n')
    return [json.loads(line) for line in lines] if data else None


class Line:
  """The connections of one host, and a thread that listens to them.

  Args:
    peers: of host 0, all others in order; of the others, host 0.
    index, names: this host, and what all are called.
    end: called with (status, sentence) when another host failed or is gone; must not return.

  Attributes:
    before_end: called with the sentence before that.
  """

  def __init__(self, peers: Sequence[Peer], index: int, names: Sequence[str],
               end: Callable[[int, str], None]):
    self.index, self.names = index, list(names)
    self._peers, self._end = list(peers), end
    self._changed, self._closing = threading.Condition(), threading.Event()
    self._values: dict[str, dict[int, Any]] = {}
    self._all: dict[str, list] = {}
    self._ending = threading.Lock()
    self.before_end: Callable[[str], None] = lambda text: None
    threading.Thread(target=self._listen, name='line', daemon=True).start()

  def gather(self, key: str, value: Any, seconds: float | None = None) -> list[Any]:
    """What every host says under `key`, in order; all must call it.

    Args:
      key: each name may be used again, one after another.
      value: of JSON.
      seconds: to wait; None for as long as all hosts live. The others wait a little longer than
        host 0, which knows who has said nothing.

    Raises:
      HostError: some did not say anything in that time.
    """
    seconds = seconds and seconds + (PATIENCE if self.index else 0)
    if self.index:
      self._peers[0].send('value', key, value)
    else:
      self._add(0, key, value)
    with self._changed:
      if self._changed.wait_for(lambda: key in self._all, seconds):
        return self._all.pop(key)
    absent = ', '.join(self.missing(key)) or f'host 0 ({self.names[0]}) or another'
    raise HostError(f'{absent} did not reach {key!r} within {seconds:.0f} s of the first; look at '
                    'what they print, then start the same command on all hosts again')

  def missing(self, key: str) -> list[str]:
    """On host 0: those who have not said anything under `key` where others have."""
    with self._changed:
      said = self._values.get(key, ())
      return [f'host {i} ({name})' for i, name in enumerate(self.names) if said and i not in said]

  def fail(self, status: int, text: str):
    """Tells all others that this host stops, and why; they end with the same status."""
    self._ending.acquire(blocking=False)
    self._closing.set()
    for peer in self._peers:
      peer.send('failed', status, f'{self} stopped: {text}')
      peer.send('bye')

  def wait_for_end(self):
    """Gives the listener time to find who is gone; returns when all seem to live."""
    time.sleep(SILENCE + 2 * BEAT)

  def close(self):
    """Says good-bye; a connection that closes from here on is no failure."""
    self._closing.set()
    for peer in self._peers:
      peer.send('bye')

  def __str__(self) -> str:
    return f'host {self.index} ({self.names[self.index]})'

  def _add(self, index: int, key: str, value: Any):
    """On host 0: the last one to say something sends what all have said."""
    with self._changed:
      said = self._values.setdefault(key, {})
      said[index] = value
      if len(said) < len(self.names):
        return
      values = [self._values[key][i] for i in range(len(self.names))]
      del self._values[key]
      for peer in self._peers:
        peer.send('all', key, values)
      self._all[key] = values
      self._changed.notify_all()

  def _listen(self):
    """Hears all peers and shows them that this host lives, until one of them ends that."""
    selector, beat = selectors.DefaultSelector(), 0.0
    for peer in self._peers:
      selector.register(peer.connection, selectors.EVENT_READ, peer)
    while selector.get_map():
      for key, _ in selector.select(BEAT / 2):
        if not self._hear(key.data):
          selector.unregister(key.data.connection)
      now = time.monotonic()
      if now - beat > BEAT:
        beat = now
        for peer in self._peers:
          peer.send('alive')
      for key in list(selector.get_map().values()):
        if now - key.data.heard > SILENCE and not self._closing.is_set():
          self._stop(GONE, self._gone(key.data, f'has not answered for {SILENCE:.0f} s'))

  def _hear(self, peer: Peer) -> bool:
    """Takes what a peer says; False when it has nothing more to say."""
    messages = peer.receive()
    if messages is None:
      if not self._closing.is_set():
        self._stop(GONE, self._gone(peer, 'is gone'))
      return False
    for kind, *content in messages:
      if kind == 'value':
        self._add(peer.index, *content)
      elif kind == 'all':
        with self._changed:
          self._all[content[0]] = content[1]
          self._changed.notify_all()
      elif kind == 'failed':
        self._stop(*content)
      elif kind == 'bye':
        return False
    return True

  def _gone(self, peer: Peer, what: str) -> str:
    return (f'{peer} {what}; all hosts stop, and the same command on every host continues from the '
            'last checkpoint')

  def _stop(self, status: int, text: str):
    if not self._ending.acquire(blocking=False):
      return  # this host ends already, for a reason of its own
    for peer in self._peers:
      peer.send('failed', status, text)
    self.before_end(text)
    self._end(status, text)


def end_process(status: int, text: str) -> NoReturn:
  """Prints a sentence and ends the process, whatever its other threads wait for."""
  print(f'error: {text}', file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(status)


def connect(address: tuple[str, int], index: int, count: int, seconds: float,
            end: Callable[[int, str], None] = end_process) -> Line:
  """Meets the other hosts; returns when all are there.

  Args:
    address: host 0's name, and the port at which it listens.
    index, count: of this host and of hosts.
    seconds: that host 0 waits for the others, and they for host 0.

  Raises:
    HostError: some are not there in time; it names them.
    UserError: two say the same index, or another count.
  """
  name = f'{socket.gethostname()}, process {os.getpid()}'
  if index == 0:
    peers = _meet_all(address, count, seconds, name)
    names = [name, *(peer.name for peer in peers)]
    for peer in peers:
      peer.send('welcome', names)
    return Line(peers, 0, names, end)
  peer = Peer(_reach(address, index, seconds), 0, address[0])
  peer.send('hello', index, count, name)
  peer.connection.settimeout(2 * seconds)
  messages: list[list] | None = []
  while not messages:
    messages = peer.receive()
    if messages is None:
      raise HostError(f'host 0 at {address[0]}:{address[1]} closed the connection; look at what it '
                      'prints, then start the same command on all hosts again')
  kind, *content = messages[0]
  if kind == 'failed':
    raise HostError(content[1])
  [names] = content
  peer.name = names[0]
  peer.connection.settimeout(SILENCE)
  return Line([peer], index, names, end)


def _reach(address: tuple[str, int], index: int, seconds: float) -> socket.socket:
  deadline = time.monotonic() + seconds
  while True:
    try:
      return socket.create_connection(address, timeout=max(1.0, deadline - time.monotonic()))
    except OSError as error:
      if time.monotonic() > deadline:
        raise HostError(f'host {index} finds no host 0 at {address[0]}:{address[1]} within '
                        f'{seconds:.0f} s ({error}); start the same command on all hosts, and let '
                        'their firewalls pass the coordinator\'s port and the one below it'
                        ) from error
      time.sleep(0.2)


def _meet_all(address: tuple[str, int], count: int, seconds: float, name: str) -> list[Peer]:
  """The other hosts, in order; any problem is told to all that are there."""
  interface = address[0] if address[0] in LOOPBACK else ''
  try:
    server = socket.create_server((interface, address[1]), backlog=count)
  except OSError as error:
    raise UserError(f'port {address[1]} cannot be opened ({error.strerror}); choose another '
                    'coordinator, whose port and the one below it are free') from error
  deadline, peers = time.monotonic() + seconds, {}
  with server:
    try:
      while len(peers) < count - 1:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
          peer = Peer(server.accept()[0])
        except TimeoutError:
          absent = [f'host {i}' for i in range(1, count) if i not in peers]
          raise HostError(
              f'{", ".join(absent)} of {count} did not come within {seconds:.0f} s to host 0 '
              f'({name}); see whether the same command runs there, then start all hosts again'
          ) from None
        _introduce(peer, peers, count)
    except Exception as error:
      for peer in peers.values():
        peer.send('failed', GONE, str(error))
      raise
  return [peers[i] for i in range(1, count)]


def _introduce(peer: Peer, peers: dict[int, Peer], count: int):
  """Takes a peer's hello."""
  peer.connection.settimeout(5)
  try:
    [(kind, index, their_count, name)] = peer.receive()
  except (TypeError, ValueError):
    return  # something else that looks at ports
  if kind != 'hello':
    return
  peer.index, peer.name = index, name
  peer.connection.settimeout(SILENCE)
  clash = peers.get(index)
  peers[index if clash is None and 0 < index < count else -1 - len(peers)] = peer
  if their_count != count:
    raise UserError(f'{peer} was started with num_processes={their_count} and host 0 with '
                    f'{count}; start all with the same')
  if clash is not None or not 0 < index < count:
    raise UserError(f'{peer} was started with process_id={index}, as was '
                    f'{clash or "host 0"}; give every process one of its own below {count}')
