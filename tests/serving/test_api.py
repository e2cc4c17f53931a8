"""What OpenAI's own client gets from the server is what the model says."""
import json
import subprocess
import sys

import httpx2 as httpx
import numpy as np
import openai
import pytest
from tiny_worker import FIM, LABELS, made

from lm.data.examples import chat
from lm.data.vocabularies import ByteVocabulary
from lm.inference import complete, generate, infill, SamplingConfig
from lm.inference.generate import without_eos
from lm.inference.scores import score


@pytest.fixture(scope='module')
def client(writer):
  return openai.OpenAI(base_url=f'{writer.url}/v1', api_key='none', max_retries=0)


def expected(prompts, seeds=0, **sampling):
  """What `generate` writes."""
  done = complete(*made('gpt'), ByteVocabulary(), prompts, SamplingConfig(**sampling), seeds, 48)
  return [one['text'] for one in done]


@pytest.mark.supports('serving', "OpenAI's completions, streamed or not, by its own client")
def test_a_completion_is_the_text_of_generate(client):
  ask = lambda **options: client.completions.create(model='gpt', max_tokens=9, **options)
  greedy = ask(prompt=['abc', 'hello'], temperature=0)
  assert [one.text for one in greedy.choices] == expected(['abc', 'hello'], temperature=0.0,
                                                          max_new_tokens=9)
  assert greedy.usage.prompt_tokens == 8 and greedy.usage.completion_tokens == 18
  drawn = ask(prompt='abc', n=3, seed=5, temperature=1.3, top_p=0.9)
  assert [one.text for one in drawn.choices] == expected(
      ['abc'] * 3, [5, 6, 7], temperature=1.3, top_p=0.9, max_new_tokens=9)
  empty = [ask(prompt=prompt, temperature=0).choices[0].text for prompt in ([], '')]
  assert empty[0] == empty[1]
  ids = ByteVocabulary().encode('abc').tolist()
  assert ask(prompt=ids, temperature=0).choices[0].text == greedy.choices[0].text


def test_a_stream_is_the_same_text_in_pieces(client):
  ask = lambda **options: client.completions.create(
      model='gpt', prompt='abc', max_tokens=30, seed=3, n=2, **options)
  whole, texts, ends = ask(), ['', ''], {}
  pieces = list(ask(stream=True, stream_options={'include_usage': True}))
  for piece in pieces[:-1]:
    choice, = piece.choices
    texts[choice.index] += choice.text
    if choice.finish_reason:
      ends[choice.index] = choice.finish_reason
  assert texts == [one.text for one in whole.choices] and set(ends.values()) == {'length'}
  assert pieces[-1].usage == whole.usage and len(pieces) > 4


def test_log_probabilities_are_the_models_own(client):
  ask = lambda **options: client.completions.create(
      model='gpt', prompt='abc', temperature=0, max_tokens=5, logprobs=2, **options).choices[0]
  found = ask().logprobs
  greedy, = complete(*made('gpt'), ByteVocabulary(), ['abc'],
                     SamplingConfig(temperature=0.0, max_new_tokens=5), 0, 48)
  context = np.concatenate([[0], ByteVocabulary().encode('abc')])
  scores, = score(*made('gpt'), [(context, greedy['tokens'])], 2)
  np.testing.assert_allclose(found.token_logprobs, scores.log_probs, atol=1e-4)
  np.testing.assert_allclose([max(one.values()) for one in found.top_logprobs],
                             scores.top_log_probs[:, 0], atol=1e-4)
  echoed = client.completions.create(model='gpt', prompt='abc', max_tokens=0, echo=True, logprobs=1)
  assert echoed.choices[0].text == 'abc' and len(echoed.choices[0].logprobs.tokens) == 3


@pytest.mark.supports('serving', 'conversations by the chat template, gaps by suffix')
def test_a_conversation_is_answered_by_the_template_and_a_gap_is_filled(client):
  messages = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'hi'}]
  ask = lambda **options: client.chat.completions.create(
      model='talk', messages=messages, max_tokens=9, seed=4, temperature=0.7, **options)
  template = chat.open_template(ByteVocabulary(), 'plain')
  assert template.prompt(messages).tolist() != template.prompt(messages[1:]).tolist()
  wanted, = generate(*made('talk'), [template.prompt(messages)], SamplingConfig(
      temperature=0.7, max_new_tokens=9), 4, 48, template.end_id, None)
  text, found = ByteVocabulary().decode(without_eos(wanted)), ask(logprobs=True)
  assert found.choices[0].message.content == text and found.choices[0].message.role == 'assistant'
  assert found.usage.prompt_tokens == len(template.prompt(messages))
  np.testing.assert_allclose([one.logprob for one in found.choices[0].logprobs.content],
                             wanted.log_probs, atol=1e-4)
  pieces = list(ask(stream=True))
  assert ''.join(piece.choices[0].delta.content or '' for piece in pieces) == text
  gap = client.completions.create(model='talk', prompt='abc', suffix='def', max_tokens=9,
                                  temperature=0)
  middle, = infill.infill(*made('talk'), ByteVocabulary(), FIM, 'abc', 'def',
                          SamplingConfig(max_new_tokens=9), 1, 0, 48)
  assert gap.choices[0].text == middle.text
  with pytest.raises(openai.BadRequestError, match='can complete, score, and not chat'):
    client.chat.completions.create(model='gpt', messages=messages)


