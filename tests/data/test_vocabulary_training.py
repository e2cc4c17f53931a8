"""Trained vocabularies are exact, whatever trains them, and hold what was asked for."""

import dataclasses
import gzip
import itertools
import json
import pickle
import random
import re
import subprocess

from conftest import run_python
from conftest import write_corpus
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import make_tokenizer_references as references
import numpy as np
import pytest

from lm.corpus.document import Document
from lm.data import pretrained_vocabularies
from lm.data import tasks
from lm.data import vocabularies
from lm.data import vocabulary_training
from lm.errors import UserError

_SYMBOLS = ('[NLU]', '[S2S]', '<|im_start|>')
_LINES = [
    'def __init__(self, x=0):\n        self._x = x  # a constructor\n',
    '\tif not self._x and None is not x:\r\n            return 1234567890\n',
    'Ein Satz mit Umlauten äöü, Möglichkeiten und 日本語 🎉.\n\n',
    'The quick brown fox jumps over the lazy dog, 27 times a day; the others jumped 4 times.\n',
    '學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？',
    ' spelt: [NLU] and <unk> [MASK] </s> ▁ \uf8f1\0',
]
_RANDOM = random.Random(0)


def _line():
  """A line of the above, with words of syllables and numbers: there is something to learn."""
  syllable = lambda: _RANDOM.choice('bdfgklmnprst') + _RANDOM.choice(['a', 'e', 'i', 'o', 'ä'])
  words = [''.join(syllable() for _ in range(_RANDOM.randint(1, 3))) for _ in range(6)]
  return f'{_RANDOM.choice(_LINES)}{" ".join(words)} {_RANDOM.choice([1984, 2026])}\n'


_DOCUMENTS = [Document(f'{n}', ''.join(_line() for _ in range(40))) for n in range(9)]
_TEXTS = [
    '', ' ', '  lead', '\n\t x', 'a\0b', '▁ \uf8f1s', 'x[NLU]y [NLU]', '[NL[NLU]U]', '[S2S][S2S]',
    '<|im_start|>the', '<unk></s><pad>[MASK][CLS]', '<extra_id_0>', '<0x41>', 'Ġ', '日本語🎉 fox',
    'é e\u0301 \u200b\ufeff', 'a' * 5000, ' ' * 5000,
]  # fmt: skip
_ANY = st.one_of(st.text(), st.text(alphabet=' \n\0▁[NLUS2]<|unk>日äĠ1'), st.sampled_from(_TEXTS))
_LOSSLESS = ('bpe', 'unigram', 'byte_bpe')


def _config(kind, size=400, **fields):
  options = {'extra_ids': 5, 'user_defined_symbols': _SYMBOLS, **fields}
  return vocabularies.VocabularyConfig(kind, size, **options)


def _train(config, documents=_DOCUMENTS):
  total = sum(len(document.text.encode()) for document in documents)
  return vocabulary_training.train(config, documents, total)


@pytest.fixture(scope='module')
def trained():
  return {kind: _train(_config(kind)) for kind in vocabularies.TRAINED}


@pytest.mark.supports('vocabularies', 'byte-level BPE and WordPiece, trained', 'mode tokens')
@pytest.mark.parametrize('kind', _LOSSLESS)
@settings(max_examples=100, deadline=None)
@given(text=_ANY)
def test_every_text_comes_back_with_symbols_as_one_id(trained, kind, text):
  vocabulary = trained[kind]
  ids = vocabulary.encode(text).tolist()
  assert vocabulary.decode(ids) == text
  special = {vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id}
  assert not special & set(ids) and max(ids, default=0) < vocabulary.size - 5
  for symbol in _SYMBOLS:
    id_, = vocabulary.encode(symbol).tolist()
    assert ids.count(id_) == text.count(symbol)


