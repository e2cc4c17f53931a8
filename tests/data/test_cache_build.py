"""The cache holds documents exactly, survives kill -9, never goes stale, names what is wrong."""

import dataclasses
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

from conftest import PREPARE
from conftest import run_python
from conftest import write_corpus
import numpy as np
import pytest

from lm.data import cache
from lm.data import shards
from lm.data import splits
from lm.data import tasks
from lm.data import vocabularies
from lm.errors import UserError

_FULL = cache.RECORD_TOKENS
_BYTES = vocabularies.VocabularyConfig(kind='byte')


def _arguments(task):
  return json.dumps(dataclasses.asdict(task))


def test_the_cache_holds_every_document_exactly(task, prepared):
  documents = list(splits.documents(task.files))
  rule = splits.survey(iter(documents), task.held_out_fraction)
  expected = list(splits.split(iter(documents), rule, task.held_out_fraction))
  for part in ('train', 'validation'):
    stored = prepared.cache(part)
    wanted = [document for split, document in expected if split == part]
    assert len(stored) == len(wanted) == prepared.info['splits'][part]['documents'] > 0
    for index, (name, text) in enumerate((document.name, document.text) for document in wanted):
      record = stored[index]
      assert record['tokens'][-1] == prepared.vocabulary.eos_id
      assert prepared.vocabulary.decode(record['tokens'][:-1]) == text
      assert len(record['tokens']) == stored.lengths[index]
      assert record['name'] == name
      assert record.get('text') == (text if part == 'validation' else None)
    assert prepared.info['splits'][part]['tokens'] == stored.lengths.sum()
    assert prepared.info['splits'][part]['bytes'] == sum(
        len(document.text.encode()) for document in wanted)


def test_a_name_may_be_any_bytes():
  name = os.fsdecode(b'caf\xe9/\xff.txt:3')
  tokens, found, text = cache.decode_record(cache.encode_record(np.arange(70_000), name, 'é'))
  assert (tokens.tolist(), found, text) == (list(range(70_000)), name, 'é')


def test_training_needs_no_tensorflow_once_the_cache_stands(task, prepared):
  code = PREPARE.replace('print(', 'prepared = (').replace('.directory)', ')') + (
      '  from lm.data import loader\n'
      '  with loader.Loader(prepared.cache("train"), 32, 2, 0).iterate(0, 2) as it: list(it)\n'
      '  print(sorted({"tensorflow", "seqio", "apache_beam"} & set(sys.modules)))\n'
  )
  child = run_python(code, _arguments(task))
  output, error = child.communicate(timeout=60)
  assert output.strip() == '[]', error


@pytest.mark.supports('data', 'worker processes')
def test_worker_processes_give_the_same_batches(task, prepared):
  code = PREPARE.replace('print(', 'prepared = (').replace('.directory)', ')') + (
      '  from lm.data import loader\n'
      '  data = loader.Loader(prepared.cache("train"), 32, 2, 0)\n'
      '  with data.iterate(3, 5, num_workers=2, num_threads=1) as it: found = list(it)\n'
      '  same = [(b[k] == data.batch(3 + i)[k]).all() for i, b in enumerate(found) for k in b]\n'
      '  print(len(found), all(same))\n'
  )
  child = run_python(code, _arguments(task))
  output, error = child.communicate(timeout=60)
  assert output.strip() == '5 True', error
  assert not error.strip(), error


@pytest.mark.supports('data', 'resumable ArrayRecord cache', 'Apache Beam')
def test_a_killed_build_resumes_and_keeps_finished_shards(tmp_path, monkeypatch):
  """Kills the builder and its workers at the first finished shard; Beam then does the rest."""
  task = tasks.TextTask(write_corpus(tmp_path / 'texts', 40), _BYTES, 0.2, str(tmp_path / 'cache'))
  slow = (
      'import time\n'
      'from lm.data import build\n'
      'build._MIN_SHARD_BYTES = build._MAX_SHARD_BYTES = 8000\n'
      'build.main()\n'
  )
  arguments = {'task': dataclasses.asdict(task), 'specification': {'workers': 1, 'progress': False}}
  child = run_python(slow, json.dumps(arguments), stdin=subprocess.PIPE, start_new_session=True)
  deadline = time.monotonic() + 90
  while not (finished := list(tmp_path.glob('cache/text-*/*.lengths.npy'))):
    assert time.monotonic() < deadline and child.poll() is None, child.communicate()
    time.sleep(0.002)
  os.killpg(child.pid, signal.SIGKILL)
  child.communicate()
  directory = finished[0].parent
  staged = json.loads(next(tmp_path.glob('cache/texts-*/texts.json')).read_text())
  finished = [path for path in directory.glob('*.lengths.npy')]
  assert 0 < len(finished) < len(staged)
  assert not (directory / 'info.json').exists()
  before = {path: path.stat().st_mtime_ns for path in finished}

  prepared = task.prepare(progress=False, beam_options=('--runner=DirectRunner',))
  assert prepared.directory == directory
  assert {path: path.stat().st_mtime_ns for path in finished} == before
  texts = {document.name: document.text for document in splits.documents(task.files)}
  stored = [
      prepared.vocabulary.decode(document['tokens'][:-1])
      for part in map(prepared.cache, ('train', 'validation'))
      for document in map(part.__getitem__, range(len(part)))
  ]
  assert sorted(stored) == sorted(texts.values())
  assert not list(tmp_path.glob('cache/**/*.part')) and not list(tmp_path.glob('cache/texts-*/'))


