"""A text task, and its way from files to a standing cache.

`TextTask` is what gin binds. `prepare()` answers at once where a cache of exactly these documents,
this vocabulary and these preprocessors stands; else a child process builds it, so that TensorFlow,
which SeqIO brings, is never imported where a model trains.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from importlib import metadata
import json
import os
from pathlib import Path
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Mapping, Optional, Tuple, Union

from lm.data import cache
from lm.data import pretrained_vocabularies
from lm.data import splits
from lm.data import vocabularies
from lm.errors import UserError

if TYPE_CHECKING:
  import seqio

_LM = Path(vocabularies.__file__).resolve().parents[1]
_READING = ('corpus/collect.py', 'corpus/readers/__init__.py', 'corpus/readers/examples.py',
            'corpus/readers/fields.py', 'corpus/readers/jsonl.py', 'corpus/readers/piece.py',
            'corpus/readers/streams.py', 'corpus/readers/table.py', 'corpus/readers/whole.py',
            'corpus/stdlib.py', 'corpus/write.py', 'data/splits.py')  # fmt: skip
_LEARNING = ('data/vocabularies.py', 'data/vocabulary_training.py', 'data/tokenizer_training.py')
_IMPORTING = ('data/pretrained_vocabularies.py', 'data/tokenizer_config.py',
              'data/tokenizer_files.py', 'data/tokenizer_pipelines.py')  # fmt: skip
_TOKENISING = ('data/seqio_tasks.py',)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A standing cache: what training needs of a task.

  Attributes:
    directory: of the cache, to be read by `cache.TokenCache(directory, split)`.
    vocabulary: made its ids.
    info: provenance and sizes: `info['splits'][split]` has documents, bytes, tokens,
      bytes_per_token.
  """

  directory: Path
  vocabulary: vocabularies.Vocabulary
  info: dict[str, Any]

  def cache(self, split: str) -> cache.TokenCache:
    """Opens 'train' or 'validation'."""
    return cache.TokenCache(self.directory, split)


@dataclasses.dataclass(frozen=True)
class TextTask:
  """Plain text to be predicted token by token.

  Attributes:
    files: glob patterns (.txt, .md, .py, .jsonl, each also .gz or .zst, and the shards of a corpus
      by `lm corpus`), or None for Python's own standard library.
    vocabulary: kind and size, or where another project's lies.
    held_out_fraction: of the documents, chosen by name; see `splits`.
    cache_dir: where vocabularies and caches are kept; safe to delete, safe to share.
    name: in SeqIO's registry and in the cache directory's name.
  """

  files: Union[str, Tuple[str, ...], None] = None
  vocabulary: vocabularies.VocabularyConfig = vocabularies.VocabularyConfig()
  held_out_fraction: float = 0.04
  cache_dir: str = '~/.cache/lm'
  name: str = 'text'

  def __post_init__(self) -> None:
    if not 0 < self.held_out_fraction < 1:
      raise UserError(f'held_out_fraction={self.held_out_fraction} must lie between 0 and 1.')
    if not self.name or not self.name.replace('_', '').isalnum():
      raise UserError(f'name={self.name!r} must be letters, digits and underscores.')
    if isinstance(self.files, list):
      object.__setattr__(self, 'files', tuple(self.files))

  def prepare(
      self,
      workers: Optional[int] = None,
      progress: bool = True,
      beam_options: Optional[Tuple[str, ...]] = None,
  ) -> Prepared:
    """Returns the task's cache, building what is missing of it.

    Args:
      workers: processes that tokenise; None for one a core.
      progress: shows bars with rate and time left on standard error.
      beam_options: tokenises with Apache Beam instead, for instance on a cluster that shares
        `cache_dir`: `('--runner=DirectRunner', '--direct_num_workers=4')`.

    Raises:
      UserError: the files, the vocabulary's size or the cache's directory are at fault.
    """
    if beam_options is not None and importlib.util.find_spec('apache_beam') is None:
      raise UserError(f'beam_options={beam_options!r} need Apache Beam, which is not installed: '
                      "pip install 'lm[beam]', or leave them out.")
    places = locate(self)
    if places.cache is None or not (places.cache / 'info.json').exists():
      _build(self, workers or len(os.sched_getaffinity(0)), progress, beam_options)
      places = locate(self)
    if places.cache is None or not (places.cache / 'info.json').exists():
      raise UserError(f'The files of task {self.name!r} changed while they were read; run again.')
    info = json.loads((places.cache / 'info.json').read_text('utf-8'))
    return Prepared(places.cache, vocabularies.load(places.cache / 'vocabulary'), info)

  def register(self) -> seqio.Task:
    """Returns the task in SeqIO's registry (imports TensorFlow; builds what is missing)."""
    from lm.data import seqio_tasks

    vocabulary = self.prepare(progress=False).vocabulary
    return seqio_tasks.register(self.name, self.files, self.held_out_fraction, vocabulary)


