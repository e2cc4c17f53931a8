"""Tells a person what happens to a run, by a command of theirs.

The command is a line of shell. It finds LM_RUN (the run directory), LM_STEP, LM_KIND and LM_MESSAGE
in its environment, and the same as one JSON object (`run`, `step`, `kind`, `message`) on its
standard input. The kinds: `skipped`, `rollback`, `stuck`, `stopped_early`, `stopped` (by a signal),
`failed`, `finished`. For instance

  curl -s -d @- https://example.com/hook        mail -s "$LM_KIND at step $LM_STEP" me@example.com
"""
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Optional

SECONDS = 30.0  # that a command may take
SECONDS_AT_END = 10.0  # that the end of a run waits for those on their way
AT_ONCE = 4
LONGEST = 4000  # characters; an environment holds no more than 128 KiB in a variable


class Alerts:
  """Runs the command in the background; training neither waits for it nor fails with it.

  Args:
    command: of shell; None for no alerts.
    run_dir: the run.
    log: takes a sentence where the command fails.
  """

  def __init__(self, command: Optional[str], run_dir: pathlib.Path, log: Callable[[str], None]):
    self._command, self._run_dir, self._log = command, run_dir, log
    self._running: list[tuple[threading.Thread, subprocess.Popen]] = []
    self.step = 0  # the last one that is done, for who does not know it

  def send(self, kind: str, message: str, step: int | None = None):
    """Tells that something happened; at once, whatever the command does."""
    if self._command is None:
      return
    self._running = [pair for pair in self._running if pair[0].is_alive()]
    if kind == 'skipped' and len(self._running) >= AT_ONCE:  # there may be one at every step
      self._log(f'warning: no alert of {message!r}, since {AT_ONCE} commands still run')
      return
    what = {'run': str(self._run_dir.absolute()), 'step': self.step if step is None else step,
            'kind': kind, 'message': message.replace('\0', ' ')[:LONGEST]}
    environment = {f'LM_{name.upper()}': str(value) for name, value in what.items()}
    try:
      child = subprocess.Popen(
          ['/bin/sh', '-c', self._command], env=os.environ | environment, stdin=subprocess.PIPE,
          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    except OSError as error:
      self._log(f'warning: alert_command cannot be run ({error.strerror})')
      return
    with contextlib.suppress(BrokenPipeError):  # of a command that reads nothing
      # Now, since this process may end at once; it is less than a pipe holds.
      child.stdin.write(json.dumps(what).encode() + b'\n')
      child.stdin.close()
    child.stdin = None  # or `communicate` would flush it
    thread = threading.Thread(target=self._wait, args=(child,), name='alert', daemon=True)
    thread.start()
    self._running.append((thread, child))

  @contextlib.contextmanager
  def until_the_end(self) -> Iterator['Alerts']:
    """Tells of what ends the block by an exception, and lets commands end."""
    try:
      yield self
    except BaseException as error:
      self.send('failed', f'{error}' or type(error).__name__)
      raise
    finally:
      end = time.monotonic() + SECONDS_AT_END
      for thread, child in self._running:
        thread.join(max(0.0, end - time.monotonic()))
        if thread.is_alive():
          _kill(child)

  def _wait(self, child: subprocess.Popen):
    try:
      _, said = child.communicate(timeout=SECONDS)
      why = f'it ended with status {child.returncode}'
    except subprocess.TimeoutExpired:
      _kill(child)
      said, why = b'', f'it took longer than {SECONDS:.0f} s'
    if child.returncode:
      lines = said.decode(errors='replace').strip().splitlines()[-1:]
      self._log(f'warning: alert_command failed ({", ".join([why, *lines])})')


def _kill(child: subprocess.Popen):
  """The command and all that it started."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(child.pid, signal.SIGKILL)
  child.wait()
