"""The page of a task shows every number, loads nothing, and cannot be broken by a text."""
import re

import numpy as np
import pytest
import real_examples as real
from test_report import Page

from lm.errors import UserError
from lm.evaluation import metrics
from lm.evaluation import significance
from lm.evaluation import task_report

NASTY = '</pre></body><script src="https://x.y/z.js">alert("1 & 2")</script>'


@pytest.fixture(scope='module')
def snips():
  about, rows = real.classified(real.snips('validate')[::4])
  rows[0].update(inputs=NASTY, prediction=about['labels'][6], scores=[-3.0] * 6 + [-0.3])
  rows[1].update(prediction=NASTY)
  return about, rows


@pytest.fixture(scope='module')
def intervals(snips):
  return significance.bootstrap(metrics.scorer(*snips), repeats=30)


@pytest.fixture(scope='module')
def text(snips, intervals):
  return task_report.page(*snips, intervals=intervals)


@pytest.mark.supports('evaluation', 'a page of a task: confusion, calibration, worst errors, '
                      'slices by length')
def test_the_page_shows_each_metric_with_its_interval(snips, intervals, text):
  page = Page(text)
  values = metrics.compute(*snips)
  cells = page.of('td')
  for name in task_report.headline(values):
    at = cells.index(name)
    assert cells[at + 1] == task_report.value_text(values[name])
    if name in intervals:
      low, high = cells[at + 2].split(' to ')
      assert float(low) <= values[name] <= float(high) or name in ('f1_macro', 'ece')
  assert {'Metrics', 'Confusion', 'Most confused', 'Calibration', 'By length', 'Classes',
          'Mistakes of the highest confidence'} <= set(page.of('h2'))


def test_the_matrix_counts_what_was_taken_for_what(snips, text):
  about, rows = snips
  found = np.zeros((7, 8), int)
  names = [*about['labels'], NASTY]
  for row in rows:
    found[about['labels'].index(row['targets']), names.index(row['prediction'])] += 1
  matrix = re.findall(r'<td style="background[^>]*>([\d,]+)</td>', text)
  assert [int(cell) for cell in matrix[:56]] == found.reshape(-1).tolist()


def test_nothing_runs_and_texts_are_texts(text):
  page = Page(text)
  assert not {'script', 'link', 'img', 'iframe', 'object', 'base'} & set(page.tags)
  assert not [name for name, _ in page.attributes if name in ('src', 'href') or name[:2] == 'on']
  assert '<script' not in text and any(NASTY in said for said in page.of('pre'))


def test_the_surest_mistake_comes_first(snips, text):
  about, rows = snips
  sure = lambda row: max(row['scores']) - np.logaddexp.reduce(row['scores'])
  wrong = [row for row in rows if row['targets'] != row['prediction'] != NASTY]
  first = max(wrong, key=sure)
  shown = [said for said in Page(text).of('p') if said.startswith('id ')]
  assert shown[0].startswith(f'id {first["id"]}, confidence {np.exp(sure(first)):.4f}')


def test_slices_by_length_hold_every_example_once(snips, text):
  about, rows = snips
  cells = Page(text).of('td')
  found = [(cells[i], int(cells[i + 1]), float(cells[i + 2])) for i, cell in enumerate(cells)
           if re.fullmatch(r'\d+ to \d+ words', cell)]
  assert len(found) == 4 and sum(size for _, size, _ in found) == len(rows)
  right = np.mean([row['targets'] == row['prediction'] for row in rows])
  assert sum(n * share for _, n, share in found) / len(rows) == pytest.approx(right, abs=1e-4)


OTHERS = {
    'similarity': {'inputs': 'a', 'targets': 1.0, 'prediction': 2.0},
    'tagging': {'inputs': ['a', 'b'], 'targets': ['O', 'B-x'], 'prediction': ['O', 'O']},
    'span_extraction': {'inputs': 'q', 'targets': ['x'], 'prediction': 'y'},
    'generation': {'inputs': 'q', 'targets': ['x', 'z'], 'prediction': 'y'},
    'multiple_choice': {'inputs': '', 'targets': 0, 'prediction': 1, 'scores': [-2.0, -1.0],
                        'lengths': [3, 3], 'greedy': [False, False]},
    'retrieval': {'inputs': 'q', 'targets': ['d'], 'prediction': ['e', 'd'], 'scores': [2, 1]},
    'language_modelling': {'inputs': 't', 'targets': '', 'scores': [3.0], 'words': 1, 'tokens': 2,
                           'bytes': 4}}


@pytest.mark.parametrize('kind', OTHERS)
def test_every_kind_has_a_page(kind, tmp_path):
  rows = [{'id': str(i), **OTHERS[kind]} for i in range(3)]
  about = {'task': f'<{kind}>', 'kind': kind, 'labels': None, 'split': 's', 'step': 1}
  path = task_report.write(about, rows, tmp_path / 'page.html', intervals={})
  page = Page(path.read_text('utf-8'))
  assert page.of('h1') == [f'<{kind}>'] and 'Worst examples' in page.of('h2') or (
      kind == 'multiple_choice')
  assert not re.search(r'\b(nan|None)\b', ' '.join(page.of('td') + page.of('p')))


def test_many_classes_are_colours_and_the_most_confused():
  about, rows = real.classified(real.banking()[::20])
  page = Page(task_report.page(about, rows, intervals={}))
  assert 'number of the target' in page.of('text') and 'taken for' in page.of('th')


def test_predictions_without_a_kind_are_one_sentence(tmp_path):
  with pytest.raises(UserError, match="kind 'magic' have no metrics"):
    task_report.write({'kind': 'magic'}, [{}], tmp_path / 'page.html')
