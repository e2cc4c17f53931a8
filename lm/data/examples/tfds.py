"""Sets of TensorFlow Datasets, read in a child process: TensorFlow is not imported here.

    parent                                    child
    TFDS.records('train')  --- JSON -------->  main(): opens the data set, or makes it
                           <-- a line each --  records: bytes as text, classes by their names
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any, Iterator

import numpy as np

from lm.data.examples import sources
from lm.errors import UserError

_ROOT = Path(__file__).resolve().parents[3]


@dataclasses.dataclass(frozen=True)
class TFDS(sources.Source):
  """A set of TensorFlow Datasets; what is not prepared yet is fetched, which needs a network.

  Its splits are written as there, such as 'validation_matched' or 'train[:10%]'.

  Attributes:
    name: such as 'glue/cola', also with a version: 'glue/cola/2.0.0'.
    data_dir: where data sets lie prepared.
  """

  name: str = ''
  data_dir: str = '~/tensorflow_datasets'

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.name:
      raise UserError("name='' must be a data set, such as 'glue/cola'.")

  def _digest(self) -> Any:
    info = Path(self._directory(), 'dataset_info.json').read_bytes()
    return [hashlib.sha256(info).hexdigest(), self.train, self.validation, self.test]

  def _read(self, split: str) -> sources.Located:
    patterns = getattr(self, split)
    for name in (patterns,) if isinstance(patterns, str) else patterns:
      lines = _child({'directory': self._directory(), 'split': name})
      for number, line in enumerate(lines, 1):
        yield f'{self.name}:{name}:{number}', json.loads(line)

  def _directory(self) -> str:
    """Returns where the set lies prepared, which it does then."""
    found = self._prepared()
    if not found:
      for line in _child({'name': self.name, 'data_dir': os.path.expanduser(self.data_dir)}):
        print(line, file=sys.stderr, end='')
      found = self._prepared()
    if len(found) != 1:
      inside = ', '.join(found) or 'nothing'
      raise UserError(f'name={self.name!r} must be one data set below {self.data_dir}, where there'
                      f' is {inside}; write NAME/CONFIG/VERSION.')
    return found[0]

  def _prepared(self) -> list[str]:
    root = os.path.join(os.path.expanduser(self.data_dir), self.name)
    pattern = os.path.join(glob.escape(root), '**', 'dataset_info.json')
    return sorted(map(os.path.dirname, glob.glob(pattern, recursive=True)))


def _child(wish: dict[str, str]) -> Iterator[str]:
  """Yields what a child process writes, line by line; it ends with this iterator."""
  path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get('PYTHONPATH')]))
  child = subprocess.Popen(
      [sys.executable, '-c', 'from lm.data.examples import tfds; tfds.main()', json.dumps(wish)],
      stdout=subprocess.PIPE, encoding='utf-8',
      env=dict(os.environ, PYTHONPATH=path, TF_CPP_MIN_LOG_LEVEL='3', CUDA_VISIBLE_DEVICES='-1'))
  try:
    last = ''
    for line in child.stdout:
      if last:
        yield last
      last = line
    if child.wait() == 2:
      raise UserError(json.loads(last)['error'])
    if last:
      yield last
    if child.returncode:
      raise RuntimeError(f'Reading {wish} ended with status {child.returncode}; see above.')
  finally:
    child.kill()
    child.stdout.close()
    child.wait()


def main() -> None:
  """Does in the child what the JSON on its command line wishes."""
  wish, out = json.loads(sys.argv[1]), os.fdopen(os.dup(1), 'w', encoding='utf-8')
  os.dup2(2, 1)  # What the library prints is not for the parent to read.
  try:
    for record in _records(**wish) if 'split' in wish else _prepare(**wish):
      out.write(json.dumps(record) + '\n')
  except UserError as error:
    out.write(json.dumps({'error': str(error)}) + '\n')
    out.close()
    sys.exit(2)
  out.close()


def _library() -> Any:
  try:
    import tensorflow_datasets
  except ImportError as error:
    raise UserError(f'Sets of TensorFlow Datasets need the package ({error}): pip install'
                    ' tensorflow-datasets.') from error
  return tensorflow_datasets


def _prepare(name: str, data_dir: str) -> Iterator[Any]:
  library = _library()
  before, _, last = name.rpartition('/')
  name, version = (before, last) if last[:1].isdigit() else (name, '')
  try:
    library.builder(f'{name}:{version}' if version else name, data_dir=data_dir
                    ).download_and_prepare()
  except Exception as error:  # Of the network, of the disk, of the set's own code.
    raise UserError(f'{name} lies not prepared in {data_dir}, and cannot be fetched'
                    f' ({type(error).__name__}: {str(error).strip().splitlines()[0]}); prepare it'
                    ' where there is a network, or bind SOURCE to files.') from error
  yield from ()


def _records(directory: str, split: str) -> Iterator[Any]:
  library = _library()
  builder = library.builder_from_directory(directory)
  config = library.ReadConfig(interleave_cycle_length=1, try_autocache=False)
  try:
    data = builder.as_dataset(split=split, shuffle_files=False, read_config=config)
  except ValueError as error:
    raise UserError(f'{directory} has no split {split!r}; it has {sorted(builder.info.splits)}.'
                    ) from error
  for record in library.as_numpy(data):
    yield plain(builder.info.features, record)


def plain(feature: Any, value: Any) -> Any:
  """Returns a value of TensorFlow Datasets as JSON has it: a class is its name, None if it has
  none, and bytes are text."""
  inner = getattr(feature, 'feature', feature)  # Of a sequence.
  if isinstance(value, dict):
    return {name: plain(inner[name], each) for name, each in value.items()}
  if hasattr(value, 'to_list'):
    value = value.to_list()
  value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
  if isinstance(value, list):
    return [plain(inner, each) for each in value]
  if isinstance(value, bytes):
    return value.decode('utf-8', 'replace')
  if hasattr(inner, 'int2str'):
    return inner.int2str(value) if value >= 0 else None
  return value
