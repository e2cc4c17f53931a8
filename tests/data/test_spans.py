"""Answers that stand in a text: characters to tokens, windows, and back to characters."""
import json
import pathlib

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from lm.corpus.document import Document
from lm.data import examples
from lm.data import pretrained_vocabularies
from lm.data import vocabularies
from lm.data import vocabulary_training
from lm.data.examples import convert
from lm.data.examples import forms
from lm.data.examples import spans

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'
BERT = SHARED / 'tokenizers' / 'bert-base-uncased' / 'vocab.txt'
BYTES = vocabularies.VocabularyConfig('byte')
TEXTS = ['the end of points and unicode ab cd ef gh of the end'] * 50


def made(kind):
  documents = [Document(str(i), text) for i, text in enumerate(TEXTS)]
  config = vocabularies.VocabularyConfig(kind, size=270)
  return vocabulary_training.train(config, documents, sum(map(len, TEXTS)))


VOCABULARIES = {'byte': vocabularies.ByteVocabulary, 'bpe': lambda: made('bpe'),
                'unigram': lambda: made('unigram')}


@pytest.fixture(scope='module', params=[*VOCABULARIES, 'tokenizers/bert-base-uncased/vocab.txt',
                                        'tokenizers/gpt2', 'tokenizers/sentencepiece-test'])
def vocabulary(request):
  if request.param in VOCABULARIES:
    return VOCABULARIES[request.param]()
  path = SHARED / request.param
  if not path.exists():
    pytest.skip(f'{path} is not there')
  if path.name == 'sentencepiece-test':
    path = path / 'test_model.model'
  return pretrained_vocabularies.open_pretrained(path)


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.sampled_from('ab end of\n\tü學😀\u2581\uf8f1,.'), max_size=60))
def test_offsets_are_of_the_tokens_that_encode_gives(vocabulary, text):
  ids, offsets = vocabulary.encode_offsets(text)
  assert ids.tolist() == vocabulary.encode(text).tolist()
  assert offsets.shape == (len(ids), 2)
  assert (offsets[:, 0] <= offsets[:, 1]).all() and (np.diff(offsets[:, 0]) >= 0).all()
  assert not len(ids) or offsets.max() <= len(text)
  covered = {i for begin, end in offsets for i in range(begin, end)}
  shown = {i for i, character in enumerate(text) if character not in ' \n\t\u2581\uf8f1'}
  assert shown <= covered


def test_offsets_hold_the_text_of_a_token(vocabulary):
  text = 'The end of 308 points.'
  ids, offsets = vocabulary.encode_offsets(text)
  first, last = spans.tokens_of(offsets, 11, 14)
  assert spans.text_of(text, offsets, first, last) == '308'
  assert vocabulary.decode(ids[first:last + 1]).endswith('08')  # 3 is unknown to one of them.


def prepared_of(tmp_path, file, vocabulary, stride=64):
  source = examples.Files(validation=str(file), convert=convert.squad)
  return examples.ExampleTask(source, examples.SpanExtraction(stride), vocabulary=vocabulary,
                              cache_dir=str(tmp_path)).prepare(progress=False)


def answer_of_labels(prepared, index, length):
  """What `best` makes of logits that are high at an example's own labels."""
  form, lengths = prepared.form, prepared.lengths(length, 'validation')
  example, encoded = (getattr(prepared.cache('validation'), f)(index)
                      for f in ('example', 'encoded'))
  found = []
  for window, part in spans.windows(form, encoded, lengths):
    features = form.features([part], lengths)
    starts, ends = -np.ones((2, length), np.float32)
    starts[features['start_positions']], ends[features['end_positions']] = 5, 5
    found.append((window, starts, ends))
  offsets = prepared.vocabulary.encode_offsets(example['context'])[1]
  return example, spans.best(found, example['context'], offsets, longest=10**6, threshold=0.0).text


