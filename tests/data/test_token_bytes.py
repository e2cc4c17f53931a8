"""The bytes of a vocabulary's tokens are those of the text that it decodes."""
from hypothesis import given, settings, strategies as st
import pytest
from test_pretrained_vocabularies import _TEXTS, opened

from lm.corpus.document import Document
from lm.data import vocabularies, vocabulary_training
from lm.data.token_bytes import token_bytes

TRAINED = ['bpe', 'unigram', 'byte', 'byte_bpe', 'wordpiece']


@pytest.fixture(scope='module')
def tables(opened):
  """(vocabulary, its bytes), of a name."""
  documents = [Document(str(n), text * 3) for n, text in enumerate(_TEXTS)]
  total = sum(len(document.text.encode()) for document in documents)
  known = {}

  def get(name):
    if name not in known:
      config = vocabularies.VocabularyConfig(name, 400, extra_ids=5) if name in TRAINED else None
      vocabulary = (vocabulary_training.train(config, documents, total) if config else opened(name))
      known[name] = vocabulary, token_bytes(vocabulary)
    return known[name]

  return get


NAMES = [*TRAINED, 'gpt2', 'bert', 't5', 'llama2c']


@pytest.mark.supports('vocabularies', 'bytes of tokens')
@pytest.mark.parametrize('name', NAMES)
def test_joined_bytes_are_the_decoded_text(tables, name):
  vocabulary, table = tables(name)
  assert len(table.within) == len(table.first) == vocabulary.size

  @settings(max_examples=150, deadline=None)
  @given(st.lists(st.integers(0, vocabulary.size - 1), max_size=6))
  def check(ids):
    texts = [ids, *(vocabulary.encode(text).tolist() for text in _TEXTS)]
    for ids in texts:
      data = b''.join([*map(table.first.__getitem__, ids[:1]),
                       *map(table.within.__getitem__, ids[1:])])
      if ids and not table.first[ids[0]]:
        continue  # No text begins with it.
      try:
        text = data.decode()
      except UnicodeDecodeError:
        continue
      text = vocabularies.unescape(text) if name in vocabularies.SENTENCEPIECE else text
      assert vocabulary.decode(ids) == text

  check()
