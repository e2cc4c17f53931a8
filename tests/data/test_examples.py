"""Labelled examples: every one of them in its row, as it is alone."""
import dataclasses
import json
import pathlib
import pickle

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.data import examples
from lm.data.examples import forms, rows
from lm.data.vocabularies import VocabularyConfig
from lm.errors import UserError
from lm.models.bert import BERTConfig
from lm.models.heads import ClassifierConfig, DualEncoderConfig, EmbedderConfig
from lm.training.losses import CosineSimilarity, Prediction

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'
BYTES = VocabularyConfig(kind='byte')
WEATHER = ('will it rain', 'is it cold in Ulm today', 'sun?', 'how warm will it be on Sunday')
MUSIC = ('play some jazz', 'louder', 'play the next song of this album please', 'stop it')


def records():
  return [{'text': text, 'intent': intent, 'id': f'{intent}-{i}'}
          for intent, texts in (('weather', WEATHER), ('music', MUSIC))
          for i, text in enumerate(texts)]


def write(path, lines):
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines), 'utf-8')
  return str(path)


def task_of(tmp_path, lines=None, kind=examples.Classification(), name='made', **changes):
  source = examples.Files(write(tmp_path / 'train.jsonl', records() if lines is None else lines),
                          fields=(('a', 'text'), ('label', 'intent')))
  return examples.ExampleTask(**{'source': source, 'kind': kind, 'vocabulary': BYTES,
                                 'cache_dir': str(tmp_path / 'cache'), 'name': name} | changes)


def prepare(*args, **changes):
  return task_of(*args, **changes).prepare(progress=False)


@pytest.mark.supports('data', 'tasks of labelled examples, packed into rows')
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=200), seed=st.integers(0, 99),
       most=st.integers(2, 9))
@settings(max_examples=50, deadline=None)
def test_every_example_stands_in_one_row_that_has_room(sizes, seed, most):
  sizes, lengths = np.array(sizes), forms.Lengths(40, 60, most)
  order = np.random.default_rng(seed).permutation(len(sizes))
  packed = rows.pack_first_fit(order, [sizes, 60 - sizes], lengths)
  assert sorted(np.concatenate(packed).tolist()) == list(range(len(sizes)))
  for members in packed:
    assert sizes[members].sum() <= 40 and (60 - sizes[members]).sum() <= 60 or len(members) == 1
    assert len(members) <= most
  firsts = [np.flatnonzero(order == members[0])[0] for members in packed]
  assert firsts == sorted(firsts)


def test_short_examples_fill_their_rows():
  sizes = np.random.default_rng(0).integers(6, 40, 5000)
  packed = rows.pack_first_fit(np.arange(5000), [sizes, 0 * sizes], forms.Lengths(64, 1, 16))
  assert sizes.sum() / (64 * len(packed)) > 0.95


def test_rows_are_a_function_of_seed_and_row(tmp_path):
  prepared = prepare(tmp_path)
  stream = prepared.rows('train', 64, seed=3)
  first = [stream.members(row).tolist() for row in range(40)]
  again = pickle.loads(pickle.dumps(prepared.rows('train', 64, seed=3)))
  assert [again.members(row).tolist() for row in reversed(range(40))] == first[::-1]
  epoch = len(stream)
  assert sorted(sum(first[:epoch], [])) == list(range(8))
  assert [first[:epoch]] != [first[epoch:2 * epoch]]
  assert [prepared.rows('train', 64, 4).members(row).tolist() for row in range(40)] != first
  whole = prepared.loader('train', 64, 4, seed=3).batch(2)
  own = prepared.loader('train', 64, 4, seed=3).batch(2, slice(1, 3))
  for name, values in own.items():
    np.testing.assert_array_equal(values, whole[name][1:3])


def frame(ids):
  return [256 + 3 + 1, *ids, 256 + 3]