@pytest.mark.supports('serving', 'stop strings, rules, seeds, log-probabilities')
def test_a_text_ends_at_its_stop_and_follows_its_rule(client):
  whole = expected(['abc'], temperature=0.0, max_new_tokens=30)[0]
  stop = whole[3:5]
  cut = client.completions.create(model='gpt', prompt='abc', temperature=0, max_tokens=30,
                                  stop=stop)
  assert cut.choices[0].text == whole[:whole.index(stop)]
  assert cut.choices[0].finish_reason == 'stop'
  ruled = client.completions.create(model='gpt', prompt='abc', max_tokens=8,
                                    extra_body={'regex': '[0-9]{3}-x'})
  assert ruled.choices[0].text[:3].isdigit() and ruled.choices[0].text[3:] == '-x'


@pytest.mark.supports('serving', 'classes of texts: /v1/classify')
def test_texts_are_classified_together_and_each_as_alone(writer):
  ask = lambda *texts: writer.post('/v1/classify', json={'model': 'classify', 'input': texts}
                                   ).json()['data']
  texts = ['a', 'some text', 'another text that is longer', '']
  together = ask(*texts)
  for text, found in zip(texts, together):
    alone, = ask(text)
    assert found['label'] == alone['label'] == max(found['scores'], key=found['scores'].get)
    assert set(found['scores']) == set(LABELS)
    np.testing.assert_allclose(list(found['scores'].values()), list(alone['scores'].values()),
                               atol=1e-5)
  assert len({json.dumps(found['scores']) for found in together}) == 4


@pytest.mark.supports('serving', 'its OpenAPI description, by schemathesis')
def test_no_request_of_the_description_is_an_error_of_the_server(writer, tmp_path):
  pytest.importorskip('schemathesis', reason='schemathesis is in the extra test')
  found = subprocess.run(
      [sys.executable, '-m', 'schemathesis.cli', 'run', f'{writer.url}/openapi.json', '--seed=1',
       '--max-examples=8', '--checks=not_a_server_error', '--phases=examples,coverage,fuzzing',
       '--continue-on-failure', '--request-timeout=60'], capture_output=True, text=True,
      cwd=tmp_path)
  assert found.returncode == 0, found.stdout[-3000:]
  assert writer.metric('lm_requests_total') > 100
  assert writer.metric('lm_requests_total', status='200') > 20
  assert writer.metric('lm_worker_restarts') == 0


BAD = {
    'no model': ({'model': 'none', 'prompt': 'a'}, 404, "no model 'none'"),
    'another ability': ({'model': 'classify', 'prompt': 'a'}, 400, 'can classify'),
    'too many tokens': ({'prompt': 'a', 'max_tokens': 1001}, 400, 'max_tokens=1001'),
    'too many texts': ({'prompt': 'a', 'n': 9}, 400, '9 texts'),
    'a long prompt': ({'prompt': 'a' * 100}, 400, 'the prompt has 100 tokens'),
    'unknown field': ({'prompt': 'a', 'tempreture': 1}, 400, 'tempreture'),
    'a number out of range': ({'prompt': 'a', 'top_p': 2}, 400, 'top_p'),
    'ids of no token': ({'prompt': [1, 4000]}, 400, '0 to 299'),
    'an empty stop': ({'prompt': 'a', 'stop': ['']}, 400, 'stop has an empty text'),
    'a bad rule': ({'prompt': 'a', 'regex': '('}, 400, 'regex'),
    'two rules': ({'prompt': 'a', 'regex': 'a', 'choices': ['a']}, 400, 'one of regex'),
    'no token': ({'prompt': 'a', 'logit_bias': {'x': 1}}, 400, 'logit_bias'),
    'echo of nothing': ({'prompt': 'a', 'max_tokens': 0}, 400, 'max_tokens=0'),
    'a suffix': ({'prompt': 'a', 'suffix': 'b'}, 400, 'infill'),
}


