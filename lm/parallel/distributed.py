"""Several hosts, one program: who takes part, and what they agree on.

`Hosts` is a value that is passed along; `Hosts()` is a process alone. Only host 0 writes to the run
directory; all read it, so it lies on a disk that they share. `line.py` says who is missing or gone.
"""
from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import hashlib
from importlib import metadata
import os
import platform
import subprocess
import sys
import traceback
from typing import Any, TypeVar

import jax
from jax._src import clusters

from lm.errors import HostError, UserError
from lm.parallel import line as line_lib
from lm.parallel import relay as relay_lib

T = TypeVar('T')
# Decide what a program computes; a host where one differs would compute something else, or hang.
PACKAGES = ('jax', 'jaxlib', 'libtpu', 'flax', 'optax', 'numpy', 'grain', 'orbax-checkpoint')
FLAGS = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')
AGREEMENT_SECONDS = 45.0


@dataclasses.dataclass(frozen=True)
class Hosts:
  """The hosts of a run, seen from one of them.

  index, count: of this host, and of hosts.
  line: to the others; relay: the child that holds this host's connection to JAX's coordinator.
  """
  index: int = 0
  count: int = 1
  line: line_lib.Line | None = None
  relay: subprocess.Popen | None = None

  @property
  def is_main(self) -> bool:
    """Whether this host writes to the run directory and shows progress."""
    return self.index == 0

  def gather(self, key: str, value: Any, seconds: float | None = None) -> list[Any]:
    """What every host says under `key` (of JSON), in order; see `Line.gather`."""
    return [value] if self.line is None else self.line.gather(key, value, seconds)

  def wait_for_all(self, key: str):
    """Returns when every host has come here."""
    self.gather(key, None)

  def ask_main(self, key: str, function: Callable[[], T]) -> T:
    """What `function` returns (of JSON) on host 0, where alone it is called."""
    return self.gather(key, function() if self.is_main else None)[0]

  def main_first(self, key: str, function: Callable[[], T]) -> T:
    """Calls it on host 0, and then on the others, which find what it left on a shared disk; returns
    when all are done."""
    result = function() if self.is_main else None
    self.wait_for_all(key)
    result = result if self.is_main else function()
    self.wait_for_all(key)
    return result

  def prove_same(self, facts: Mapping[str, str]):
    """Stops where a fact (a version, a digest) of this program differs between hosts.

    Raises:
      UserError: names the fact, and the hosts that differ from most.
      HostError: a host did not answer within a minute.
    """
    short = digest(repr(dict(facts)))
    if len(set(self.gather('the proof of one program', short, AGREEMENT_SECONDS))) == 1:
      return  # what differs is worth a long message to every host; that nothing does is not
    answers = self.gather('what differs', dict(facts), AGREEMENT_SECONDS)
    for fact in facts:
      values = [answer.get(fact) for answer in answers]
      usual = max(values, key=values.count)
      if odd := [i for i, value in enumerate(values) if value != usual]:
        raise UserError(f'{fact} is {values[odd[0]]} on {self._names(odd)} and {usual} on '
                        f'{self._names(i for i, value in enumerate(values) if value == usual)}; '
                        'all hosts must run the same program, so install and start the same there')

  def same_program(self, function: Callable, load: Callable | None = None) -> Callable:
    """A jitted function that runs for the first time when every host has compiled the same program:
    a collective that meets another one hangs, and one that waits for a compiler gives up.

    Args:
      load: finds the executable of what is lowered, or None where there is none.
    """
    programs = []

    def call(*args):
      if not programs:
        lowered = function.lower(*args)
        self.prove_same({'the digest of a program': digest(lowered.as_text())})
        programs.append(load and load(lowered) or lowered.compile())
        self.wait_for_all('the compiler')
      return programs[0](*args)
    return function if self.count == 1 and load is None else call

  def _names(self, indices: Any) -> str:
    indices = list(indices)
    more = f' and {len(indices) - 4} more' if len(indices) > 4 else ''
    return ', '.join(f'host {i} ({self.line.names[i]})' for i in indices[:4]) + more

  def shut_down(self):
    """Ends together with all others."""
    if self.line is not None:
      self.wait_for_all('the end')
      self.line.close()
      jax.distributed.shutdown()

  @contextlib.contextmanager
  def ending_together(self):
    """Tells the other hosts of an exception here, and ends this process as they end.

    A collective that fails, fails since another host did: that one is named, not the collective.
    """
    try:
      yield
    except BaseException as error:
      if self.line is None:
        raise
      if isinstance(error, jax.errors.JaxRuntimeError):
        self.line.wait_for_end()
      status, text = {UserError: 2, HostError: line_lib.GONE}.get(type(error)), str(error)
      if status is None:
        traceback.print_exc()
        text = f'{type(error).__name__}: {error}'.splitlines()[0]
      self.line.fail(status or line_lib.GONE, text)
      line_lib.end_process(status or 1, text)


