"""Servers of tiny models in processes of their own, on loopback."""
import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import httpx2 as httpx
import pytest

HERE = pathlib.Path(__file__).resolve().parent


class Server:
  """A running server.

  Attributes:
    url: where it is. process: itself.
  """

  def __init__(self, *kinds, keys='', places=8, waiting=8, blocklist='', log=None):
    self.process = subprocess.Popen(
        [sys.executable, str(HERE / 'tiny_server.py'), keys, str(places), str(waiting), blocklist,
         *kinds], env=os.environ | {'PYTHONPATH': str(HERE.parents[1]), 'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.PIPE, stderr=log, text=True)
    told = self.process.stdout.readline().split()
    assert told[:1] == ['serves']
    self.url = told[-1]

  def post(self, path, **options):
    return httpx.post(self.url + path, timeout=60, **options)

  def metric(self, name, **labels):
    """The value of a gauge or counter, the sum of those with these labels."""
    text = httpx.get(self.url + '/metrics').text
    lines = [line for line in text.splitlines() if re.match(rf'{name}[{{ ]', line)]
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(float(line.rsplit(' ', 1)[1]) for line in lines if all(x in line for x in wanted))

  def workers(self):
    """Process ids of its workers."""
    path = pathlib.Path(f'/proc/{self.process.pid}/task/{self.process.pid}/children')
    return [int(pid) for pid in path.read_text().split()]

  def close(self):
    """Ends it as an operator does; returns its status."""
    self.process.send_signal(signal.SIGTERM)
    try:
      return self.process.wait(30)
    finally:
      self.process.kill()


def until(condition, seconds=20.0):
  """Waits until something holds; returns whether it came to that."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    with contextlib.suppress(httpx.HTTPError):
      if condition():
        return True
    time.sleep(0.05)
  return False


@pytest.fixture(scope='session')
def writer():
  """A server of a tiny GPT, a tiny classifier, and a GPT of a chat template that fills gaps."""
  server = Server('gpt', 'classify', 'talk')
  yield server
  server.close()


@pytest.fixture
def slow():
  """A server whose model counts slowly, of two places and a queue of two."""
  server = Server('slow', places=2, waiting=2)
  yield server
  server.close()
