"""Two runs are compared on the same examples, or not at all."""
import json

import numpy as np
import pytest
import real_examples as real
from scipy import stats
from test_report import Page

from lm.errors import UserError
from lm.evaluation import task_compare


def save(directory, predictions, task='snips', split='validation'):
  """Writes (header, rows) as `lm evaluate` does; returns the run directory."""
  header, rows = predictions
  place = directory / 'predictions'
  place.mkdir(parents=True, exist_ok=True)
  header = {**header, 'task': task, 'split': split, 'metrics': {}}
  (place / f'{task}-{split}.json').write_text(json.dumps(header))
  (place / f'{task}-{split}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return directory


@pytest.fixture
def runs(tmp_path):
  """A run that is right in 70 %, and one in 85 %."""
  examples = real.snips('validate')[::5]
  return [save(tmp_path / name, real.classified(examples, accuracy, seed))
          for name, accuracy, seed in (('worse', 0.7, 0), ('better', 0.85, 1))]


def right(run):
  path = run / 'predictions' / 'snips-validation.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  return np.array([row['targets'] == row['prediction'] for row in rows])


@pytest.mark.supports('evaluation', 'two runs: flips and significance')
def test_flips_and_differences_are_those_of_the_predictions(runs):
  one = task_compare.compare_runs(*runs, repeats=100)['tasks']['snips-validation']
  before, after = map(right, runs)
  won, lost = (~before & after).sum(), (before & ~after).sum()
  assert (one['won'], one['lost'], one['examples']) == (won, lost, 140)
  accuracy = one['metrics']['accuracy']
  assert accuracy['difference'] == pytest.approx(after.mean() - before.mean())
  assert accuracy['p'] == stats.binomtest(int(won), int(won + lost)).pvalue < 0.05
  assert accuracy['low'] < accuracy['difference'] < accuracy['high']
  assert len(one['flips']['lost']) == lost and len(one['flips']['won']) == min(won, 20)
  for flip in one['flips']['won']:
    assert flip['second'] == flip['target'] != flip['first'] and flip['inputs']


def test_the_tables_hold_the_numbers(runs, tmp_path):
  result = task_compare.compare_runs(*runs, repeats=20)
  accuracy = result['tasks']['snips-validation']['metrics']['accuracy']
  text = task_compare.markdown(result)
  row = next(line for line in text.splitlines() if line.startswith('| accuracy'))
  assert f'| {accuracy["first"]:.4f} | {accuracy["second"]:.4f} | +' in row
  assert "McNemar's exact test" in text and 'f1/' not in text
  page = Page(task_compare.write(result, tmp_path / 'page.html').read_text('utf-8'))
  assert f'{accuracy["difference"]:+.4f}' in page.of('td') and 'f1/PlayMusic' in page.of('td')
  assert 'script' not in page.tags
  for flips in result['tasks']['snips-validation']['flips'].values():
    assert all(any(flip['inputs'] in text for text in page.of('pre')) for flip in flips)


def test_a_run_does_not_differ_from_itself(runs):
  one = task_compare.compare_runs(runs[0], runs[0], repeats=20)['tasks']['snips-validation']
  assert one['won'] == one['lost'] == 0 and one['flips'] == {'lost': [], 'won': []}
  assert all(found['difference'] == 0 for found in one['metrics'].values())


def test_texts_that_gained_and_lost_most_are_shown(tmp_path):
  examples = real.translations('eng-deu', 40)
  runs = [save(tmp_path / str(seed), real.generated(examples, seed), 'mt') for seed in (0, 1)]
  one = task_compare.compare_runs(*runs, repeats=20)['tasks']['mt-validation']
  assert one['won'] + one['lost'] <= 40 and one['flips']['won'] and one['flips']['lost']
  assert 'sacrebleu' in one['metrics']['bleu']['test']


def test_tags_are_compared(tmp_path):
  examples = real.wnut()[:60]
  runs = [save(tmp_path / str(seed), real.tagged(examples, 0.95, seed), 'ner') for seed in (0, 1)]
  one = task_compare.compare_runs(*runs, repeats=20)['tasks']['ner-validation']
  assert one['metrics']['sentence_accuracy']['test'] == "McNemar's exact test"
  assert one['metrics']['span_f1']['low'] < one['metrics']['span_f1']['high']


@pytest.mark.parametrize('change, message', [
    (lambda header, rows: rows.pop(), '140 examples in the first run and 139'),
    (lambda header, rows: rows[3].update(id='other'), "row 3 .* has id='validate15' in"),
    (lambda header, rows: rows[3].update(targets='PlayMusic'), 'row 3 .* has targets='),
    (lambda header, rows: header.update(labels=header['labels'][::-1]), 'has labels='),
    (lambda header, rows: header.update(kind='generation'), "has kind='classification' in"),
    (lambda header, rows: header.update(kind='magic'), "kind 'magic' have no metrics"),
    (lambda header, rows: rows[5].pop('prediction'), "row 5 .* has no 'prediction'")])
def test_predictions_that_do_not_fit_are_one_sentence(runs, change, message):
  about, rows = real.classified(real.snips('validate')[::5])
  change(about, rows)
  save(runs[1], (about, rows))
  with pytest.raises(UserError, match=message):
    task_compare.compare_runs(*runs)


def test_what_is_absent_or_torn_is_one_sentence(runs, tmp_path):
  with pytest.raises(UserError, match='holds no predictions; run `lm evaluate'):
    task_compare.compare_runs(runs[0], tmp_path / 'none')
  other = save(tmp_path / 'other', real.classified(real.snips('validate')[:9]), split='test')
  with pytest.raises(UserError, match='snips-validation and .* of snips-test, no task and split'):
    task_compare.compare_runs(runs[0], other)
  path = runs[0] / 'predictions' / 'snips-validation.jsonl'
  path.write_text(path.read_text()[:-30])
  with pytest.raises(UserError, match='jsonl:140 is not JSON'):
    task_compare.compare_runs(*runs)
  path.with_suffix('.json').unlink()
  with pytest.raises(UserError, match='cannot be read'):
    task_compare.compare_runs(*runs)
