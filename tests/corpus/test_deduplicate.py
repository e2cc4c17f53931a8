"""Equal documents, URLs, lines and paragraphs; and what holds for every grouping."""
import dataclasses
import re

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from lm.corpus import deduplicate
from lm.corpus.deduplicate import tokens
from lm.corpus.deduplicate.whole import normalised
from lm.corpus.document import Document
from lm.errors import UserError

LONG = 'a line that is long enough to be told from a heading, of eighty characters and a few'
GROUPINGS = [
    deduplicate.Exact(), deduplicate.URL(), deduplicate.URL(keep='longest'),
    deduplicate.Lines(min_characters=3), deduplicate.Paragraphs(min_characters=3),
    deduplicate.Substrings(length=4), deduplicate.MinHash(shingle=2),
    deduplicate.MinHash(threshold=0.6, shingle=1, keep='longest')]


def run(grouping, texts, block=2, bits=3, **fields):
  documents = [Document(str(i), text) for i, text in enumerate(texts)]
  for name, values in fields.items():
    for document, value in zip(documents, values):
      setattr(document, name, value)
  deduplicate.run(grouping, documents, block, bits)
  return documents


def kept(documents):
  return [document.address for document in documents if not document.removed_by]


@pytest.mark.supports('documents', 'equal texts, URLs, lines and paragraphs kept once')
def test_the_first_of_equal_documents_is_kept_and_the_others_name_it():
  documents = run(deduplicate.Exact(), ['b', 'a b\n', 'A b', '\ta b ', '', '', 'a  b', 'a b'])
  assert kept(documents) == [0, 1, 2, 4, 5, 6]
  assert [document.cluster for document in documents] == [-1, 1, -1, 1, -1, -1, -1, 1]
  assert documents[7].removed_by == 'exact.duplicate'
  assert documents[7].verdicts == {'exact.duplicate_of': 1} and not documents[1].verdicts


def test_a_hash_of_64_bits_does_not_make_documents_equal():
  records = deduplicate.Exact().emit(run(deduplicate.Exact(), ['a', 'b', 'c', 'a']), None)
  records['key'] = records['key'][0]
  assert deduplicate.Exact().resolve(records).tolist() == [(0, 0), (3, 0)]


def test_what_was_removed_before_stands_for_nobody():
  documents = [Document('0', 'same', removed_by='gopher.word_count'), Document('1', 'same'),
               Document('2', 'same')]
  deduplicate.run(deduplicate.Exact(), documents)
  assert kept(documents) == [1] and documents[2].cluster == 1
  assert documents[0].removed_by == 'gopher.word_count' and documents[0].cluster == -1


@pytest.mark.parametrize('one, other', [
    ('http://www.Example.org/a/', 'https://example.org/a'), ('//example.org', 'example.org/'),
    ('https://example.org/a?b=2&a=1', 'http://example.org/a?a=1&b=2#top'),
    ('https://example.org/a?utm_source=x&fbclid=1&a=1', 'https://example.org:443/a?a=1'),
    ('https://example.org/%7Ejoe/caf%C3%A9', 'https://user@example.org./~joe/café')])
def test_urls_of_one_page_are_the_same(one, other):
  assert normalised(one) == normalised(other) != ''


@pytest.mark.parametrize('one, other', [
    ('https://example.org/a', 'https://example.org/b'), ('https://a.org/x', 'https://b.org/x'),
    ('https://example.org/a?page=1', 'https://example.org/a?page=2'),
    ('https://example.org/a?page', 'https://example.org/a'),
    ('https://example.org:8080/', 'https://example.org/'), ('/a/b', '/a/c'),
    ('https://[broken/a', 'https://[broken/b'), ('http://a.org:99999/', 'http://a.org:99998/')])
def test_urls_of_two_pages_are_not(one, other):
  assert normalised(one) != normalised(other)


def test_of_one_url_the_first_or_the_longest_is_kept():
  texts = ['ab', 'abcd', 'abc', 'wxyz', 'x', '']
  urls = ['u.org', 'u.org/', 'v.org', 'u.org', '', '']
  assert kept(run(deduplicate.URL(), texts, url=urls)) == [0, 2, 4, 5]
  documents = run(deduplicate.URL(keep='longest'), texts, url=urls)
  assert kept(documents) == [1, 2, 4, 5] and documents[0].cluster == 1


def test_lines_are_cut_but_for_the_first_and_short_ones_stay():
  home = ' ' * 99 + 'Home'
  texts = [f'{home}\n{LONG}\n  Mine {LONG}\n', f'{home}\n {LONG} \nyours', f'{LONG}', f'x\n{LONG}']
  documents = run(deduplicate.Lines(), texts)
  assert [document.text for document in documents] == [texts[0], f'{home}\nyours', '', 'x']
  assert documents[1].verdicts == {'lines.duplicate': len(LONG) + 3}
  assert documents[2].removed_by == 'lines.duplicate' and kept(documents) == [0, 1, 3]


