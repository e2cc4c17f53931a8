"""Augmentations: as EDA publishes them, labels stay, and batches are of (seed, row) alone."""
import collections
import dataclasses
import importlib.util
import json
import pathlib
import pickle
import tarfile

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from lm.data import examples
from lm.data.examples import augment
from lm.data.examples.augment import typos, wordnet, words as words_
from lm.data.vocabularies import VocabularyConfig
from lm.errors import UserError
from lm.models.bert import BERTConfig

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'
SYNSETS = {
    'noun': ('03 movie 0 film 0 moving_picture 0', '02 man 0 gentleman 0', '02 car 0 Jan 0',
             '02 dog 0 hound 0', '01 cast 0'),
    'verb': ('03 halt 0 stop 0 quit 0', '02 like 0 try 0'), 'adj': ('02 funny 0 asleep(p) 0',),
    'adv': ('02 truly 0 really 1', '02 so 0 thus 0')}
LETTERS = dict(zip(SYNSETS, 'nvar'))


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  """A WordNet of ten synsets."""
  folder = tmp_path_factory.mktemp('wordnet')
  for part, synsets in SYNSETS.items():
    lines = ['  1 This software and database is provided "AS IS"']
    lines += [f'{i:08} 00 {LETTERS[part]} {words} 001 @ 00000001 n 0000 | a gloss' for i, words
              in enumerate(synsets, 1)]
    (folder / f'data.{part}').write_text('\n'.join(lines) + '\n')
  (folder / 'noun.exc').write_text('men man\n')
  (folder / 'verb.exc').write_text('stopped stop\nstopping stop\nquitting quit\n')
  return str(folder)


@pytest.fixture(scope='module')
def real(tmp_path_factory):
  archive = SHARED / 'kg' / 'wordnet-3.0' / 'wordnet-3.0.tar.xz'
  if not archive.exists():
    pytest.skip(f'{archive} is not there')
  folder = tmp_path_factory.mktemp('wordnet')
  with tarfile.open(archive) as tar:
    tar.extractall(folder, filter='data')
  return str(next(folder.rglob('data.noun')).parent)


def all_of(wordnet_, **changes):
  return [augment.Synonyms(wordnet=wordnet_, **changes),
          augment.RandomInsertion(wordnet=wordnet_, **changes),
          augment.RandomSwap(**changes), augment.RandomDeletion(**changes),
          augment.Typos(letters=0.2, **changes)]


WORDS = st.sampled_from('the film film, Movies (halted) dogs! STOPPED really a funny man 3 x — ü'
                        .split())
TAGS = st.sampled_from('O O O B-person I-person B-place I-place'.split())


