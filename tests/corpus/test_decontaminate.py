"""Text of an evaluation is found however it is written, and nothing else is."""

import gzip
import json
import pathlib
import pickle
import random
import re
import subprocess
import sys
import tarfile
import types

import numpy as np
import pytest

from lm.corpus import decontaminate
from lm.corpus import decontaminate_index
from lm.corpus.document import Document
from lm.errors import UserError

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'
WORD = re.compile(r'[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+')


def shared(name):
  if not (SHARED / name).exists():
    pytest.skip(f'{name} is not in {SHARED}')
  return SHARED / name


def read(name):
  path = shared(name)
  opener = gzip.open if path.suffix == '.gz' else open
  with opener(path, 'rt', encoding='utf-8') as file:
    return file.read()


def judged(stage, text):
  document = Document('a', text)
  stage.apply(document)
  assert bool(document.removed_by) == bool(document.verdicts['decontaminate.hits'])
  return document.verdicts['decontaminate.hits']


@pytest.fixture(scope='module')
def evaluations(tmp_path_factory):
  directory = tmp_path_factory.mktemp('evaluations')
  with tarfile.open(shared('eval/blimp/blimp.tar.gz')) as archive:
    archive.extractall(directory / 'blimp', filter='data')
  names = ('lambada/*.jsonl.gz', 'piqa/*.jsonl', 'winogrande/*.jsonl.gz', 'xquad/*.json.gz')
  return (*(str(SHARED / 'eval' / name) for name in names), str(directory / 'blimp/**/*.jsonl'))


@pytest.fixture(scope='module')
def stage(evaluations, tmp_path_factory):
  directory = tmp_path_factory.mktemp('index')
  return decontaminate.Decontaminate(tasks=evaluations).prepare(directory)


def rewritten(text, rng):
  """The same words in another case, with other punctuation and other spaces."""
  text = ''.join(rng.choice((str.lower, str.upper))(character) for character in text)
  between = (' ', '  ', ', ', '.\n', ' -- ', '\u3002')
  return WORD.sub(lambda word: word[0] + rng.choice(between), text)


@pytest.mark.supports('documents', 'Decontaminated against evaluations by 13-grams, hits listed')
def test_every_text_of_five_evaluations_is_found_where_it_was_planted(stage, evaluations):
  rng = random.Random(0)
  ordinary = read('lm/kjv-bible/bible-kjv.txt.gz')
  planted = missed = 0
  for name, text in decontaminate.evaluation_texts(evaluations):
    if rng.random() < 0.03 and len(WORD.findall(text.lower())) >= 8:
      at = rng.randrange(len(ordinary) - 1000)
      page = f'{ordinary[at : at + 500]}\n{rewritten(text, rng)}\n{ordinary[at + 500 : at + 1000]}'
      hits = judged(stage, page)
      planted += 1
      missed += not hits
  assert planted > 1000 and not missed


def test_text_of_another_time_holds_nothing_of_an_evaluation(stage):
  for name in ('lm/kjv-bible/bible-kjv.txt.gz', 'lm/tinyshakespeare/input.txt'):
    assert not judged(stage, read(name))
  for path in shared('lm/chinese-classics').glob('*.json'):
    assert not judged(stage, path.read_text(encoding='utf-8'))


def test_a_real_hit_says_which_evaluation_and_which_words(stage):
  """Two articles of Wikipedia on two towns share a sentence of the census."""
  ((name, words),) = judged(stage, read('lm/wikitext-2/valid.txt.gz'))
  assert name.endswith('xquad.en.json.gz') and words.startswith('had someone living alone who was')


def test_thirteen_words_in_a_row_count_and_twelve_do_not(tmp_path):
  words = [f'word{number}' for number in range(40)]
  (tmp_path / 'test.txt').write_text(' '.join(words))
  stage = decontaminate.Decontaminate(tasks=(str(tmp_path / 'test.txt'),))
  page = ['other'] * 20
  for count, contaminated in ((12, False), (13, True)):
    for start in range(40 - count):
      text = ' '.join(page + words[start : start + count] + page)
      assert bool(judged(stage, text)) == contaminated
  assert judged(stage, ' '.join(page + words + page)) == [['test.txt', ' '.join(words)]]
  assert not judged(stage, ' '.join(page + words[::-1] + page))


def test_short_texts_are_found_whole_from_eight_words_on(tmp_path):
  (tmp_path / 'test.jsonl').write_text(
      json.dumps({'question': 'a b c d e f g h i', 'answers': ['j k l m n o p'], 'id': 7}) + '\n'
  )
  stage = decontaminate.Decontaminate(tasks=(str(tmp_path / '*.jsonl'),))
  assert judged(stage, 'x A b, c d e f g h i. y')
  assert not judged(stage, 'x a b c d e f g h y')  # Eight of its nine words.
  assert not judged(stage, 'x j k l m n o p y')  # Seven words.
  assert not judged(stage, 'f g h i j k l m n o p')  # Two strings side by side are no text.
  least = decontaminate.Decontaminate(tasks=(str(tmp_path / '*.jsonl'),), min_words=7)
  assert judged(least, 'x j k l m n o p y')
  with pytest.raises(UserError, match='min_words=14 is not between 1 and n=13'):
    decontaminate.Decontaminate(min_words=14)


