"""What was planted is found, and nothing else is said of real data that has nothing."""
import re

import numpy as np
import pytest
import real_examples as real

from lm.evaluation import leakage
from lm.evaluation import overlap


def split(examples, every=10):
  return {'train': [one for i, one in enumerate(examples) if i % every],
          'validation': examples[::every]}


def found(kind, splits, **names):
  return {(one.what, one.split): one for one in leakage.find(kind, splits, **names)}


@pytest.fixture(scope='module')
def snips():
  return {'train': real.snips('train')[::10], 'validation': real.snips('validate')}


INTENTS = ('AddToPlaylist', 'BookRestaurant', 'GetWeather', 'PlayMusic', 'RateBook',
           'SearchCreativeWork', 'SearchScreeningEvent')
LABELS = 'label in the input', 'telling word', 'telling number', 'target in the source'


@pytest.mark.supports('evaluation', 'train/test overlap and label leakage')
def test_snips_repeats_itself_and_gives_no_label_away():
  splits = {'train': real.snips('train'), 'validation': real.snips('validate')}
  findings = found('classification', splits)
  plain = {name: [' '.join(re.findall(r'\w+', one['a'].lower())) for one in examples]
           for name, examples in splits.items()}
  seen = sum(words in set(plain['train']) for words in plain['validation'])
  assert findings['same text', 'validation'].count == seen == 18
  assert findings['nearly the same text', 'validation'].count == 8
  assert not [what for what, _ in findings if what in LABELS]
  for one in findings['same text', 'validation'].examples:
    same = [re.findall(r'\w+', one[side].lower()) for side in ('text', 'train_text')]
    assert same[0] == same[1] and one['id'][:3] == 'val' and one['train_id'][:3] == 'tra'


def test_half_of_a_pair_is_seen_in_the_sts_benchmark():
  findings = found('similarity', {'train': real.captions('train'),
                                  'validation': real.captions('dev')})
  assert findings['one of two texts', 'validation'].count == 68
  assert 'contradiction' not in {what for what, _ in findings}


def test_a_copy_is_found_in_other_case_and_punctuation(snips):
  copy = {**snips['train'][5], 'id': 'copy', 'a': f' "{snips["train"][5]["a"].upper()}"!'}
  before = found('classification', snips)['same text', 'validation'].count
  after = found('classification', {**snips, 'validation': [*snips['validation'], copy]})
  assert after['same text', 'validation'].count == before + 1
  assert f'{before + 1} of 701' in after['same text', 'validation'].sentence


def jaccard(one, other):
  pairs = [{*zip(text.lower().split(), text.lower().split()[1:])} for text in (one, other)]
  return len(pairs[0] & pairs[1]) / max(len(pairs[0] | pairs[1]), 1)


def test_near_duplicates_are_all_of_those_that_comparing_all_pairs_finds():
  rng = np.random.default_rng(0)
  words = [f'w{i}' for i in range(12)]  # so few that similar texts come about
  texts = [' '.join(rng.choice(words, size=rng.integers(2, 9))) for _ in range(400)]
  others = [' '.join(rng.permutation(text.split() + ['w1'] * int(rng.integers(2))))
            for text in texts[::2]] + texts[1::40]
  for threshold in (0.5, 0.8):
    near = overlap.near(overlap.Texts(texts), overlap.Texts(others), threshold)
    for i, text in enumerate(texts):
      best = max(jaccard(text, other) for other in others)
      assert (near.place[i] >= 0) == (best >= threshold)
      if best >= threshold:
        assert jaccard(text, others[near.place[i]]) == best
    assert 10 < len(near.where) < 390


def test_a_passage_in_another_text_is_found():
  text = ' '.join(f'w{i}' for i in range(40))
  long = overlap.Texts(['other words here ' * 3, f'before, {text} and after'])
  assert overlap.passages(overlap.Texts([text[60:130], 'w1 w2', '']), long).place.tolist() == [
      1, -1, -1]
  assert overlap.passages(overlap.Texts([' '.join(text.split()[5:17])]), long).place[0] == -1
  chinese = overlap.Texts(['子曰學而時習之不亦說乎有朋自遠方來不亦樂乎'])
  assert overlap.passages(overlap.Texts(['習之，不亦說乎？有朋自遠方來不亦樂']), chinese).place[0] == 0


def test_texts_without_words_are_no_copies():
  smiles = overlap.Texts(['😀', '', '...', 'a'])
  assert overlap.same(smiles, smiles).place.tolist() == [-1, -1, -1, 3]
  assert overlap.near(smiles, smiles).place.tolist() == [-1, -1, -1, 3]
  nothing = overlap.Texts([])
  for function in (overlap.same, overlap.near, overlap.passages):
    assert function(smiles, nothing).place.tolist() == [-1] * 4
    assert function(nothing, smiles).place.tolist() == []


