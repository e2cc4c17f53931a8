"""Vocabularies lose nothing, are the same whenever trained, and say when they cannot be."""

import pickle

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from lm.corpus.document import Document
from lm.data import vocabularies
from lm.data import vocabulary_training
from lm.errors import UserError

_LINES = [
    'def __init__(self, x=0):\n        self._x = x\n',
    '\tif not self._x and None is not x:\r\n            return 12345\n',
    'Ein Satz mit Umlauten äöü und 日本語 🎉.\n\n',
    'for name in names: print(name)\n',
]
_DOCUMENTS = [Document(f'{n}', ''.join(_LINES[(n * k) % 4] for k in range(40))) for n in range(9)]
_HARD = [
    '', ' ', '  lead', 'trail  ', '\n', '\t\t x', '\r\n', 'a\0b', '\u2581', 'a\u2581 \u2581b',
    '\uf8f1s\uf8f1e\uf8f1', '<s>', '</s>', '<unk>', '<pad>', '<0x41>', '<0x0A>', '日本語🎉',
    '\ufffd\ufeff', '\u2585\u2047', '\x85\u2028\u2029', 'e\u0301', 'x' * 9000, ' ' * 9000,
]  # fmt: skip

_ALPHABET = ' \n\t\r\0\u2581\uf8f1se<>0x41_a日'


def _train(kind, size=300, documents=_DOCUMENTS):
  total = sum(len(document.text.encode()) for document in documents)
  return vocabulary_training.train(vocabularies.VocabularyConfig(kind, size), documents, total)


@pytest.fixture(scope='module')
def trained():
  return {kind: _train(kind) for kind in ('bpe', 'unigram', 'byte')}


@pytest.mark.supports('vocabularies', 'BPE', 'unigram', 'bytes')
@pytest.mark.parametrize('kind', ['bpe', 'unigram', 'byte'])
@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet=_ALPHABET), st.sampled_from(_HARD)))
def test_decoding_returns_every_text(trained, kind, text):
  vocabulary = trained[kind]
  ids = vocabulary.encode(text)
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert vocabulary.decode(ids) == text
  assert not ids.size or (ids.min() > vocabulary.unk_id and ids.max() < vocabulary.size)


@pytest.mark.parametrize('kind', ['bpe', 'unigram', 'byte'])
def test_decoding_accepts_every_id(trained, kind):
  vocabulary = trained[kind]
  assert isinstance(vocabulary.decode(range(-3, vocabulary.size + 3)), str)
  assert vocabulary.decode([vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id]) == ''


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_training_again_gives_the_same_vocabulary(trained, kind):
  assert _train(kind).digest == trained[kind].digest


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_words_apart_are_encoded_as_in_the_whole_text(trained, kind):
  vocabulary = trained[kind]
  for text in (document.text for document in _DOCUMENTS):
    assert vocabulary.encode(text).tolist() == vocabulary._processor.encode(text)


def test_forgetting_known_words_changes_nothing(trained, monkeypatch):
  monkeypatch.setattr(vocabularies, '_MOST_KNOWN_WORDS', 0)
  for text in (document.text for document in _DOCUMENTS):
    assert trained['bpe'].decode(trained['bpe'].encode(text)) == text


@pytest.mark.parametrize('kind', ['bpe', 'unigram', 'byte'])
def test_saving_and_pickling_keep_the_vocabulary(trained, kind, tmp_path):
  vocabulary, text = trained[kind], _DOCUMENTS[1].text
  vocabulary.save(tmp_path)
  for copy in (vocabularies.load(tmp_path), pickle.loads(pickle.dumps(vocabulary))):
    assert copy.digest == vocabulary.digest and copy.size == vocabulary.size
    np.testing.assert_array_equal(copy.encode(text), vocabulary.encode(text))


def test_a_damaged_model_is_refused(trained, tmp_path):
  trained['bpe'].save(tmp_path)
  path = tmp_path / 'vocabulary.model'
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  with pytest.raises(UserError, match='damaged'):
    vocabularies.load(tmp_path)


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_too_large_a_size_names_the_largest_that_works(kind):
  documents = [Document('a', 'the cat sat on the mat ' * 20)]
  with pytest.raises(UserError, match=r'size=400 is too large .* set it to \d+ or less') as caught:
    _train(kind, 400, documents)
  largest = int(str(caught.value).split('set it to ')[1].split()[0])
  assert _train(kind, largest, documents).size == largest


def test_more_characters_than_pieces_are_spelt_in_bytes():
  text = ''.join(map(chr, range(0x4E00, 0x4E00 + 2000))) + 'ab ab ab ' * 200
  vocabulary = _train('bpe', 300, [Document('han', text)])
  assert vocabulary.size == 300 and vocabulary.decode(vocabulary.encode(text)) == text


def test_a_config_out_of_range_is_refused():
  with pytest.raises(UserError, match='size=100 is too small'):
    vocabularies.VocabularyConfig(size=100)
  with pytest.raises(UserError, match="kind='words'"):
    vocabularies.VocabularyConfig(kind='words')
