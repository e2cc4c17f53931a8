"""Every format becomes the same documents, in blocks that can be read in any order."""

import bz2
import gzip
import json
import lzma
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import zipfile

import pytest
import zstandard

from lm.corpus import collect
from lm.corpus import write
from lm.corpus.document import Document
from lm.corpus.readers.piece import PIECE_BYTES
from lm.errors import UserError

RAW = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data' / 'raw'


def raw(name):
  if not (RAW / name).exists():
    pytest.skip(f'shared/data/raw/{name} is not here')
  return RAW / name


def read(*files, **settings):
  """All documents of files, and the faults as (name, reason)."""
  faults, documents = [], []
  report = lambda name, reason: faults.append((name, reason))
  for group in collect.groups([collect.Source('s', tuple(map(str, files)), **settings)]):
    for block in collect.split(group, report):
      documents += collect.read(pickle.loads(pickle.dumps(block)), report)
  return documents, faults


def jsonl(count, size=0):
  return b''.join(
      b'{"text": "line %d %s", "url": "http://e/%d"}\n' % (index, b'x' * size, index)
      for index in range(1, count + 1))


def epub(path, chapters=2, size=20):
  """Writes a book whose spine is in another order than its files."""
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as book:
    book.writestr('mimetype', 'application/epub+zip', zipfile.ZIP_STORED)
    book.writestr('META-INF/container.xml', (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="OEBPS/content.opf"/></rootfiles></container>'))
    order = list(range(chapters, 0, -1))
    items = ''.join(f'<item id="c{n}" href="text/chapter%20{n}.xhtml"'
                    ' media-type="application/xhtml+xml"/>' for n in sorted(order))
    spine = ''.join(f'<itemref idref="c{n}"/>' for n in order)
    book.writestr('OEBPS/content.opf', (
        '<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf"'
        ' xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><dc:title>A Book</dc:title>'
        f'<dc:language>de-AT</dc:language></metadata><manifest>{items}</manifest>'
        f'<spine>{spine}</spine></package>'))
    for n in sorted(order):
      book.writestr(f'OEBPS/text/chapter {n}.xhtml', (
          '<?xml version="1.0" encoding="utf-8"?><html xmlns="http://www.w3.org/1999/xhtml"><head>'
          f'<title>x</title></head><body><h1>Chapter {n}</h1><ul><li>one</li></ul>'
          f'<p>{"word " * size}</p></body></html>'))
  return path


@pytest.mark.supports('documents', 'WARC and ARC, plain, gz or zst')
def test_archives_of_the_web(tmp_path):
  folder = raw('warc')
  documents, faults = read(folder / 'ai2-cc-sample.warc.gz')
  assert len(documents) == 10 and not faults
  page = documents[3]
  assert page.name == 's/ai2-cc-sample.warc.gz:9' and page.media_type == 'text/html'
  assert page.url.startswith('https://creativecommons.org/2024/04/23/') and page.charset == 'utf-8'
  assert page.date == '2024-04-25T16:27:49Z' and page.raw.lstrip().startswith(b'<!DOCTYPE html>')
  inflated = gzip.decompress((folder / 'ai2-cc-sample.warc.gz').read_bytes())
  (tmp_path / 'a.warc').write_bytes(inflated)
  (tmp_path / 'b.warc.zst').write_bytes(zstandard.compress(inflated))
  (tmp_path / 'c.warc.gz').write_bytes(gzip.compress(inflated))  # One member of all records.
  for name in ('a.warc', 'b.warc.zst', 'c.warc.gz'):
    again, faults = read(tmp_path / name)
    assert [d.raw for d in again] == [d.raw for d in documents] and not faults
  # A gzip body, one in chunks, one that says so and is not, and an ARC.
  for name in ('example.warc.gz', 'example.arc.gz', 'example-wrong-chunks.warc.gz',
               'example-iana.org-chunked.warc', 'example-bad-non-chunked.warc.gz'):
    (page,), faults = read(folder / 'warcio' / name)
    assert page.raw.startswith(b'<!doctype html>') and page.raw.rstrip().endswith(b'</html>')
    assert page.date[:2] == '20' and page.url.startswith('http://') and not faults, name


@pytest.mark.supports('documents', 'dumps of Wikipedia (XML, bz2, gz or plain)')
def test_dumps_of_wikipedia(tmp_path):
  path = raw('enwiki-xml') / 'enwiki-shortened.xml.bz2'
  documents, faults = read(path)
  assert len(documents) == 106 and [reason for _, reason in faults] == [
      'has redirects (99)', 'has pages that are no articles (1)']
  article = documents[0]
  assert (article.name, article.title) == ('s/enwiki-shortened.xml.bz2:12', 'Anarchism')
  assert article.url == 'https://en.wikipedia.org/wiki/Anarchism' and article.language == 'en'
  assert article.media_type == 'text/x-wiki' and article.date == '2016-04-22T10:19:33Z'
  plain = bz2.decompress(path.read_bytes())
  (tmp_path / 'a.xml').write_bytes(plain)
  assert [d.raw for d in read(tmp_path / 'a.xml')[0]] == [d.raw for d in documents]


@pytest.mark.parametrize('suffix, pack', [
    ('', bytes), ('.gz', gzip.compress), ('.zst', zstandard.compress), ('.bz2', bz2.compress),
    ('.xz', lzma.compress)], ids=['plain', 'gz', 'zst', 'bz2', 'xz'])
@pytest.mark.supports('documents', 'jsonl, plain, gz, zst, bz2 or xz')
def test_lines_of_a_large_file_are_each_read_once(tmp_path, suffix, pack):
  lines = jsonl(6000, 3000)  # 18 MB: several blocks.
  path = tmp_path / f'a.jsonl{suffix}'
  path.write_bytes(pack(lines[:9_000_001]) + pack(lines[9_000_001:]))
  (group,) = collect.groups([collect.Source('s', str(path))])
  blocks = list(collect.split(group, print))
  assert len(blocks) >= 2 and max(block.size for block in blocks) < 9 << 20
  documents, faults = read(path)
  assert [d.name for d in documents] == [f's/a.jsonl{suffix}:{n}' for n in range(1, 6001)]
  assert documents[4321].text.startswith('line 4322 ') and documents[9].url == 'http://e/10'
  assert not faults


@pytest.mark.supports('documents', 'Parquet, Arrow, ArrayRecord, directories as of Hugging Face')
def test_tables_and_directories(tmp_path):
  arrow = pytest.importorskip('pyarrow')
  from array_record.python import array_record_module
  import pyarrow.parquet

  rows = [{'text': f'row {n}', 'title': f't{n}', 'lang': 'de', 'score': n} for n in range(1, 3001)]
  table = arrow.Table.from_pylist(rows)
  folder = tmp_path / 'set' / 'data'
  folder.mkdir(parents=True)
  (tmp_path / 'set' / 'README.md').write_text('# card')
  (tmp_path / 'set' / 'dataset_infos.json').write_text('{}')
  arrow.parquet.write_table(table, folder / 'a.parquet', row_group_size=700)
  with arrow.OSFile(str(folder / 'b.arrow'), 'wb') as sink:
    with arrow.ipc.new_stream(sink, table.schema) as stream:
      stream.write_table(table, max_chunksize=500)
  with arrow.OSFile(str(folder / 'c.arrow'), 'wb') as sink:
    with arrow.ipc.new_file(sink, table.schema) as stream:
      stream.write_table(table, max_chunksize=500)
  writer = array_record_module.ArrayRecordWriter(str(folder / 'd.array_record'), 'group_size:8')
  for row in rows:
    writer.write(json.dumps(row).encode())
  writer.close()
  documents, faults = read(tmp_path / 'set')
  assert not faults and len(documents) == 12000
  for letter, first in zip('abcd', range(0, 12000, 3000)):
    document = documents[first + 1234]
    assert document.name.split(':') == [
        f's/{letter}.' + {'a': 'parquet', 'd': 'array_record'}.get(letter, 'arrow'), '1235']
    assert (document.text, document.title, document.language) == ('row 1235', 't1235', 'de')
  assert read(tmp_path / 'set/data/a.parquet', text_key='title')[0][0].text == 't1'


@pytest.mark.supports('documents', 'EPUB, HTML, Markdown, plain text')
def test_files_that_are_one_document(tmp_path):
  epub(tmp_path / 'a.epub')
  (tmp_path / 'b.html').write_bytes(b'<p>page</p>')
  (tmp_path / 'c.md').write_bytes(b'# page')
  (tmp_path / 'd.txt.gz').write_bytes(gzip.compress(b'caf\xe9'))
  documents, faults = read(tmp_path / '*', licence='CC0-1.0', language='fr')
  assert not faults and [d.media_type for d in documents] == [
      'application/epub+zip', 'text/html', 'text/markdown', 'text/plain']
  book = documents[0]
  assert (book.title, book.language, book.licence) == ('A Book', 'de', 'CC0-1.0')
  assert book.raw.index(b'Chapter 2') < book.raw.index(b'Chapter 1')
  assert documents[3].raw == b'caf\xe9' and documents[3].language == 'fr'


@pytest.mark.slow
@pytest.mark.supports('documents', 'TensorFlow Datasets that lie prepared')
def test_data_sets_of_tfds(tmp_path):
  """In a process of its own, since TensorFlow stays in one that imports it."""
  pytest.importorskip('tensorflow_datasets')
  code = '''
import sys, tensorflow_datasets as tfds
from lm.corpus import collect
rows = [{'text': f'example {n}', 'url': 'http://e'} for n in range(5)]
class Toy(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')
  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
        {'text': tfds.features.Text(), 'url': tfds.features.Text()}), disable_shuffling=True)
  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}
  def _generate_examples(self):
    yield from enumerate(rows)
Toy(data_dir=sys.argv[1]).download_and_prepare()
for group in collect.groups([collect.Source('s', sys.argv[1], tfds='toy:train')]):
  for block in collect.split(group, print):
    for document in collect.read(block, print):
      print('READ', document.name, document.text, document.url)
'''
  done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True,
                        env=dict(os.environ, TF_CPP_MIN_LOG_LEVEL='3'))
  found = [line for line in done.stdout.splitlines() if line.startswith('READ')]
  assert found == [f'READ s/toy:train:{n + 1} example {n} http://e' for n in range(5)], done.stderr


def test_blocks_are_of_one_size_and_in_the_order_of_sources_and_paths(tmp_path):
  for index in range(300):
    (tmp_path / f'{index:03d}.txt').write_text('x' * 100_000)
  sources = [collect.Source('b', str(tmp_path / '2*')),
             collect.Source('a', str(tmp_path / '[01]*'))]
  groups = collect.groups(sources)
  names = [file.name for group in groups for file in group.files]
  assert names == [f'b/2{n:02d}.txt' for n in range(100)] + [f'a/{n:03d}.txt' for n in range(200)]
  blocks = [block for group in groups for block in collect.split(group, print)]
  assert len(blocks) == 8 and max(block.size for block in blocks) <= PIECE_BYTES
  assert groups == collect.groups(sources) and len({group.key for group in groups}) == len(groups)
  before = groups[0].key
  (tmp_path / '200.txt').write_text('changed')
  assert collect.groups(sources)[0].key != before


def test_names_do_not_depend_on_where_the_files_lie(tmp_path):
  for root in ('one', 'two/deeper'):
    (tmp_path / root / 'p').mkdir(parents=True)
    (tmp_path / root / 'p' / 'a.jsonl').write_bytes(jsonl(2))
    (tmp_path / root / 'b.txt').write_bytes(b'b')
  assert [d.name for d in read(tmp_path / 'one')[0]] == [
      's/b.txt', 's/p/a.jsonl:1', 's/p/a.jsonl:2']
  assert read(tmp_path / 'one')[0] == read(tmp_path / 'two')[0]


def test_a_link_without_suffix_behind_it_is_read_by_its_own(tmp_path):
  """As the cache of Hugging Face's hub is laid out."""
  (tmp_path / 'blob').write_bytes(jsonl(2))
  (tmp_path / 'snapshot').mkdir()
  os.symlink(tmp_path / 'blob', tmp_path / 'snapshot' / 'train.jsonl')
  assert len(read(tmp_path / 'snapshot')[0]) == 2


@pytest.mark.parametrize('form', ['array_record', 'parquet', 'jsonl'])
@pytest.mark.supports('documents', 'the shards that `lm corpus` writes')
def test_a_corpus_is_read_by_its_own_names(tmp_path, form):
  documents = [Document(f'web/a.warc.gz:{n}', f'text {n}', source='web', language='en')
               for n in range(100)]
  write.Writer(format=form).write(tmp_path / 'web-00000-of-00001', documents)
  found = list(collect.documents(str(tmp_path / '*')))
  assert [(d.name, d.text) for d in found] == [(d.name, d.text) for d in documents]
  (shard,) = tmp_path.iterdir()
  shard.write_bytes(shard.read_bytes()[:-9])
  with pytest.raises(UserError, match='truncated or damaged'):
    list(collect.documents(str(shard)))


@pytest.mark.parametrize('settings, sentence', [
    ({'name': 'a b'}, "name='a b' must be letters"), ({'format': 'pdf'}, "format='pdf' is not one"),
    ({'weight': 0.0}, 'weight=0.0 must be positive'), ({'files': 'nothing*'}, 'matches no file'),
    ({'files': ()}, 'names no file'), ({'max_document_bytes': 0}, 'max_document_bytes=0 must be')])
def test_a_wrong_source_is_told_in_one_sentence(tmp_path, monkeypatch, settings, sentence):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a.txt').write_text('a')
  with pytest.raises(UserError, match=sentence):
    collect.groups([collect.Source(**({'name': 's', 'files': 'a.txt'} | settings))])


def test_sources_need_different_names(tmp_path):
  (tmp_path / 'a.txt').write_text('a')
  source = collect.Source('s', str(tmp_path / 'a.txt'))
  with pytest.raises(UserError, match='different names'):
    collect.groups([source, source])


def test_raw_archives_are_no_text_to_train_on(tmp_path):
  epub(tmp_path / 'a.epub')
  with pytest.raises(UserError, match='lm corpus'):
    list(collect.documents(str(tmp_path / 'a.epub')))
  shutil.copy(tmp_path / 'a.epub', tmp_path / 'a.warc')
  with pytest.raises(UserError, match='lm corpus'):
    list(collect.documents(str(tmp_path / 'a.warc')))
