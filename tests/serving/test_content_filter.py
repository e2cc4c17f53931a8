"""A server with filters lets nothing through that they refuse, says so, and keeps no text."""
import functools
import json
import os
import signal
import types

from conftest import Server, until
import httpx2 as httpx
import openai
import pytest

from lm.commands import serve_filter
from lm.errors import UserError

LETTERS = 'abcdefghijklmnop'
KEY = 'a-key-of-some-length'
PLANTED = 'grumbo', 'ann@example.org', '541-754-3010', 'Xylophone', 'very bad thing'


def spelt(*pieces):
  """A prompt on which the model writes these pieces; it holds nothing that a filter knows."""
  letters = lambda piece: ''.join(
      LETTERS[byte >> 4] + LETTERS[byte & 15] for byte in piece.encode())
  return ' '.join(map(letters, pieces))


@pytest.fixture(scope='module')
def guarded(tmp_path_factory):
  """A server with all filters, whose log is kept."""
  folder = tmp_path_factory.mktemp('guarded')
  (folder / 'keys').write_text(f'anna {KEY}')
  (folder / 'list').write_text('grumbo\nvery bad thing\n')
  with open(folder / 'log', 'w+') as log:
    server = Server('says', 'gpt', 'classify', 'embed', 'tag', 'fill', keys=str(folder / 'keys'),
                    blocklist=str(folder / 'list'), log=log)
    client = openai.OpenAI(base_url=f'{server.url}/v1', api_key=KEY, max_retries=0)
    post = lambda path, **body: server.post(path, json=body,
                                            headers={'Authorization': f'Bearer {KEY}'})
    yield types.SimpleNamespace(server=server, client=client, post=post, log=folder / 'log')
    server.close()


def said(guarded, *pieces, **options):
  """A choice of a completion whose text the model writes in these pieces."""
  found = guarded.client.completions.create(model='says', prompt=spelt(*pieces), **options)
  return found.choices[0]


def streamed(guarded, *pieces, **options):
  """The texts of a stream, and how it ends."""
  found = [piece.choices[0] for piece in guarded.client.completions.create(
      model='says', prompt=spelt(*pieces), stream=True, **options)]
  return [choice.text for choice in found], found[-1].finish_reason


@pytest.mark.supports('serving', 'harm refused on both sides, by a list and a classifier')
@pytest.mark.parametrize('prompt, rule', [
    ('a Grumbo there', 'blocklist'), ('very bad\nthing', 'blocklist'), ('so 100% of it', 'harm'),
    ('x ' * 200 + '%' + ' x' * 200, 'harm'), (['good', 'grumbo'], 'blocklist')])
def test_a_prompt_that_is_refused_is_an_error_with_its_code(guarded, prompt, rule):
  before = guarded.server.metric('lm_filter_decisions_total', side='input', verdict='block',
                                 rule=rule)
  with pytest.raises(openai.BadRequestError, match=f'rule: {rule}') as refused:
    guarded.client.completions.create(model='says', prompt=prompt)
  assert refused.value.code == 'content_filter' and refused.value.status_code == 400
  with pytest.raises(openai.BadRequestError):
    for _ in guarded.client.completions.create(model='says', prompt=prompt, stream=True):
      pass
  assert guarded.server.metric('lm_filter_decisions_total', side='input', verdict='block',
                               rule=rule) == before + 2


def test_every_route_is_judged(guarded):
  chat = lambda text: guarded.post('/v1/chat/completions', model='says', messages=[
      {'role': 'system', 'content': 'be good'}, {'role': 'user', 'content': [
          {'type': 'text', 'text': text[:4]}, {'type': 'text', 'text': text[4:]}]},
      {'role': 'user', 'content': spelt('yes')}])
  asks = {
      'chat': chat, 'embed': lambda text: guarded.post('/v1/embeddings', model='embed', input=text),
      'classify': lambda text: guarded.post('/v1/classify', model='classify', input=['a', text]),
      'tag': lambda text: guarded.post('/v1/tag', model='tag', input=[text.split()]),
      'fill': lambda text: guarded.post('/v1/fill', model='fill',
                                        input=['a [MASK]', f'[MASK] {text}']),
      'SageMaker': lambda text: guarded.post('/invocations', model='embed', input=text),
      'Vertex AI': lambda text: guarded.post('/predict', instances=[{'model': 'embed',
                                                                     'input': text}])}
  for name, ask in asks.items():
    for text in ('a very bad thing', 'a % b'):
      found = ask(text)
      assert found.status_code == 400, (name, found.text)
      assert found.json()['error']['code'] == 'content_filter', name
    assert ask('a very good thing').status_code == 200, name


