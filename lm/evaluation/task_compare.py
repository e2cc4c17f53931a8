"""Two runs' predictions of the same examples: what flipped, and whether the metrics differ.

    result = compare_runs('runs/small', 'runs/large')     # every task that both have predicted
    print(markdown(result)); write(result, 'comparison.html')
"""
from collections.abc import Mapping, Sequence
import dataclasses
import html
import pathlib
from typing import Any

import numpy as np

from lm.errors import UserError
from lm.evaluation import metrics
from lm.evaluation import report
from lm.evaluation import significance
from lm.evaluation import tables
from lm.evaluation.task_report import headline, said, shortened, value_text

MOST_FLIPS = 20  # shown, each way
HEADS = 'metric', 'first', 'second', 'difference', '95 % interval', 'p'
NOTE = ('Differences are second minus first, of the same examples; intervals are percentile '
        'bootstraps over them. p is of two sides and not corrected for the number of metrics: '
        'decide before which one counts.')


def compare_runs(run_a: str | pathlib.Path, run_b: str | pathlib.Path, seed: int = 0,
                 repeats: int = significance.REPEATS, progress: bool = False) -> dict[str, Any]:
  """Compares what two runs predicted for the tasks and splits that both have.

  Args:
    run_a, run_b: run directories, with a folder `predictions`.
    seed, repeats: of the resamples and trials; see `significance`.

  Returns:
    {'first', 'second', 'tasks': {name: {'kind', 'examples', 'metrics': {metric: {'first', 'second',
    'difference', 'low', 'high', 'p', 'test'}}, 'measure', 'won', 'lost', 'flips': {'won': [...],
    'lost': [...]}}}}: a flip has 'id', 'inputs', 'target', 'first' and 'second' as text. Where
    examples are not right or wrong, those are shown that gained or lost most of `measure`.

  Raises:
    UserError: a run has no predictions, or they are of different splits, examples or labels.
  """
  places = [pathlib.Path(run) / 'predictions' for run in (run_a, run_b)]
  names = [{path.stem: path for path in sorted(place.glob('*.jsonl'))} for place in places]
  for place, found in zip(places, names):
    if not found:
      raise UserError(f'{place} holds no predictions; run `lm evaluate --run_dir={place.parent} '
                      '--tasks=...` first')
  shared = [name for name in names[0] if name in names[1]]
  if not shared:
    raise UserError(f'{run_a} has predictions of {", ".join(names[0])} and {run_b} of '
                    f'{", ".join(names[1])}, no task and split in common; evaluate both on the '
                    'same split')
  return {'first': str(run_a), 'second': str(run_b), 'tasks': {
      name: compare(*(metrics.read(found[name]) for found in names), seed=seed, repeats=repeats,
                    progress=progress) for name in shared}}


def compare(first: tuple[Mapping, Sequence], second: tuple[Mapping, Sequence], seed: int = 0,
            repeats: int = significance.REPEATS, progress: bool = False) -> dict[str, Any]:
  """One task of `compare_runs`: of (header, rows) and (header, rows). Raises as it does."""
  (header, rows), (other, others) = first, second
  _check(header, rows, other, others)
  found = significance.compare(header, rows, others, seed, repeats, progress)
  both = metrics.scorer(header, [*rows, *others])
  before, after = both.each[:len(rows)], both.each[len(rows):]
  change = after.astype(float) - before.astype(float)
  flips = {}
  for way, sign in ('lost', -1), ('won', 1):
    order = np.argsort(-sign * change, kind='stable')
    flips[way] = [_flip(header, rows[i], others[i]) for i in order[:MOST_FLIPS]
                  if sign * change[i] > 0]
  return {
      'kind': header['kind'], 'examples': len(rows),
      'metrics': {name: {**dataclasses.asdict(one), 'difference': one.value}
                  for name, one in found.items()},
      'measure': both.each_is, 'flips': flips,
      'won': int((change > 0).sum()), 'lost': int((change < 0).sum())}


