"""Windows of steps whose traces are kept, for TensorBoard's profiler, XProf or Perfetto.

  profile/step-00000012/plugins/profile/<time>/    the trace of step 12 and those after it

A window is asked for by a config, or by a signal to the running process: `kill -USR1 PID`. Of
several hosts each that is asked traces itself.
"""
import contextlib
import dataclasses
import pathlib
import signal
from collections.abc import Callable, Iterator

import jax

from lm.parallel.distributed import Hosts

PROFILE = 'profile'
SIGNAL = signal.SIGUSR1


@dataclasses.dataclass(frozen=True)
class Window:
  """first_step: that is traced, counted from 1; none by itself where it is 0, so that only the
  signal starts one. num_steps: of each window."""
  first_step: int = 0
  num_steps: int = 3

  def __post_init__(self):
    if self.first_step < 0 or self.num_steps < 1:
      raise ValueError(f'first_step={self.first_step} must not be negative and '
                       f'num_steps={self.num_steps} must be at least 1')


class Profiler:
  """Starts and ends the traces of a run.

  Args:
    run_dir: where they go.
    window: that the config asks for, and the length of those that a signal asks for.
    hosts: who train together.
    log: is told where a trace lies.
  """

  def __init__(self, run_dir: pathlib.Path, window: Window, hosts: Hosts,
               log: Callable[[str], None]):
    self._run_dir, self._window, self._log = run_dir, window, log
    self._suffix = f'.host-{hosts.index:05d}' if hosts.index else ''
    self._asked, self._last = False, None
    self._directory: pathlib.Path | None = None

  @contextlib.contextmanager
  def on_signal(self) -> Iterator[None]:
    """Lets the signal ask for a window, in the main thread."""
    def ask(*_):
      self._asked = True
    try:
      before = signal.signal(SIGNAL, ask)
    except ValueError:  # another thread, such as a notebook's server has
      yield
      return
    try:
      yield
    finally:
      signal.signal(SIGNAL, before)
      self._end()

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """Around a step, up to its results on the host."""
    if self._directory is None and (self._asked or step == self._window.first_step):
      self._begin(step)
    with jax.profiler.StepTraceAnnotation('train', step_num=step):
      yield
    if step == self._last:
      self._end()

  def _begin(self, step: int):
    self._asked, self._last = False, step + self._window.num_steps - 1
    directory = self._run_dir / PROFILE / f'step-{step:08d}{self._suffix}'
    try:
      jax.profiler.start_trace(directory)
    except RuntimeError as error:  # somebody else's trace goes on
      self._log(f'warning: step {step} is not traced ({error})')
      return
    self._directory = directory

  def _end(self):
    if self._directory is not None:
      directory, self._directory = self._directory, None
      try:
        jax.profiler.stop_trace()
      except (RuntimeError, OSError) as error:  # such as a full disk
        self._log(f'warning: the trace in {directory} is not written ({error})')
      else:
        self._log(f'a trace is in {directory}')