def test_a_text_is_cut_before_what_is_refused(guarded):
  for bad, rule in (('a gr|umb|o!', 'blocklist'), ('100|% of it', 'harm')):
    refused = functools.partial(guarded.server.metric, 'lm_filter_decisions_total', side='output',
                                verdict='block', rule=rule)
    before = refused()
    pieces = ['It was ', 'so.', ' Then', ' more. ', *bad.split('|'), ' And on.']
    whole = said(guarded, *pieces)
    assert (whole.text, whole.finish_reason) == ('It was so. Then more. ', 'content_filter')
    texts, end = streamed(guarded, *pieces)
    assert (''.join(texts), end) == (whole.text, 'content_filter') and len(texts) > 2
    again, end = streamed(guarded, *''.join(pieces))
    assert (''.join(again), end) == (whole.text, 'content_filter')
    assert refused() == before + 3
  assert until(lambda: guarded.server.metric('lm_running') == 0)
  fine = said(guarded, 'It was ', 'so.')
  assert (fine.text, fine.finish_reason) == ('It was so.', 'stop')


def test_personal_information_is_replaced_on_both_sides(guarded):
  texts, end = streamed(guarded, 'Write to an', 'n@exa', 'mple.org or call 541-', '754-30', '10. ')
  assert (''.join(texts), end) == ('Write to <EMAIL> or call <PHONE>. ', 'stop')
  echoed = guarded.client.completions.create(model='says', prompt='', echo=True)
  assert echoed.choices[0].text == ''
  words = ['call', '541', '754', '3010', 'or', 'a@b.co']
  tagged = guarded.post('/v1/tag', model='tag', input=[words]).json()['data'][0]
  assert tagged['words'] == ['call', '<PHONE>', '<PHONE>', '<PHONE>', 'or', '<EMAIL>']
  vector = lambda text: guarded.post('/v1/embeddings', model='embed', input=text).json()['data'][0]
  assert vector('to ann@example.org')['embedding'] == vector('to <EMAIL>')['embedding']
  assert guarded.server.metric('lm_filter_decisions_total', side='input', verdict='redact') >= 2


@pytest.mark.supports('serving', 'no blank is filled with what is refused')
@pytest.mark.parametrize('text, filled', [
    ('gr[MASK]mba', ['uo0a']), ('gr[MASK]mbo', ['o0a']), ('[MASK] gr[MASK]mbo', ['uo0a', 'o0a']),
    ('a very bad [MASK] thing', ['uo0a']), ('to ann@exampl.c[MASK]', ['0']),
    ('ann@example.org [MASK]', ['uo0a'])])
def test_a_blank_is_filled_with_nothing_that_is_refused(guarded, text, filled):
  told = len(guarded.log.read_text())
  found = guarded.post('/v1/fill', model='fill', input=[text])
  blanks = found.json()['data'][0]['blanks']
  assert [''.join(one['text'] for one in blank) for blank in blanks] == filled
  for blank in blanks:
    scores = [one['score'] for one in blank]
    assert scores == sorted(scores, reverse=True) and sum(scores) < 1
  size = len(text.replace('[MASK]', '_').replace('ann@example.org', '<EMAIL>'))
  assert found.json()['usage']['prompt_tokens'] == size + 2
  # Of the five letters one is always refused; three would end the address.
  decision = 'route=/v1/fill side=output verdict=block rule=harm score=0.9820 redacted='
  assert decision + ('email:3\n' if filled == ['0'] else '-\n') in guarded.log.read_text()[told:]


def test_what_cannot_be_judged_does_not_pass(guarded):
  with pytest.raises(openai.BadRequestError, match='cannot judge the ids of tokens'):
    guarded.client.completions.create(model='says', prompt=[1, 2, 3])


@pytest.mark.parametrize('stream', [False, True])
def test_log_probabilities_of_what_is_not_judged_are_refused(guarded, stream):
  ask = functools.partial(guarded.client.completions.create, model='says', prompt=spelt('yes'))
  for logprobs in (0, 2):
    with pytest.raises(openai.BadRequestError, match='filters texts.*leave logprobs out') as told:
      ask(logprobs=logprobs, stream=stream)
    assert told.value.status_code == 400
  with pytest.raises(openai.BadRequestError, match='leave logprobs out'):
    guarded.client.chat.completions.create(
        model='says', messages=[{'role': 'user', 'content': spelt('yes')}], logprobs=True,
        stream=stream)
  score = functools.partial(ask, model='gpt', prompt='abc', max_tokens=0, echo=True)
  with pytest.raises(openai.BadRequestError, match='logprobs=2.*set logprobs=0'):
    score(logprobs=2)
  scores = score(logprobs=0).choices[0].logprobs  # of a prompt that was judged
  assert scores.tokens == ['a', 'b', 'c'] and all(value < 0 for value in scores.token_logprobs)
  models = guarded.client.models.list().data
  assert len(models) == 6 and all(model.filtered for model in models)


WRITTEN = 'It was so. A grumbo came. And on it goes'