def digest(text: str) -> str:
  """A short digest of a text, for `prove_same`."""
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def program_facts() -> dict[str, str]:
  """Versions and flags that decide what this host compiles."""
  installed = {d.name: d.version for name in PACKAGES
               for d in metadata.distributions(name=name)}
  return {'the version of Python': platform.python_version(),
          **{f'the version of {name}': installed.get(name, 'absent') for name in PACKAGES},
          **{name: os.environ.get(name, 'unset') for name in FLAGS},
          'the number of devices': str(jax.local_device_count())}


def initialize(coordinator: str | None = None, num_processes: int | None = None,
               process_id: int | None = None, seconds: float = 60.0) -> Hosts:
  """Joins the processes of a run; what is not given is found as `jax.distributed` finds it: on TPU
  VMs, GKE, Slurm and Open MPI. A process with neither is alone.

  Must be called before JAX touches a device.

  Args:
    coordinator: HOST:PORT of process 0; the port below it is used too.
    num_processes, process_id: how many, and which this is.
    seconds: to wait for the others.

  Raises:
    UserError: the arguments do not fit together.
    HostError: a host did not come in time; it is named.
  """
  coordinator = coordinator or os.environ.get('JAX_COORDINATOR_ADDRESS')
  coordinator, num_processes, process_id, local_device_ids = (
      clusters.ClusterEnv.auto_detect_unset_distributed_params(
          coordinator, num_processes, process_id, None, None, int(seconds)))
  given = {'--coordinator': coordinator, '--num_processes': num_processes,
           '--process_id': process_id}
  if coordinator is None and num_processes in (None, 1) and process_id in (None, 0):
    return Hosts()
  if absent := [name for name, value in given.items() if value is None]:
    raise UserError(f'{" and ".join(absent)} cannot be found here (no TPU VM, GKE or Slurm); give '
                    '--coordinator=HOST:PORT, --num_processes and --process_id together')
  if not 0 <= process_id < num_processes:
    raise UserError(f'--process_id={process_id} must be from 0 to {num_processes - 1}, below '
                    f'--num_processes={num_processes}')
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdigit() or not 1024 < int(port) < 65536:
    raise UserError(f'--coordinator={coordinator} is not HOST:PORT with a port from 1025 to 65535')
  if num_processes == 1:
    return Hosts()
  line = line_lib.connect((host.strip('[]'), int(port) - 1), process_id, num_processes, seconds)
  child = _start_relay(coordinator) if process_id else None
  address = f'127.0.0.1:{int(child.stdout.readline())}' if child else coordinator
  # SIGTERM is the training loop's to handle: all hosts stop after the same step.
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(
      address, num_processes, process_id, local_device_ids, cluster_detection_method='deactivate',
      coordinator_bind_address=coordinator if host in line_lib.LOOPBACK else None,
      # A host that is gone is found by the line: JAX would end this process without a sentence.
      heartbeat_timeout_seconds=3600)
  return Hosts(process_id, num_processes, line, child)


def _start_relay(coordinator: str) -> subprocess.Popen:
  """In a session of its own, so that a signal to all processes here does not end it first."""
  return subprocess.Popen([sys.executable, '-I', relay_lib.__file__, coordinator],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
