"""Blocklists remove what C4 removes; spam is what its authors repeat."""

import gzip
import pathlib
import random
import re

import pytest

from lm.corpus import harm
from lm.corpus.document import Document
from lm.errors import UserError

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'


def shared(name):
  if not (SHARED / name).exists():
    pytest.skip(f'{name} is not in {SHARED}')
  return SHARED / name


@pytest.fixture(scope='module')
def blocklist():
  shared('safety/ldnoobw/en')
  return harm.Blocklist(files=(str(SHARED / 'safety/ldnoobw/??'),))


def judged(stage, text, language=''):
  document = Document('a', text, language=language)
  stage.apply(document)
  return document


def words(stage, text, language):
  return judged(stage, text, language).verdicts['blocklist.words']


@pytest.mark.supports('documents', 'Blocklists of bad words by language, as in C4')
@pytest.mark.parametrize('language', ['en', 'de', 'fr', 'es', 'ru', 'zh', 'ja'])
def test_every_entry_is_found_in_a_sentence_of_its_language(blocklist, language):
  entries = shared(f'safety/ldnoobw/{language}').read_text(encoding='utf-8').split('\n')
  for entry in filter(None, map(str.strip, entries)):
    for text in (f'x {entry.title()}, y', entry, f'“{entry}”'):
      if entry not in harm._ALLOWED:
        document = judged(blocklist, text, language)
        assert document.removed_by == 'blocklist.words', entry
        assert document.verdicts['blocklist.words'], entry


def test_it_removes_what_the_expression_of_c4_removes(blocklist):
  """The expression as Raffel et al. published it: flanked by what is no letter nor figure."""
  entries = shared('safety/ldnoobw/en').read_text(encoding='utf-8').split('\n')
  forms = '|'.join(re.escape(entry.strip()) for entry in entries if entry.strip())
  expression = re.compile(rf'(?:\W|^)({forms})(?:\W|$)')
  text = gzip.open(shared('lm/wikitext-2/valid.txt.gz'), 'rt', encoding='utf-8').read()
  chapters = re.split(r'\n = [^=]', text)
  removed = [bool(judged(blocklist, chapter, 'en').removed_by) for chapter in chapters]
  assert removed == [bool(expression.search(chapter.lower())) for chapter in chapters]
  assert 0 < sum(removed) < len(removed) / 2


def test_words_count_only_whole_where_words_have_spaces(blocklist):
  assert words(blocklist, 'Sex sells.', 'en') == ['sex']
  assert not words(blocklist, 'Essex, Sussex, sexton, assess, Scunthorpe, ésex, sexé', 'en')
  assert words(blocklist, '这个三级片很旧', 'zh') == ['三级片']
  assert not words(blocklist, '性 別', 'zh')  # C4 lets it pass.
  assert not words(blocklist, '1913.5 asmr', 'zh')  # '13.' and 'sm' are words there too.


def test_a_document_is_judged_by_the_list_of_its_language(blocklist):
  text = 'une pute'
  assert judged(blocklist, text, 'fr').removed_by and not judged(blocklist, text, 'en').removed_by
  assert judged(blocklist, text).removed_by  # Of unknown language: all lists.
  assert not judged(blocklist, text, 'fi').verdicts  # No list: not judged.


def test_another_list_makes_another_corpus(tmp_path):
  (tmp_path / 'en').write_text('bad\n')
  stage = harm.Blocklist(files=str(tmp_path / 'en'))
  before = stage.prepare(tmp_path)
  assert repr(stage.prepare(tmp_path)) == repr(before)
  (tmp_path / 'en').write_text('worse\n')
  assert repr(stage.prepare(tmp_path)) != repr(before)


def test_a_list_is_named_when_it_cannot_be_read(tmp_path):
  with pytest.raises(UserError, match='matches no file'):
    judged(harm.Blocklist(files=(str(tmp_path / 'en'),)), 'x')
  (tmp_path / 'en').write_bytes(b'\xff')
  with pytest.raises(UserError, match='not UTF-8'):
    judged(harm.Blocklist(files=(str(tmp_path / 'en'),)), 'x')


ORDINARY = (
    'The garden had been laid out by an uncle who liked straight lines. Between the beds ran paths '
    'of crushed shell, and at the end of each stood a bench that nobody used. In spring the bulbs '
    'came up in rows like pupils; by July everything had leaned over, grown together and refused '
    'to be told apart, which my mother said was the best thing about it. We ate our meals there.'
)


def stuffed():
  rng = random.Random(0)
  filler = ORDINARY.lower().split()
  return ' '.join(
      rng.choice(filler) if rng.random() < 0.6 else rng.choice(('replica', 'watches', 'cheap'))
      for _ in range(200)
  )


@pytest.mark.supports('documents', 'Spam: compressibility, stuffed keywords, links')
@pytest.mark.parametrize('text, rule', [
    ('Buy cheap replica watches online today! ' * 40, 'spam.compression'),
    (stuffed(), 'spam.keyword'),
    ('\n'.join(f'Best offer https://shop{n}.example.com/{n * 7919:x}/deal' for n in range(9)),
     'spam.links'),
])  # fmt: skip
def test_spam_is_removed_by_the_rule_that_it_breaks(text, rule):
  document = judged(harm.Spam(), text)
  limits = {'compression': 4.0, 'keyword': 0.15, 'links': 0.5}
  broken = [name for name, most in limits.items() if document.verdicts[f'spam.{name}'] > most]
  assert document.removed_by == f'spam.{broken[0]}' and rule in [f'spam.{name}' for name in broken]


def test_ordinary_text_is_no_spam_and_every_rule_is_measured():
  document = judged(harm.Spam(), ORDINARY)
  assert not document.removed_by
  assert set(document.verdicts) == {'spam.compression', 'spam.keyword', 'spam.links'}
  text = gzip.open(shared('lm/wikitext-2/valid.txt.gz'), 'rt', encoding='utf-8').read()
  chapters = re.split(r'\n = [^=]', text)
  assert not any(judged(harm.Spam(), chapter).removed_by for chapter in chapters)
  assert not judged(harm.Spam(), '').removed_by
