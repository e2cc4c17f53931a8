"""The report shows every number, loads nothing, and cannot be broken by what a model says."""

from __future__ import annotations

import html.parser
import json
import re

import pytest

from lm.errors import UserError
from lm.evaluation import plot, report

VOID = {'meta'}  # What SVG leaves empty closes itself.
FILES = [
    {'name': 'argparse.py', 'bytes': 1000, 'bits_per_byte': 1.111, 'gzip': 2.222, 'xz': 2.111},
    {'name': 'a<b>&c.py', 'bytes': 20000, 'bits_per_byte': 1.999, 'gzip': 1.888, 'xz': 1.777},
    {'name': 'tie.py', 'bytes': 30, 'bits_per_byte': 1.5, 'gzip': 1.5, 'xz': 1.625}]
EVALUATION = {'step': 60, 'bits_per_byte': 1.234, 'loss': 2.3456, 'tokens': 4321, 'bytes': 21030,
              'gzip_bits_per_byte': 2.468, 'xz_bits_per_byte': 2.0,
              'xz_together_bits_per_byte': 1.625, 'files': FILES}
SAMPLES = [{'prompt': 'def <', 'temperature': 0.8,
            'text': '</pre></body><script src="https://x.y/z.js">alert("1 & 2")</script>\n\tend'}]