@pytest.mark.parametrize('kind', vocabularies.TRAINED)
def test_a_vocabulary_has_its_size_sentinels_and_special_ids(trained, kind):
  vocabulary = trained[kind]
  assert (vocabulary.size, vocabulary.extra_ids) == (400, 5)
  assert vocabulary.sentinel_ids == (399, 398, 397, 396, 395)
  if kind == 'wordpiece':
    ids = [getattr(vocabulary, f'{role}_id') for role in ('pad', 'unk', 'cls', 'sep', 'mask')]
    assert ids == [0, 1, 2, 3, 4] and vocabulary.eos_id == 3
    marked = vocabulary.encode_pair('the fox', 'the dog')
    assert (marked.ids[0], marked.ids[-1], marked.token_types[-1]) == (2, 3, 1)
  else:
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=' \nabthe.,;äö日語🎉x12[]'))
def test_wordpiece_gives_back_what_it_knows_but_for_spaces(trained, text):
  """Its normal form has one space where BERT cuts words, and none elsewhere."""
  vocabulary = trained['wordpiece']
  text = ''.join(word for word in text if vocabulary.unk_id not in vocabulary.encode(word))
  ids = vocabulary.encode(text)
  assert vocabulary.unk_id not in ids
  assert ''.join(vocabulary.decode(ids).split()) == ''.join(text.split())


def test_wordpiece_has_no_id_for_unknown_characters_and_none_for_a_spelt_mask(trained):
  vocabulary = trained['wordpiece']
  ids = vocabulary.encode('the жук [MASK] dog').tolist()
  assert ids.count(vocabulary.unk_id) == 1 and vocabulary.mask_id not in ids


_AGAIN = """
import json, sys
from lm.corpus.document import Document
from lm.data import vocabularies, vocabulary_training
documents = [Document(*each) for each in json.load(sys.stdin)]
for kind in ('byte_bpe', 'wordpiece', 'bpe'):
  config = vocabularies.VocabularyConfig(kind, 400, 4_000_000, 5, None, tuple(sys.argv[1:]))
  print(vocabulary_training.train(config, documents, 1).digest)
"""


@pytest.mark.parametrize('threads', ['1', '3'])
def test_other_processes_and_threads_train_the_same(trained, threads, monkeypatch):
  monkeypatch.setenv('RAYON_NUM_THREADS', threads)
  monkeypatch.setenv('PYTHONHASHSEED', threads)
  texts = json.dumps([(document.name, document.text) for document in _DOCUMENTS])
  process = run_python(_AGAIN, *_SYMBOLS, stdin=subprocess.PIPE)
  output, error = process.communicate(texts, timeout=120)
  assert process.returncode == 0, error
  assert output.split() == [trained[kind].digest for kind in ('byte_bpe', 'wordpiece', 'bpe')]


@pytest.fixture(scope='module')
def real():
  """Some 200 kB of English, Chinese and German."""
  shared = references.SHARED
  if not shared.exists():
    pytest.skip(f'{shared} is not there')
  verses = gzip.open(shared / 'lm/kjv-bible/bible-kjv.txt.gz', 'rt').read(60_000)
  pairs = {language: gzip.open(shared / f'mt/tatoeba-eng-{language}/{language}.txt.gz', 'rt')
           for language in ('cmn', 'deu')}
  lines = {language: [line.split('\t')[1] for line in itertools.islice(file, 3000)]
           for language, file in pairs.items()}
  texts = [verses, ''.join(lines['cmn']), ''.join(lines['deu'])]
  return [Document(f'{n}', text) for n, text in enumerate(texts)]


@pytest.mark.parametrize('kind', ['bpe', 'byte_bpe', 'wordpiece'])
def test_what_is_cut_out_of_a_larger_vocabulary_is_what_would_be_trained(kind, real):
  total = sum(len(document.text.encode()) for document in real)
  sentences = list(vocabulary_training.sample(real, total, total))
  config = _config(kind, byte_fallback=kind != 'bpe')
  sizes = [700, 4000, 5000, 5001]  # 700 have no room for all characters, the others have.
  found = vocabulary_training.train_sizes(config, sizes, sentences)
  assert list(found) and {size: each.size for size, each in found.items()} == {n: n for n in sizes}
  for size in sizes:
    alone = vocabulary_training.train(dataclasses.replace(config, size=size), real, total)
    assert alone.digest == found[size].digest


