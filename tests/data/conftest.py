"""A tiny corpus and its cache, built once for all tests of the room."""

import json
import os
from pathlib import Path
import random
import subprocess
import sys

import pytest

from lm.data import tasks
from lm.data import vocabularies

_WORDS = 'der and self return 日本 if not None for é in x0 12345 \t lambda'.split(' ')


def write_corpus(directory, num_files=12, words=400, seed=0):
  """Writes text files of random words, indented like source code."""
  rng = random.Random(seed)
  directory.mkdir(parents=True, exist_ok=True)
  for index in range(num_files):
    lines = [
        ' ' * rng.choice([0, 4, 8]) + ' '.join(rng.choices(_WORDS, k=8)) + '\n'
        for _ in range(words // 8)
    ]
    (directory / f'{index:02d}.txt').write_text(''.join(lines), encoding='utf-8')
  return str(directory / '*.txt')


def run_python(code, *arguments, **options):
  """Starts a Python that sees this repository; returns the process."""
  environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
  return subprocess.Popen(
      [sys.executable, '-c', code, *arguments],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options,
  )  # fmt: skip


PREPARE = """
import json, sys
from lm.data import tasks, vocabularies
fields = json.loads(sys.argv[1])
fields['vocabulary'] = vocabularies.VocabularyConfig(**fields['vocabulary'])
if __name__ == '__main__':
  print(tasks.TextTask(**fields).prepare(workers=1).directory)
"""


@pytest.fixture(scope='session')
def task(tmp_path_factory):
  root = tmp_path_factory.mktemp('corpus')
  return tasks.TextTask(
      files=write_corpus(root / 'texts'),
      vocabulary=vocabularies.VocabularyConfig(size=320),
      held_out_fraction=0.2,
      cache_dir=str(root / 'cache'),
      name='tiny',
  )


@pytest.fixture(scope='session')
def prepared(task):
  """The cache, built by two processes at once: they must agree on it."""
  import dataclasses

  arguments = json.dumps(dataclasses.asdict(task))
  builders = [run_python(PREPARE, arguments) for _ in range(2)]
  outputs = [builder.communicate(timeout=120) for builder in builders]
  for builder, (_, error) in zip(builders, outputs):
    assert builder.returncode == 0, error
  directories = {Path(output.strip()) for output, _ in outputs}
  assert len(directories) == 1
  standing = task.prepare()
  assert {standing.directory} == directories
  return standing