class Page(html.parser.HTMLParser):
  """Parses a page strictly: every element must be closed in order."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.attributes, self.cells, self.texts = [], [], [], [], []
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append((self.open[-1] if self.open else '', data))

  def of(self, tag):
    return [text for where, text in self.texts if where == tag]


@pytest.fixture
def run_dir(tmp_path):
  with open(tmp_path / 'metrics.jsonl', 'w', encoding='utf-8') as file:
    for step in range(1, 61):
      file.write(json.dumps({
          'step': step, 'split': 'train', 'loss': 9.0 - step / 10, 'learning_rate': 1e-3,
          'grad_norm': 1.0, 'tokens_per_second': 1000.0 + step, 'mfu': 0.3125,
          'data_wait_share': 0.015}) + '\n')
    file.write(json.dumps({'step': 60, 'split': 'validation', 'loss': 3.125}) + '\n')
    file.write('{"step": 61, "spl')
  (tmp_path / 'evaluation.json').write_text(json.dumps(EVALUATION))
  (tmp_path / 'samples.json').write_text(json.dumps(SAMPLES))
  (tmp_path / 'config.gin').write_text('FILES = "<books>"\n')
  return tmp_path


def test_every_file_and_figure_appears_in_the_table_with_its_winner(run_dir):
  page = Page(report.write_report(run_dir).read_text(encoding='utf-8'))
  cells = page.of('td')
  rows = [cells[i:i + 6] for i in range(0, len(cells), 6)]
  assert rows == [
      ['all files', '21,030', '1.234', '2.468', '2.000', 'model'],
      ['argparse.py', '1,000', '1.111', '2.222', '2.111', 'model'],
      ['a<b>&c.py', '20,000', '1.999', '1.888', '1.777', 'xz -9'],
      ['tie.py', '30', '1.500', '1.500', '1.625', 'gzip -9']]
  assert '1 of 3' in page.of('dd')
  assert any('All files in one xz -9: 1.625 bits' in text for text in page.of('p'))


def test_bars_are_as_long_as_their_values(run_dir):
  text = report.write_report(run_dir).read_text(encoding='utf-8')
  widths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', text)]
  values = [1.234, 2.468, 2.0]
  values += [x for file in FILES for x in (file['bits_per_byte'], file['gzip'], file['xz'])]
  assert len(widths) == len(values)
  for width, value in zip(widths, values):
    assert width / widths[1] == pytest.approx(value / 2.468, abs=1e-3)


def test_summary_and_charts_show_the_numbers_of_the_run(run_dir):
  page = Page(report.write_report(run_dir).read_text(encoding='utf-8'))
  for value in '60', '1.234', '-50.0 %', '-38.3 %', '3.1250', '3.0000', '31.2', '1.5':
    assert value in page.of('dd'), (value, page.of('dd'))
  assert page.of('figcaption') == ['Loss', 'Learning rate', 'Gradient norm', 'Speed',
                                   'Model FLOP utilisation', 'Waiting for data']
  assert page.tags.count('svg') == 7
  for label in ('loss (nats per token)', 'MFU (% of peak)', 'tokens per second', 'step',
                'bits per byte (less is better)'):
    assert label in page.of('text'), label
  assert {'train, every row', 'train, smoothed', 'validation', 'model', 'gzip -9', 'xz -9'} <= set(
      page.of('span'))


@pytest.mark.supports('evaluation', 'self-contained report')
def test_nothing_is_loaded_and_nothing_runs(run_dir):
  text = report.write_report(run_dir).read_text(encoding='utf-8')
  page = Page(text)
  assert not {'script', 'link', 'img', 'iframe', 'object', 'base'} & set(page.tags)
  assert not [name for name, _ in page.attributes
              if name in ('src', 'href', 'xlink:href') or name.startswith('on')]
  assert 'url(' not in text and '@import' not in text
  for address in re.findall(r'\w+://\S*', text):
    assert address.startswith('https://x.y/'), address  # The sample's own text, escaped.


def test_what_a_model_or_a_config_says_is_shown_as_text(run_dir):
  text = report.write_report(run_dir).read_text(encoding='utf-8')
  page = Page(text)
  assert '<script' not in text and '&lt;script src=' in text
  assert SAMPLES[0]['text'] in page.of('pre') and 'def <' in page.of('b')
  assert 'FILES = "<books>"\n' in page.of('pre')
  assert 'temperature 0.8' in page.of('p')


@pytest.mark.parametrize('absent', ['metrics.jsonl', 'evaluation.json', 'samples.json',
                                    'config.gin'])
def test_what_is_absent_is_left_out(run_dir, absent):
  (run_dir / absent).unlink()
  page = Page(report.write_report(run_dir).read_text(encoding='utf-8'))
  assert ('Loss' in page.of('figcaption')) == (absent != 'metrics.jsonl')
  assert ('argparse.py' in page.of('td')) == (absent != 'evaluation.json')
  assert ('config.gin' in page.of('summary')) == (absent != 'config.gin')
  assert ('Samples' in page.of('h2')) == (absent != 'samples.json')


def test_a_loss_that_is_not_finite_is_said_and_does_not_break_the_curve(run_dir):
  rows = (run_dir / 'metrics.jsonl').read_text().splitlines()
  rows[29] = json.dumps({'step': 30, 'split': 'train', 'loss': None, 'non_finite': True})
  (run_dir / 'metrics.jsonl').write_text('\n'.join(rows))
  text = report.write_report(run_dir).read_text(encoding='utf-8')
  assert 'Not finite: 1 rows, the first at step 30.' in Page(text).of('p')
  assert not re.search(r'\b(nan|inf|None)\b', re.sub(r'<style>.*?</style>', '', text, flags=re.S))


def test_a_single_row_and_zero_losses_are_drawn(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "split": "train", "loss": 0.0}\n')
  assert 'circle' in Page(report.write_report(tmp_path).read_text(encoding='utf-8')).tags


def test_a_failed_report_is_one_sentence_and_leaves_the_old_one(run_dir):
  before = report.write_report(run_dir).read_bytes()
  (run_dir / 'evaluation.json').write_text('{"step": 3}')
  with pytest.raises(UserError, match='bits_per_byte.*lm evaluate'):
    report.write_report(run_dir)
  (run_dir / 'evaluation.json').write_text('{"step":')
  with pytest.raises(UserError, match='evaluation.json is not JSON'):
    report.write_report(run_dir)
  assert (run_dir / 'report.html').read_bytes() == before
  with pytest.raises(UserError, match='neither metrics.jsonl nor evaluation.json'):
    report.write_report(run_dir / 'none')


@pytest.mark.parametrize('low, high', [(0, 1), (0.3, 0.9), (-5, 5), (0, 1e-5), (1, 123456), (2, 2)])
def test_ticks_are_few_and_round_and_inside(low, high):
  values = plot.ticks(low, high)
  assert 1 <= len(values) <= 9 and all(low - 1e-9 <= v <= high + 1e-9 for v in values)
  assert len({plot.number(v) for v in values}) == len(values)
  assert all(len(plot.number(v)) <= 7 for v in values)


def test_smoothing_keeps_constants_and_lines_and_lowers_noise():
  line = [(i, 3.0 - 0.1 * i) for i in range(50)]
  for (_, smoothed), (_, raw) in zip(plot.smooth(line, 10), line):
    assert smoothed == pytest.approx(raw)
  noise = [(i, (-1.0) ** i) for i in range(101)]
  assert max(abs(y) for _, y in plot.smooth(noise, 20)[20:80]) < 0.06
  assert plot.smooth([], 3) == []


def test_thinning_a_long_run_keeps_every_spike():
  points = [(i, 100.0 if i == 54321 else 1.0) for i in range(100000)]
  thin = plot._thin(points)
  assert len(thin) <= plot.MAX_POINTS and (54321, 100.0) in thin
