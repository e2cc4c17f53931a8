"""What is broken is named and passed over; the rest is read, in bounded memory and time."""

import gzip
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import zstandard

from lm.corpus import collect

RAW = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data' / 'raw'


def read(*files, **settings):
  """All documents of files, and the faults as (name, reason)."""
  faults, documents = [], []
  report = lambda name, reason: faults.append((name, reason))
  for group in collect.groups([collect.Source('s', tuple(map(str, files)), **settings)]):
    for block in collect.split(group, report):
      documents += collect.read(block, report)
  return documents, faults


def kinds(faults):
  return [(name, collect.kind(reason)) for name, reason in faults]


def record(number, body=b'<p>page</p>', length=None):
  http = b'HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n' + body
  return (b'WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://e/%d\r\nContent-Type:'
          b' application/http; msgtype=response\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n') % (
              number, len(http) if length is None else length, http)


def numbers(documents):
  return [int(document.url.rpartition('/')[2]) for document in documents]


@pytest.mark.parametrize('suffix, pack', [
    ('gz', gzip.compress), ('zst', zstandard.ZstdCompressor(write_checksum=True).compress)])
@pytest.mark.supports('documents', 'damaged archives: what is whole of them')
def test_members_behind_a_damaged_one_are_read(tmp_path, suffix, pack):
  members = [pack(record(n, os.urandom(3000).hex().encode())) for n in range(20)]
  members[7] = members[7][:500] + b'\xff' * 100 + members[7][600:]
  members[12] = members[12][:-1000]
  members[15] = b'garbage that is no member'
  (tmp_path / f'a.warc.{suffix}').write_bytes(b''.join(members))
  documents, faults = read(tmp_path / '*')
  assert numbers(documents) == [n for n in range(20) if n not in (7, 12, 15)]
  assert kinds(faults) == [(f's/a.warc.{suffix}', 'is truncated or damaged')] * 3


def test_a_record_whose_length_is_wrong_costs_no_other(tmp_path):
  records = [record(n) for n in range(9)]
  records[2] = record(2, length=5000)  # Would swallow those behind it.
  records[4] = record(4, length=3)
  records[6] = record(6)[:-30]
  (tmp_path / 'a.warc').write_bytes(b''.join(records))
  documents, faults = read(tmp_path / 'a.warc')
  assert numbers(documents) == [0, 1, 3, 5, 7, 8]
  assert {kind for _, kind in kinds(faults)} == {'is truncated or damaged'} and len(faults) >= 3


def test_a_truncated_archive_of_warcio():
  path = RAW / 'warc' / 'warcio' / 'example-trunc.warc'
  if not path.exists():
    pytest.skip('shared/data/raw/warc is not here')
  documents, faults = read(path)
  assert not documents and kinds(faults) == [('s/example-trunc.warc:3', 'is truncated or damaged')]


@pytest.mark.parametrize('suffix, pack', [('gz', gzip.compress), ('zst', zstandard.compress)])
def test_the_lines_before_a_truncation_are_read(tmp_path, suffix, pack):
  lines = b''.join(json.dumps({'text': os.urandom(400).hex()}).encode() + b'\n' for _ in range(900))
  (tmp_path / f'a.jsonl.{suffix}').write_bytes(pack(lines)[:-2000])
  documents, faults = read(tmp_path / '*')
  assert 300 < len(documents) < 900
  assert kinds(faults) == [(f's/a.jsonl.{suffix}', 'is truncated or damaged')]


