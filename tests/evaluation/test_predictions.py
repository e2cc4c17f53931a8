"""Predictions: each is what the model says of its example alone, however they are computed."""
import dataclasses
import functools
import json
import pathlib
import signal
import socket
import subprocess
import sys
import threading

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import predicting
from predicting import LABELS, LENGTH, TAGS
import pytest

from lm.data.examples import spans
from lm.data.examples.forms import Encoded, Lengths
from lm.errors import UserError
from lm.evaluation import likelihood, metrics, predictions, task_report
from lm.evaluation.predictions import heads, texts
from lm.inference import complete
from lm.inference.sampling import SamplingConfig
from lm.training.losses import Prediction

CHILD = pathlib.Path(predicting.__file__)
ON_MESHES = 'tags', 'found', 'named', 'written_by_t5'


@pytest.fixture(scope='module', autouse=True)
def pages():
  """Pages have tests of their own."""
  write, task_report.write = task_report.write, predicting.no_page
  yield
  task_report.write = write


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
  """Of the toy tasks, for all processes."""
  return tmp_path_factory.mktemp('tasks')


@pytest.fixture(scope='session')
def rows_of(folder, tmp_path_factory):
  """rows_of(name): (model, task, rows) of a toy task, predicted once."""
  run, made = tmp_path_factory.mktemp('run'), {}

  def rows(name):
    if name not in made:
      model, task = predicting.model(name, run), predicting.prepared(name, folder)
      found = predictions.evaluate(model, task, 'validation', progress=False)
      header, rows = metrics.read(run / 'predictions' / f'{name}-validation.jsonl')
      assert header['metrics'] == found == metrics.compute(header, rows)
      assert [row['id'] for row in rows] == [f'n{i}' for i in range(24)]
      made[name] = model, task, rows
    return made[name]
  return rows


@functools.cache
def _outputs_of(module):
  return jax.jit(lambda params, batch: module.apply({'params': params}, batch,
                                                    method='outputs')[0])


def outputs(model, batch):
  """Of a batch of one row."""
  return _outputs_of(model.module)(model.params, {name: x[None] for name, x in batch.items()})


def encoded(task):
  cache = task.cache('validation')
  return [cache.encoded(i) for i in range(len(cache))]


@pytest.mark.supports('evaluation', 'predictions of labelled examples, packed or by length')
@pytest.mark.parametrize('name', ['intents', 'whole', 'scores'])
def test_an_answer_is_that_to_the_example_alone(name, rows_of):
  model, task, rows = rows_of(name)
  for example, row in zip(encoded(task), rows, strict=True):
    logits = outputs(model, task.form.features([example], Lengths(LENGTH, 1, 1)))['classes'][0, 0]
    if name == 'scores':
      assert row['prediction'] == pytest.approx(1 + 2 * float(logits[0]), abs=1e-5)
      continue
    scores = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(row['scores'], scores, atol=1e-5)
    assert row['prediction'] == LABELS[np.argmax(scores)]


@pytest.mark.supports('evaluation', 'tags of sentences longer than the model')
def test_every_word_has_the_tag_of_its_first_token(rows_of):
  model, task, rows = rows_of('tags')
  long = 0
  for example, row in zip(encoded(task), rows, strict=True):
    assert len(row['prediction']) == len(row['targets']) == len(row['inputs'])
    if len(example.a) > LENGTH - 2:
      long += 1
      continue
    tags = outputs(model, task.form.features([example], Lengths(LENGTH, 1, 1)))['tags'][0]
    first = np.flatnonzero(example.targets >= 0) + 1  # behind [CLS]
    assert row['prediction'] == [TAGS[i] for i in np.argmax(tags, -1)[first]]
  assert 1 < long < 24


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=60), room=st.integers(1, 30))
@settings(max_examples=200, deadline=None)
def test_windows_ask_once_for_each_word_and_have_it_whole(sizes, room):
  is_first = np.concatenate([np.arange(size) == 0 for size in sizes])
  starts, asked = np.flatnonzero(is_first), []
  for window in heads.word_windows(is_first, room):
    assert is_first[window.start] and window.end in [*starts, len(is_first)]
    words = np.flatnonzero((starts >= window.start) & (starts < window.end))
    assert window.end - window.start <= room or len(words) == 1
    asked += range(*window.words)
    assert set(range(*window.words)) <= set(words)
  assert sorted(asked) == list(range(len(sizes)))