def register_mixture(name: str, rates: Mapping[TextTask, float]) -> seqio.Mixture:
  """Returns the tasks as a mixture in SeqIO's registry, in place of an older one of its name.

  Raises:
    UserError: two tasks have one name.
  """
  import seqio

  names = [task.name for task in rates]
  if len(set(names)) < len(names):
    raise UserError(f'The tasks {names} of mixture {name!r} need different names in SeqIO.')
  if name in seqio.MixtureRegistry.names():
    seqio.MixtureRegistry.remove(name)
  registered = [(task.register().name, rate) for task, rate in rates.items()]
  return seqio.MixtureRegistry.add(name, registered)


@dataclasses.dataclass(frozen=True)
class Places:
  """Where a task's products lie; every name holds a digest of all that made the product.

  Attributes:
    texts: the documents, split and staged for tokenising; deleted when the cache stands.
    vocabulary: the trained vocabulary.
    cache: the cache, None as long as there is no vocabulary.
    lock: held by whoever builds.
  """

  texts: Path
  vocabulary: Path
  cache: Optional[Path]
  lock: Path


def locate(task: TextTask) -> Places:
  """Returns where the task's products lie, standing or not; reads the files that are new to it."""
  root = Path(task.cache_dir).expanduser()
  documents = splits.fingerprint(task.files, root)
  texts = _digest(documents, task.held_out_fraction, *map(_source, _READING))
  imported = digests_of_vocabulary(task.vocabulary)
  vocabulary = root / 'vocabularies' / _digest(
      texts,
      dataclasses.asdict(task.vocabulary),
      *map(_source, _LEARNING),
      metadata.version('sentencepiece'),
      *imported,
  )
  directory = None
  if (vocabulary / 'vocabulary.json').exists():
    ids = json.loads((vocabulary / 'vocabulary.json').read_text('utf-8'))['digest']
    versions = [metadata.version(package) for package in ('seqio', 'tensorflow')]
    form = (cache.FORMAT, cache.RECORD_TOKENS)
    digest = _digest(texts, ids, versions, form, *map(_source, _TOKENISING), *imported)
    directory = root / f'{task.name}-{digest}'
  return Places(root / f'texts-{texts}', vocabulary, directory, root / f'texts-{texts}.lock')


def digests_of_vocabulary(config: vocabularies.VocabularyConfig) -> list[str]:
  """Returns digests of all that makes the ids of an imported vocabulary: its files, our readers;
  or of one that the package `tokenizers` trains."""
  if config.kind in vocabularies.TOKENIZERS:
    found = importlib.util.find_spec('tokenizers')
    version = metadata.version('tokenizers') if found else ''
    return [version, *map(_source, _IMPORTING)]
  if config.kind != 'pretrained':
    return []
  return [pretrained_vocabularies.digest_of(config.path), *map(_source, _IMPORTING)]


def sources() -> dict[str, str]:
  """Returns the digests of the source files that decide what a cache holds."""
  return {file: _source(file) for file in (*_READING, *_LEARNING, *_IMPORTING, *_TOKENISING)}


def _digest(*parts: Any) -> str:
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode('utf-8')).hexdigest()[:16]


def _source(file: str) -> str:
  """Returns a digest of a source file of `lm`: a changed line there makes a new cache."""
  return hashlib.sha256((_LM / file).read_bytes()).hexdigest()


def _build(
    task: TextTask, workers: int, progress: bool, beam_options: Optional[Tuple[str, ...]]
) -> None:
  """Builds the cache in a child process, which ends when this one does."""
  environment = dict(
      os.environ,
      PYTHONPATH=os.pathsep.join(filter(None, [str(_LM.parent), os.environ.get('PYTHONPATH')])),
      TF_CPP_MIN_LOG_LEVEL='3',
      CUDA_VISIBLE_DEVICES='-1',  # The accelerator belongs to the caller.
      JAX_PLATFORMS='cpu',
  )
  specification = {'workers': workers, 'progress': progress, 'beam_options': beam_options}
  arguments = {'task': dataclasses.asdict(task), 'specification': specification}
  child = subprocess.Popen(
      [sys.executable, '-c', 'from lm.data import build; build.main()', json.dumps(arguments)],
      stdin=subprocess.PIPE,  # Its end tells the child that this process is gone.
      stdout=subprocess.PIPE,
      env=environment,
  )
  try:
    assert child.stdout is not None
    output = child.stdout.read().decode('utf-8')
  except BaseException:
    child.kill()
    raise
  finally:
    assert child.stdin is not None
    child.wait()
    child.stdin.close()
    child.stdout.close()
  if child.returncode == 2 and output:
    raise UserError(json.loads(output.splitlines()[-1])['error'])
  if child.returncode:
    raise RuntimeError(
        f'Building the cache of task {task.name!r} ended with status {child.returncode} (negative:'
        ' the number of a signal); see above. Run again: finished shards are kept.'
    )