def test_the_usage_of_a_text_that_is_cut_counts_what_was_written(guarded):
  ask = lambda **options: guarded.client.completions.create(
      model='gpt', prompt=['abcd', 'xy'], n=2, max_tokens=40,
      extra_body={'choices': [WRITTEN]}, **options)
  count = lambda: [guarded.server.metric('lm_tokens_total', model='gpt', kind=kind)
                   for kind in ('prompt', 'completion')]
  before, whole = count(), ask()
  assert {(one.text, one.finish_reason) for one in whole.choices} == {
      ('It was so. ', 'content_filter')}
  # A token a byte, up to the blank behind which the second sentence was judged.
  tokens = len('It was so. A grumbo came. ')
  assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (4 + 2, 4 * tokens)
  assert count() == [before[0] + 6, before[1] + 4 * tokens]
  *_, last = ask(stream=True, stream_options={'include_usage': True})
  assert last.usage == whole.usage


def test_the_log_has_decisions_and_no_text(guarded):
  said(guarded, 'to ann@example.org, Xylophone. ', 'a very bad thing')
  for text in ('grumbo', 'Xylophone 541-754-3010'):
    guarded.post('/v1/embeddings', model='embed', input=text)
  lines = guarded.log.read_text()
  for line in (
      'caller=anna route=/v1/embeddings side=input verdict=block rule=blocklist score=- redacted=-',
      'route=/v1/embeddings side=input verdict=redact rule=- score=0.0180 redacted=phone:1',
      'caller=anna route=/v1/completions side=output verdict=block rule=blocklist'):
    assert line in lines
  for text in (*PLANTED, spelt('a very bad thing'), KEY):
    assert text.lower() not in lines.lower()


def pid_of_filter(server):
  return next(pid for pid in server.workers()
              if b'filter=' in open(f'/proc/{pid}/cmdline', 'rb').read())


def test_without_the_filter_nothing_goes_through(guarded):
  server = guarded.server
  for body in ({}, {'stream': True}):  # It dies of this text, and so does its successor.
    found = guarded.post('/v1/completions', model='says', prompt='die now', **body)
    assert found.status_code == 503 and 'filter' in found.json()['error']['message']
    assert found.headers['Retry-After']
    assert until(lambda: httpx.get(f'{server.url}/ready').is_success)
  os.kill(pid_of_filter(server), signal.SIGKILL)
  codes = set()
  while 200 not in codes:
    codes.add(guarded.post('/v1/completions', model='says', prompt=spelt('yes')).status_code)
    bad = guarded.post('/v1/completions', model='says', prompt='grumbo')
    assert bad.status_code in (400, 503)
  assert codes <= {200, 503}
  assert server.metric('lm_worker_restarts', model='filter') >= 3


def test_a_stream_whose_filter_dies_says_so(guarded):
  with httpx.stream('POST', f'{guarded.server.url}/v1/completions', timeout=60, json={
      'model': 'says', 'prompt': spelt('All is well. ', 'die now'), 'stream': True},
                    headers={'Authorization': f'Bearer {KEY}'}) as response:
    found = [line.removeprefix('data: ') for line in response.iter_lines() if line]
  first, error, done = json.loads(found[0]), json.loads(found[-2]), found[-1]
  assert first['choices'][0]['text'] == 'All is well. ' and done == '[DONE]'
  assert error['error']['code'] == 503 and 'die now' not in ''.join(found)
  assert until(lambda: httpx.get(f'{guarded.server.url}/ready').is_success)


def test_recorded_precision_and_recall_are_those_of_the_threshold(tmp_path):
  (tmp_path / 'predictions').mkdir()
  rows = [('harmful', -0.05), ('harmful', -0.3), ('harmful', -3.0), ('harmless', -0.01),
          ('harmless', -4.0), ('harmful', -0.02)]
  (tmp_path / 'predictions' / 'a-test.json').write_text(json.dumps(
      {'task': 'a', 'split': 'test', 'kind': 'classification', 'labels': ['harmless', 'harmful']}))
  (tmp_path / 'predictions' / 'a-test.jsonl').write_text(''.join(json.dumps(
      {'id': str(i), 'targets': target, 'prediction': target, 'scores': [-1.0, score]}) + '\n'
      for i, (target, score) in enumerate(rows)))
  found, = serve_filter.measured(tmp_path, 0.9)
  assert (found['precision'], found['recall'], found['examples']) == (2 / 3, 2 / 4, 6)
  assert serve_filter.measured(tmp_path, 0.5)[0]['recall'] == 3 / 4
  assert serve_filter.measured(tmp_path / 'none', 0.5) == []


@pytest.mark.parametrize('text, sentence', [
    (None, 'cannot be read'), (b'\xff\xfe', 'cannot be read'), (b'# none\n\n', 'has no entry')])
def test_a_list_that_is_none_is_told(tmp_path, text, sentence):
  if text is not None:
    (tmp_path / 'list').write_bytes(text)
  spec = {'blocklist': str(tmp_path / 'list'), 'redact': False, 'harm_filter': None,
          'threshold': 0.9}
  with pytest.raises(UserError, match=sentence):
    serve_filter.load(spec)
