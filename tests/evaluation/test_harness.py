"""lm-evaluation-harness gets the same answers from us as from transformers on the same weights."""
import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

from lm import main, run
from lm.data import vocabularies
from lm.errors import UserError
from lm.evaluation import harness, likelihood

HERE = pathlib.Path(__file__).resolve().parent
TASKS = ('piqa', 'winogrande', 'lambada', 'blimp')
TEXTS = ['Once upon a time, there was a little girl named Lily.\nShe liked to play. ' * n
         for n in (1, 40)]  # the longer one has more tokens than the model sees
PROMPTS = ['Once upon a time', 'Lily and Tom ']


@pytest.fixture(scope='module')
def make():
  spec = importlib.util.spec_from_file_location('make', HERE / 'make_likelihood_references.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not module.DATA.exists():
    pytest.skip('the evaluation sets are not beside the repository')
  return module


@pytest.fixture(scope='module')
def tasks(make, tmp_path_factory):
  """{name: YAML file} of local tasks with a few examples."""
  directory = tmp_path_factory.mktemp('tasks')
  rows = {**make.examples(5), 'wikitext': [{'text': text} for text in TEXTS],
          'lines': [{'text': text, 'answer': '.'} for text in PROMPTS]}
  for name, each in rows.items():
    (directory / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in each))
    text = (HERE / 'harness_tasks' / f'local_{name}.yaml').read_text()
    if name == 'blimp':
      # The registry puts a space before each sentence. Of texts that begin with one transformers
      # makes other ids than sentencepiece, whose model stories260K has (see `save_pretrained`).
      text += 'target_delimiter: ""\n'
    (directory / f'local_{name}.yaml').write_text(text.replace('DATA', str(directory)))
  return {name: str(directory / f'local_{name}.yaml') for name in rows}


@pytest.fixture(scope='module')
def answering(stories):
  pytest.importorskip('lm_eval', reason='lm_eval is in the extras harness and parity')
  experiment = run.open_experiment((), (), stories)
  _, module, params = run.load(experiment, stories)
  return harness.model(module, params, vocabularies.load(stories / 'vocabulary'), progress=False)


def local_tasks():
  """Files of tasks alone: to read the whole registry takes seconds."""
  from lm_eval.tasks import TaskManager
  return TaskManager(include_defaults=False)


@pytest.mark.supports('evaluation', 'lm-evaluation-harness, item by item as through transformers')
def test_every_answer_is_that_of_transformers(stories, answering, tasks, tmp_path, monkeypatch):
  pytest.importorskip('torch', reason='PyTorch is in the extra parity')
  import lm_eval
  from lm_eval.models.huggingface import HFLM
  monkeypatch.setenv('DISABLE_MULTIPROC', '1')
  assert not main.main(['convert', f'--to={tmp_path / "hf"}', f'--run_dir={stories}'])
  theirs = HFLM(pretrained=str(tmp_path / 'hf'), dtype='float32', softmax_dtype='float64',
                device='cpu', batch_size=4)
  asked = [tasks[name] for name in (*TASKS, 'lines')]
  wanted = lm_eval.simple_evaluate(theirs, tasks=asked, task_manager=local_tasks())
  found = harness.evaluate(answering, asked)
  for name, values in found.metrics.items():
    assert values == pytest.approx(harness._numbers(wanted['results'][name]), rel=1e-4,
                                   abs=1e-4), name
  for header, rows in found.predictions:
    samples = sorted(wanted['samples'][header['task']], key=lambda sample: sample['doc_id'])
    assert len(rows) == len(samples) > 1
    for row, sample in zip(rows, samples):
      if header['kind'] == 'generation':
        assert row['prediction'] == sample['filtered_resps'] and row['targets'] == ['.']
        continue
      answers = [answer for answer, in sample['resps']]
      np.testing.assert_allclose(row['scores'], [score for score, _ in answers], atol=1e-3)
      assert row['greedy'] == [greedy for _, greedy in answers]
      assert float(row['prediction'] == row['targets']) == sample['acc']
  assert {header['kind'] for header, _ in found.predictions} == {'multiple_choice', 'generation'}


def test_windows_are_those_of_the_harness():
  utils = pytest.importorskip('lm_eval.utils', reason='lm_eval is in the extras harness and parity')
  for size in (1, 9, 10, 11, 25, 40):
    ids = list(range(1, size + 1))
    wanted = map(utils.make_disjoint_window, utils.get_rolling_token_windows(ids, 0, 10, 1))
    found = [(context.tolist(), continuation.tolist())
             for context, continuation in likelihood.windows(ids, 0, 10)]
    assert found == list(wanted)


@pytest.mark.supports('evaluation', 'lm evaluate --harness=TASK, and the model type lm of lm_eval')
def test_the_command_and_the_model_type_run_tasks_on_a_run(stories, answering, tasks, tmp_path):
  del answering  # skips without lm_eval
  import lm_eval
  from lm.commands import harness as command
  names = f'{tasks["winogrande"]},{tasks["wikitext"]}'
  out = tmp_path / 'result.json'
  assert not main.main(['evaluate', f'--run_dir={stories}', f'--harness={names}', '--limit=2',
                        '--num_fewshot=1', f'--json={out}'])
  result = json.loads(out.read_text())
  assert json.loads((stories / 'harness.json').read_text()) == {
      'step': 0, 'limit': 2, 'num_fewshot': 1, 'tasks': result}
  folder = stories / 'predictions'
  rows = [json.loads(line) for line in
          (folder / 'local_winogrande-validation.jsonl').read_text().splitlines()]
  accuracy = np.mean([row['prediction'] == row['targets'] for row in rows])
  assert len(rows) == 2 and result['local_winogrande']['acc'] == accuracy
  header = json.loads((folder / 'local_winogrande-validation.json').read_text())
  assert header == {'task': 'local_winogrande', 'kind': 'multiple_choice', 'labels': None,
                    'split': 'validation', 'step': 0, 'metrics': result['local_winogrande']}
  texts = [json.loads(line) for line in
           (folder / 'local_wikitext-test.jsonl').read_text().splitlines()]
  nats = sum(row['scores'][0] for row in texts)
  assert result['local_wikitext']['word_perplexity'] == pytest.approx(
      np.exp(nats / sum(row['words'] for row in texts)))

  command.register()
  with harness._quiet():
    again = lm_eval.simple_evaluate('lm', f'run_dir={stories},batch_size=4', tasks=[
        tasks['winogrande']], limit=2, num_fewshot=1, task_manager=local_tasks())
  assert harness._numbers(again['results']['local_winogrande']) == result['local_winogrande']


def test_tasks_that_are_not_there_are_one_sentence(answering, tmp_path, monkeypatch):
  with pytest.raises(UserError, match="'pica' is no task of lm-evaluation-harness"):
    harness.evaluate(answering, ['pica'])
  text = (HERE / 'harness_tasks' / 'local_piqa.yaml').read_text()
  (tmp_path / 'local_piqa.yaml').write_text(text.replace('DATA', str(tmp_path)))
  with pytest.raises(UserError, match='the data of .*local_piqa.yaml cannot be read'):
    harness.evaluate(answering, [str(tmp_path / 'local_piqa.yaml')])


def test_without_the_harness_the_error_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  monkeypatch.setitem(sys.modules, 'lm_eval.api.model', None)
  with pytest.raises(UserError, match=r"pip install 'lm\[harness\]'"):
    harness.model(None, None, None)
