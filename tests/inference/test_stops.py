"""Text grows character by character and never shows a part of a stop string."""
import dataclasses

from hypothesis import example, given, settings, strategies as st
import numpy as np
import pytest
from test_generate import GPT2, Letters, params_of

from lm.data.vocabularies import ByteVocabulary
from lm.inference import complete, SamplingConfig
from lm.inference.stops import Detokenizer, StopStrings, Stream

PIECES = st.lists(st.text('ab€', max_size=4), max_size=12)
STOPS = st.lists(st.text('ab€', min_size=1, max_size=4), max_size=3)


def cut(text, stops):
  """The specification: the text before the stop string that ends first, of these the longest."""
  for end in range(len(text) + 1):
    ended = [stop for stop in stops if text[:end].endswith(stop)]
    if ended:
      return text[:end - max(map(len, ended))], True
  return text, False


@pytest.mark.supports('decoding', 'stop strings across token borders')
@settings(max_examples=300, deadline=None)
@example(['a', 'ba', 'bb'], ['ababb', 'abb'])
@given(PIECES, STOPS)
def test_text_is_cut_before_the_first_stop_string_however_it_comes(pieces, stops):
  expected, stopped = cut(''.join(pieces), stops)
  matcher, given_out = StopStrings(stops), ''
  for number, piece in enumerate(pieces):
    given_out += matcher.feed(piece)
    # All that can be no part of a stop string is out, and nothing that may yet be one.
    so_far, done = cut(''.join(pieces[:number + 1]), stops)
    tail = 0 if done else max((n for stop in stops for n in range(len(stop))
                               if so_far.endswith(stop[:n])), default=0)
    assert given_out == so_far[:len(so_far) - tail]
  assert given_out + matcher.finish() == expected
  assert (matcher.stopped_by is not None) == stopped


@pytest.mark.supports('decoding', 'streaming of whole UTF-8 characters')
@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=3), st.text('aé€😀 ', max_size=3).map(str.encode))))
def test_characters_come_out_whole_and_all_bytes_in_the_end(parts):
  vocabulary = ByteVocabulary()
  ids = (np.frombuffer(b''.join(parts), np.uint8).astype(int) + 3).tolist()
  stream = Detokenizer(vocabulary.decode)
  pieces = [stream.feed(token) for token in ids]
  assert not any(piece.endswith('\N{REPLACEMENT CHARACTER}') for piece in pieces)
  assert ''.join(pieces) + stream.finish() == vocabulary.decode(ids)


def test_a_valid_text_waits_for_no_byte_more_than_its_character_has():
  vocabulary, text = ByteVocabulary(), 'né 3€ 😀.'
  stream, seen = Detokenizer(vocabulary.decode), ''
  for count, token in enumerate(vocabulary.encode(text), 1):
    seen += stream.feed(token)
    assert seen == text.encode()[:count].decode(errors='ignore')


def test_spaces_between_words_come_out_though_decoding_begins_with_none():
  words = ['once', 'upon', 'a', 'time']
  stream = Detokenizer(lambda ids: ' '.join(words[i] for i in ids))
  assert [stream.feed(i) for i in (0, 1, 2, 3, 2)] == ['once', ' upon', ' a', ' time', ' a']


def test_a_character_of_several_tokens_stops_a_text():
  vocabulary = ByteVocabulary()
  stream = Stream(vocabulary.decode, ['€.'])
  for token in vocabulary.encode('3€ 4€, 5€. 6'):
    stream.feed(token)
  assert stream.stopped and stream.text == '3€ 4€, 5' and stream.finish() == ''


def test_a_completion_ends_before_its_stop_string_and_others_go_on():
  vocabulary = Letters()
  config = SamplingConfig(temperature=1.0, max_new_tokens=40)
  ask = lambda configs, prompts: complete(
      GPT2.build(), params_of(GPT2), vocabulary, prompts, configs, 0, 48)
  prompts = ['abc', 'xyz', 'q']
  free = ask(config, prompts)
  text = free[1]['text']
  stop = next(text[i:i + 3] for i in range(18, len(text)) if text.index(text[i:i + 3]) == i)
  stopping = dataclasses.replace(config, stop=('does not occur', stop))
  done = ask([config, stopping, dataclasses.replace(config, stop=('~',))], prompts)
  assert done[0] == free[0] and done[2] == free[2]
  assert done[1]['text'] == text[:text.index(stop)] and done[1]['stopped'] == 'stop'
  ended = len(done[1]['tokens'])
  assert done[1]['tokens'] == free[1]['tokens'][:ended]
  assert stop in vocabulary.decode(done[1]['tokens'])
  assert stop not in vocabulary.decode(done[1]['tokens'][:-1])


def test_bad_words_may_be_texts():
  vocabulary = ByteVocabulary()
  model = dataclasses.replace(GPT2, vocab_size=vocabulary.size)
  config = SamplingConfig(temperature=1.0, max_new_tokens=40)
  ask = lambda config: complete(model.build(), params_of(model), vocabulary, ['abc'], config, 0, 48)
  text = ask(config)[0]['text']
  word = next(c for c in text if c.isprintable() and c.isascii())
  assert word not in ask(dataclasses.replace(config, bad_words=(word,)))[0]['text']
