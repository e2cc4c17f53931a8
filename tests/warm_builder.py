"""A process that has imported TensorFlow, and forks to build the caches of the tests.

`lm.data.tasks` builds a cache in a new process whose workers import TensorFlow, seconds each, for
texts of some kilobytes. data/test_cache_build.py and every `lm` in a process of its own build as
users do; the other tests send their task here, and `lm.data.build` does the same work in forks of
this process.
"""
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


@functools.cache
def _process() -> subprocess.Popen:
  """Ends with the tests, when its input does."""
  path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
  quiet = {'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': '-1', 'JAX_PLATFORMS': 'cpu'}
  return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True,
                          stdout=subprocess.PIPE, env={**os.environ, **quiet, 'PYTHONPATH': path})


def install():
  """Puts it in the place of `lm.data.tasks._build`."""
  from lm.data import tasks
  from lm.errors import UserError
  build = tasks._build

  def build_warm(task, workers, progress, beam_options):
    if beam_options is not None or 'test_cache_build.py' in os.environ['PYTEST_CURRENT_TEST']:
      return build(task, workers, progress, beam_options)
    specification = {'workers': workers, 'progress': progress, 'beam_options': None}
    arguments = {'task': dataclasses.asdict(task), 'specification': specification}
    child = _process()
    child.stdin.write(json.dumps({'folder': os.getcwd(), 'arguments': arguments}) + '\n')
    child.stdin.flush()
    answer = json.loads(child.stdout.readline())
    if 'error' in answer:
      raise UserError(answer['error'])
    assert answer == {'status': 0}, answer

  tasks._build = build_warm


def main():
  """Builds what each line of the input says, in a fork, and prints how that ended."""
  from lm.data import build, seqio_tasks
  del seqio_tasks  # Imports TensorFlow.
  context = multiprocessing.get_context
  multiprocessing.get_context = lambda _: context('fork')
  for line in sys.stdin:
    pid = os.fork()
    if not pid:
      try:
        request = json.loads(line)
        os.chdir(request['folder'])
        sys.argv[1:] = [json.dumps(request['arguments'])]
        build.main()
        os._exit(0)
      finally:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != 2:  # of a user's mistake, which the fork has printed
      print(json.dumps({'status': status}), flush=True)


if __name__ == '__main__':
  main()