def test_long_documents_are_hashed_in_pieces_like_short_ones(monkeypatch):
  english, chinese = read('lm/tinyshakespeare/input.txt'), read('eval/xquad/xquad.zh.json.gz')
  text = english[:40_000] + chinese[:10_000]
  whole, positions = decontaminate_index.word_hashes(text)
  expected = [match.span() for match in WORD.finditer(text.lower())]
  assert positions.tolist() == [start for start, _ in expected]
  distinct = {text.lower()[start:end] for start, end in expected}
  assert len(np.unique(whole)) == len(distinct)
  monkeypatch.setattr(decontaminate_index, '_CHUNK', 1000)
  pieces, again = decontaminate_index.word_hashes(text)
  assert (pieces == whole).all() and (again == positions).all()


def test_the_prepared_stage_is_small_and_another_process_finds_the_same(stage, evaluations):
  text = read('lm/wikitext-2/valid.txt.gz')[:1_000_000]
  data = pickle.dumps(stage)
  assert len(data) < 2000 and stage.digest in repr(stage) and stage.index not in repr(stage)
  code = (
      'import sys, pickle; from lm.corpus.document import Document;'
      'stage, text = pickle.load(sys.stdin.buffer); document = Document("a", text);'
      'stage.apply(document); print(document.verdicts["decontaminate.hits"])'
  )
  printed = subprocess.run(
      [sys.executable, '-c', code], input=pickle.dumps((stage, text)), check=True,
      capture_output=True, env={'PYTHONHASHSEED': '9', 'PYTHONPATH': ':'.join(sys.path)},
  ).stdout.decode()  # fmt: skip
  assert printed.strip() == str(judged(stage, text))
  assert printed.strip() == str(judged(decontaminate.Decontaminate(tasks=evaluations), text))


def test_the_digest_is_of_what_the_evaluations_hold(tmp_path):
  def digest(text):
    (tmp_path / 'test.txt').write_text(text)
    patterns = (str(tmp_path / 'test.txt'),)
    return decontaminate.Decontaminate(tasks=patterns).prepare(tmp_path / 'index').digest

  first = digest('a b c d e f g h i j')
  assert first == digest('a b c d e f g h i j') != digest('a b c d e f g h i k')


def test_local_evaluation_splits_of_the_registry_count_and_no_others(monkeypatch, tmp_path):
  def task(splits, **source):
    def get_dataset(split, shuffle):
      assert split in splits and not shuffle
      examples = [{'inputs': f'{split} one two three four five six seven'.encode(), 'label': 1}]
      return types.SimpleNamespace(as_numpy_iterator=lambda: iter(examples))

    source = types.SimpleNamespace(get_dataset=get_dataset, **source)
    return types.SimpleNamespace(splits=splits, source=source)

  def prepared(directory):
    builder = types.SimpleNamespace(data_dir=str(directory))
    return {'tfds_dataset': types.SimpleNamespace(builder=builder)}

  tasks = {
      'here': task(('train', 'test')), 'downloaded': task(('validation',), **prepared(tmp_path)),
      'elsewhere': task(('test',), **prepared(tmp_path / 'missing')),
  }  # fmt: skip
  registry = types.SimpleNamespace(names=tasks.keys, get=tasks.get)
  monkeypatch.setitem(sys.modules, 'seqio', types.SimpleNamespace(TaskRegistry=registry))
  stage = decontaminate.Decontaminate()
  text = ': one, two, three, four, five, six, seven.'
  assert [hit[0] for hit in judged(stage, f'Test{text}')] == ['here:test']
  assert [hit[0] for hit in judged(stage, f'Validation{text}')] == ['downloaded:validation']
  assert not judged(stage, f'Train{text}')


@pytest.mark.slow  # Imports TensorFlow.
def test_the_evaluation_splits_of_registered_tasks_count():
  seqio = pytest.importorskip('seqio')
  import tensorflow as tf

  def source(split, shuffle_files=False, seed=None):
    del shuffle_files, seed
    return tf.data.Dataset.from_tensors({'inputs': f'{split} one two three four five six seven'})

  name = 'decontaminate_test_task'
  seqio.TaskRegistry.add(
      name, seqio.FunctionDataSource(source, splits=('train', 'test')), preprocessors=[],
      output_features={},
  )  # fmt: skip
  try:
    stage = decontaminate.Decontaminate()
    assert judged(stage, 'Test: one, two, three, four, five, six, seven.')[0][0] == f'{name}:test'
    for split in ('Train', 'Validation'):
      assert not judged(stage, f'{split}: one, two, three, four, five, six, seven.')
  finally:
    seqio.TaskRegistry.remove(name)


def test_without_evaluations_nothing_is_removed_and_seqio_is_not_imported():
  code = (
      'import sys; from lm.corpus import decontaminate; from lm.corpus.document import Document;'
      'document = Document("a", "b " * 99); decontaminate.Decontaminate().apply(document);'
      'print(document.verdicts, document.removed_by, "seqio" in sys.modules)'
  )
  environment = {'PYTHONPATH': ':'.join(sys.path)}
  printed = subprocess.run(
      [sys.executable, '-c', code], check=True, capture_output=True, env=environment
  ).stdout.decode()
  assert printed.split() == ["{'decontaminate.hits':", '[]}', 'False']


@pytest.mark.parametrize('name, data', [('a.jsonl', b'{"a": 1}\n{'), ('a.txt', b'\xff\xfe')])
def test_a_broken_file_of_evaluations_is_named(tmp_path, name, data):
  (tmp_path / name).write_bytes(data)
  with pytest.raises(UserError, match=rf'{name}.*not what its name says'):
    decontaminate.Decontaminate(tasks=(str(tmp_path / name),)).prepare(tmp_path)