def test_segments_of_a_row_are_its_examples(tmp_path):
  prepared = prepare(tmp_path)
  assert prepared.kind.labels == ('music', 'weather')
  cache, stream = prepared.cache('train'), prepared.rows('train', 80, seed=0)
  for row in range(len(stream)):
    features, members = stream[row], stream.members(row)
    assert features['class_weights'].sum() == len(members)
    for segment, i in enumerate(members, 1):
      example = cache.example(int(i))
      where = features['encoder_segment_ids'] == segment
      ids = features['encoder_input_tokens'][where]
      assert ids[0] == prepared.form.vocab_size - 1 and ids[-1] == prepared.form.vocab_size - 2
      assert prepared.vocabulary.decode(ids[1:-1]) == example['a']
      assert features['encoder_positions'][where].tolist() == list(range(where.sum()))
      label = prepared.kind.labels[features['class_labels'][segment - 1]]
      assert label == example['label'] == example['id'].split('-')[0]


@pytest.mark.parametrize('pooling', ['pooler', 'cls', 'mean', 'last'])
def test_classes_of_packed_examples_are_those_of_each_alone(tmp_path, pooling):
  packed, alone = prepare(tmp_path), prepare(tmp_path, packed=False)
  trunk = BERTConfig(vocab_size=300, max_length=80, d_model=32, num_layers=2, num_heads=2, d_ff=64,
                     masked_lm=False, sentence_classes=0, pooler=pooling == 'pooler',
                     dtype='float32')
  module = ClassifierConfig(trunk, 2, pooling).build()
  params = module.init(jax.random.key(0), method='initialize')['params']
  params = jax.tree.map(lambda x: x + 0.05, params)
  run = jax.jit(lambda batch: module.apply({'params': params}, batch, method='outputs')[0])

  def by_example(prepared):
    stream, found = prepared.rows('train', 80, seed=1), {}
    for row in range(len(stream)):
      classes = run(jax.tree.map(lambda x: x[None], stream[row]))['classes'][0]
      found |= dict(zip(stream.members(row).tolist(), np.asarray(classes)))
    return np.stack([found[i] for i in range(8)]), len(stream)

  (together, count), (apart, alone_count) = by_example(packed), by_example(alone)
  assert count < alone_count == 8
  np.testing.assert_allclose(together, apart, atol=2e-6)
  assert np.ptp(together, axis=0).min() > 1e-4


def test_losses_of_packed_rows_are_sums_over_examples(tmp_path):
  prepared = prepare(tmp_path)
  batch = jax.tree.map(jnp.asarray, prepared.loader('train', 64, 3, seed=0).batch(0))
  logits = np.random.default_rng(0).normal(size=(*batch['class_labels'].shape, 2))
  loss = Prediction()
  total = loss({'classes': jnp.asarray(logits)}, batch)['classes']
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  chosen = np.take_along_axis(log_p, batch['class_labels'][..., None], -1)[..., 0]
  np.testing.assert_allclose(total, -chosen[batch['class_weights'] > 0].sum(), rtol=1e-5)
  assert loss.weights(batch)['classes'] == batch['class_weights'].sum() > 3


TAGS = [{'words': ['Ann', 'lives', 'in', 'Ulm'], 'tags': ['PER', 'O', 'O', 'LOC']},
        {'words': ['Hello'], 'tags': ['O']}]


def vocabulary_of(folder):
  """A vocabulary of another project; skips where it is not."""
  path = SHARED / 'tokenizers' / folder
  if not path.exists():
    pytest.skip(f'{folder} is not beside the repository')
  return VocabularyConfig(kind='pretrained', path=str(path))


@pytest.mark.supports('fine-tuning', 'sequence labelling: a tag on the first token of each word')
@pytest.mark.parametrize('folder', ['bert-base-uncased', 'sentencepiece-test/test_model.model',
                                    None])
def test_the_first_token_of_a_word_has_its_tag(tmp_path, folder):
  vocabulary = vocabulary_of(folder) if folder else BYTES
  prepared = prepare(tmp_path, TAGS, examples.Tagging(), vocabulary=vocabulary)
  stream = prepared.rows('train', 64, seed=0)
  features, members = stream[0], stream.members(0)
  assert len(stream) == 1 and prepared.kind.labels == ('LOC', 'O', 'PER')
  expected = [pair for i in members for pair in zip(TAGS[i]['words'], TAGS[i]['tags'])]
  starts = np.flatnonzero(features['tag_weights'])
  assert len(starts) == len(expected)
  special = {int(id_) for frame in prepared.form._frames[0] for id_ in frame}
  for start, end, (word, tag) in zip(starts, [*starts[1:], 64], expected):
    ids = [id_ for id_ in features['encoder_input_tokens'][start:end] if id_ not in special | {0}]
    text = prepared.vocabulary.decode(ids).strip()
    assert text in (word, word.lower())
    assert prepared.kind.labels[features['tag_labels'][start]] == tag