def test_a_word_in_the_middle_has_context_on_both_sides():
  windows = heads.word_windows(np.ones(100, bool), 20)
  for window in windows[1:-1]:
    assert min(window.words[0] - window.start, window.end - window.words[1]) >= 4


@pytest.mark.supports('evaluation', 'classes by the likelihood of their words')
@pytest.mark.parametrize('name', ['named', 'named_by_t5'])
def test_a_label_is_as_likely_as_training_says(name, rows_of):
  model, task, rows = rows_of(name)
  cache, loss = task.cache('validation'), jax.jit(
      lambda params, batch: Prediction()(model.module.apply({'params': params}, batch,
                                                            method='outputs')[0], batch)['tokens'])
  for i in range(0, 24, 6):
    nats = []
    for label in LABELS:
      example = task.form.encode({**cache.example(i), 'label': label})
      if name == 'named':  # What is too long loses its beginning, as in training.
        example = example._replace(a=example.a[-(LENGTH - len(example.targets) - 1):])
      batch = task.form.features([example], Lengths(LENGTH, 32, 1))
      batched = {key: jnp.asarray(x)[None] for key, x in batch.items()}
      nats.append(float(loss(model.params, batched)))
    np.testing.assert_allclose(rows[i]['scores'], jax.nn.log_softmax(-np.array(nats)), atol=2e-4)


@pytest.mark.supports('evaluation', 'generation, ragged batches')
@pytest.mark.parametrize('name', ['written', 'written_by_t5', 'spelt'])
def test_what_is_written_is_what_one_prompt_gives(name, rows_of):
  model, task, rows = rows_of(name)
  module, params = model.alone()
  short = [row for row in rows if len(row['inputs']) < 15]  # of one bucket
  assert len(short) > 2
  for row in short[:5]:
    one, = complete(module, params, task.vocabulary, [row['inputs']],
                    SamplingConfig(temperature=0.0, max_new_tokens=8), 0, LENGTH)
    assert row['prediction'] == one['text'].strip() and row['scores'] is None


def test_of_a_long_prompt_a_decoder_keeps_the_end_and_an_encoder_the_beginning(rows_of):
  for name in ('written', 'written_by_t5'):
    model, task, _ = rows_of(name)
    short = dataclasses.replace(model, sequence_length=24)
    module, _ = model.alone()
    new, prompts = texts.Generated(short, task, 'validation')._prompts(module)
    whole = [each.a.tolist() for each in encoded(task)]
    assert new == 8 and max(map(len, whole)) > 24 > min(map(len, whole))
    room = 23 if name == 'written_by_t5' else 16
    cut = [ids[:room] if name == 'written_by_t5' else ids[-room:] for ids in whole]
    assert [ids.tolist() for ids in prompts] == cut


def test_what_is_written_becomes_a_label_a_number_or_tags(rows_of):
  model, task, _ = rows_of('spelt')
  made = texts.Generated(model, task, 'validation')
  answers = ['music', 'SUN', 'sunny', *[''] * 21]
  assert [row['prediction'] for row in made.rows(answers)][:4] == ['music', 'sun', 'sunny', '']
  assert [texts.number(text, 1, 3) for text in ('2.5', '9', 'two')] == [2.5, 3, 1]
  assert texts.tags('B-x I-x what', 4, TAGS) == ['B-x', 'I-x', 'O', 'O']


def test_choices_and_texts_are_scored_as_by_the_likelihood_alone(rows_of):
  for name, alone in ('chosen', likelihood.predict_choices), ('read', likelihood.predict_texts):
    model, task, rows = rows_of(name)
    cache = task.cache('validation')
    wanted = alone(model.module, model.params, task.vocabulary,
                   [cache.example(i) for i in range(24)], progress=False, **(
                       {'max_length': LENGTH}))
    for row, other in zip(rows, wanted, strict=True):
      np.testing.assert_allclose(row['scores'], other['scores'], rtol=1e-5)
      assert row['targets'] == other['targets'] and row['prediction'] == other['prediction']
    assert set(rows[0]) == set(wanted[0])