def test_beam_options_without_beam_say_what_to_install(tmp_path, monkeypatch):
  task = tasks.TextTask(write_corpus(tmp_path / 'texts', 4), _BYTES, 0.2, str(tmp_path / 'cache'))
  monkeypatch.setattr(tasks.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'lm\[beam\]'"):
    task.prepare(progress=False, beam_options=('--runner=DirectRunner',))


def test_a_builder_ends_when_its_caller_is_killed(tmp_path):
  task = tasks.TextTask(write_corpus(tmp_path / 'texts', 4), _BYTES, 0.2, str(tmp_path / 'cache'))
  caller = run_python(PREPARE, _arguments(task), start_new_session=True)
  deadline = time.monotonic() + 30
  while not list(tmp_path.glob('cache/*.lock')):
    assert time.monotonic() < deadline
    time.sleep(0.01)
  caller.kill()
  caller.communicate(timeout=20)  # Returns when the last process that holds its pipes is gone.


def test_whatever_makes_the_cache_is_in_its_name(tmp_path, task, prepared):
  """A changed file, split or vocabulary is another cache; the same again is the same one."""
  assert tasks.locate(task).cache == prepared.directory
  texts = shutil.copytree(Path(task.files).parent, tmp_path / 'texts')
  moved = dataclasses.replace(task, files=str(texts / '*.txt'))
  assert tasks.locate(moved).cache == prepared.directory

  def places(changed):
    found = tasks.locate(changed)
    return found.texts, found.vocabulary

  seen = {places(task)}
  with open(texts / '00.txt', 'a') as file:
    file.write('x')
  seen.add(places(moved))
  seen.add(places(dataclasses.replace(task, held_out_fraction=0.3)))
  seen.add(places(dataclasses.replace(task, vocabulary=vocabularies.VocabularyConfig(size=321))))
  assert len(seen) == 4


@pytest.mark.parametrize('name', ['seqio_tasks', 'splits', 'vocabulary_training', 'vocabularies'])
def test_a_changed_line_of_code_makes_a_new_cache(tmp_path, task, prepared, name):
  root = Path(tasks.__file__).parents[2]
  shutil.copytree(root / 'lm', tmp_path / 'lm', ignore=shutil.ignore_patterns('__pycache__'))
  code = (
      'import json, sys; from lm.data import tasks, vocabularies; f = json.loads(sys.argv[1]);'
      'f["vocabulary"] = vocabularies.VocabularyConfig(**f["vocabulary"]);'
      'print(tasks.locate(tasks.TextTask(**f)).cache)'
  )

  def located():
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))
    command = [sys.executable, '-c', code, _arguments(task)]
    return subprocess.check_output(command, env=environment, cwd=tmp_path, text=True).strip()

  assert located() == str(prepared.directory)
  with open(tmp_path / f'lm/data/{name}.py', 'a') as source:
    source.write('\nCHANGED = True\n')
  assert located() != str(prepared.directory)


@pytest.mark.supports('data', 'SeqIO tasks')
def test_the_task_is_a_seqio_task(task, prepared):
  code = PREPARE.replace('print(', 'task = (').replace('.prepare(workers=1).directory', '') + (
      '  import seqio\n'
      '  task.register()\n'
      '  registered = seqio.TaskRegistry.get(task.name)\n'
      '  data = registered.get_dataset(None, "validation", shuffle=False).as_numpy_iterator()\n'
      '  print(json.dumps([d["targets"].tolist() for d in data]))\n'
      '  vocabulary = registered.output_features["targets"].vocabulary\n'
      '  metrics = [f.__name__ for f in registered.metric_fns]\n'
      '  print(vocabulary.decode(vocabulary.encode("a b")), metrics)\n'
  )
  child = run_python(code, _arguments(task))
  output, error = child.communicate(timeout=90)
  assert child.returncode == 0, error
  ids, rest = output.splitlines()
  stored = prepared.cache('validation')
  assert json.loads(ids) == [stored[i]['tokens'].tolist() for i in range(len(stored))]
  assert rest == "a b ['bits_per_byte']"