@pytest.mark.parametrize('pair', [False, True])
def test_texts_are_framed_as_their_vocabulary_frames_them(tmp_path, pair):
  lines = [{'text': text, 'intent': 'x', **({'b': 'the other, longer text'} if pair else {})}
           for text in WEATHER]
  prepared = prepare(tmp_path, lines, vocabulary=vocabulary_of('bert-base-uncased'), packed=False)
  cache, stream = prepared.cache('train'), prepared.rows('train', 64, seed=0)
  for row in range(4):
    example, features = cache.example(int(stream.members(row)[0])), stream[row]
    marked = prepared.vocabulary.encode_pair(example['a'], example.get('b'))
    size = len(marked.ids)
    assert features['encoder_input_tokens'][:size].tolist() == marked.ids.tolist()
    assert features['encoder_token_types'][:size].tolist() == marked.token_types.tolist()
    assert features['encoder_segment_ids'].sum() == size


def test_a_pair_that_is_too_long_loses_of_its_longer_text(tmp_path):
  lines = [{'text': 'short one', 'intent': 'x', 'b': 'word ' * 10_000}]
  prepared = prepare(tmp_path, lines, vocabulary=vocabulary_of('bert-base-uncased'))
  ids = prepared.rows('train', 32, seed=0)[0]['encoder_input_tokens']
  told = prepared.vocabulary.decode(ids)
  assert told == 'short one ' + ' '.join(['word'] * 27) and ids[-1] == prepared.vocabulary.sep_id
  assert '1 of 1 train examples' in prepared.tell('train', 32)
  assert prepared.tell('train', 20_000) is None


TEMPLATE = examples.Template('intent: {a}', '{label}', (('music', 'tune'),))


def test_text_to_text_asks_by_the_template(tmp_path):
  prepared = prepare(tmp_path, form='text_to_text', template=TEMPLATE, target_length=24)
  stream, text = prepared.rows('train', 80, seed=0), prepared.vocabulary.decode
  for row in range(len(stream)):
    features = stream[row]
    for segment, i in enumerate(stream.members(row), 1):
      example = prepared.cache('train').example(int(i))
      ids = features['encoder_input_tokens'][features['encoder_segment_ids'] == segment]
      assert text(ids) == f'intent: {example["a"]}' and ids[-1] == prepared.vocabulary.eos_id
      where = features['decoder_segment_ids'] == segment
      word = {'music': 'tune'}.get(example['label'], example['label'])
      assert text(features['decoder_target_tokens'][where]) == word
      assert features['decoder_input_tokens'][where][0] == 0
      assert features['decoder_loss_weights'][where].all()


def test_a_decoder_learns_the_target_alone(tmp_path):
  template = dataclasses.replace(TEMPLATE, targets=' {label}')
  prepared = prepare(tmp_path, form='decoder', template=template)
  stream, text = prepared.rows('train', 80, seed=0), prepared.vocabulary.decode
  for row in range(len(stream)):
    features = stream[row]
    for segment, i in enumerate(stream.members(row), 1):
      example = prepared.cache('train').example(int(i))
      where = features['decoder_segment_ids'] == segment
      targets, weights = (features[f'decoder_{x}'][where]
                          for x in ('target_tokens', 'loss_weights'))
      word = {'music': 'tune'}.get(example['label'], example['label'])
      assert text(targets) == f'intent: {example["a"]} {word}'
      assert text(targets[weights > 0]) == f' {word}'
      assert targets[-1] == prepared.vocabulary.eos_id and weights[-1] == 1


def test_a_prompt_that_is_too_long_loses_its_beginning(tmp_path):
  lines = [{'text': 'x' * 500 + ' the end', 'intent': 'weather'}]
  template = dataclasses.replace(TEMPLATE, inputs='{a}?', targets=' {label}')
  prepared = prepare(tmp_path, lines, form='decoder', template=template)
  features = prepared.rows('train', 40, seed=0)[0]
  told = prepared.vocabulary.decode(features['decoder_target_tokens'])
  assert told.endswith('the end? weather') and len(told) == 39