@pytest.mark.supports('evaluation', 'retrieval among all documents of a split')
def test_a_ranking_is_that_of_all_documents_by_cosine(rows_of):
  model, task, rows = rows_of('found')
  cache, frame = task.cache('validation'), lambda text: task.form.framed(
      Encoded(task.vocabulary.encode(text), None, None), LENGTH)[0]
  given = [cache.example(i) for i in range(24)]
  documents = list(dict.fromkeys(text for example in given for text in example['documents']))
  of = lambda text: np.pad(frame(text), (0, LENGTH - len(frame(text))))
  embed = lambda query, document: outputs(model, {'query_tokens': of(query),
                                                  'document_tokens': of(document)})['embeddings']
  vectors = np.stack([embed('a', text)['document'][0] for text in documents])
  for row, example in list(zip(rows, given, strict=True))[::7]:
    scores = vectors @ np.asarray(embed(example['query'], 'a')['query'][0])
    assert row['prediction'] == [f'd{i}' for i in np.argsort(-scores)]
    np.testing.assert_allclose(row['scores'], np.sort(scores)[::-1], atol=1e-5)
    assert row['targets'] == [f'd{documents.index(example["documents"][0])}']


@pytest.mark.supports('evaluation', 'multiple choice and spans by an encoder')
def test_a_choice_is_that_of_its_example_alone(rows_of):
  model, task, rows = rows_of('picked')
  for example, row in list(zip(encoded(task), rows, strict=True))[::4]:
    classes = outputs(model, task.form.features([example], Lengths(LENGTH, 1, 2, 2)))['classes'][0]
    np.testing.assert_allclose(row['scores'], jax.nn.log_softmax(classes)[:, 1], atol=1e-5)
    assert row['prediction'] == np.argmax(row['scores'])


def test_an_answer_is_the_best_span_of_all_windows(rows_of):
  model, task, rows = rows_of('answered')
  cache, lengths, windows = task.cache('validation'), Lengths(LENGTH, 1, 1), 0
  for i, (example, row) in enumerate(zip(encoded(task), rows, strict=True)):
    context, found = cache.example(i)['context'], []
    for window, part in spans.windows(task.form, example, lengths):
      logits = outputs(model, task.form.features([part], lengths))
      found.append((window, *(np.asarray(logits[name][0]) for name in ('starts', 'ends'))))
    windows = max(windows, len(found))
    offsets = task.vocabulary.encode_offsets(context)[1]
    assert row['prediction'] == spans.best(found, context, offsets).text
    assert row['prediction'] in context and row['targets'] == [context.split()[0]]
  assert windows > 5


def test_alike_texts_have_a_cosine(rows_of):
  model, task, rows = rows_of('alike')
  lengths = Lengths(LENGTH, 1, 1, packed=False)
  for example, row in list(zip(encoded(task), rows, strict=True))[::8]:
    found = outputs(model, task.form.features([example], lengths))['embeddings']
    assert row['prediction'] == pytest.approx(float(found['query'][0] @ found['document'][0]),
                                              abs=1e-5)


def test_predictions_that_stand_are_used_and_their_metrics_computed_anew(folder, tmp_path):
  model, task = predicting.model('intents', tmp_path), predicting.prepared('intents', folder)
  predictions.evaluate(model, task, 'validation', progress=False)
  path = tmp_path / 'predictions' / 'intents-validation.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  right = ''.join(json.dumps({**row, 'prediction': row['targets']}) + '\n' for row in rows)
  path.write_text(right)
  blind = dataclasses.replace(model, params=None)
  assert predictions.evaluate(blind, task, 'validation', progress=False)['accuracy'] == 1
  assert path.read_text() == right
  for other in (dataclasses.replace(model, digest='of another'), dataclasses.replace(
      model, step=8), dataclasses.replace(model, sequence_length=32)):
    assert predictions.evaluate(other, task, 'validation', progress=False)['accuracy'] < 1
    assert json.loads(path.with_suffix('.json').read_text())['step'] == other.step


def test_a_part_of_another_checkpoint_or_a_torn_line_is_asked_again(folder, tmp_path):
  model, task = predicting.model('intents', tmp_path), predicting.prepared('intents', folder)
  path = tmp_path / 'predictions' / 'intents-validation.jsonl'
  predictions.evaluate(model, task, 'validation', progress=False)
  whole, key = path.read_bytes(), json.loads(path.with_suffix('.json').read_text())['key']
  wrong = json.dumps([[i, [0.0, 0.0, 0.0]] for i in range(24)])
  for first, line in (('other', f'{wrong}\n'), (key, wrong[:-9]), (key, wrong)):
    path.with_suffix('.json').unlink(missing_ok=True)
    path.with_suffix('.jsonl.part').write_text(json.dumps({'key': first}) + '\n' + line)
    predictions.evaluate(model, task, 'validation', progress=False)
    assert path.read_bytes() == whole and not path.with_suffix('.jsonl.part').exists()


