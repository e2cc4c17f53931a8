"""What of a text goes out, and when, does not depend on how the model cut it into pieces."""
import asyncio

from hypothesis import example, given, settings, strategies as st
import pytest

from lm.corpus.privacy import Redact
from lm.serving import sentences
from lm.serving.filters import Filter, Privacy, Words
from lm.serving.guard import Guard, redacted

ENTRIES = ('grumbo', 'very bad thing', 'zat', '坏东西', 'f**x')
PRIVATE = ('ann@example.org', 'call 541-754-3010 now', '4111 1111 1111 1111', '+46 8 928 571 38',
           'NI AB 12 34 56 C', 'GB82 WEST 1234 5698 7654 32', 'SSN 078051121', '93.184.216.34',
           'password: x7Kq9Lm2Pw4Z', 'AKIAIOSFODNN7EXAMPLQ', 'a:b@c.de', '078-05-1121',
           '-----BEGIN PRIVATE KEY-----\nMIIEvQ IBADANBg\n-----END PRIVATE KEY-----',
           'PuTTY-User-Key-File-2: ssh-rsa\nLines: 2\nAAAA\nPrivate-MAC: 0123abcd ')
PLAIN = ('Once', 'upon a time', 'I am.', 'Really?', 'in 2019', 'there', 'was', 'gr', 'umbo', 'very',
         'bad', 'thing', 'zatopek', 'the zat', '坏', '东西', '。', 'NI AB', '12', 'ann', 'é', 'A',
         'x' * 90, '\N{ZERO WIDTH SPACE}', '\n', '...', '4111 1111', 'f**', 'x', 'ＧＲＵＭＢＯ')


class Near:
  """A filter that is called in place of its worker."""
  is_ready, facts = True, {}

  def __init__(self, words=None, privacy=None):
    self._filter = Filter(words, privacy)

  async def run(self, job):
    found = []
    self._filter.submit({'id': 0, **job}, found.append)
    yield found[0]


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  path = tmp_path_factory.mktemp('words') / 'list'
  path.write_text('# those of this test\n' + '\n'.join(ENTRIES))
  return Words(str(path))


def told(near, pieces, prompt=''):
  """What comes out of pieces that a model writes, as it comes, and how it ends."""
  async def model(job):
    del job
    for piece in pieces:
      yield {'text': piece}
    yield {'text': '', 'done': 'stop'}

  async def collect():
    job = {'op': 'complete', 'prompt': prompt}
    return [event async for event in Guard(near, None).checked(model, 'a', '/', job)]
  events = asyncio.run(collect())
  return [event['text'] for event in events], events[-1]['done']


def cut(text, places):
  places = sorted({place % (len(text) + 1) for place in places})
  return [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


CUTS = st.lists(st.integers(0, 5000), max_size=40)
TEXTS = lambda parts: st.lists(st.sampled_from(parts), min_size=1, max_size=40).flatmap(
    lambda found: st.lists(st.sampled_from((' ', ' ', ' ', '', '. ', '\n')), min_size=len(found),
                           max_size=len(found)).map(
        lambda gaps: ''.join(map(''.join, zip(found, gaps)))))


@pytest.mark.supports('serving', 'personal information replaced, in streams too')
@settings(max_examples=300, deadline=None)
@given(TEXTS((*PRIVATE, *PLAIN)), CUTS)
@example('the address is ann@example.org and', range(40))
@example('The card 4111 1111 1111 1111 is mine. ' + 'So it goes on. ' * 40, range(900))
@example('So. ' * 60 + 'Now NI AB 12 34 56 C. ' + 'So it goes on. ' * 40, range(900))
@example('At 10. ' * 3000 + 'Call 541-754-3010. ' * 2, range(0, 21_000, 700))
@example('-----BEGIN PRIVATE KEY-----\n' + 'MIIEvQ IBAD. ' * 900 + '-----END PRIVATE KEY----- a',
         range(0, 12_000, 700))
@example('word ' * 54 + '+46 8 928 571 38 is it', range(300))
@example('word ' * 54 + 'NI AB 12 34 56 C is it. ' + 'word ' * 60, range(400))
@example('字' * 250 + 'ghp_' + 'a1B' * 12 + '。', range(300))
@example('PuTTY-User-Key-File-2: ssh-rsa\n' + 'AAAA\n' * 100 + 'Private-MAC: 0123abcd ', range(600))
def test_a_stream_is_redacted_as_the_whole_text(text, places):
  pieces, end = told(Near(privacy=Privacy()), cut(text, places))
  assert ''.join(pieces) == redacted(text, Redact().find(text), 0, len(text)) and end == 'stop'


@settings(max_examples=300, deadline=None)
@given(TEXTS(PLAIN + ENTRIES), CUTS)
@example('a very bad\nthing', range(20))
@example('so. very. grum\N{ZERO WIDTH SPACE}bo! and on', range(30))
@example('x' * 278 + ' very bad thing and on', range(400))
@example('-' * 277 + 'zatopek and on', range(300))
def test_no_blocked_word_gets_out(words, text, places):
  near = Near(words)
  whole, one_end = told(near, [text])
  pieces, end = told(near, cut(text, places))
  out = ''.join(pieces)
  assert (out, end) == (''.join(whole), one_end)
  assert not words.judge(out, True)[0] and text.startswith(out)
  assert (end == 'content_filter') == words.judge(text, True)[0]
  assert out == text if end == 'stop' else not words.judge(out, False)[1]


def test_words_that_only_hold_an_entry_pass(words):
  for text in ('zatopek', 'gazat', 'very badthing', 'grumbos', 'bad thing'):
    assert told(Near(words), [*text]) == ([text], 'stop')
  for text in ('ZAT', 'Very  bad\tthing!', '“grumbo”', '这是坏东西吗', 'f**x', 'ｚａｔ',
               'grum\N{ZERO WIDTH SPACE}bo'):
    assert words.judge(text, True)[0], text


def test_a_word_that_begins_in_the_prompt_is_blocked_and_an_address_replaced(words):
  assert told(Near(words), ['bo', ' and on'], 'so grum')[1] == 'content_filter'
  assert told(Near(words), ['opek', ' and on'], 'so zat')[1] == 'stop'
  assert told(Near(privacy=Privacy()), ['ple', '.org is it'], 'to ann@exam')[0] == [
      '<EMAIL> is it']
  long = 'grumbos ' * 1000
  assert told(Near(words), ['and', ' on'], long)[1] == 'stop'


def test_sentences_go_out_as_they_end(words):
  pieces = ['One sentence', '. Two', '. ', 'Three', ' and more']
  assert told(Near(words, Privacy()), pieces)[0] == ['One sentence. ', 'Two. ', 'Three and more']
  long = 'word ' * 400
  out = told(Near(words), [*long])[0]
  assert ''.join(out) == long and max(map(len, out)) <= sentences.WINDOW and len(out) > 6


@given(TEXTS(PLAIN + PRIVATE))
def test_windows_cover_a_text_and_none_is_long(text):
  found = list(sentences.windows(text))
  assert ''.join(text[begin:end] for begin, end in found) == text
  assert all(end - begin <= sentences.WINDOW for begin, end in found)
