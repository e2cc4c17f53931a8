"""Choices, shown examples, and documents beside the right one, in each form."""
import json

import numpy as np
import pytest

from lm.data import examples
from lm.data.examples import forms
from lm.data.examples import rows
from lm.data.vocabularies import VocabularyConfig
from lm.errors import UserError

BYTES = VocabularyConfig('byte')
CHOICES = [{'id': f'c{i}', 'context': f'two and {i} make', 'label': i % 3,
            'continuations': ['five', 'a lot of numbers', str(2 + i)][:2 + (i % 3 == 2)]}
           for i in range(3)] + [
    {'id': 'none', 'contexts': ['', ''], 'continuations': ['He runs.', 'He run.'], 'label': 0}]
CHOICES[1]['label'] = 1
TEMPLATE = examples.Template('Say: {context}', ' {continuation}')


def task_of(tmp_path, records, kind, **changes):
  for split in ('train', 'validation'):
    lines = [json.dumps(record) + '\n' for record in records]
    (tmp_path / f'{split}.jsonl').write_text(''.join(lines if split == 'train' else lines[:2]))
  source = examples.Files(str(tmp_path / 'train.jsonl'), str(tmp_path / 'validation.jsonl'))
  return examples.ExampleTask(source, kind, vocabulary=BYTES, cache_dir=str(tmp_path / 'cache'),
                              **changes)


def prepare(*args, **changes):
  return task_of(*args, **changes).prepare(progress=False)


@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('length', [100, 41])
def test_each_choice_is_a_segment_and_one_of_an_example_is_right(tmp_path, packed, length):
  prepared = prepare(tmp_path, CHOICES, examples.MultipleChoice(), packed=packed)
  cache, stream, seen = prepared.cache('train'), prepared.rows('train', length, 0), []
  for row in range(len(stream)):
    features, members, segment = stream[row], stream.members(row), 0
    assert len(members) == 1 or packed and length == 100
    assert features['class_weights'].sum() == features['encoder_segment_ids'].max()
    for i in members:
      example = cache.example(int(i))
      seen.append(example['id'])
      for place, continuation in enumerate(example['continuations']):
        ids = features['encoder_input_tokens'][features['encoder_segment_ids'] == segment + 1]
        assert features['class_labels'][segment] == (place == example['label'])
        text = prepared.vocabulary.decode(ids)
        whole = example['contexts'][place] + continuation
        assert text == whole if length == 100 else (ids[0], ids[-1]) == (260, 259)
        segment += 1
  assert sorted(seen) == ['c0', 'c1', 'c2', 'none']


def test_a_model_that_writes_learns_the_right_continuation(tmp_path):
  prepared = prepare(tmp_path, CHOICES, examples.MultipleChoice(), form='decoder',
                     template=TEMPLATE)
  encoded = [prepared.cache('train').encoded(i) for i in range(4)]
  decode = prepared.vocabulary.decode
  assert [decode(e.a) + decode(e.targets) for e in encoded] == [
      'Say: two and 0 make five', 'Say: two and 1 make a lot of numbers',
      'Say: two and 2 make 4', 'Say:  He runs.']
  assert prepared.form.template.choices(prepared.cache('train').example(0)) == [
      ('Say: two and 0 make', ' five'), ('Say: two and 0 make', ' a lot of numbers')]


TEXTS = [{'id': str(i), 'a': f'text {i}', 'label': 'odd' if i % 2 else 'even'} for i in range(9)]


def shots_of(tmp_path, shots, seed=0, form='decoder'):
  template = examples.Template('{a}:', ' {label}', shots=shots, shots_seed=seed)
  return prepare(tmp_path, TEXTS, examples.Classification(), form=form, template=template)


@pytest.mark.supports('evaluation', 'few-shot prompts of training examples, chosen by a seed')
def test_shown_examples_are_the_same_for_all_and_never_the_example_itself(tmp_path):
  prepared, pool = shots_of(tmp_path, 3), set()
  cache, template = prepared.cache('train'), prepared.form.template
  for i in range(9):
    *shown, own = template.prompt(cache.example(i)).split('\n\n')
    assert own == f'text {i}:' and len(set(shown)) == 3
    assert not any(line.startswith(own) for line in shown)
    pool |= set(shown)
    assert prepared.vocabulary.decode(cache.encoded(i).a) == '\n\n'.join([*shown, own])
  assert len(pool) == 4
  assert all(int(line[5]) % 2 == (line[8:] == 'odd') for line in pool)
  again = shots_of(tmp_path, 3).form.template.prompt(cache.example(0))
  assert again == template.prompt(cache.example(0))
  others = {shots_of(tmp_path, 3, seed).form.template.prompt(cache.example(0)) for seed in range(5)}
  assert len(others) > 2


