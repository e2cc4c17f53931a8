"""The held-out rule: by name alone, never empty, never everything; fingerprints follow contents."""

import os

from hypothesis import given
from hypothesis import strategies as st
import pytest

from lm.corpus.document import Document
from lm.data import splits
from lm.errors import UserError


def _split(documents, fraction):
  rule = splits.survey(iter(documents), fraction)
  return list(splits.split(iter(documents), rule, fraction))


@given(st.sets(st.text(max_size=5), min_size=2, max_size=30), st.floats(0.001, 0.999))
def test_some_are_held_out_and_some_are_not_in_any_order(names, fraction):
  documents = [Document(name, 'text') for name in sorted(names)]
  found = _split(documents, fraction)
  assert [document for _, document in found] == documents
  assert {part for part, _ in found} == {'train', 'validation'}
  assert sorted(_split(documents[::-1], fraction), key=str) == sorted(found, key=str)


def test_adding_documents_moves_none():
  documents = [Document(f'{n}', 'text') for n in range(2000)]
  found = _split(documents, 0.04)
  assert _split(documents[:1000], 0.04) == found[:1000]
  assert 40 < sum(part == 'validation' for part, _ in found) < 130


def test_of_a_single_document_the_tail_is_held_out_at_a_line():
  text = ''.join(f'line {n}\n' for n in range(1000))
  (_, head), (part, tail) = _split([Document('book', text)], 0.04)
  assert head.text + tail.text == text and head.text.endswith('\n')
  assert (part, tail.name) == ('validation', 'book#tail')
  assert 0.09 < len(tail.text) / len(text) < 0.11


@given(st.text(alphabet='ab \n', min_size=20))
def test_a_single_document_loses_nothing(text):
  try:
    (_, head), (_, tail) = _split([Document('book', text)], 0.5)
  except UserError as error:
    assert 'too few' in str(error)
  else:
    assert head.text + tail.text == text and head.text.strip() and tail.text.strip()


def test_the_fingerprint_follows_names_and_contents(tmp_path):
  files, memo = str(tmp_path / 'texts/*'), tmp_path / 'memo'
  (tmp_path / 'texts').mkdir()
  path = tmp_path / 'texts/a.txt'
  seen = set()
  for change in ('one', 'two', 'eno'):
    path.write_text(change)
    seen.add(splits.fingerprint(files, memo))
  path.rename(path.with_name('b.txt'))
  seen.add(splits.fingerprint(files, memo))
  (tmp_path / 'texts/c.txt').write_text('more')
  seen.add(splits.fingerprint(files, memo))
  assert len(seen) == 5
  assert splits.fingerprint(files, memo) in seen


def test_a_standing_file_is_not_read_again(tmp_path, monkeypatch):
  path = tmp_path / 'a.txt'
  path.write_text('text')
  os.utime(path, (1e9, 1e9))
  first = splits.fingerprint(str(path), tmp_path / 'memo')
  monkeypatch.setattr(splits.hashlib, 'file_digest', None)
  assert splits.fingerprint(str(path), tmp_path / 'memo') == first
  os.utime(path, (1e9, 1e9 + 1))
  with pytest.raises(TypeError):
    splits.fingerprint(str(path), tmp_path / 'memo')
