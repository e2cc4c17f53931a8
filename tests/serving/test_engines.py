"""Every engine behind the one interface: what it writes, and that no stream waits for a score."""
import asyncio
import json
import pathlib
import types

import httpx2 as httpx
import jax
import jaxtyping
import numpy as np
import pytest
from tiny_worker import backend, CONFIGS, FIM, LABELS, made, Vocabulary

from lm import main, run
from lm.commands import serve_worker
from lm.data import vocabularies
from lm.data.examples import chat
from lm.data.vocabularies import ByteVocabulary
from lm.errors import UserError
from lm.export import artifact
from lm.inference import complete, infill, SamplingConfig
from lm.inference.scores import score_texts
from lm.interop import of_run
from lm.serving import app
from lm.serving.admission import Keys, Queue, Rates
from lm.serving.answers import Limits
from lm.serving.reader import Batching, Reader

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPEC = {'num_rows': 3, 'cache_tokens': None, 'max_batch': 4, 'latency': 0.0}


def job(number, prompt, **more):
  sampling = {'max_new_tokens': 9, 'temperature': 0, **more.pop('sampling', {})}
  return {'id': number, 'op': 'complete', 'prompt': prompt, 'sampling': sampling, 'seed': number,
          'seconds': 600, 'top': None, **more}


def ask(writer, jobs):
  """The text and the last event of each job, all at once."""
  texts, ends = {}, {}

  def teller(number):
    def tell(event):
      texts[number] = texts.get(number, '') + event.get('text', '')
      if 'done' in event or 'error' in event:
        ends[number] = event
    return tell

  for one in jobs:
    writer.submit(one, teller(one['id']))
  while writer.step() is not None:
    pass
  return [texts[one['id']] for one in jobs], [ends[one['id']] for one in jobs]


def asked_for_scores(abilities):
  """The server's answer to who asks a model of these abilities for the scores of a prompt."""
  served = types.SimpleNamespace(name='m', facts={'abilities': abilities}, is_ready=True)
  service = app.Service([(served, Queue(1, 1))], Keys(None), Rates(None), Limits())

  async def ask():
    transport = httpx.ASGITransport(app=app.create(service))
    async with httpx.AsyncClient(transport=transport, base_url='http://server') as client:
      return await client.post('/v1/completions', json={
          'model': 'm', 'prompt': 'ab', 'echo': True, 'logprobs': 1, 'max_tokens': 0})
  return asyncio.run(ask())


