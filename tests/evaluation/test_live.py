"""The report of a run can be read while it goes, and shows what happens inside."""
import json
import math
import re
import threading
import time

import numpy as np
import pytest
from test_report import Page

from lm.evaluation import live, plot, report, watched
from lm.training import monitor

LAYERS, HEADS, EXPERTS = 5, 3, 4


def rows_of(step):
  """All that a run of a mixture of experts writes at a step."""
  rng = np.random.default_rng(step)
  draw = lambda *shape: rng.random(shape).astype(np.float32)
  return [
      ('train', {'loss': 5 - step / 50, 'grad_norm': 1.0, 'learning_rate': 1e-3}),
      ('norms', {f'{kind}/{group}': draw(*shape) for kind in
                 ('grad_norm', 'param_norm', 'update_ratio')
                 for group, shape in (('attention', (LAYERS,)), ('moe', (LAYERS,)),
                                      ('norms', (LAYERS,)), ('token_embedding', ()))}),
      ('probe', {'entropy/attention': draw(LAYERS), 'rms/residual': draw(LAYERS),
                 'max/residual': draw(LAYERS), 'zeros/mlp/mlp_hidden': draw(LAYERS),
                 'entropy_of_heads/attention': draw(LAYERS, HEADS),
                 'load/moe': draw(LAYERS, EXPERTS), 'load_entropy/moe': draw(LAYERS),
                 'dropped/moe': draw(LAYERS)})]


@pytest.fixture
def watched_run(tmp_path):
  writer = monitor.MetricsWriter(tmp_path)
  for step in (10, 20, 30):
    for split, row in rows_of(step):
      writer.write(step, split, row)
  writer.close()
  (tmp_path / 'goodput.json').write_text(json.dumps({'seconds': {
      'compile': 10.0, 'step': 80.0, 'lost': 0.0, 'down': 10.0}}))
  (tmp_path / 'samples.jsonl').write_text(''.join(json.dumps(
      {'step': step, 'prompt': 'if <', 'text': f'x{step}>', 'tokens': [1]}) + '\n'
      for step in range(1, 20)))
  return tmp_path


@pytest.mark.supports('watching', 'heat maps by layer and step', 'samples over time')
def test_every_number_of_the_inside_has_its_figure(watched_run):
  text = report.write_report(watched_run).read_text(encoding='utf-8')
  page = Page(text)
  assert set(page.of('h2')) == {'Training', 'Time', 'Norms', 'Inside the model', 'Experts',
                                'Samples while it learnt'}
  assert page.of('figcaption')[3:] == [
      '1 min 40 s since the first start', 'Gradient norm by group', 'Updates by group',
      'Parameter norm by group', 'Gradient norm of attention by layer',
      'Gradient norm of moe by layer', 'Updates of attention by layer', 'Updates of moe by layer',
      'Entropy of attention', 'RMS of residual', 'Largest of residual', 'Zeros of mlp/mlp_hidden',
      'Entropy of the heads of attention, step 30', 'Load of the experts of moe, step 30',
      'How even the load is, moe', 'Dropped, moe']
  assert {'compile 10.0 %', 'step 80.0 %', 'down 10.0 %'} <= set(page.of('span'))
  assert 'lost 0.0 %' not in page.of('span')
  # Of 19 samples six, the first and the last among them, with the prompt as text.
  assert [s for s in page.of('p') if re.fullmatch(r'step \d+', s)] == [
      f'step {i}' for i in (1, 5, 8, 12, 15, 19)]
  assert page.of('b').count('if <') == 6 and 'x19>' in page.of('pre')
  assert not {'script', 'img', 'link', 'image'} & set(page.tags) and 'http-equiv' not in text


def test_colours_of_a_heat_map_are_those_of_its_values():
  values = [[0.0, 10.0], [5.0, math.nan], [10.0, 10.0]]  # columns, from the bottom up
  text = plot.heat_map(list(enumerate(values)), 'step', 'layer', 'nats')
  paths = dict(re.findall(r'<path stroke="#(\w+)" d="([^"]*)"', text))
  assert paths == {plot.RAMP[0]: 'M0 1h1', plot.RAMP[8]: 'M1 1h1',
                   plot.RAMP[-1]: 'M2 1h1M0 0h1M2 0h1'}
  logarithmic = plot.heat_map([(0, [0.01, 0.1, 1.0, 0.0])], 'step', 'layer', 'nats', log=True)
  paths = dict(re.findall(r'<path stroke="#(\w+)" d="([^"]*)"', logarithmic))
  assert paths == {plot.RAMP[0]: 'M0 3h1', plot.RAMP[8]: 'M0 2h1', plot.RAMP[-1]: 'M0 1h1'}
  assert '>0.01<' in logarithmic and '>1<' in logarithmic
  assert plot.heat_map([(1, [math.nan])], 'x', 'y', 'z') == plot.heat_map([], 'x', 'y', 'z') == ''


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors():
  points = [(0, 1e-3), (1, 1e-2), (2, 1e-1), (3, 0.0)]
  text = plot.line_chart([plot.Series('', points)], 'x', 'y', log_y=True)
  ys = [float(y) for _, y in re.findall(r'([\d.]+) ([\d.]+)', re.search(
      r'class="curve c0" d="M([^"]*)"', text)[1])]
  assert len(ys) == 3 and ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
  assert '>0.001<' in text and '>0.1<' in text