@pytest.mark.parametrize('length', [0, 1, _FULL, _FULL + 1, 3 * _FULL - 1])
@pytest.mark.parametrize('highest', [2**16 - 1, 2**31 - 1])
def test_records_and_slices_of_long_documents(tmp_path, length, highest):
  tokens = np.linspace(0, highest, length).astype(np.int32)
  one = np.array([7], np.int32)
  records = [*cache.split_records(one, 'é', '日'), *cache.split_records(tokens, 'n', 't')]
  _write_cache(tmp_path, records, [1, length])
  stored = cache.TokenCache(tmp_path, 'validation')
  np.testing.assert_array_equal(stored[1]['tokens'], tokens)
  assert (stored[0]['name'], stored[0]['text'], stored[-1]['name']) == ('é', '日', 'n')
  for start in {0, length // 2, max(length - 2, 0)}:
    for stop in {start + 1, length} if start < length else ():
      np.testing.assert_array_equal(stored.slice(1, start, stop), tokens[start:stop])


def _write_cache(directory, records, lengths):
  middle = len(records) // 2
  for number, part in enumerate((records[:middle], records[middle:])):
    cache.write_array_record(directory / f'validation-{number}.array_record', part)
  cache.write_array(directory / 'validation.lengths.npy', np.array(lengths, np.int64))
  counts = (middle, len(records) - middle)
  shards = [{'file': f'validation-{n}.array_record', 'records': c} for n, c in enumerate(counts)]
  cache.write_whole(
      directory / 'info.json', json.dumps({'splits': {'validation': {'shards': shards}}}).encode()
  )


def test_a_broken_shard_does_not_count_as_finished(tmp_path):
  shard = {'name': 's', 'documents': 3}
  lengths = np.array([2, 2, cache.RECORD_TOKENS + 1])
  records = [r for n in lengths for r in cache.split_records(np.ones(n, np.int32), '', '')]
  path = tmp_path / 's.array_record'
  cache.write_array_record(path, records)
  assert not shards.finished(tmp_path, shard)
  cache.write_array(tmp_path / 's.lengths.npy', lengths)
  assert shards.finished(tmp_path, shard)
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  assert not shards.finished(tmp_path, shard)


def test_a_missing_cache_is_named(tmp_path):
  with pytest.raises(UserError, match='holds no whole cache'):
    cache.TokenCache(tmp_path, 'train')


@pytest.mark.supports('faults survived', 'full disk')
def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(tmp_path):
  """A limit on a file's size fails a write as a full disk does."""
  code = (
      'import resource, sys, pathlib; from lm.data import cache; from lm.errors import UserError\n'
      'resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))\n'
      'for write in (lambda p: cache.write_array_record(p, (b"x" * 1000 for _ in range(4000))),\n'
      '              lambda p: cache.write_whole(p, bytes(400000))):\n'
      '  try: write(pathlib.Path(sys.argv[1]) / "file")\n'
      '  except UserError as error: print(error)\n'
  )
  output, error = run_python(code, str(tmp_path)).communicate(timeout=30)
  assert output.count('the disk is full') == output.count('\n') == 2, (output, error)
  assert not list(tmp_path.iterdir())


def test_errors_of_the_builder_reach_the_caller(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'\xff\xfe text')
  task = tasks.TextTask(str(tmp_path / 'a.txt'), _BYTES, cache_dir=str(tmp_path / 'cache'))
  with pytest.raises(UserError, match='not UTF-8: byte 0xff at offset 0'):
    task.prepare(progress=False)
  (tmp_path / 'b.txt').write_text('a few words, no more\n' * 3)
  small = tasks.TextTask(str(tmp_path / 'b.txt'), cache_dir=str(tmp_path / 'cache'))
  with pytest.raises(UserError, match='size=4096 is too large a vocabulary'):
    small.prepare(progress=False)


def test_a_cache_directory_that_cannot_be_one_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  files = write_corpus(tmp_path / 'texts', 3)
  task = tasks.TextTask(files, _BYTES, 0.2, str(tmp_path / 'file/cache'))
  with pytest.raises(UserError, match='file/cache.* cannot be written .*CACHE_DIR'):
    task.prepare(progress=False)


def test_fields_out_of_range_are_refused():
  with pytest.raises(UserError, match='held_out_fraction=1.5'):
    tasks.TextTask(held_out_fraction=1.5)
  with pytest.raises(UserError, match="name='a b'"):
    tasks.TextTask(name='a b')