@given(text=st.lists(WORDS, min_size=1, max_size=12).map(' '.join), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_labels_stay_and_texts_are_never_empty(small, text, seed):
  example = {'id': '7', 'a': text, 'b': text[::-1], 'label': 'x'}
  for change in all_of(small, rate=1.0):
    changed = change(example, np.random.default_rng(seed))
    assert changed['a'].strip() and changed['b'].strip()
    assert {**changed, 'a': text, 'b': text[::-1]} == example
    assert changed == change(example, np.random.default_rng(seed))
    assert change(example, np.random.default_rng(seed)) is not example
    one = dataclasses.replace(change, fields=('b',))(example, np.random.default_rng(seed))
    assert one['a'] == text


def entities(words, tags):
  """(type, words) of every entity, in order: what the tags say."""
  found, before = [], 'O'
  for word, tag in zip(words, tags):
    if tag.startswith('B-') or tag.startswith('I-') and before[2:] != tag[2:]:
      found.append((tag[2:], []))
    if tag != 'O':
      found[-1][1].append(word)
    before = tag
  return found


@given(pairs=st.lists(st.tuples(WORDS, TAGS), min_size=1, max_size=12), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_entities_stay_whole_and_words_keep_their_tags(small, pairs, seed):
  words, tags = map(list, zip(*pairs))
  for i, tag in enumerate(tags):  # make it valid BIO
    if tag[0] == 'I' and (i == 0 or tags[i - 1][2:] != tag[2:]):
      tags[i] = 'B' + tag[1:]
  example = {'id': '7', 'words': words, 'tags': tags}
  for change in all_of(small, rate=1.0)[:4]:
    change = dataclasses.replace(change, alpha=0.7)
    changed = change(example, np.random.default_rng(seed))
    assert len(changed['words']) == len(changed['tags']) > 0 and all(changed['words'])
    assert entities(changed['words'], changed['tags']) == entities(words, tags)
    assert not any(' ' in word for word in changed['words'])
  typed = all_of(small, rate=1.0)[-1](example, np.random.default_rng(seed))
  assert typed['tags'] == tags and len(typed['words']) == len(words) and all(typed['words'])


def test_a_moved_word_takes_its_tag_along(small):
  words, tags = 'he stopped the really funny film'.split(), 'PRON VERB DET ADV ADJ NOUN'.split()
  of = dict(zip(words, tags))
  example = {'id': '7', 'words': words, 'tags': tags}
  for seed in range(20):
    for change in (augment.RandomSwap(1.0, alpha=0.9), augment.RandomDeletion(1.0, alpha=0.5)):
      changed = change(example, np.random.default_rng(seed))
      assert [of[word] for word in changed['words']] == changed['tags']
    changed = augment.RandomInsertion(1.0, alpha=0.2, wordnet=small)(
        example, np.random.default_rng(seed))
    new, = (pair for pair in zip(changed['words'], changed['tags']) if pair[0] not in of)
    assert new in [('halted', 'VERB'), ('truly', 'ADV'), ('asleep', 'ADJ'), ('movie', 'NOUN')]


TEXT = ('the dog really halted a funny film and the man liked it so the movie was really funny for'
        ' a man of the past').split()  # 23 words, 10 of them with synonyms here


@pytest.mark.supports('fine-tuning', 'augmentation: EDA, typos, cut-off, back-translation, mixup')
@pytest.mark.parametrize('alpha', [0.02, 0.1, 0.3])
def test_eda_is_what_its_paper_says(small, alpha):
  n, rng = max(1, int(alpha * len(TEXT))), np.random.default_rng(0)
  known, kept = wordnet.load(small), []
  for _ in range(200):
    words = augment.Synonyms(1.0, alpha=alpha, wordnet=small).text(' '.join(TEXT), rng)
    words = words.replace('moving picture', 'moving_picture').split()
    replaced = [(old, new) for old, new in zip(TEXT, words, strict=True) if old != new]
    assert len(replaced) == n
    for old, new in replaced:
      assert old not in words_.STOP_WORDS and new.replace('_', ' ') in known.synonyms(old)
    words = augment.RandomSwap(1.0, alpha=alpha).text(' '.join(TEXT), rng).split()
    assert sorted(words) == sorted(TEXT) and sum(a != b for a, b in zip(words, TEXT)) <= 2 * n
    words = augment.RandomInsertion(1.0, alpha=alpha, wordnet=small).text(' '.join(TEXT), rng)
    words = words.replace('moving picture', 'moving_picture').split()
    more = collections.Counter(words) - collections.Counter(TEXT)
    assert more.total() == n == len(words) - len(TEXT)
    synonyms = {each.replace(' ', '_') for old in set(TEXT) - words_.STOP_WORDS
                for each in known.synonyms(old)}
    assert set(more) <= synonyms
    left = iter(words)
    assert all(word in left for word in TEXT)  # what was there stands in its order
    words = augment.RandomDeletion(1.0, alpha=alpha).text(' '.join(TEXT), rng).split()
    left = iter(TEXT)
    assert all(word in left for word in words)
    kept.append(len(words))
  share = 1 - np.mean(kept) / len(TEXT)
  assert abs(share - alpha) < 4 * (alpha / len(TEXT) / 200)**0.5
  assert len(augment.RandomDeletion(1.0, alpha=1.0).text('a b c', rng).split()) == 1
  assert len(words_.STOP_WORDS) == 127


def test_synonyms_keep_form_case_and_punctuation(small):
  known = wordnet.load(small)
  assert known.synonyms('movies') == ('films', 'moving pictures')
  assert known.synonyms('men') == ('gentlemen',) and known.synonyms('gentlemen') == ('men',)
  assert known.synonyms('stopped') == ('halted',)  # 'quit' has no past in -ed
  assert known.synonyms('halting') == ('quitting', 'stopping')
  assert known.synonyms('tries') == ('likes',) and known.synonyms('liked') == ('tried',)
  assert known.synonyms('car') == ('Jan',) and known.synonyms('cars') == ()
  assert known.synonyms('funny') == ('asleep',) and known.synonyms('cast') == ()
  change = augment.Synonyms(1.0, wordnet=small)
  assert change.text('("Truly!")', np.random.default_rng(0)) == '("Really!")'
  assert change.text('TRULY', np.random.default_rng(0)) == 'REALLY'
  assert change.text('the  of\tand', np.random.default_rng(0)) == 'the  of\tand'


def test_synonyms_of_the_real_wordnet(real):
  known = wordnet.load(real)
  assert {'films', 'motion pictures', 'pictures'} <= set(known.synonyms('movies'))
  assert {'halted', 'ceased', 'blocked'} <= set(known.synonyms('stopped'))
  assert 'kids' in known.synonyms('children') and 'hilarious' not in known.synonyms('bad')
  assert {'awful', 'astonishing'} <= set(known.synonyms('amazing'))
  assert known.synonyms('xyzzy') == () and wordnet.load(real) is known


@given(text=st.text(st.sampled_from('abcXYZ é1,. '), max_size=60), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_typos_are_of_four_kinds_and_leave_all_but_letters(text, seed):
  typed = augment.Typos(1.0, letters=0.5).text(text, np.random.default_rng(seed))
  other = lambda s: [c for c in s if c.lower() not in typos.NEIGHBOURS]
  assert other(typed) == other(text)
  assert [bool(w) for w in typed.split(' ')] == [bool(w) for w in text.split(' ')]


def test_single_typos():
  found = collections.Counter()
  for seed in range(4000):
    typed = augment.Typos(1.0, letters=0.08).text('Wasp', np.random.default_rng(seed))
    found[typed] += 1
  share = {kind: sum(found[word] for word in words) / 4000 for kind, words in {
      'neighbour': ['Wadp', 'Waap', 'Wawp', 'Waep', 'Wazp', 'Waxp'], 'transposed': ['Wsap'],
      'left out': ['Wap'], 'twice': ['Wassp'], 'none': ['Wasp']}.items()}
  assert abs(share['none'] - 0.92**4) < 0.03
  assert all(0.008 < share[kind] < 0.03 for kind in share if kind != 'none'), share
  assert all(a in typos.NEIGHBOURS[b] for a in typos.NEIGHBOURS for b in typos.NEIGHBOURS[a])
  assert typos.NEIGHBOURS['g'] == 'tyfhvb'


def task_of(tmp_path, augmentations=(), rows=None, **changes):
  rows = rows or [{'id': str(i), 'a': ' '.join(TEXT[i:i + 3 + i % 9]), 'label': 'xy'[i % 2]}
                  for i in range(20)]
  path = tmp_path / 'train.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return examples.ExampleTask(**{
      'source': examples.Files(str(path), validation=str(path)), 'kind': examples.Classification(),
      'vocabulary': VocabularyConfig(kind='byte'), 'augmentations': tuple(augmentations),
      'cache_dir': str(tmp_path / 'cache')} | changes)


def same(one, other):
  return all((one[name] == other[name]).all() for name in one) and set(one) == set(other)


def test_batches_are_a_function_of_seed_and_row(tmp_path, small):
  changes = [*all_of(small, rate=0.5), augment.TokenCutoff(0.5)]
  prepared = task_of(tmp_path, changes).prepare(progress=False)
  loader = prepared.loader('train', 128, 4, seed=3)
  first = [loader.batch(step) for step in range(6)]
  again = pickle.loads(pickle.dumps(prepared.rows('train', 128, seed=3)))
  for step in (4, 0, 2):
    for row in (3, 0):
      assert same(again[4 * step + row], {k: v[row] for k, v in first[step].items()})
  with loader.iterate(start_step=2, num_steps=4, num_threads=2) as batches:
    assert all(same(batch, first[2 + i]) for i, batch in enumerate(batches))
  assert not same(first[0], prepared.loader('train', 128, 4, seed=4).batch(0))


def test_rate_0_is_not_there_and_other_splits_are_as_they_are(tmp_path, small):
  plain = task_of(tmp_path).prepare(progress=False)
  off = task_of(tmp_path, all_of(small, rate=0.0)).prepare(progress=False)
  on = task_of(tmp_path, all_of(small, rate=1.0)).prepare(progress=False)
  for step in range(5):
    batch = lambda prepared, split: prepared.loader(split, 128, 4, seed=1).batch(step)
    assert same(batch(plain, 'train'), batch(off, 'train'))
    assert not same(batch(plain, 'train'), batch(on, 'train'))
    assert same(batch(plain, 'validation'), batch(on, 'validation'))


@pytest.mark.parametrize('form', ['encoder', 'text_to_text', 'decoder'])
def test_what_grows_beyond_its_place_stays_and_cuts_nobody(tmp_path, small, form):
  change = augment.RandomInsertion(1.0, growth=1.4, alpha=0.3, wordnet=small)
  prepared = task_of(tmp_path, [change], form=form).prepare(progress=False)
  cache, rows = prepared.cache('train'), prepared.rows('train', 200, seed=0)
  kept, seen = 0, 0
  for row in range(len(rows)):
    features, members = rows[row], rows.members(row)
    side = 'decoder' if form == 'decoder' else 'encoder'
    for segment, i in enumerate(members, 1):
      where = features[f'{side}_segment_ids'] == segment
      name = 'decoder_target_tokens' if form == 'decoder' else 'encoder_input_tokens'
      ids = features[name][where]
      example = cache.example(int(i))
      text = prepared.vocabulary.decode([x for x in ids if 3 <= x < 259])
      assert text.endswith(example['label']) or form != 'decoder'
      left = iter(text.removesuffix(example['label'] if form == 'decoder' else '').split())
      assert all(word in left for word in example['a'].split())
      kept, seen = kept + (len(text) <= len(example['a']) + 1), seen + 1
  assert seen == 20 and 0 < kept < 20


@pytest.mark.parametrize('kind', ['token', 'span'])
def test_what_is_cut_off_is_seen_by_nobody(tmp_path, kind):
  prepared = task_of(tmp_path, [augment.TokenCutoff(1.0, ratio=0.3, kind=kind)]).prepare(
      progress=False)
  whole, rows = task_of(tmp_path).prepare(progress=False), prepared.rows('train', 64, seed=0)
  trunk = BERTConfig(vocab_size=300, max_length=64, d_model=16, num_layers=2, num_heads=2, d_ff=32,
                     masked_lm=False, sentence_classes=0, dtype='float32', init_std=0.3)
  module = trunk.build()
  params = module.init(jax.random.key(0), method='initialize')
  run = jax.jit(lambda batch: module.apply(params, batch, None, method='encode'))
  for row in range(4):
    cut, plain = rows[row], whole.rows('train', 64, seed=0)[row]
    hidden = (plain['encoder_segment_ids'] > 0) & (cut['encoder_segment_ids'] == 0)
    for segment, i in enumerate(rows.members(row), 1):
      size = prepared.cache('train').sizes[i, 0]
      places = np.flatnonzero(hidden & (plain['encoder_segment_ids'] == segment))
      start = np.flatnonzero(plain['encoder_segment_ids'] == segment)[0]
      assert len(places) == min(max(1, int(0.3 * size)), size - 1)
      assert places.min() > start and places.max() <= start + size  # never [CLS] or [SEP]
      assert kind == 'token' or (np.diff(places) == 1).all()
    assert (cut['encoder_input_tokens'][hidden] == 0).all()
    for name in plain:
      keep = ~hidden if plain[name].shape == hidden.shape else slice(None)
      np.testing.assert_array_equal(cut[name][keep], plain[name][keep])
    other = cut | {'encoder_input_tokens': np.where(hidden, 77, cut['encoder_input_tokens'])}
    batch = lambda features: {name: x[None] for name, x in features.items()}
    seen = cut['encoder_segment_ids'] > 0
    one, two, three = (np.asarray(run(batch(x)))[0][seen] for x in (cut, other, plain))
    np.testing.assert_array_equal(one, two)
    assert np.abs(one - three).max() > 1e-3


def test_a_tag_that_is_cut_off_has_no_loss(tmp_path):
  rows = [{'words': 'we saw Ulm and Bonn'.split(), 'tags': 'O O B O B'.split()}] * 5
  for form, weight in (('encoder', 'tag_weights'), ('text_to_text', None)):
    prepared = task_of(tmp_path, [augment.TokenCutoff(1.0, ratio=0.5)], rows, form=form,
                       kind=examples.Tagging(), template=examples.Template('{words}', '{tags}')
                       ).prepare(progress=False)
    features = prepared.rows('train', 64, seed=0)[0]
    cut = (features['encoder_positions'] > 0) & (features['encoder_segment_ids'] == 0)
    assert cut.sum() > 10 and (features['encoder_input_tokens'] >= 0).all()
    assert weight is None or 0 < features[weight].sum() and not features[weight][cut].any()


def test_paraphrases_are_drawn_from_the_file(tmp_path):
  path = tmp_path / 'paraphrases.jsonl'
  path.write_text(json.dumps({'id': '0', 'text': 'how are you', 'paraphrases': ['hi', 'hey', '']})
                  + '\n' + json.dumps({'id': '1', 'text': 'bye', 'paraphrases': []}) + '\n')
  change, rng = augment.BackTranslation(1.0, path=str(path)), np.random.default_rng(0)
  example = {'id': '5', 'a': 'how are you', 'label': 'x'}
  assert {change(example, rng)['a'] for _ in range(50)} == {'hi', 'hey'}
  assert change({**example, 'a': 'bye'}, rng)['a'] == 'bye'
  change.open(iter(['else', 'how are you']))
  with pytest.raises(UserError, match='none of the first 1 texts'):
    change.open(iter(['else']))
  other = tmp_path / 'other.jsonl'
  other.write_text('{"text": 3}\n')
  with pytest.raises(UserError, match='jsonl:1 is no JSON object'):
    augment.BackTranslation(path=str(other)).open(['a'])


@pytest.mark.parametrize('kind, wrong', [
    (examples.SpanExtraction(), augment.RandomSwap()), (examples.MultipleChoice(), augment.Typos()),
    (examples.LanguageModelling(), augment.RandomDeletion()),
    (examples.Tagging(), augment.BackTranslation(path='x')),
    (examples.Similarity(), augment.RandomSwap(fields=('source',)))])
def test_kinds_that_would_lose_their_answer_are_refused(tmp_path, kind, wrong):
  form = 'decoder' if kind.name in ('multiple_choice', 'language_modelling') else 'encoder'
  with pytest.raises(UserError, match='leave it out|name some of'):
    task_of(tmp_path, [wrong], kind=kind, form=form)


def test_wrong_settings_are_one_sentence(tmp_path, small):
  for make in (lambda: augment.RandomSwap(rate=1.1), lambda: augment.RandomSwap(alpha=0.0),
               lambda: augment.Typos(letters=2.0), lambda: augment.TokenCutoff(ratio=1.0),
               lambda: augment.TokenCutoff(kind='word'), augment.BackTranslation,
               lambda: augment.RandomSwap(growth=0.5), lambda: wordnet.load(str(tmp_path)),
               lambda: augment.Synonyms(wordnet='nowhere').open([]),
               lambda: augment.BackTranslation(path='nowhere').open([]),
               lambda: task_of(tmp_path, [augment.TokenCutoff()], form='decoder')):
    with pytest.raises(UserError) as error:
      make()
    assert '\n' not in str(error.value)


def test_limited_training_sets_lie_in_one_another(tmp_path):
  lines = [json.dumps({'a': f'text {i}', 'label': 'xy'[i % 2]}) + '\n' for i in range(200)]
  path, turned = tmp_path / 'a.jsonl', tmp_path / 'b.jsonl'
  path.write_text(''.join(lines)), turned.write_text(''.join(lines[::-1]))

  def read(path, split='train', **changes):
    source = examples.Files(str(path), held_out=0.2, **changes)
    return [record['a'] for _, record in source.records(split)]

  few, more = read(path, limit=20), read(path, limit=50)
  assert len(few) == 20 and len(more) == 50 and set(few) < set(more) < set(read(path))
  assert read(turned, limit=20) == few[::-1]
  assert read(path, 'validation', limit=20) == read(path, 'validation')
  assert len(read(path, limit=1000)) == len(read(path))
  with pytest.raises(UserError, match='limit=0'):
    examples.Files('x', limit=0)


def test_a_file_of_paraphrases_is_made_by_two_translators(tmp_path):
  path = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'back_translate.py'
  spec = importlib.util.spec_from_file_location('back_translate', path)
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  forward = lambda texts, seeds: [None if text == 'x y' else f'{text} {seed % 3}'
                                  for text, seed in zip(texts, seeds, strict=True)]
  backward = lambda texts, seeds: [text.removesuffix(' 0').upper().replace('A B', 'a b')
                                   for text, _ in zip(texts, seeds, strict=True)]
  rows = [{'id': str(i), 'a': text, 'label': 'l'}
          for i, text in enumerate(['a b', 'c', 'x y', 'c'])]
  out = tmp_path / 'made.jsonl'
  texts = script.texts_of(task_of(tmp_path, rows=rows))
  assert script.write(out, texts, forward, backward, count=5) == (3, 5)
  assert [json.loads(line) for line in out.read_text().splitlines()] == [
      {'id': '0', 'text': 'a b', 'paraphrases': ['a b 1', 'a b 2']},
      {'id': '1', 'text': 'c', 'paraphrases': ['C', 'C 1', 'C 2']},
      {'id': '2', 'text': 'x y', 'paraphrases': []}]
  assert augment.BackTranslation(1.0, path=str(out)).text('c', np.random.default_rng(0)) != 'c'
  with pytest.raises(UserError, match='no text that may be replaced'):
    next(script.texts_of(task_of(tmp_path, rows=rows, kind=examples.SpanExtraction())))
