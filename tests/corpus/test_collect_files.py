"""Files in, documents out, and one sentence for each way in which files can be wrong."""

import gzip
import json
import re

import pytest
import zstandard

from lm.corpus import collect
from lm.errors import UserError


def _write(path, data):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)
  return str(path)


def _jsonl(*texts):
  return ''.join(json.dumps({'text': text}) + '\n' for text in texts).encode()


def _texts(patterns):
  return [(document.name, document.text) for document in collect.documents(patterns)]


@pytest.mark.parametrize(
    'compress', [None, gzip.compress, zstandard.compress], ids=['plain', 'gz', 'zst']
)
@pytest.mark.supports('documents', 'txt, md, py and jsonl, plain, gz or zst')
def test_compressed_files_give_the_same_documents(tmp_path, compress):
  suffix = {None: '', gzip.compress: '.gz', zstandard.compress: '.zst'}[compress]
  pack = compress or (lambda data: data)
  _write(tmp_path / f'a.txt{suffix}', pack('eins\r\nzwei é'.encode()))
  _write(tmp_path / f'b.jsonl{suffix}', pack(_jsonl('one', '', 'two\nlines')))
  found = _texts(str(tmp_path / '*'))
  assert [text for _, text in found] == ['eins\r\nzwei é', 'one', 'two\nlines']
  assert [name for name, _ in found][1:] == [f'b.jsonl{suffix}:1', f'b.jsonl{suffix}:3']


def test_patterns_recurse_overlap_and_keep_the_order_of_paths(tmp_path):
  for name in ('z.md', 'a/b/c.py', 'a/x.txt'):
    _write(tmp_path / name, name.encode())
  patterns = (str(tmp_path / '**' / '*'), str(tmp_path / 'z.md'))
  assert _texts(patterns) == [(name, name) for name in ('a/b/c.py', 'a/x.txt', 'z.md')]


def test_names_do_not_depend_on_where_the_files_lie(tmp_path):
  for root in ('one', 'two/deeper'):
    _write(tmp_path / root / 'p/a.txt', b'a')
    _write(tmp_path / root / 'q/b.txt', b'b')
  assert _texts(str(tmp_path / 'one/**/*.txt')) == _texts(str(tmp_path / 'two/deeper/**/*.txt'))


def test_several_zstd_frames_are_read_to_the_end(tmp_path):
  frames = zstandard.compress(_jsonl('one')) + zstandard.compress(_jsonl('two'))
  path = _write(tmp_path / 'a.jsonl.zst', frames)
  assert [text for _, text in _texts(path)] == ['one', 'two']


@pytest.mark.parametrize(
    'name, data, sentence',
    [
        ('a.txt', b'caf\xe9 noir', r'not UTF-8: byte 0xe9 at offset 3.*iconv'),
        ('a.jsonl', _jsonl('ok') + b'{"text": "\xff"}\n', r'byte 0xff at offset 25'),
        ('a.jsonl', _jsonl('ok') + b'{"text": \n', r'a\.jsonl:2 is not JSON'),
        ('a.jsonl', b'{"body": "x"}\n', r'a\.jsonl:1 has no string under the key "text"'),
        ('a.jsonl', b'[1]\n', r'a\.jsonl:1 has no string'),
        ('a.jsonl', b'{"text": "\\ud800"}\n', r'a\.jsonl:1 holds a lone surrogate U\+D800'),
        ('a.txt.gz', gzip.compress(b'x' * 9999, mtime=0)[:-9], r'truncated or damaged'),
        ('a.txt.gz', b'no archive', r'truncated or damaged'),
        ('a.txt.zst', zstandard.compress(b'0123456789' * 99)[:-5], r'truncated or damaged'),
        ('a.txt.zst', b'no archive', r'truncated or damaged'),
        ('a.txt', b' \n', r'corpus is empty'),
    ],
)
def test_a_wrong_file_is_named_in_one_sentence(tmp_path, name, data, sentence):
  path = _write(tmp_path / name, data)
  with pytest.raises(UserError, match=sentence) as caught:
    _texts(path)
  assert str(caught.value).count('\n') == 0
  assert re.search(re.escape(name), str(caught.value))


def test_a_pattern_without_match_is_an_error(tmp_path):
  with pytest.raises(UserError, match=r"nothing\*.*matches no file"):
    _texts(str(tmp_path / 'nothing*'))
  with pytest.raises(UserError, match='names no file'):
    _texts(())


def test_jsonl_is_streamed(tmp_path):
  """The first documents arrive although a later line is broken: nobody read to the end."""
  path = _write(tmp_path / 'a.jsonl', _jsonl('one', 'two') + b'broken')
  stream = collect.documents(path)
  assert [next(stream).text, next(stream).text] == ['one', 'two']
  with pytest.raises(UserError):
    next(stream)