def _check(header, rows, other, others):
  name = metrics.contract.name(header)
  for field in ('kind', 'split', 'labels', 'language'):
    if header.get(field) != other.get(field):
      raise UserError(f'{name} has {field}={header.get(field)!r} in the first run and '
                      f'{other.get(field)!r} in the second; compare predictions of the same task')
  if len(rows) != len(others):
    raise UserError(f'{name} has {len(rows):,} examples in the first run and {len(others):,} in '
                    'the second; evaluate both on the same files')
  for number, (row, one) in enumerate(zip(rows, others)):
    for field in ('id', 'targets'):
      if row.get(field) != one.get(field):
        raise UserError(f'row {number} of {name} has {field}={row.get(field)!r} in the first run '
                        f'and {one.get(field)!r} in the second; evaluate both on the same files')


def _flip(header, row, other):
  (target, first), (_, second) = said(header, row), said(header, other)
  if header['kind'] == 'tagging':  # the words with mistakes of each
    target = ' '.join(map(str, row['targets']))
  return {'id': row.get('id'), 'inputs': shortened(row.get('inputs', '')), 'target': target,
          'first': first, 'second': second}


def table(one: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
  """The rows, under HEADS, of these metrics of a task."""
  rows = []
  for name in names:
    found = one['metrics'][name]
    interval = '' if found['low'] is None else (
        f'{_signed(found["low"])} to {_signed(found["high"])}')
    p = '' if found['p'] is None else '< 0.001' if found['p'] < 0.001 else f'{found["p"]:.3f}'
    rows.append([name, value_text(found['first']), value_text(found['second']),
                 _signed(found['difference']), interval, p])
  return rows


def _signed(value):
  return f'{"+" * (value > 0)}{value_text(value)}'


def _summary(one):
  tests = dict.fromkeys(found['test'] for found in one['metrics'].values() if found['test'])
  words = ('right before and wrong now', 'wrong before and right now') if (
      one['measure'] in one['metrics']) else ('worse', 'better')
  return (f'{one["examples"]:,} examples: {one["lost"]:,} {words[0]}, {one["won"]:,} {words[1]} '
          f'(by {one["measure"]}). Tests: {"; ".join(tests)}.')


def markdown(result: Mapping[str, Any]) -> str:
  """A table a task, for a terminal, a README or an issue."""
  parts = [f'First: {result["first"]}. Second: {result["second"]}.\n']
  for name, one in result['tasks'].items():
    rows = table(one, headline(one['metrics']))
    parts += [f'**{name}**\n', tables.markdown(HEADS, rows), _summary(one) + '\n']
  return '\n'.join([*parts, NOTE + '\n'])


def page(result: Mapping[str, Any]) -> str:
  """The same as HTML that loads nothing, with the examples that flipped and F1 by class."""
  body = [f'<p class="soft">First: {html.escape(result["first"])}. Second: '
          f'{html.escape(result["second"])}. {NOTE}</p>']
  for name, one in result['tasks'].items():
    of_classes = [key for key in one['metrics'] if key.startswith('f1/')]
    body += [f'<h2>{html.escape(name)}</h2>', tables.page(HEADS, table(one, headline(
        one['metrics']))), f'<p>{html.escape(_summary(one))}</p>',
             _flips('Lost', one, 'lost'), _flips('Won', one, 'won')]
    if of_classes:
      body.append('<details><summary>F1 by class</summary>'
                  f'{tables.page(HEADS, table(one, of_classes))}</details>')
  return report.document('Two runs on the same examples', '\n'.join(body))


def _flips(title, one, way):
  figures = ''.join(
      f'<figure><p class="soft">id {html.escape(str(flip["id"]))}</p>'
      f'<pre>{html.escape(flip["inputs"])}\n<b>target</b> {html.escape(flip["target"])}\n'
      f'<b>first</b>  {html.escape(flip["first"])}\n<b>second</b> {html.escape(flip["second"])}'
      '</pre></figure>' for flip in one['flips'][way])
  return (f'<details{" open" * (len(one["flips"][way]) < 10)}><summary>{title}: {one[way]:,}'
          f'</summary><div class="samples">{figures}</div></details>') if figures else ''


def write(result: Mapping[str, Any], path: str | pathlib.Path) -> pathlib.Path:
  """Writes the page.

  Raises:
    UserError: the disk is full, or not writable.
  """
  return report.write(pathlib.Path(path), page(result))
