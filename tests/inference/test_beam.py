"""Beams are those of `transformers`, and of the papers for groups and forced words."""
import json
import pathlib

import numpy as np
import pytest

import beam_reference as reference
from lm.errors import UserError
from lm.inference.beam import beam_search, BeamConfig
from small_models import model

HERE = pathlib.Path(__file__).resolve().parent
CASES = json.loads((HERE / 'reference_beams.json').read_text())
MAX_NEW_TOKENS = 12


def search(name, prompts, eos, words=None, max_new_tokens=MAX_NEW_TOKENS, **settings):
  decoder, params = model(name)
  settings.setdefault('num_return_sequences', settings.get('num_beams', 4))
  config = BeamConfig(max_new_tokens=max_new_tokens, **settings)
  return beam_search(decoder, params, [np.array(prompt) for prompt in prompts], config, 64, eos,
                     None, words)


@pytest.mark.supports('decoding', 'beam search as of transformers')
@pytest.mark.parametrize('case', CASES, ids=lambda case: '-'.join(
    [case['model'], *map(str, case['settings'].values())]))
def test_beams_and_scores_are_those_of_transformers(case):
  found = search(case['model'], case['prompts'], case['eos'], **case['settings'])
  for ours, theirs in zip(found, case['beams'], strict=True):
    assert [beam.tokens.tolist() for beam in ours] == [tokens for tokens, _ in theirs]
    np.testing.assert_allclose([beam.score for beam in ours], [score for _, score in theirs],
                               atol=1e-4, rtol=1e-5)


TABLE, LOGITS, EOS = reference.Table(13), reference.table(13), 3
PROMPTS = [[5, 7], [10, 11], [4, 4, 9, 2, 8], [1]]


def compare(config, words=None, prompts=PROMPTS):
  found = beam_search(TABLE, LOGITS, [np.array(prompt) for prompt in prompts], config, 64, EOS,
                      None, words)
  for ours, prompt, forced in zip(found, prompts, words or [()] * len(prompts), strict=True):
    theirs = reference.search(LOGITS, prompt, config, EOS, forced)[:config.num_return_sequences]
    assert [beam.tokens.tolist() for beam in ours] == [tokens for tokens, _ in theirs]
    np.testing.assert_allclose([beam.score for beam in ours], [score for _, score in theirs],
                               rtol=1e-5)
  return found


@pytest.mark.supports('decoding', 'diverse beams')
@pytest.mark.parametrize('stops', [dict(), dict(early_stopping=True, length_penalty=0.5),
                                   dict(early_stopping='never', length_penalty=1.0),
                                   dict(early_stopping='never', length_penalty=2.0),
                                   dict(early_stopping='never', length_penalty=0.0)], ids=str)
@pytest.mark.parametrize('penalty', [0.0, 1.1, 5.0])
def test_groups_search_as_in_the_paper(penalty, stops):
  config = BeamConfig(num_beams=6, num_groups=3, diversity_penalty=penalty, num_return_sequences=6,
                      max_new_tokens=8, **stops)
  for beams in compare(config):
    distinct = {tuple(beam.tokens) for beam in beams}
    assert len(distinct) == 2 if penalty == 0 else len(distinct) > 2


FORCED = [[[6]], [[2, 11]], [], [[6, 1], [6, 9, 4]]]


@pytest.mark.supports('decoding', 'forced words')
@pytest.mark.parametrize('stops', [dict(), dict(early_stopping=True), dict(length_penalty=0.0)],
                         ids=str)
def test_forced_words_are_written_by_banks_as_in_the_paper(stops):
  config = BeamConfig(num_return_sequences=4, max_new_tokens=12, **stops)
  for forced, (best, *_) in zip(FORCED, compare(config, FORCED)):
    text = ' '.join(map(str, best.tokens))
    assert all(' '.join(map(str, word)) in text for word in forced)


def test_forced_words_are_those_of_their_prompt_alone():
  config = BeamConfig(max_new_tokens=12)
  tokens = lambda words: [beam.tokens.tolist() for beam, in compare(config, words)]
  forced, last = tokens(FORCED), tokens([[], [], [], FORCED[3]])
  assert forced[2:] == last[2:] and forced[1] != last[1]


def test_a_text_that_the_limit_cuts_off_before_its_words_comes_last():
  config = BeamConfig(num_return_sequences=4, max_new_tokens=3)
  beams, = compare(config, [[[6, 1, 2]]], PROMPTS[:1])
  assert beams[0].tokens.tolist() == [6, 1, 2]
  assert beams[0].score < beams[1].score, 'a likelier text without the words came first'


def test_one_beam_is_greedy_and_says_how_likely_each_token_is():
  found = compare(BeamConfig(num_beams=1, max_new_tokens=12))
  for (beam,), prompt in zip(found, PROMPTS):
    text = list(prompt)
    for token, log_prob in zip(beam.tokens, beam.log_probs, strict=True):
      row = reference.log_probs(LOGITS, text)
      assert token == row.argmax()
      np.testing.assert_allclose(log_prob, row.max(), atol=1e-5)
      text.append(token)
    assert (text[-1] == EOS) == (beam.stopped == 'eos')


@pytest.mark.parametrize('name', ['stories260K', 't5_gated'])
def test_beams_of_a_prompt_do_not_depend_on_its_neighbours(name):
  prompts = [[5, 7], [9], [40, 41, 9, 20, 8, 22, 33], [12, 50, 6]]
  settings = dict(length_penalty=0.6, early_stopping=True, max_new_tokens=9)
  tokens = lambda prompts: [[beam.tokens.tolist() for beam in beams]
                            for beams in search(name, prompts, 9, **settings)]
  together = tokens(prompts)
  assert together == tokens(prompts[::-1])[::-1]
  assert together[:3] == tokens(prompts[:3]), 'a batch of three, padded by an idle row'


def test_a_full_context_cuts_beams_and_says_so():
  (best,), = beam_search(TABLE, LOGITS, [np.array([5, 7])], BeamConfig(max_new_tokens=12), 10, -1,
                         None)
  assert len(best.tokens) == 8 and best.stopped == 'context'


@pytest.mark.parametrize('changes, message', [
    ({'num_beams': 0}, 'num_beams=0'), ({'num_groups': 3}, 'num_beams=4 is not divisible'),
    ({'diversity_penalty': 1.0}, 'num_groups=1'), ({'num_return_sequences': 5}, 'raise num_beams'),
    ({'min_new_tokens': 129}, 'min_new_tokens=129'), ({'early_stopping': 'soon'}, "'soon'"),
    ({'no_repeat_ngram_size': 0}, 'no_repeat_ngram_size=0')])
def test_beams_that_cannot_be_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    BeamConfig(**changes)


@pytest.mark.parametrize('word, message', [([], 'must have tokens'), ([6, EOS], 'not the end'),
                                           ([6] * 13, 'max_new_tokens=12')])
def test_words_that_cannot_be_written_are_refused(word, message):
  with pytest.raises(UserError, match=message):
    beam_search(TABLE, LOGITS, [np.array([5])], BeamConfig(max_new_tokens=12), 64, EOS, None,
                [[word]])
