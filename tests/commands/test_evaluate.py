"""`lm evaluate` on runs of labelled examples: the run's own, other tasks, two runs compared."""
import functools
import json
import os

import pytest

from lm import main
from lm.evaluation import task_compare, task_report

LINES = [(f'play {word}', 'music') for word in 'jazz rock blues soul folk swing'.split()] + [
    (f'will it {word}', 'sun') for word in 'rain snow hail pour freeze thaw'.split()]
CONFIG = """
from __gin__ import dynamic_registration
include 'gin/models/gpt_small_cpu.gin'
include 'gin/optim/adamw.gin'
include 'gin/objectives/causal_lm.gin'
include 'gin/runs/pretrain.gin'
include '{folder}/weather.gin'
from lm import run
from lm.data import examples
from lm.data import vocabularies
from lm.models import gpt
run.Experiment.task = %TASK
examples.ExampleTask.vocabulary = @vocabularies.VocabularyConfig()
examples.ExampleTask.cache_dir = %CACHE_DIR
vocabularies.VocabularyConfig.kind = 'byte'
VOCAB_SIZE = 260
CACHE_DIR = '{folder}/cache'
SEQUENCE_LENGTH = 64
BATCH_SIZE = 4
NUM_STEPS = 2
CHECKPOINT_EVERY = 2
EVAL_EVERY = 2
DTYPE = 'float32'
gpt.GPTConfig.d_model = 16
gpt.GPTConfig.num_layers = 1
gpt.GPTConfig.num_heads = 2
gpt.GPTConfig.d_ff = 24
"""
TASK = """
from __gin__ import dynamic_registration
from lm.data import examples
TASK = @examples.ExampleTask()
examples.ExampleTask.source = @examples.Files()
examples.ExampleTask.kind = @examples.{kind}()
examples.ExampleTask.form = '{form}'
examples.ExampleTask.template = @examples.Template()
examples.Template.inputs = '{inputs}'
examples.Template.targets = '{targets}'
examples.ExampleTask.name = '{name}'
examples.Files.{split} = '{folder}/{file}.jsonl'
"""


def write(folder, name, kind, lines, split='validation', form='encoder', inputs='{a} is',
          targets=' {label}'):
  (folder / f'{name}-{split}.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in lines))
  (folder / f'{name}.gin').write_text(TASK.format(
      kind=kind, form=form, name=name, folder=folder, file=f'{name}-{split}', split=split,
      inputs=inputs, targets=targets))
  return str(folder / f'{name}.gin')


@pytest.fixture(scope='module', autouse=True)
def pages():
  """Pages have tests of their own."""
  before = task_report.write
  task_report.write = lambda header, rows, path, scorer: path.write_text('a page\n')
  yield
  task_report.write = before


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A decoder that was trained on two classes."""
  folder = tmp_path_factory.mktemp('files')
  lines = [{'a': text, 'label': label} for text, label in LINES]
  path = write(folder, 'weather', 'Classification', lines, 'train', 'decoder')
  (folder / 'held.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in lines[::3]))
  with open(path, 'a') as file:
    for split in 'validation', 'test':
      file.write(f"examples.Files.{split} = '{folder}/held.jsonl'\n")
  (folder / 'run.gin').write_text(CONFIG.format(folder=folder))
  assert main.main(['train', f'--gin_file={folder}/run.gin', f'--run_dir={folder}/run']) == 0
  return folder / 'run'


def evaluate(run, *flags):
  out = run.parent / 'out.json'
  assert main.main(['evaluate', f'--run_dir={run}', f'--json={out}', *flags]) == 0
  return json.loads(out.read_text())


def refused(capsys, *flags):
  assert main.main(['evaluate', *flags]) == 2
  message = capsys.readouterr().err.strip().splitlines()[-1]
  assert message.startswith('error: ')
  return message


@pytest.mark.supports('evaluation', 'lm train ends with the metrics of validation and test')
def test_training_ends_with_the_metrics_of_both_splits(run, capsys):
  found = json.loads((run / 'evaluation.json').read_text())
  assert found['step'] == 2 and set(found['tasks']) == {'weather-validation', 'weather-test'}
  header = json.loads((run / 'predictions' / 'weather-test.json').read_text())
  assert header['metrics']['accuracy'] == found['tasks']['weather-test']['accuracy']
  assert any('word for word' in warning for warning in header['warnings'])
  assert 'predictions/weather-test.html' in (run / 'report.html').read_text()
  result = evaluate(run, '--split=test')
  assert result == {'weather': {'step': 2, **header['metrics']}}
  out = capsys.readouterr().out
  assert 'accuracy' in out and '  music: precision ' in out and '  sun: precision ' in out


@pytest.mark.supports('evaluation', 'lm evaluate --tasks: other tasks with a run')
def test_other_tasks_take_the_form_and_the_vocabulary_of_the_run(run):
  folder, before = run.parent, json.loads((run / 'evaluation.json').read_text())
  choices = write(folder, 'ends', 'MultipleChoice', [
      {'context': 'it will', 'continuations': [' rain', ' jazz'], 'label': i % 2}
      for i in range(5)], inputs='{context}', targets='{continuation}')
  words = write(folder, 'prose', 'LanguageModelling', [{'text': text} for text, _ in LINES],
                inputs='', targets='{text}')
  result = evaluate(run, f'--tasks={choices},{words}')
  assert set(result) == {'ends', 'prose'} and 0 <= result['ends']['accuracy'] <= 1
  assert result['prose']['bits_per_byte'] > 0
  tasks = json.loads((run / 'evaluation.json').read_text())['tasks']
  assert tasks == before['tasks'] | {'ends-validation': result['ends'],
                                     'prose-validation': result['prose']}


def test_two_runs_are_compared(run, capsys, monkeypatch):
  monkeypatch.setattr(task_compare, 'compare_runs',
                      functools.partial(task_compare.compare_runs, repeats=9))
  assert main.main(['evaluate', '--compare', str(run), str(run)]) == 0
  assert 'weather-test' in capsys.readouterr().out


def test_mistakes_are_one_sentence(run, capsys):
  folder, at = run.parent, f'--run_dir={run}'
  own = f'{folder}/weather.gin'
  found = write(folder, 'found', 'Retrieval', [{'query': 'a', 'documents': ['b']}],
                inputs='{query}', targets='{document}')
  assert 'embedder' in refused(capsys, at, f'--tasks={found}')
  assert "no split 'test'" in refused(capsys, at, f'--tasks={found}', '--split=test')
  assert 'there is no gin file' in refused(capsys, at, '--tasks=nothing')
  assert 'TASK' in refused(capsys, at, '--tasks=gin/optim/adamw.gin')
  assert "the name 'weather'" in refused(capsys, at, f'--tasks={own},{own}')
  os.makedirs(folder / 'empty', exist_ok=True)
  assert 'no predictions' in refused(capsys, '--compare', str(run), str(folder / 'empty'))