@pytest.mark.parametrize('name', BAD)
def test_a_wrong_request_is_told_in_one_sentence(writer, name):
  body, status, sentence = BAD[name]
  found = writer.post('/v1/completions', json={'model': 'gpt', 'max_tokens': 4} | body)
  assert found.status_code == status and sentence in found.json()['error']['message']


RAW = {'no JSON': (b'{"model": "gpt"', 400), 'invalid UTF-8': (b'{"model": "\xff\xfe"}', 400),
       'a lone surrogate': (b'{"model": "gpt", "prompt": "\\ud800"}', 400),
       'NaN': (b'{"model": "gpt", "prompt": "a", "temperature": NaN}', 400),
       'infinity': (b'{"model": "gpt", "prompt": "a", "temperature": 1e999}', 400),
       'deep JSON': (b'[' * 4000, 400), 'deep object': (b'{"a":' * 500 + b'1' + b'}' * 500, 400),
       'a long body': (b'{"model": "gpt", "prompt": "' + b'a' * 5000 + b'"}', 413),
       'a huge number': (b'{"model": "gpt", "prompt": "a", "seed": 1' + b'0' * 3000 + b'}', 400),
       'nothing': (b'', 400)}


@pytest.mark.supports('serving', 'malformed requests: a sentence each, no stuck worker')
@pytest.mark.parametrize('name', RAW)
def test_bytes_that_are_no_request_harm_nobody(writer, name):
  body, status = RAW[name]
  found = writer.post('/v1/completions', content=body,
                      headers={'Content-Type': 'application/json'})
  assert found.status_code == status, found.text
  assert found.json()['error']['message']


def test_a_body_without_a_length_is_cut_off_too(writer):
  found = writer.post('/v1/completions', content=(b'a' * 1000 for _ in range(50)))
  assert found.status_code == 413


def test_the_state_is_told(writer):
  get = lambda path: httpx.get(writer.url + path)
  assert get('/health').json() == {'status': 'alive'} and get('/ready').status_code == 200
  models = {one['id']: one for one in get('/v1/models').json()['data']}
  assert models['classify']['labels'] == list(LABELS) and models['gpt']['max_length'] == 48
  assert '/v1/completions' in get('/openapi.json').json()['paths']
  before = writer.metric('lm_tokens_total', model='gpt', kind='completion')
  writer.post('/v1/completions', json={'model': 'gpt', 'prompt': 'a', 'max_tokens': 7})
  assert writer.metric('lm_tokens_total', model='gpt', kind='completion') == before + 7
  assert writer.metric('lm_running') == 0


@pytest.mark.supports('serving', 'the contracts of SageMaker and Vertex AI')
def test_clouds_are_answered_as_the_routes_answer(writer):
  post = lambda path, body: writer.post(path, json=body)
  assert httpx.get(f'{writer.url}/ping').status_code == 200
  body = {'model': 'gpt', 'prompt': 'abc', 'temperature': 0, 'max_tokens': 5}
  text = post('/v1/completions', body).json()['choices'][0]['text']
  assert post('/invocations', body).json()['choices'][0]['text'] == text
  classes = post('/v1/classify', {'model': 'classify', 'input': 'ab'}).json()['data']
  found = post('/predict', {'instances': ['ab', {'input': 'ab'}],
                            'parameters': {'model': 'classify'}}).json()['predictions']
  assert [one['data'] for one in found] == [classes, classes]
  for path, bad, told in (('/invocations', {'prompt': 'a'}, 'model is missing'),
                          ('/invocations', {**body, 'top_p': 7}, 'top_p'),
                          ('/invocations', {**body, 'model': 3}, 'model'),
                          ('/predict', {'instances': []}, 'instances'),
                          ('/predict', {'instances': ['a'] * 9}, '9 instances'),
                          ('/predict', {'instances': [{**body, 'stream': True}]}, 'stream')):
    answer = post(path, bad)
    assert answer.status_code == 400 and told in answer.json()['error']['message'], answer.text


@pytest.mark.parametrize('kind', ['tag', 'embed'])
def test_other_heads_answer_in_their_own_form(kind):
  """By the backend alone, as `worker.work` calls it."""
  from tiny_worker import backend
  found, reader = [], backend(kind)
  words = ['ab', 'c', 'defg']
  reader.submit({'id': 1, 'op': kind, 'input': words if kind == 'tag' else 'ab c'}, found.append)
  reader.submit({'id': 2, 'op': kind, 'input': 'ab c' if kind == 'embed' else ' '.join(words)},
                found.append)
  while reader.step() is not None:
    pass
  first, second = found
  if kind == 'tag':
    assert first['tags'] == second['tags'] and first['words'] == words
    assert set(first['tags']) <= set(LABELS)
  else:
    assert first['vector'] == second['vector']
    np.testing.assert_allclose(np.linalg.norm(first['vector']), 1, atol=1e-5)