def test_byte_level_bpe_is_the_one_that_tokenizers_trains(real):
  from tokenizers import Tokenizer, models, pre_tokenizers, trainers

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
      [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
  )
  sentences = list(vocabulary_training.sample(real, 1, 1))
  tokenizer.train_from_iterator(sentences, trainers.BpeTrainer(
      vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
  own = _train(vocabularies.VocabularyConfig('byte_bpe', 2003), real)
  for document in real:
    ids = [id_ + 3 for id_ in tokenizer.encode(document.text).ids]
    assert own.encode(document.text).tolist() == ids


def test_vocab_txt_is_read_by_other_wordpiece_tokenizers(real, tmp_path):
  from tokenizers import BertWordPieceTokenizer

  vocabulary = _train(vocabularies.VocabularyConfig('wordpiece', 3000, split_digits=False), real)
  vocabulary.save_pretrained(tmp_path)
  other = BertWordPieceTokenizer(str(tmp_path / 'vocab.txt'), lowercase=False)
  for document in real:
    ids = other.encode(document.text, add_special_tokens=False).ids
    assert vocabulary.encode(document.text).tolist() == ids
    assert ids.count(vocabulary.unk_id) < 0.02 * len(ids)


@pytest.fixture(scope='module')
def exported(trained, tmp_path_factory):
  """What others open: tokenizer.json and tokenizer_config.json."""
  found = {}
  for kind, vocabulary in trained.items():
    directory = tmp_path_factory.mktemp(kind)
    vocabulary.save_pretrained(directory)
    for file in directory.iterdir():
      if file.name not in ('tokenizer.json', 'tokenizer_config.json'):
        file.unlink()
    found[kind] = pretrained_vocabularies.open_pretrained(directory)
  return found


@pytest.mark.parametrize('kind', ['bpe', 'byte_bpe', 'wordpiece'])
@settings(max_examples=60, deadline=None)
@given(text=_ANY)
def test_tokenizer_json_gives_the_same_ids(trained, exported, kind, text):
  assert exported[kind].encode(text).tolist() == trained[kind].encode(text).tolist()
  assert exported[kind].sentinel_ids == trained[kind].sentinel_ids


def test_text_that_spells_the_last_bytes_is_not_them_in_tokenizer_json(tmp_path):
  own = _train(_config('unigram', 500), [*_DOCUMENTS, Document('hex', '< 0 x F E > <0xFF> ' * 300)])
  own.save_pretrained(tmp_path)
  copy = pretrained_vocabularies.open_pretrained(tmp_path / 'tokenizer.json')
  text = '<0xFF>, <0xFE>'
  assert copy.decode(copy.encode(text)) == own.decode(own.encode(text)) == text


@pytest.mark.parametrize('kind', vocabularies.TRAINED)
def test_nothing_is_learnt_of_what_stands_within_a_symbol(kind):
  documents = [*_DOCUMENTS, Document('more', ' <|zqjzqj|>' * 400)]
  vocabulary = _train(_config(kind, user_defined_symbols=('<|zqjzqj|>',)), documents)
  pieces = [vocabulary.decode([id_]) for id_ in range(vocabulary.size)]
  assert [piece for piece in pieces if 'zq' in piece] == ['<|zqjzqj|>']


@pytest.mark.parametrize('kind', vocabularies.TRAINED)
def test_what_is_saved_is_opened_by_its_path_with_more_extra_ids_if_asked(trained, kind, tmp_path):
  vocabulary, text = trained[kind], _DOCUMENTS[3].text
  vocabulary.save(tmp_path)
  same, more = (pretrained_vocabularies.open_pretrained(tmp_path, count) for count in (0, 8))
  assert same.digest == vocabulary.digest and (more.size, more.extra_ids) == (403, 8)
  for copy in (same, more, vocabularies.load(tmp_path), pickle.loads(pickle.dumps(vocabulary))):
    np.testing.assert_array_equal(copy.encode(text), vocabulary.encode(text))
  before = pretrained_vocabularies.digest_of(tmp_path)
  for file in tmp_path.glob('vocabulary.*'):
    file.write_bytes(file.read_bytes() + b' ')
  changed = kind in vocabularies.SENTENCEPIECE
  assert (pretrained_vocabularies.digest_of(tmp_path) != before) == changed


@pytest.mark.supports('vocabularies', 'digits alone or not', 'with or without byte fallback')
@pytest.mark.parametrize('kind', vocabularies.TRAINED)
def test_digits_stand_alone_unless_they_may_not(trained, kind):
  joined = _train(_config(kind, split_digits=False))
  longest = lambda vocabulary: max(
      len(''.join(re.findall(r'\d', vocabulary.decode([id_])))) for id_ in range(vocabulary.size))
  assert (longest(trained[kind]), longest(joined)) in [(1, length) for length in range(2, 11)]


@pytest.mark.parametrize('kind', vocabularies.SENTENCEPIECE)
def test_without_bytes_a_strange_character_is_unknown_and_nothing_else_is_lost(kind, tmp_path):
  vocabulary = _train(_config(kind, 300, byte_fallback=False))
  ids = vocabulary.encode('the жук fox [NLU]').tolist()
  assert ids.count(vocabulary.unk_id) == 1 and vocabulary.decode(ids) == 'the  fox [NLU]'
  assert vocabulary.decode(vocabulary.encode(_LINES[3])) == _LINES[3]
  vocabulary.save_pretrained(tmp_path)
  copy = pretrained_vocabularies.open_pretrained(tmp_path / 'tokenizer.json')
  assert kind == 'unigram' or copy.encode('the жук fox [NLU]').tolist() == ids


@pytest.mark.parametrize('kind', vocabularies.TOKENIZERS)
def test_too_large_a_size_names_the_largest(kind):
  documents = [Document('a', 'the cat sat on the mat ' * 20)]
  with pytest.raises(UserError, match=r'size=900 is too large .* set it to \d+ or less') as caught:
    _train(_config(kind, 900), documents)
  largest = int(str(caught.value).split('set it to ')[1].split()[0])
  assert _train(_config(kind, largest), documents).size == largest


@pytest.mark.parametrize('symbols', [('[NLU]', '[NLU]'), ('a b',), ('é!',), ('<unk>',), ('x',),
                                     ('##a',), ('<extra_id_3>',), ('<0x41>',)])  # fmt: skip
def test_a_symbol_that_cannot_be_one_is_refused(symbols):
  with pytest.raises(UserError, match='of user_defined_symbols must'):
    vocabularies.VocabularyConfig(user_defined_symbols=symbols)
  with pytest.raises(UserError, match='only a vocabulary that is trained'):
    vocabularies.VocabularyConfig('byte', user_defined_symbols=symbols)


def test_a_task_knows_its_vocabulary_by_all_that_trains_it(tmp_path):
  files = write_corpus(tmp_path / 'texts', 2)
  configs = [_config('byte_bpe'), _config('wordpiece'), _config('bpe'), _config('bpe', extra_ids=6),
             _config('bpe', split_digits=False), _config('bpe', byte_fallback=False),
             _config('bpe', user_defined_symbols=()), _config('byte_bpe', 401)]  # fmt: skip
  places = [tasks.locate(tasks.TextTask(files, config, 0.3, str(tmp_path / 'cache'))).vocabulary
            for config in configs]  # fmt: skip
  assert len(set(places)) == len(configs)
