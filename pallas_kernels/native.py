"""Kernels in C++ for CPUs, which the machine's own compiler makes when one is first used: where
XLA's code reads memory at a fraction of its speed.

The library of all of them is kept in $XDG_CACHE_HOME/lm (~/.cache/lm), by its sources, jaxlib and
the processor.
"""
import ctypes
import functools
import hashlib
import os
import pathlib
import platform as machine
import shutil
import subprocess
import tempfile

import jax
import jaxlib

from pallas_kernels import platform

HERE = pathlib.Path(__file__).parent
TARGETS = 'lm_streamed_matmul', 'lm_streamed_rows', 'lm_decode_attention', 'lm_put_tokens'
SOURCES = HERE / 'streamed_matmul' / 'cpu.cc', HERE / 'decode_attention' / 'cpu.cc'
FLAGS = ('-std=c++20', '-O3', '-march=native', '-fPIC', '-shared', '-w')
SECONDS = 300  # that the compiler may take


@functools.cache
def is_there() -> bool:
  """Whether this machine can make the native kernels; warns once of why not."""
  compiler = shutil.which(os.environ.get('CXX', 'c++'))
  if compiler is None:
    return _without('there is no C++ compiler')
  try:
    library = ctypes.CDLL(str(_library(compiler)))
  except (OSError, subprocess.SubprocessError) as error:
    said = (getattr(error, 'stderr', None) or str(error)).strip()
    return _without(f'{compiler} cannot make the native kernels ({said[:200]})')
  for name in TARGETS:
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform='cpu')
  return True


def _without(reason):
  platform.warn_once(f'{reason}, so that decoding on this CPU may take twice its time; install a '
                     'C++ compiler, or name one by CXX')
  return False


def _library(compiler):
  """The compiled library, made if it is not there."""
  parts = [path.read_text() for path in (HERE / 'native.h', *SOURCES)]
  key = '\n'.join([*parts, jaxlib.__version__, _processor(), compiler, *FLAGS])
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache', 'lm')
  path = cache / f'native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so'
  if not path.exists():
    cache.mkdir(parents=True, exist_ok=True)
    # Moved when it is whole: other processes may make it at the same time.
    with tempfile.TemporaryDirectory(dir=cache) as directory:
      made = pathlib.Path(directory, path.name)
      subprocess.run([compiler, *FLAGS, f'-I{HERE}', f'-I{jax.ffi.include_dir()}',
                      *map(str, SOURCES), '-o', str(made)],
                     check=True, capture_output=True, text=True, timeout=SECONDS)
      made.replace(path)
  return path


def _processor():
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    return next(line for line in lines if line.startswith(('flags', 'Features')))
  except (OSError, StopIteration):
    return machine.processor() + machine.machine()