@pytest.mark.supports('faults survived', 'kill -9 of an evaluation')
@pytest.mark.parametrize('name', ['tags', 'named', 'written_by_t5'])
def test_a_killed_evaluation_goes_on_where_it_was(name, folder, rows_of, tmp_path, monkeypatch):
  _, task, _ = rows_of(name)
  child = start(folder, tmp_path, name, kill_after=1)
  assert child.wait(300) == -signal.SIGKILL
  path = tmp_path / 'predictions' / f'{name}-validation.jsonl'
  part = path.with_suffix('.jsonl.part')
  known = dict(json.loads(part.read_text().splitlines()[1]))
  assert not path.exists() and len(part.read_text().splitlines()) == 2
  asked, model = [], predicting.model(name, tmp_path)
  add = predictions.store.Part.add
  monkeypatch.setattr(predictions.store.Part, 'add',
                      lambda self, answers: asked.extend(answers) or add(self, answers))
  predictions.evaluate(model, task, 'validation', progress=False)
  assert asked and known and not set(asked) & set(known)
  other, _, _ = rows_of(name)
  whole = other.directory / 'predictions' / path.name
  assert path.read_bytes() == whole.read_bytes()


def start(folder, run, names, mesh=1, devices=1, kill_after=0, address=()):
  """A child that predicts."""
  flags = (f'{predicting.os.environ["XLA_FLAGS"]} '
           f'--xla_force_host_platform_device_count={devices}')
  return subprocess.Popen(
      [sys.executable, str(CHILD), *map(str, (folder, run, names, mesh, kill_after, *address))],
      env={**predicting.os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags,
           'PYTHONPATH': str(CHILD.parents[2])},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def same_rows(run, rows_of):
  for name in ON_MESHES:
    _, rows = metrics.read(run / 'predictions' / f'{name}-validation.jsonl')
    for row, wanted in zip(rows, rows_of(name)[2], strict=True):
      scores, others = row.pop('scores'), dict(wanted)
      np.testing.assert_allclose(scores or [], others.pop('scores') or [], atol=1e-5)
      assert row == others


@pytest.mark.supports('evaluation', 'the same on any number of devices and processes')
@pytest.mark.parametrize('processes', [1, 2])
def test_devices_and_processes_predict_the_same(processes, folder, rows_of, tmp_path):
  for name in ON_MESHES:
    rows_of(name)  # what the processes find in the cache
  with socket.create_server(('localhost', 0)) as server:
    port = server.getsockname()[1]
  address = lambda i: (f'localhost:{port}', processes, i) if processes > 1 else ()
  children = [start(folder, tmp_path, ','.join(ON_MESHES), 8, 8 // processes, address=address(i))
              for i in range(processes)]
  ends = [None] * processes
  readers = [threading.Thread(target=lambda i=i, child=child: ends.__setitem__(
      i, child.communicate(timeout=300))) for i, child in enumerate(children)]
  for reader in readers:
    reader.start()
  for reader in readers:
    reader.join()
  assert [child.returncode for child in children] == [0] * processes, ends[0][1][-3000:]
  found = [json.loads(out.splitlines()[-1]) for out, _ in ends]
  for name in ON_MESHES:
    header = json.loads((rows_of(name)[0].directory / 'predictions' / f'{name}-validation.json'
                         ).read_text())
    for one in found:
      for key, value in header['metrics'].items():
        assert one[name][key] == pytest.approx(value, abs=1e-5)
      assert one[name].get('accuracy') == header['metrics'].get('accuracy')
  same_rows(tmp_path, rows_of)


@pytest.mark.parametrize('task, model, sentence', [
    ('written', 'intents', 'needs a decoder'), ('intents', 'named', 'needs ClassifierConfig'),
    ('tags', 'intents', 'needs TaggerConfig'), ('found', 'intents', 'EmbedderConfig'),
    ('named_by_t5', 'named', 'needs an encoder-decoder'), ('intents', 'scores', 'num_classes=1')])
def test_what_a_model_cannot_answer_is_refused(task, model, sentence, folder, tmp_path):
  with pytest.raises(UserError, match=sentence) as caught:
    predictions.evaluate(predicting.model(model, tmp_path), predicting.prepared(task, folder),
                         'validation')
  assert task in str(caught.value)
  assert not list(tmp_path.glob('predictions/*'))


def test_a_split_that_is_not_there_is_named(folder, tmp_path):
  with pytest.raises(UserError, match="no split 'test'"):
    predictions.evaluate(predicting.model('intents', tmp_path),
                         predicting.prepared('intents', folder), 'test')
