"""Repeated spans against a comparison of every span with all others."""
import gzip
import pathlib
import random

from hypothesis import given, settings, strategies as st
import pytest

from lm.corpus import deduplicate
from lm.corpus.document import Document

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'


def run(texts, length, block=3):
  documents = [Document(str(i), text) for i, text in enumerate(texts)]
  deduplicate.run(deduplicate.Substrings(length), documents, block)
  return documents


def compared(texts, length):
  """The tokens left of each text when every span is looked up among all before it."""
  first, left = {}, []
  for number, tokens in enumerate(map(str.split, texts)):
    cut = set()
    for start in range(len(tokens) - length + 1):
      owner, place = first.setdefault(tuple(tokens[start:start + length]), (number, start))
      if (owner, place) != (number, start):
        kept = place + length if owner == number else 0
        cut |= set(range(max(start, kept), start + length))
    left.append([token for i, token in enumerate(tokens) if i not in cut])
  return left


def few_words(count):
  return st.lists(st.sampled_from('abcdefgh'[:count]), max_size=40).map(' '.join)


@pytest.mark.supports('documents', 'repeated spans kept once')
@settings(deadline=None, max_examples=100)
@given(st.integers(1, 8).flatmap(lambda n: st.lists(few_words(n), max_size=6)),
       st.integers(2, 9), st.integers(1, 4), st.integers(0, 5))
def test_it_cuts_what_comparing_all_spans_cuts(texts, length, block, copied):
  texts += [f'x {text} y' for text in texts[:copied]]
  found = [document.text.split() for document in run(texts, length, block)]
  assert found == compared(texts, length)


def test_spans_of_real_text_are_cut_at_their_very_ends():
  path = SHARED / 'lm' / 'wikitext-2' / 'valid.txt.gz'
  if not path.exists():
    pytest.skip('the data are not beside the repository')
  rng = random.Random(0)
  texts = [line for line in gzip.open(path, 'rt', encoding='utf-8') if len(line) > 400][:600]
  words = [text.split() for text in texts]
  for _ in range(200):  # Spans of 40 to 60 words, into other texts or the same.
    source, target = rng.choice(words), rng.choice(words)
    start = rng.randrange(len(source) - 60)
    place = rng.randrange(len(target))
    target[place:place] = source[start:start + rng.randint(40, 60)]
  texts = [' '.join(some) for some in words]
  documents = run(texts, 50, block=64)
  expected = compared(texts, 50)
  assert [document.text.split() for document in documents] == expected
  cut = [document for document in documents if 'substrings.duplicate' in document.verdicts]
  assert 60 < len(cut) < 140
  for document, text in zip(documents, texts):
    removed = document.verdicts.get('substrings.duplicate', 0)
    assert len(document.text) == len(text) - removed


def test_what_is_left_keeps_its_paragraphs_and_an_empty_document_is_removed():
  span = 'one two three four'
  documents = run([f'{span} five', f'A\n\n{span} b\n', f'E {span}\n\nB', f'{span}\n c', f' {span} ',
                   f'd {span}', f'f\n{span}    g'], 4)
  assert [document.text for document in documents] == [
      f'{span} five', 'A\n\nb\n', 'E\n\nB', 'c', '', 'd', 'f\ng']
  removed = [document.address for document in documents if document.removed_by]
  assert removed == [4] and documents[4].removed_by == 'substrings.duplicate'


def test_a_repeated_text_keeps_its_first_occurrence_whole():
  assert run([' '.join('abc' * 40)], 50)[0].text.split() == list('abc' * 17)[:50]


def test_characters_are_the_tokens_where_no_spaces_are_written():
  verse = '关关雎鸠在河之洲窈窕淑女君子好逑'
  documents = run([f'诗云{verse}矣', f'子曰{verse}也', verse[:9]], 10)
  assert [document.text for document in documents] == [f'诗云{verse}矣', '子曰也', verse[:9]]


def test_case_and_punctuation_tell_spans_apart():
  texts = ['a b c d', 'a b C d', 'a b, c d', 'a b\n\tc d']
  assert [document.text for document in run(texts, 4)] == ['a b c d', 'a b C d', 'a b, c d', '']
