"""Shards hold the documents exactly, appear whole, and have the same bytes each time."""

import json
import os
import signal
import subprocess
import sys
import time

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from lm.corpus import files
from lm.corpus import write
from lm.corpus.document import Document
from lm.data import splits
from lm.errors import UserError

FORMATS = pytest.mark.parametrize('form', list(write.SUFFIXES))


def corpus(count=200):
  """Documents with all that text may hold."""
  for i in range(count):
    text = '' if i % 50 == 3 else f'{i}\n\x00\t"é日本語\U0001f600\r\n\u2028' * (i % 13 + 1)
    yield Document(f'web/a.warc.gz:{i}', text, source='web', language='zh', licence='CC-BY-4.0',
                   url=f'https://example.org/{i}?a=1&b="', date='2024-05-01T00:00:00Z',
                   raw=b'gone', verdicts={'a.b': 1}, title='not in the shard')  # fmt: skip


@FORMATS
@pytest.mark.supports('documents', 'write ArrayRecord, Parquet, JSONL shards')
def test_a_shard_holds_the_documents_exactly(form, tmp_path):
  shard = write.Writer(form).write(tmp_path / 'deep' / 'x', corpus())
  path = tmp_path / 'deep' / shard.file
  records = list(write.read(path))
  for record, document in zip(records, corpus(), strict=True):
    assert dict(record) == {name: getattr(document, name) for name in write.FIELDS}
    again = write.document(record)
    assert all(getattr(again, name) == getattr(document, name) for name in write.FIELDS)
  assert shard.documents == 200 and shard.file_bytes == path.stat().st_size
  assert shard.text_bytes == sum(len(document.text.encode()) for document in corpus())
  assert os.listdir(tmp_path / 'deep') == [shard.file]


@FORMATS
def test_the_same_documents_give_the_same_bytes_in_another_process(form, tmp_path):
  code = ('import sys; sys.path[:0] = sys.argv[3:]\n'
          'from lm.corpus import write; import test_write\n'
          'print(write.Writer(sys.argv[1]).write(sys.argv[2], test_write.corpus()).sha256)')
  child = subprocess.run(
      [sys.executable, '-c', code, form, str(tmp_path / 'y'), os.path.dirname(__file__), *sys.path],
      capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert write.Writer(form).write(tmp_path / 'x', corpus()).sha256 == child.stdout.strip()


@FORMATS
def test_an_empty_shard_is_a_shard(form, tmp_path):
  shard = write.Writer(form).write(tmp_path / 'x', [])
  assert list(write.read(tmp_path / shard.file)) == []


@FORMATS
def test_a_failed_write_leaves_nothing_and_the_old_shard(form, tmp_path):
  def broken():
    yield from corpus(10)
    raise ZeroDivisionError

  shard = write.Writer(form).write(tmp_path / 'x', corpus(5))
  with pytest.raises(ZeroDivisionError):
    write.Writer(form).write(tmp_path / 'x', broken())
  assert os.listdir(tmp_path) == [shard.file]
  assert len(list(write.read(tmp_path / shard.file))) == 5


def test_a_killed_write_leaves_no_shard(tmp_path):
  code = ('import itertools, sys, time\n'
          'from lm.corpus import write\n'
          'from lm.corpus.document import Document\n'
          'documents = (time.sleep(.001) or Document(str(i), "x" * 9999)\n'
          '             for i in itertools.count())\n'
          'write.Writer("jsonl").write(sys.argv[1], documents)')
  environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
  child = subprocess.Popen([sys.executable, '-c', code, str(tmp_path / 'x')], env=environment)
  deadline = time.monotonic() + 60
  while not list(tmp_path.glob('*.part')):
    assert time.monotonic() < deadline and child.poll() is None
    time.sleep(0.01)
  child.send_signal(signal.SIGKILL)
  child.wait()
  assert not list(tmp_path.glob('*.zst'))


def test_a_full_disk_is_one_sentence(tmp_path):
  path = '/dev/full' if os.path.exists('/dev/full') else pytest.skip('needs /dev/full')
  with pytest.raises(UserError, match='disk is full') as error, files.whole(tmp_path / 'x') as part:
    with open(path, 'wb') as file:
      file.write(b'x' * 100_000)
    del part
  assert str(tmp_path / 'x') in str(error.value) and not os.listdir(tmp_path)
  with pytest.raises(UserError, match='cannot be written: File exists'):
    (tmp_path / 'file').touch()
    write.Writer().write(tmp_path / 'file' / 'x', corpus(1))


@FORMATS
def test_a_truncated_shard_is_named(form, tmp_path):
  shard = write.Writer(form).write(tmp_path / 'x', corpus())
  path = tmp_path / shard.file
  path.write_bytes(path.read_bytes()[: shard.file_bytes // 2])
  with pytest.raises(UserError, match=f'{path} is truncated or damaged'):
    list(write.read(path))


def test_lone_surrogates_become_replacement_characters(tmp_path):
  document = Document('a\udcff', 'x\ud83d\ude00y\ud800z')  # The first two are a pair: an emoji.
  for form in write.SUFFIXES:
    shard = write.Writer(form).write(tmp_path / 'x', [document])
    (record,) = write.read(tmp_path / shard.file)
    assert (record['name'], record['text']) == ('a\ufffd', 'x\U0001f600y\ufffdz')


def test_records_of_others_are_not_taken_for_ours():
  assert write.document({'text': 'x', 'name': 'everyone', 'source': 'web'}) is None
  assert write.document(dict.fromkeys(write.FIELDS, 'x') | {'more': 1}).name == 'x'


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 100), max_size=50), st.integers(1, 300))
def test_shards_are_neighbouring_blocks_of_about_the_size(blocks, size):
  plan = write.Writer(shard_bytes=size).plan(blocks)
  assert [block for part in plan for block in part] == list(range(len(blocks)))
  sums = [sum(blocks[block] for block in part) for part in plan]
  assert all(sums[:-1])
  for total, part in zip(sums, plan):  # nearer to the size with its last block than without
    last = [blocks[block] for block in part if blocks[block]][-1:]
    assert [total] == last or total <= size + sum(last) / 2
  for total, after in zip(sums, plan[1:]):
    assert total + blocks[after[0]] / 2 > size


@pytest.mark.parametrize('weight', [0, 0.25, 0.5, 1, 1.75, 2])
def test_copies_are_as_many_as_the_weight_says(weight):
  counts = [write.copies(f'web/a:{i}', weight) for i in range(4000)]
  assert set(counts) <= {int(weight), int(weight) + (weight % 1 > 0)}
  assert abs(sum(counts) / len(counts) - weight) < 0.03
  more = [write.copies(f'web/a:{i}', weight + 0.1) for i in range(4000)]
  assert all(a <= b for a, b in zip(counts, more))


def test_sampling_does_not_choose_what_is_held_out():
  names = [f'web/a:{i}' for i in range(20_000)]
  held_out = [name for name in names if splits.position(name) < 0.1]
  kept = sum(write.copies(name, 0.5) for name in held_out)
  assert abs(kept / len(held_out) - 0.5) < 0.05


@pytest.mark.parametrize('fields', [{'format': 'csv'}, {'shard_bytes': 0}])
def test_a_writer_that_cannot_be_says_why(fields):
  with pytest.raises(UserError, match=f'{next(iter(fields))}='):
    write.Writer(**fields)


def test_a_file_of_no_format_is_no_shard(tmp_path):
  (tmp_path / 'x.csv').write_text(json.dumps({}))
  with pytest.raises(UserError, match='so it is no shard'):
    list(write.read(tmp_path / 'x.csv'))