SCORES_REFUSED = 'and not score a prompt, as echo with max_tokens=0 asks; the run of a GPT can'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The run of a family after a step."""
  folder = tmp_path_factory.mktemp('runs')
  (folder / 'text.jsonl').write_text('\n'.join(
      json.dumps({'text': 'Some text that is read once, and more of it. ' * 2}) for _ in range(80)))

  def train(family):
    directory, name, objective, binding = folder / family, *{
        't5': ('t5.T5Config', 'span_corruption',
               '--gin.objectives.SpanCorruption.num_sentinels=8'),
        'transformer_xl': ('transformer_xl.TransformerXLConfig', 'causal_lm',
                           '--gin.transformer_xl.TransformerXLConfig.memory_length=16')}[family]
    if not directory.exists():
      assert main.main([
          'train', f'--gin_file=gin/models/{family}_small_cpu.gin',
          f'--gin_file=gin/objectives/{objective}.gin', '--gin_file=gin/optim/adamw.gin',
          '--gin_file=gin/runs/pretrain.gin', "--gin.vocabularies.VocabularyConfig.kind='byte'",
          "--gin.DTYPE='float32'", '--gin.VOCAB_SIZE=267', '--gin.EXTRA_IDS=8',
          '--gin.SEQUENCE_LENGTH=32', '--gin.BATCH_SIZE=8', '--gin.NUM_STEPS=1',
          '--gin.WARMUP_STEPS=0', f'--gin.{name}.d_model=32', f'--gin.{name}.num_layers=2',
          f'--gin.{name}.num_heads=4', f'--gin.{name}.d_ff=64', binding,
          f"--gin.FILES='{folder}/text.jsonl'", f"--gin.CACHE_DIR='{folder}/cache'",
          f'--run_dir={directory}']) == 0
    return directory

  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)
    yield train


@pytest.mark.supports('serving', 'runs of T5 and Transformer-XL: completions, and gaps by T5')
@pytest.mark.parametrize('family', ['t5', 'transformer_xl'])
def test_a_run_of_another_family_completes_as_generate_does(trained, family):
  directory = trained(family)
  writer = serve_worker.load({**SPEC, 'directory': str(directory)})
  assert writer.abilities == ('complete', *(['infill'] if family == 't5' else []))
  prompts = ['Some', 'text that is', '', 'read', 'once']
  wishes = [{}, {'temperature': 1.0, 'top_p': 0.9}, {}, {'temperature': 1.3}, {}]
  texts, ends = ask(writer, [job(i, prompt, sampling=wish, top=2) for i, (prompt, wish) in
                             enumerate(zip(prompts, wishes))])
  experiment = run.open_experiment([], [], str(directory))
  _, module, params = run.load(experiment, str(directory))
  vocabulary, longest = vocabularies.load(directory / 'vocabulary'), experiment.model.max_length
  wanted = complete(module, params, vocabulary, prompts, [
      SamplingConfig(max_new_tokens=9, **{'temperature': 0, **wish}) for wish in wishes],
                    [*range(5)], longest)
  assert texts == [one['text'] for one in wanted]
  assert [end['done'] for end in ends] == [one['stopped'] for one in wanted]
  assert all(len(end['top']) == end['new_tokens'] for end in ends)
  with pytest.raises(UserError, match='can complete.*and not score'):
    writer.submit({'id': 9, 'op': 'score', 'prompt': 'a', 'top': 0}, print)
  refused = asked_for_scores(writer.abilities)
  assert refused.status_code == 400 and SCORES_REFUSED in refused.json()['error']['message']
  if family == 't5':
    gap = {'id': 1, 'op': 'infill', 'before': 'Some ', 'after': ' is', 'seed': 1, 'seconds': 600,
           'sampling': {'max_new_tokens': 9, 'temperature': 0}}
    sentinels = infill.Spans(*vocabulary.sentinel_ids[:2])
    found = infill.infill(module, params, vocabulary, sentinels, 'Some ', ' is',
                          SamplingConfig(max_new_tokens=9), 1, 1, longest)
    assert ask(writer, [gap])[0] == [found[0].text]


@pytest.fixture(scope='module')
def artefact(tmp_path_factory):
  """An artefact of a tiny model in a format, each made once."""
  pytest.importorskip('onnxruntime', reason='onnxruntime is in the extra export')
  pytest.importorskip('tensorflow', reason='tensorflow is in the extra export')
  folder = tmp_path_factory.mktemp('artefacts')

  def export(kind, form):
    out = folder / f'{kind}_{form}'
    if not out.exists():
      config = of_run.changed(CONFIGS[kind], artifact.PLAIN)
      source = folder / f'run_of_{out.name}'
      (source / 'vocabulary').mkdir(parents=True)
      if kind == 'talk':
        chat.save(chat.open_template(ByteVocabulary(), 'plain'), source / 'vocabulary')
      model = artifact.Model(config, config.build(), made(kind)[1], ByteVocabulary(), source, 7,
                             LABELS)
      jaxtyping.config.update('jaxtyping_disable', True)  # It knows no sizes that are letters.
      artifact.export(model, artifact.find(form), str(out))
      jaxtyping.config.update('jaxtyping_disable', False)
    return out
  return export


@pytest.mark.supports('serving', 'decoders of ONNX Runtime and of SavedModel: completions, chat')
@pytest.mark.parametrize('form', ['onnx', 'saved_model'])
def test_an_exported_decoder_completes_and_talks_as_its_run(artefact, form):
  writer = serve_worker.load({**SPEC, 'directory': str(artefact('talk', form))})
  assert writer.abilities == ('complete', 'chat')
  refused = asked_for_scores(writer.abilities)
  assert refused.status_code == 400 and SCORES_REFUSED in refused.json()['error']['message']
  prompts = ['abc', 'hello', [{'role': 'user', 'content': 'hi'}], 'another prompt', 'ab']
  jobs = [job(i, prompt, sampling={'temperature': i / 4, 'top_p': 0.9}, top=i % 3)
          for i, prompt in enumerate(prompts)]
  found, ends = ask(backend('talk'), jobs), ask(writer, jobs)
  assert found[0] == ends[0]
  for ours, theirs in zip(found[1], ends[1], strict=True):
    assert {**ours, 'top': 0} == {**theirs, 'top': 0}
    for one, other in zip(ours.get('top', ()), theirs.get('top', ()), strict=True):
      np.testing.assert_allclose(sorted(one.values()), sorted(other.values()), atol=1e-4)
  (whole,), _ = ask(writer, [job(7, 'abc', sampling={'max_new_tokens': 30})])
  cut, (end,) = ask(writer, [job(8, 'abc', sampling={'max_new_tokens': 30, 'stop': [whole[3:5]]})])
  assert cut == [whole[:whole.index(whole[3:5])]] and end['done'] == 'stop'


@pytest.mark.supports('serving', 'encoders of SavedModel')
def test_an_exported_encoder_of_tensorflow_answers_as_its_run(artefact):
  answer, _, facts = artifact.open_artifact(str(artefact('classify', 'saved_model')))
  reader = Reader(answer, facts['inputs'], 'classify', Vocabulary(), facts['max_length'],
                  facts['labels'], Batching(4, 0.002))
  reader.warm_up()
  jobs = [{'id': i, 'op': 'classify', 'input': text} for i, text in enumerate(
      ['a', 'some text', 'a longer text than the others'])]
  for ours, theirs in zip(ask(backend('classify'), jobs)[1], ask(reader, jobs)[1], strict=True):
    assert list(ours['scores']) == list(theirs['scores']) == list(LABELS)
    np.testing.assert_allclose([*ours['scores'].values()], [*theirs['scores'].values()], atol=1e-5)


@pytest.fixture(scope='module')
def talker():
  jax.clear_caches()  # Models of other tests are equal to this one, and so are their programs.
  writer = backend('talk')
  writer.warm_up()
  return writer


SIDE = {'score': {'op': 'score', 'prompt': 'abcdefgh ' * 40, 'top': 2},
        'infill': {'op': 'infill', 'before': 'abc', 'after': 'def', 'seed': 1, 'seconds': 600,
                   'sampling': {'max_new_tokens': 9, 'temperature': 0}},
        'top': job(0, 'abc', top=3)}


@pytest.mark.supports('serving', 'scores, gaps and alternatives compile nothing after warm-up')
@pytest.mark.parametrize('name', SIDE)
def test_nothing_compiles_after_warm_up(talker, name):
  compiled, listen = [], lambda name, *_, **__: compiled.append(name)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    _, (end,) = ask(talker, [{**SIDE[name], 'id': 1}])
    assert not [one for one in compiled if 'compile' in one] and 'done' in end
    jax.jit(lambda x: x + 1)(np.zeros(60 + len(name)))
    assert [one for one in compiled if 'compile' in one], 'the listener hears nothing'
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  module, params = made('talk')
  if name == 'score':
    wanted, = score_texts(module, params, ByteVocabulary(), [SIDE[name]['prompt']], 2, 48)
    np.testing.assert_allclose(end['log_probs'], wanted.log_probs, atol=1e-4)
    assert [max(one.values()) for one in end['top']] == pytest.approx(
        wanted.top_log_probs[:, 0].tolist(), abs=1e-4)
  elif name == 'infill':
    found, = infill.infill(module, params, ByteVocabulary(), FIM, 'abc', 'def',
                           SamplingConfig(max_new_tokens=9), 1, 1, 48)
    assert end['text'] == found.text and end['prompt_tokens'] == 6
  else:
    assert len(end['top']) == end['new_tokens'] == 9


@pytest.mark.supports('serving', 'a stream goes on while texts are scored and gaps are filled')
def test_a_stream_goes_on_while_others_are_scored(talker):
  told = []
  hear = lambda name: lambda event: told.append((name, 'done' in event))
  talker.submit(job(1, 'abc', sampling={'max_new_tokens': 40}, top=0), hear('stream'))
  for number in range(2, 5):
    talker.submit({**SIDE['score'], 'id': number}, hear(f'score {number}'))
  talker.submit({**SIDE['infill'], 'id': 5}, hear('infill'))
  talker.submit({**SIDE['score'], 'prompt': 'ab', 'id': 6}, hear('short score'))
  assert not told  # nothing is computed while jobs are handed in
  while talker.step() is not None:
    pass
  ends = [name for name, is_end in told if is_end]
  assert sorted(ends) == ['infill', 'score 2', 'score 3', 'score 4', 'short score', 'stream']
  pieces = [name for name, _ in told]
  # The stream's pieces come before the first score is found, and it ends before the last.
  assert pieces[:2] == ['stream'] * 2 and pieces.index('score 2') > 3
  assert ends.index('stream') < ends.index('score 4')
  assert ends.index('short score') < ends.index('score 2')  # by turns


def test_a_gap_is_filled_no_further_than_its_end(talker):
  before = talker._engine.counts.chosen
  always = {'max_new_tokens': 20, 'temperature': 0, 'logit_bias': [[FIM.middle_id, 1000.0]]}
  texts, (end,) = ask(talker, [{**SIDE['infill'], 'id': 1, 'sampling': always}])
  assert (texts, end['done'], end['new_tokens']) == ([''], 'eos', 0)
  assert talker._engine.counts.chosen == before + 1


def test_jobs_beside_the_engine_are_cancelled_and_their_mistakes_told(talker):
  told = []
  talker.submit({**SIDE['score'], 'id': 1}, told.append)
  talker.step()
  talker.cancel(1)
  assert told == [{'done': 'cancelled'}] and talker.step() is None
  talker.submit({**SIDE['infill'], 'id': 2}, told.append)
  talker.step()
  talker.cancel(2)
  talker.step()
  assert told[1]['done'] == 'cancelled' and talker.step() is None
  with pytest.raises(UserError, match='leave no room for the text around'):
    talker.submit({**SIDE['infill'], 'sampling': {'max_new_tokens': 60}, 'id': 3}, told.append)
  with pytest.raises(UserError, match='not trained to fill spans'):
    backend('gpt').submit({**SIDE['infill'], 'id': 4}, told.append)