def test_lines_that_are_wrong_are_named_and_the_others_read(tmp_path):
  wrong = [b'{"text": ', b'[1]', b'{"body": "x"}', b'{"text": "\\ud800"}', b'{"text": "\xff"}',
           b'{"text": " "}', b'[' * 100_000, b'{"text": 1}', b'{"text": "' + b'x' * 5000 + b'"}']
  good = b'{"text": "good"}'
  (tmp_path / 'a.jsonl').write_bytes(b'\n'.join([good, *wrong, good]))
  documents, faults = read(tmp_path / 'a.jsonl', max_document_bytes=4000)
  assert [d.name for d in documents] == ['s/a.jsonl:1', 's/a.jsonl:11']
  assert kinds(faults) == [(f's/a.jsonl:{n}', kind) for n, kind in enumerate((
      'is not JSON', 'has no string under the key "text"', 'has no string under the key "text"',
      'holds a lone surrogate', 'is not UTF-8', 'is empty', 'is longer than max_document_bytes',
      'has no string under the key "text"', 'is longer than max_document_bytes'), start=2)]


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
  (tmp_path / 'empty.txt').touch()
  (tmp_path / 'good.txt').write_text('good')
  (tmp_path / 'locked.txt').write_text('locked')
  (tmp_path / 'is_a_directory.txt').mkdir()
  os.symlink(tmp_path / 'nothing', tmp_path / 'broken.txt')
  real = open

  def refuse(path, *arguments, **settings):
    if str(path).endswith('locked.txt'):
      raise PermissionError(13, 'Permission denied', path)
    return real(path, *arguments, **settings)

  monkeypatch.setattr('builtins.open', refuse)  # Root may read everything.
  documents, faults = read(tmp_path / '*.txt')
  assert [document.raw for document in documents] == [b'good']
  assert faults == [('s/broken.txt', 'cannot be read (No such file or directory)'),
                    ('s/empty.txt', 'is empty'),
                    ('s/locked.txt', 'cannot be read (Permission denied)')]


def test_garbage_under_every_suffix_is_a_fault_and_no_more(tmp_path):
  pytest.importorskip('pyarrow')
  suffixes = ('warc', 'warc.gz', 'arc', 'xml', 'xml.bz2', 'jsonl', 'jsonl.zst', 'jsonl.xz',
              'parquet', 'arrow', 'array_record', 'epub')
  for suffix in suffixes:
    (tmp_path / f'a.{suffix}').write_bytes(b'\x00\x01PK garbage\n' * 1000)
  documents, faults = read(*(tmp_path / f'a.{suffix}' for suffix in suffixes))
  assert not documents
  assert {name.split(':')[0] for name, _ in faults} >= {
      f's/a.{suffix}' for suffix in suffixes if suffix != 'xml'}


def test_bombs_are_given_up(tmp_path):
  zeros = gzip.compress(bytes(200 << 20))
  (tmp_path / 'a.warc.gz').write_bytes(
      gzip.compress(record(1)) + zeros + gzip.compress(record(2)))
  inner = record(3, gzip.compress(bytes(30 << 20))).replace(
      b'text/html\r\n', b'text/html\r\nContent-Encoding: gzip\r\n')
  head, _, body = inner.partition(b'\r\n\r\n')
  inner = head.rpartition(b' ')[0] + b' %d\r\n\r\n' % (len(body) - 4) + body
  (tmp_path / 'b.warc').write_bytes(inner + record(4))
  (tmp_path / 'c.jsonl.gz').write_bytes(zeros)
  begin = time.process_time()
  documents, faults = read(tmp_path / '*')
  assert numbers(documents) == [1, 2, 4] and time.process_time() - begin < 5
  assert 'inflates more than 256 times' in str(faults)
  assert ('s/b.warc:1', 'is longer than max_document_bytes') in kinds(faults)


@pytest.mark.supports('documents', 'files larger than memory')
def test_memory_does_not_grow_with_the_file(tmp_path):
  """Some records are far beyond the limit: the peak is that of a block, whatever the size."""
  code = '''
import resource, sys
from lm.corpus import collect
count = 0
for group in collect.groups([collect.Source('s', sys.argv[1], max_document_bytes=1 << 20)]):
  for block in collect.split(group, lambda *fault: None):
    for document in collect.read(block, lambda *fault: None):
      count += 1
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
'''
  noise = os.urandom(30_000).hex().encode()
  peaks = []
  for name, size in (('small.jsonl.gz', 8), ('large.jsonl.gz', 64)):
    with gzip.open(tmp_path / name, 'wb', compresslevel=1) as file:
      for index in range(size << 4):
        file.write(b'{"text": "%d %s"}\n' % (index, noise))
      for _ in range(size * 3):  # One line, of 184 MB in the large file.
        file.write(noise * 16)
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path / name)], capture_output=True,
                          text=True, check=True)
    count, peak = map(int, done.stdout.split())
    assert count == size << 4
    peaks.append(peak)
  assert peaks[1] - peaks[0] < 40, peaks