def test_the_same_text_with_two_labels_is_a_contradiction(snips):
  other = {**snips['train'][0], 'id': 'x', 'label': 'PlayMusic'}
  findings = found('classification', {**snips, 'validation': [*snips['validation'], other]})
  one = findings['contradiction', 'validation']
  assert one.count == 1 and 'with another label' in one.sentence
  assert {answer for _, _, answer in one.examples[0]['answers']} == {'AddToPlaylist', 'PlayMusic'}
  pair = {'id': '1', 'a': 'one', 'b': 'two', 'score': 5.0}
  pairs = {'train': [pair, {**pair, 'a': 'two', 'b': 'one', 'score': 0.0}]}
  assert found('similarity', pairs)['contradiction', 'train'].count == 2
  close = {'train': [pair, {**pair, 'score': 4.5}, {**pair, 'a': 'x', 'score': 0.0}]}
  assert ('contradiction', 'train') not in found('similarity', close)


def changed(splits, change):
  return {name: [{**one, 'a': change(i, one)} for i, one in enumerate(examples)]
          for name, examples in splits.items()}


@pytest.mark.parametrize('what, change', [
    ('label in the input', lambda i, one: f'{one["a"]} {one["label"]}'),
    ('telling word', lambda i, one: f'{one["label"][:3]}{i:05d} {one["a"]}'),
    ('telling number', lambda i, one: f'{i} {one["a"]}'),
    ('telling number', lambda i, one: f'{one["a"]} (number {7 * i + 3})')])
def test_a_field_that_was_left_in_gives_the_label_away(snips, what, change):
  findings = found('classification', changed(snips, change))
  for name in snips:
    assert (what, name) in findings, findings.keys()
    assert findings[what, name].count >= 0.9 * findings[what, name].of
    assert findings[what, name].examples[0]['label'] in INTENTS


@pytest.mark.parametrize('change', [
    lambda i, one: f'{one["a"]} Is it {" or ".join(INTENTS)}?',
    lambda i, one: f'{(i * 7919) % 100003} {one["a"]}', lambda i, one: f'intent: {one["a"]}'])
def test_what_all_examples_have_gives_nothing_away(snips, change):
  assert not [what for what, _ in found('classification', changed(snips, change)) if what in LABELS]


def test_numbers_say_nothing_where_nearly_all_labels_are_one():
  examples = [{'id': str(i), 'a': f'{i} text', 'label': 'rare' if i % 20 == 7 else 'common'}
              for i in range(400)]
  assert not [what for what, _ in found('classification', {'train': examples}) if what in LABELS]


def test_a_verbaliser_of_ones_own_is_looked_for():
  examples = [{'id': str(i), 'a': f'{"good" if i % 2 else "bad"} film {i}', 'label': str(i % 2)}
              for i in range(40)]
  names = {'verbalisers': {'1': 'good', '0': 'bad'}}
  assert ('label in the input', 'train') in found('classification', {'train': examples}, **names)
  assert ('label in the input', 'train') not in found('classification', {'train': examples})


def test_a_target_that_is_copied_is_said():
  examples = [{'id': str(i), 'source': f'Say: it is number {i}.', 'targets': [f'Number {i}']}
              for i in range(30)]
  assert found('generation', {'train': examples})['target in the source', 'train'].count == 30
  assert not found('generation', {'train': real.summaries(100)})


@pytest.mark.parametrize('kind, example', [
    ('tagging', {'words': ['a', 'b'], 'tags': ['O', 'O']}),
    ('span_extraction', {'question': 'q', 'context': 'c', 'answers': ['c'], 'starts': [0]}),
    ('multiple_choice', {'contexts': ['c', 'c'], 'continuations': ['a', 'b'], 'label': 0}),
    ('retrieval', {'query': 'q', 'documents': ['d']}), ('language_modelling', {'text': 't'})])
def test_every_kind_has_a_text_that_overlaps(kind, example, capsys):
  splits = {'train': [{'id': '0', **example}], 'test': [{'id': '1', **example}]}
  findings = leakage.find(kind, splits)
  assert [(one.what, one.split, one.count) for one in findings] == [('same text', 'test', 1)]
  leakage.warn(findings)
  said = capsys.readouterr().out
  assert said.count('\n') == 1 and said.startswith('warning: 1 of 1 (100.0 %) examples of test')


def test_empty_splits_say_nothing():
  assert not leakage.find('classification', {'train': [], 'validation': []})