class Waiting(live.LiveReport):
  """One whose pages can be waited for."""

  def __init__(self, total):
    super().__init__(total)
    self.pages, self.states = threading.Semaphore(0), []

  def _update(self, state):
    super()._update(state)
    self.states.append((self._step, state))
    self.pages.release()

  def wait(self):
    assert self.pages.acquire(timeout=20)


@pytest.mark.supports('watching', 'live report')
def test_the_page_is_there_from_the_first_moment_and_says_how_far_the_run_is(tmp_path):
  page = Waiting(40)
  writer = monitor.MetricsWriter(tmp_path, 0, (page,))
  read = lambda: (tmp_path / 'report.html').read_text(encoding='utf-8')
  page.wait()
  assert 'step 0 of 40, 0 %' in Page(read()).of('span')
  page._cost = 0.0  # as if it cost nothing
  for step in (10, 20, 30):
    for split, row in rows_of(step):
      writer.write(step, split, row)
      if split != 'train':
        page.wait()
        page._cost = 0.0
  live_page = Page(read())
  assert 'step 30 of 40, 75 %' in live_page.of('span') and 'live' in live_page.of('b')
  assert ('http-equiv', 'refresh') in live_page.attributes
  assert any('left' in text for text in live_page.of('span'))
  assert any(re.search(r'last sign of life \d{4}-\d\d-\d\d', s) for s in live_page.of('span'))
  assert 'Entropy of the heads of attention, step 30' in live_page.of('figcaption')
  writer.close()
  assert page.states[-1] == (30, 'stopped')
  ended = Page(read())
  assert 'stopped' in ended.of('b') and ('http-equiv', 'refresh') not in ended.attributes


def test_between_evaluations_a_page_is_written_twice_a_minute(tmp_path, monkeypatch):
  (tmp_path / 'metrics.jsonl').write_text('')
  now = [1000.0]
  monkeypatch.setattr(live.time, 'monotonic', lambda: now[0])
  page = Waiting(200)
  page.open(tmp_path, 0)
  for step in range(1, 101):
    now[0] += 1.0
    page.write(step, 'train', {})
  assert page.states == [(0, 'live'), (30, 'live'), (60, 'live'), (90, 'live')]
  page._cost = 2.0  # a page that takes two seconds waits a hundred
  for step in range(101, 201):
    now[0] += 1.0
    page.write(step, 'validation', {})
  assert page.states[4:] == [(step, 'live') for step in range(190, 201)]
  page.close()
  assert page.states[-1] == (200, 'ended')


def test_a_long_run_is_thinned_without_losing_its_spike_or_its_mean_and_stays_small(tmp_path):
  rng, spike = np.random.default_rng(0), 54321
  losses = 2 + 0.1 * rng.normal(size=100_000)
  losses[spike] = 30.0
  with open(tmp_path / 'metrics.jsonl', 'w', encoding='utf-8') as file:
    for step, loss in enumerate(losses):
      file.write(json.dumps({'step': step, 'split': 'train', 'loss': loss}) + '\n')
    file.write('{"step": 100000, "split": "tr')
  page = live.LiveReport(200_000)
  page.open(tmp_path, 0)
  rows = page._splits['train'].rows()
  assert len(rows) < 2 * live.MOST_ROWS and [row['step'] for row in rows] == sorted(
      row['step'] for row in rows)
  gaps = np.diff([row['step'] for row in rows])
  assert gaps.max() < 4 * 100_000 / len(rows)  # the first steps are as dense as the last
  assert spike in [row['step'] for row in rows]
  assert np.median([row['loss'] for row in rows]) == pytest.approx(2, abs=0.03)
  assert (tmp_path / 'report.html').stat().st_size < 200_000
  # What is added later is read, and what stood is not read again.
  before = page._read
  with open(tmp_path / 'metrics.jsonl', 'a', encoding='utf-8') as file:
    file.write('ain", "loss": 1.0}\n')
  page._take_rows()
  assert page._read - before == len('{"step": 100000, "split": "train", "loss": 1.0}\n')


def test_durations_are_two_units():
  assert [watched.duration(s) for s in (0.4, 59, 61, 3600, 90061)] == [
      '0 s', '59 s', '1 min 1 s', '1 h 0 min', '1 d 1 h']


def test_a_page_that_cannot_be_written_is_said_once_and_ends_nothing(tmp_path):
  said = []
  writer = monitor.MetricsWriter(tmp_path, 0, (live.LiveReport(10),), said.append)
  (tmp_path / 'evaluation.json').write_text('{"step":')
  for step in range(1, 4):
    writer.write(step, 'validation', {'loss': 1.0})
    time.sleep(0.01)
  writer.close()
  assert len(said) == 1 and 'LiveReport failed' in said[0] and len(said[0].splitlines()) == 1