def test_paragraphs_are_cut_with_the_blank_lines_behind_them():
  first, second = f'{LONG}\nand a second line', f'  indented {LONG}'
  texts = [f'{first}\n\n{second}', f'A\n \n\n{first}\n\n{second}x\n\n{LONG}',
           f'{second}\n\n{first}']
  documents = run(deduplicate.Paragraphs(), texts)
  assert documents[1].text == f'A\n \n\n{second}x\n\n{LONG}'
  assert kept(documents) == [0, 1] and documents[2].verdicts['paragraphs.duplicate']


words = st.lists(st.sampled_from(['ab', 'cd', 'ef gh', 'the', '日本', '\n', '\n\n']), max_size=25)
corpora = st.lists(words.map(' '.join), min_size=1, max_size=8)


@pytest.mark.parametrize('grouping', GROUPINGS, ids=repr)
@settings(deadline=None, max_examples=12)
@given(texts=corpora, block=st.integers(1, 8), bits=st.integers(1, 8), seed=st.integers(0, 9))
def test_neither_blocks_nor_partitions_nor_the_order_of_records_matter(
    grouping, texts, block, bits, seed):
  class Shuffled(type(grouping)):  # Records arrive in any order.
    def resolve(self, records):
      return super().resolve(np.random.default_rng(seed).permutation(records))

  texts = texts + texts[::2]
  fields = {'url': [f'u.org/{len(text) % 3}' for text in texts]}
  values = {f.name: getattr(grouping, f.name) for f in dataclasses.fields(grouping)}
  changed = run(Shuffled(**values), texts, block, bits, **fields)
  assert changed == run(grouping, texts, len(texts), **fields)


@pytest.mark.parametrize('grouping', GROUPINGS, ids=repr)
@settings(deadline=None, max_examples=12)
@given(texts=st.lists(st.text(st.characters(), max_size=60), min_size=1, max_size=4))
def test_no_text_and_no_url_makes_it_fail(grouping, texts):
  """Lone surrogates, NUL and whatever else a page may hold."""
  texts = texts + texts
  urls = [f'http://a.org/{text}?{text}' for text in texts[1:]] + texts[:1]
  assert kept(run(grouping, texts, url=urls))


@pytest.mark.parametrize('make, sentence', [
    (lambda: deduplicate.URL(keep='last'), "keep='last'.*'first', 'longest'"),
    (lambda: deduplicate.MinHash(keep=''), "keep=''"),
    (lambda: deduplicate.MinHash(threshold=1.5), r'threshold=1\.5'),
    (lambda: deduplicate.MinHash(threshold=0.2, num_hashes=8), 'num_hashes=8 find fewer than 95%'),
    (lambda: deduplicate.MinHash(shingle=0), 'shingle=0'),
    (lambda: deduplicate.Lines(min_characters=0), 'min_characters=0'),
    (lambda: deduplicate.Substrings(length=1), 'length=1')])
def test_wrong_values_are_named(make, sentence):
  with pytest.raises(UserError, match=sentence):
    make()


mixed = st.lists(st.text('aZbÉß日本ก0 \n.-_\u0301\U00020001', max_size=30), max_size=6)


@settings(deadline=None)
@given(mixed)
def test_words_are_those_of_the_text_in_lower_case(texts):
  pattern = re.compile('[日本ก\U00020001]|[aZbÉß0\u0301]+')
  numbers = {}
  found = tokens.words(texts)
  for text, first, last in zip(texts, found.bounds, found.bounds[1:]):
    expected = list(pattern.finditer(text))
    assert [match.start() for match in expected] == found.starts[first:last].tolist()
    assert [match.end() for match in expected] == found.ends[first:last].tolist()
    for match, code in zip(expected, found.hashes[first:last].tolist()):
      assert numbers.setdefault(match.group().lower(), code) == code
  assert len(set(numbers.values())) == len(numbers)


@pytest.mark.parametrize('split', [tokens.words, tokens.pieces_between_spaces])
@pytest.mark.parametrize('unit', ['a word, and ', '日本語。', 'x' * 1000, 'é '])
def test_a_long_text_has_the_tokens_of_its_parts(split, unit, monkeypatch):
  text = unit * (3000 // len(unit) + 7)
  whole = split([text])
  monkeypatch.setattr(tokens, 'PIECE', 64)
  pieces = split(['', text, text])
  count = len(whole.hashes)
  assert pieces.bounds.tolist() == [0, 0, count, 2 * count]
  for name in ('hashes', 'starts', 'ends'):
    np.testing.assert_array_equal(getattr(pieces, name), np.tile(getattr(whole, name), 2))