@pytest.mark.parametrize('record, said', [
    ({'intent': 'music'}, "has no field 'a'"),
    ({'text': '   ', 'intent': 'music'}, "has an empty 'a'"),
    ({'text': 7, 'intent': 'music'}, 'which is no text'),
    ({'text': 'hello'}, "has no 'label'"),
    ({'text': 'hello', 'intent': 'weathr'}, "'weathr', which is none of the 2 labels"),
])
def test_records_that_are_no_examples_are_named(tmp_path, record, said):
  kind = examples.Classification(('music', 'weather'))
  with pytest.raises(UserError) as error:
    prepare(tmp_path, [*records(), record], kind)
  assert said in str(error.value) and 'train.jsonl:9' in str(error.value)
  assert 'mend' in str(error.value) and '1 of 9 records' in str(error.value)


def test_a_held_out_share_is_a_split_that_stays(tmp_path):
  lines = [{'text': f'text {i}', 'intent': str(i % 2)} for i in range(1000)]
  source = examples.Files(write(tmp_path / 'a.jsonl', lines), held_out=0.2,
                          fields=(('a', 'text'), ('label', 'intent')))
  parts = {split: [record['a'] for _, record in source.records(split)]
           for split in source.splits()}
  assert not set(parts['train']) & set(parts['validation'])
  assert len(parts['train']) + len(parts['validation']) == 1000
  assert 160 < len(parts['validation']) < 240
  longer = examples.Files(write(tmp_path / 'b.jsonl', [*lines, {'text': 'new', 'intent': '1'}]),
                          held_out=0.2, fields=source.fields)
  assert set(parts['validation']) <= {r['a'] for _, r in longer.records('validation')}


def test_changed_files_make_a_new_cache(tmp_path):
  task = task_of(tmp_path)
  first = task.prepare(progress=False)
  assert task.prepare(progress=False).directory == first.directory
  write(tmp_path / 'train.jsonl', records()[:-1])
  second = task.prepare(progress=False)
  assert second.directory != first.directory
  assert [second.info['splits']['train']['documents'],
          first.info['splits']['train']['documents']] == [7, 8]


@pytest.mark.supports('fine-tuning', 'similarity by the cosine of embeddings, pairs packed in rows')
def test_cosines_of_packed_pairs_are_those_of_each_alone(tmp_path):
  lines = [{'a': one, 'b': other, 'score': 1 + 0.5 * i}
           for i, (one, other) in enumerate(zip((*WEATHER, 'x' * 70), (*MUSIC, 'y' * 70)))]
  packed, alone = (prepare(tmp_path, lines, examples.Similarity(), form='embedder', name=name,
                           packed=name == 'packed') for name in ('packed', 'alone'))
  trunk = BERTConfig(vocab_size=300, max_length=96, d_model=32, num_layers=2, num_heads=2, d_ff=64,
                     masked_lm=False, sentence_classes=0, dtype='float32', init_std=0.2)
  module = DualEncoderConfig(EmbedderConfig(trunk)).build()
  params = module.init(jax.random.key(0), method='initialize')['params']
  run = jax.jit(lambda batch: module.apply({'params': params}, batch, method='outputs')[0])
  found = {}
  for prepared in (packed, alone):
    stream = prepared.rows('train', 96, seed=1)
    for row in range(len(stream)):
      batch = jax.tree.map(lambda x: jnp.asarray(x)[None], stream[row])
      sides = run(batch)['embeddings']
      cosines = np.atleast_1d((sides['query'] * sides['document']).sum(-1)[0])
      values = np.atleast_1d(batch['pair_values'][0])
      for k, i in enumerate(stream.members(row)):
        found[prepared is packed, int(i)] = cosines[k], values[k]
        assert CosineSimilarity().weights(batch)['similarity'] == len(stream.members(row))
    assert len(stream) == (5 if prepared is alone else 3)
  for i in range(4):  # the last pair is longer than a row, and cut
    np.testing.assert_allclose(found[True, i], found[False, i], atol=2e-6)
    assert found[True, i][1] == np.float32((1 + 0.5 * i) / 5)
  assert 0 < found[True, 4][0] < 1