@pytest.mark.supports('fine-tuning', 'answers that stand in a text, long texts in windows')
@pytest.mark.parametrize('language, inexact', [('en', 1), ('zh', 0)])
def test_gold_answers_come_back_from_their_labels(tmp_path, language, inexact):
  """BERT's tokens; the inexact answer ends within a word ('2,70' of '2,700')."""
  if not SHARED.exists():
    pytest.skip(f'{SHARED} is not there')
  file = SHARED / 'eval' / 'xquad' / f'xquad.{language}.json.gz'
  prepared = prepared_of(tmp_path, file, vocabularies.VocabularyConfig('pretrained',
                                                                       path=str(BERT)))
  wrong = []
  for i in range(1190):
    example, text = answer_of_labels(prepared, i, 384)
    assert example['answers'][0] in text
    wrong += [text] if text != example['answers'][0] else []
  assert len(wrong) == inexact


QUESTION = {'id': 'q', 'question': 'where?',
            'context': 'In a hole in the ground, near Ulm it lived.',
            'answers': {'text': ['Ulm'], 'answer_start': [30]}}


def written(tmp_path, *records):
  path = tmp_path / 'some.jsonl'
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return path


def test_windows_show_the_whole_context_and_train_without_an_answer_where_it_is_not(tmp_path):
  prepared = prepared_of(tmp_path, written(tmp_path, QUESTION), BYTES, stride=7)
  lengths, encoded = prepared.lengths(30, 'validation'), prepared.cache('validation').encoded(0)
  found = spans.windows(prepared.form, encoded, lengths)
  room = 30 - 3 - len('where?')
  assert [window.first for window, _ in found] == [0, 7, 14, 21, 28][:len(found)]
  assert found[-1][0].first + room >= len(QUESTION['context']) > found[-2][0].first + room
  for window, part in found:
    features = prepared.form.features([part], lengths)
    row = features['encoder_input_tokens']
    text = prepared.vocabulary.decode(row[window.begins:window.begins + window.length])
    assert text == QUESTION['context'][window.first:window.first + room]
    start, end = features['start_positions'], features['end_positions']
    if 'Ulm' in text:
      assert prepared.vocabulary.decode(row[start:end + 1]) == 'Ulm'
    else:
      assert start == end == 0
  assert answer_of_labels(prepared, 0, 30)[1] == 'Ulm'


def test_every_window_is_a_row_of_an_epoch(tmp_path):
  short = QUESTION | {'id': 'r', 'context': 'Ulm.', 'answers': {'text': [], 'answer_start': []}}
  prepared = prepared_of(tmp_path, written(tmp_path, QUESTION, short), BYTES, stride=7)
  stream = prepared.rows('validation', 30, 0)
  found = sorted((int(stream.members(row)[0]), stream.first(row)) for row in range(len(stream)))
  assert found == [(0, 0), (0, 7), (0, 14), (0, 21), (0, 28)][:len(found) - 1] + [(1, 0)]
  batch = prepared.loader('validation', 30, len(found), 0).batch(0)
  assert batch['start_positions'].shape == (len(found),)
  assert {'class_weights', 'class_labels'}.isdisjoint(batch)


def test_an_answer_is_short_ordered_and_beats_no_answer_by_the_threshold():
  context, offsets = 'abcdef', np.stack([np.arange(6), np.arange(1, 7)], 1)
  starts, ends = np.zeros((2, 9), np.float32)
  starts[[4, 5]], ends[[3, 8, 7]] = [3, 2], [9, 5, 2]
  window = [(spans.Window(0, 3, 6), starts, ends)]
  find = lambda **limits: spans.best(window, context, offsets, **limits)
  assert find().text == 'a' and find().score == 9  # Its end would stand before the start of 3.
  ends[3] = 0
  assert find() == spans.Answer('bcdef', 8.0, 0.0)
  assert find(longest=4).text == 'cdef' and find(longest=3).text == 'def'
  starts[0] = 8.5
  assert find(threshold=0.4).text == '' and find(threshold=0.6).text == 'bcdef'
  assert find().text == 'bcdef'


def test_a_question_leaves_half_of_the_row_to_the_context(tmp_path):
  prepared = prepared_of(tmp_path, written(tmp_path, QUESTION | {'question': 'why ' * 50}), BYTES)
  lengths = prepared.lengths(43, 'validation')
  (window, part), *_ = spans.windows(prepared.form, prepared.cache('validation').encoded(0),
                                     lengths)
  assert len(part.a) == 20 and window.begins == 22 and window.length == 20
  assert isinstance(part, forms.Encoded)