def test_a_target_is_parted_from_its_prompt_among_shown_examples(tmp_path):
  template = examples.Template('{a}:', '{label}', shots=1)
  prepared = prepare(tmp_path, TEXTS, examples.Classification(), form='text_to_text',
                     template=template)
  prompt = prepared.form.template.prompt({'id': 'x', 'a': 'new', 'label': 'odd'})
  shown, own = prompt.split('\n\n')
  assert own == 'new:' and shown[6:] in (': odd', ': even')


def test_more_shots_than_training_examples_are_refused(tmp_path):
  with pytest.raises(UserError, match='shots=9 must be fewer than the training examples'):
    shots_of(tmp_path, 9)


DOCUMENTS = [{'query': f'query {i}', 'documents': [f'right {i}', *(f'wrong {i} {j}' * (j + 1)
                                                                  for j in range(1 + i % 2))]}
             for i in range(4)]


def test_negatives_are_those_that_every_example_has(tmp_path):
  prepared = prepare(tmp_path, DOCUMENTS, examples.Retrieval(), form='embedder')
  batch = prepared.loader('train', 40, 4, 0).batch(0)
  decode = prepared.vocabulary.decode
  assert batch['query_tokens'].shape == (4, 40) and batch['negative_tokens'].shape == (4, 1, 40)
  for query, document, negatives in zip(*(batch[f'{name}_tokens'] for name in
                                          ('query', 'document', 'negative'))):
    number = decode(query)[-1]
    assert decode(document) == f'right {number}' and decode(negatives[0]) == f'wrong {number} 0'
  assert '2 of 4' in prepared.tell('train', 19) and prepared.tell('train', 40) is None


def test_documents_without_others_have_no_negatives(tmp_path):
  records = [record | {'documents': record['documents'][:1]} for record in DOCUMENTS]
  batch = prepare(tmp_path, records, examples.Retrieval(), form='embedder').loader(
      'train', 30, 2, 0).batch(0)
  assert sorted(batch) == ['document_tokens', 'query_tokens']
  assert np.count_nonzero(batch['document_tokens'][0]) == 2 + len('right 0')


def test_a_label_may_be_its_place_and_a_number_may_be_formatted():
  kind = examples.Classification(('no', 'yes'))
  assert [kind.canonical({'a': 'x', 'label': label})['label'] for label in (0, '1', 'no', 2)] == [
      'no', 'yes', 'no', '2']
  tags = examples.Tagging(('O', 'B-X')).canonical({'words': ['a', 'b'], 'tags': [1, 'O']})
  assert tags['tags'] == ['B-X', 'O']
  assert examples.Template('', '{score:.1f}').target({'score': 3.26}) == '3.3'
  question = {'answers': [], 'question': 'q', 'context': 'c'}
  assert examples.Template('', '{answer}').target(question) == 'unanswerable'


@pytest.mark.parametrize('example, prompt, target', [
    ({'a': 'x', 'label': 'l'}, 'x', 'l'), ({'a': 'x', 'b': 'y', 'label': 'l'}, 'x y', 'l'),
    ({'a': 'x', 'b': 'y', 'score': 2.5}, 'x y', '2.5'),
    ({'words': ['v', 'w'], 'tags': ['O', 'B']}, 'v w', 'O B'),
    ({'question': 'q', 'context': 'c', 'answers': ['p'], 'starts': [0]}, 'q c', 'p'),
    ({'source': 's', 'targets': ['t', 'u']}, 's', 't'), ({'text': 'w'}, '', 'w'),
    ({'contexts': ['c', 'd'], 'continuations': ['e', 'f'], 'label': 1}, 'd', 'f'),
    ({'query': 'q', 'documents': ['d', 'e']}, 'q', 'd')])
def test_a_kind_has_a_bare_prompt_and_target(example, prompt, target):
  template = examples.Template()
  assert (template.prompt(example), template.target(example)) == (prompt, target)


def test_a_row_holds_no_more_parts_than_it_has_room_for():
  sizes, parts = np.full(30, 3), np.random.default_rng(0).integers(1, 5, 30)
  packed = rows.pack_first_fit(np.arange(30), [sizes, 0 * sizes], forms.Lengths(1000, 1, 6), parts)
  counts = [parts[members].sum() for members in packed]
  assert max(counts) == 6 and sum(counts) == parts.sum() and len(packed) > parts.sum() // 6 - 1


def test_only_line_ends_end_lines(tmp_path):
  texts = ['one\u2028line', 'one\x85more', 'and\x0cmore', 'last']
  (tmp_path / 'a.txt').write_bytes('\r\n'.join(texts).encode())
  (tmp_path / 'b.txt').write_bytes(b'0\n1\n2\n3\n')
  source = examples.Files(str(tmp_path / 'a.txt'), aligned=(('label', 'a.', 'b.'),))
  found = [(record['text'], record['label']) for _, record in source.records('train')]
  assert found == list(zip(texts, '0123'))
  (tmp_path / 'b.txt').write_bytes(b'0\n1\n2\n')
  with pytest.raises(UserError, match='is not aligned with 3 lines of label'):
    list(source.records('train'))
