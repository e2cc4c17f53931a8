"""`lm compare`: what is one experiment, the numbers in its tables, pages that nothing breaks."""
import json
import math
import statistics

import pytest
from scipy import stats

from lm import main
from lm.errors import UserError
from lm.evaluation import compare
from test_report import Page

LOSSES = {'0.01': (2.0, 2.1, 2.3), '0.02 | 5 % <b>': (1.5, 1.7)}


def make_run(path, rate, seed, loss, steps=40):
  """A run directory whose training loss falls to `loss`."""
  path.mkdir(parents=True)
  rows = [{'step': step, 'split': 'train', 'loss': loss + 5 / step, 'tokens_per_second': 100 + step}
          for step in range(1, steps + 1)]
  rows += [{'step': step, 'split': 'validation', 'accuracy': 0.25, 'loss': loss + (steps - step)}
           for step in (steps // 2, steps)]
  (path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  (path / 'config.gin').write_text(
      f'from lm import run\n\nLEARNING_RATE = {rate}\nSEED = {seed}\nCACHE_DIR = {path}\n'
      'run.Experiment.prompts = \\\n    (\'a\',\n     \'b = c\')\n', 'utf-8')
  return path


@pytest.fixture
def runs(tmp_path):
  return [make_run(tmp_path / 'runs' / f'{i}_{seed}', rate, seed, loss)
          for i, (rate, losses) in enumerate(LOSSES.items()) for seed, loss in enumerate(losses)]


@pytest.mark.supports('evaluation', 'runs compared: seeds as bands, intervals, LaTeX')
def test_runs_that_differ_in_the_seed_alone_are_one_line(runs, tmp_path, capsys):
  out = tmp_path / 'out'
  assert main.main(['compare', *map(str, runs), f'--out={out}']) == 0
  result = json.loads((out / 'compare.json').read_text())
  first, second = result['groups']
  assert [one['label'] for one in result['groups']] == [f'LEARNING_RATE={rate}' for rate in LOSSES]
  assert first['runs'] == [str(path) for path in runs[:3]]
  found = first['metrics']['validation loss']
  assert found['values'] == list(LOSSES['0.01'])
  assert found['std'] == pytest.approx(statistics.stdev(LOSSES['0.01']))
  assert second['metrics']['tokens/s'] == {'values': [120.5] * 2, 'mean': 120.5, 'std': 0.0,
                                           'half_width': 0.0}
  assert first['curves']['validation'] == [
      [20, pytest.approx(2.1333333 + 20), 22.0, 22.3], [40, pytest.approx(2.1333333), 2.0, 2.3]]
  shown = capsys.readouterr().out
  assert '| LEARNING_RATE=0.01 | 3 | 2.1333 ± 0.1528 |' in shown
  assert (out / 'compare.md').read_text() in shown


def test_differences_have_the_intervals_of_scipy(runs):
  groups = compare.compare(runs)['groups']
  found = groups[1]['differences']['validation loss']
  whole = stats.ttest_ind(*reversed(LOSSES.values()), equal_var=False).confidence_interval(0.95)
  assert found['mean'] - found['half_width'] == pytest.approx(whole.low)
  assert found['mean'] + found['half_width'] == pytest.approx(whole.high)
  alone = compare.compare([runs[0], runs[3]])['groups'][1]['differences']['validation loss']
  assert alone == {'mean': pytest.approx(-0.5), 'half_width': None}
  assert compare.difference([1.0, 1.0], [1.0, 1.0]) == {'mean': 0.0, 'half_width': 0.0}


def test_means_have_the_intervals_of_scipy_and_predictions_are_metrics_too(runs):
  for i, run in enumerate(runs[:3]):
    (run / 'predictions').mkdir()
    (run / 'predictions' / 'snips-test.json').write_text(json.dumps(
        {'task': 'snips', 'metrics': {'macro_f1': 0.8 + i / 10, 'signature': 'v1'}}))
  found = compare.compare(runs[:3])['groups'][0]['metrics']['snips-test macro f1']
  values = [0.8, 0.9, 1.0]
  whole = stats.t.interval(0.95, 2, statistics.fmean(values), stats.sem(values))
  assert found['values'] == pytest.approx(values)
  assert found['mean'] - found['half_width'] == pytest.approx(whole[0])
  assert compare.half_width([1.0]) is None


def test_what_a_binding_holds_breaks_no_table_and_no_page(runs, tmp_path):
  compare.write(compare.compare(runs), tmp_path)
  parsed = Page((tmp_path / 'compare.html').read_text('utf-8'))
  assert 'b' not in parsed.tags and 'script' not in parsed.tags
  assert any('<b>' in text for _, text in parsed.texts)
  assert ('class', 'band c0') in parsed.attributes and ('class', 'band c1') in parsed.attributes
  assert r'0.02 \| 5 % <b>' in (tmp_path / 'compare.md').read_text('utf-8')
  latex = (tmp_path / 'compare.tex').read_text('utf-8')
  assert r'LEARNING\_RATE=0.02 | 5 \% <b> & 2 & 1.6000 $\pm$ 0.1414' in latex
  lines = [line for line in latex.splitlines() if line.endswith(r'\\')]
  assert len({line.count(' & ') for line in lines}) == 1 and len(lines) == 3


def test_runs_of_many_settings_or_of_none_are_named_by_their_directories(runs, tmp_path):
  for run in runs[3:]:
    with open(run / 'config.gin', 'a', encoding='utf-8') as config:
      config.write(''.join(f'SETTING_{i} = 1\n' for i in range(4)))
  labels = [one['label'] for one in compare.compare(runs)['groups']]
  assert labels == ['0_0', '1_0']
  (runs[0] / 'config.gin').unlink()
  assert [one['label'] for one in compare.compare(runs[:2])['groups']] == ['0_0', '0_1']


def test_a_run_that_still_goes_and_a_loss_that_is_no_number_are_shown_as_far_as_they_are(tmp_path):
  run = make_run(tmp_path / 'a', 1, 0, 2.0)
  rows = (run / 'metrics.jsonl').read_text().splitlines()[:10]
  rows[4] = json.dumps({'step': 5, 'split': 'train', 'loss': None, 'non_finite': True})
  (run / 'metrics.jsonl').write_text('\n'.join(rows) + '\n{"step": 11, "spl')
  result = compare.compare([run, make_run(tmp_path / 'b', 2, 0, 1.0)])
  going = result['groups'][0]
  assert 'validation loss' not in going['metrics'] and going['metrics']['steps']['mean'] == 10
  assert [point[0] for point in going['curves']['train']] == [1, 2, 3, 4, 6, 7, 8, 9, 10]
  assert all(math.isfinite(x) for point in going['curves']['train'] for x in point)
  assert 'LEARNING_RATE=1' in compare.markdown(result) and compare.page(result)


def test_what_is_no_run_or_is_named_twice_is_refused(runs, tmp_path, capsys):
  assert main.main(['compare', str(runs[0]), str(tmp_path / 'none')]) == 2
  assert 'has no metrics.jsonl with rows to compare' in capsys.readouterr().err
  with pytest.raises(UserError, match='is given twice; name each run once'):
    compare.compare([runs[0], str(runs[0].parent / '.' / runs[0].name)])
