"""One spelling for what looks the same, and nothing else is touched."""

import pathlib
import random
import unicodedata

from hypothesis import given, settings, strategies as st
import pytest

from lm.corpus import normalise
from lm.corpus.document import Document

# What the rules are about, more often than chance would bring it together.
PIECES = st.sampled_from([
    'a', 'é', 'e\u0301', ' ', '\t', '\n', '\r\n', '\r', '\x85', '\u2028', '\xa0', '\u3000',
    '\u200b',
    '\u200c', '\u200d', '\ufeff', '\xad', '\x00', '\x1b', '\x1b[1m', '’', '“', '”', '„', '中', '。',
    'ا', 'ی', 'क', '्', '👩', '💻', '\ufe0f', 'Ã', '©', 'Â', '€', '™', 'â', '&amp;', '&lt;', '&', ';',
    'amp;', '<', '\ud83d', '\udc69', '.', '-', 'İ', 'Σ', '\u212b', '\u2126', '\u0344',
    '\n    if x:',
])


def normalised(text, **options):
  document = Document('name', text)
  normalise.Normalise(**options).apply(document)
  return document.text


@settings(max_examples=200, deadline=None)
@given(
    st.lists(PIECES | st.characters(), max_size=40).map(''.join), st.booleans(), st.booleans()
)
def test_normalising_twice_changes_nothing_more(text, lower_case, remove_punctuation):
  options = dict(lower_case=lower_case, remove_punctuation=remove_punctuation)
  once = normalised(text, **options)
  assert normalised(once, **options) == once


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES | st.characters(), max_size=40).map(''.join))
def test_what_is_left_is_canonical_and_visible(text):
  clean = normalised(text)
  assert unicodedata.is_normalized('NFC', clean)
  assert not any(unicodedata.category(c) == 'Cc' and c not in '\t\n' for c in clean)
  assert not set(clean) & set('\r\xa0\xad\u200b\u2060\ufeff\u2028\u3000')
  assert all(line == line.rstrip(' \t') for line in clean.split('\n'))
  clean.encode('utf-8')


@pytest.mark.supports('documents', 'mojibake, Unicode forms, invisible characters, blanks')
@pytest.mark.parametrize('before, after', [
    ('cafÃ© au lait', 'café au lait'), ('itâ€™s fine', "it's fine"),
    ('voilÃ le travail', 'voilà le travail'),
    ('AT&amp;T', 'AT&T'), ('AT&amp;T <b>', 'AT&amp;T <b>'), ('\x1b[1mbold\x1b[0m', 'bold'),
    ('e\u0301te\u0301', 'été'), ('\u212bngstrom', 'Ångstrom'), ('\ud83d\udc69', '👩'),
    ('soft\xadhyphen zero\u200bwidth\ufeff', 'softhyphen zerowidth'), ('NUL\x00', 'NUL'),
    ('a\xa0b\u2003c\u3000d', 'a b c d'), ('a\r\nb\rc\u2028d\x0ce', 'a\nb\nc\nd\ne'),
    ('“so” ‘it’ „is‟', '"so" \'it\' "is"'), ('他说：“好”。', '他说：“好”。'),
    ('他说“GPT”好\n“yes”', '他说“GPT”好\n"yes"'), ('a  \nb\t\n\n\n\n\nc', 'a\nb\n\n\nc'),
    ('Ã\u200b©', 'é'), ('&am\u200bp;', '&'),  # mended in the second pass
    ('\n\n  first', '  first'), ('Ω㎏ ①½', 'Ω㎏ ①½'),
])
def test_characters(before, after):
  assert normalised(before) == after


@pytest.mark.parametrize('text', [
    'می\u200cخواهم', 'क्\u200dष', '👩\u200d💻', '👨🏽\u200d🚀', '❤\ufe0f\u200d🔥',
    '🏴\U000e0067\U000e007f',
])
def test_joiners_stay_where_a_script_or_an_emoji_needs_them(text):
  assert normalised(text) == text
  assert normalised(f'a\u200db\u200c {text}') == f'ab {text}'


def test_code_keeps_its_indentation_blanks_and_quotes():
  sources = [pathlib.Path(normalise.__file__).parent / 'stdlib.py', pathlib.Path(random.__file__)]
  for path in sources:
    text = path.read_text('utf-8').strip('\n')
    assert normalised(text) == text
  text = 'def f():\n\tx = {  "a":  1 }\n\n\n    return  x'
  assert normalised(text) == text


def test_options():
  assert normalised("Don't STOP — now!", lower_case=True) == "don't stop — now!"
  assert normalised("Don't (stop), 世界。", remove_punctuation=True) == 'Dont stop 世界'
  assert normalised('    x = (1)', remove_punctuation=True) == '    x = 1'
  assert normalised('“a”', straight_quotes=False) == '“a”'
  assert normalised('cafÃ©', mend_encoding=False) == 'cafÃ©'


def test_the_document_says_what_was_done_and_an_empty_one_goes():
  document = Document('name', 'cafÃ©\nfine\nâ€œok')
  normalise.Normalise().apply(document)
  assert document.verdicts == {'normalise.mended_lines': 2, 'normalise.characters': 13}
  assert not document.removed_by
  document = Document('name', ' \u200b\x00\n')
  normalise.Normalise().apply(document)
  assert document.removed_by == 'normalise.characters'


def test_the_search_finds_all_that_ftfy_takes_for_mojibake():
  from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad

  ranges = (range(0x20, 0x180), range(0x370, 0x460), range(0x2010, 0x2060), range(0x2500, 0x25A0))
  alphabet = [chr(code) for codes in ranges for code in codes]
  alphabet += [c for characters in MOJIBAKE_CATEGORIES.values() for c in characters]
  chance = random.Random(0)
  lines = [''.join(chance.choices(alphabet, k=chance.randrange(1, 5))) for _ in range(40_000)]
  bad = [line for line in lines if is_bad(line)]
  assert len(bad) > 4_000
  assert all(normalise._mendable().search(line) for line in bad)
