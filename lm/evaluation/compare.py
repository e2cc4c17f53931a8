"""Runs beside each other: those that differ in the seed alone are one line with its spread."""
from collections.abc import Mapping, Sequence
import dataclasses
import html
import json
import math
import pathlib
import re
import statistics
from typing import Any

from lm.errors import UserError
from lm.evaluation import plot, report

IGNORED = 'SEED', 'CACHE_DIR'  # what does not make another experiment
MOST_SETTINGS = 4  # in a label; runs that differ in more are named by their directories
COLOURS = 8
_BINDING = re.compile(r'^(\S+) = ?(.*)')


@dataclasses.dataclass(frozen=True)
class Run:
  """What stands in a run's directory.

  settings: of config.gin.  rows: of metrics.jsonl.  metrics: the last of each held-out metric, the
  best validation loss, those of predictions, and the median of the speed.
  """
  path: pathlib.Path
  settings: Mapping[str, str]
  rows: Sequence[Mapping[str, Any]]
  metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs of one experiment with different seeds."""
  label: str
  runs: Sequence[Run]

  def values(self, name: str) -> list[float]:
    """Of a metric, of the runs that have it."""
    return [run.metrics[name] for run in self.runs if name in run.metrics]


def read(path: pathlib.Path) -> Run:
  """Reads a run.

  Raises:
    UserError: there is none, or it has no metrics yet.
  """
  rows = report.read_rows(path / 'metrics.jsonl')
  if not rows:
    raise UserError(f'{path} has no metrics.jsonl with rows to compare; give the --run_dir of runs '
                    'of `lm train`')
  held_out = [row for row in rows if row['split'] == 'validation']
  metrics = {f'validation {name.replace("_", " ")}': value
             for name, value in sorted((held_out[-1] if held_out else {}).items(),
                                       key=lambda item: item[0] != 'loss')  # the loss comes first
             if name not in ('step', 'split') and _is_number(value)}
  losses = [row['loss'] for row in held_out if _is_number(row.get('loss'))]
  if len(losses) > 1:
    metrics['best validation loss'] = min(losses)
  evaluation = report.read_json(path / 'evaluation.json') or {}
  if 'bits_per_byte' in evaluation:
    metrics['bits per byte'] = evaluation['bits_per_byte']
  for task, found in evaluation.get('tasks', {}).items():
    metrics |= {f'{task} {name.replace("_", " ")}': value for name, value in found.items()
                if name != 'step' and '/' not in name}
  speeds = [row['tokens_per_second'] for row in rows if 'tokens_per_second' in row]
  if speeds:
    metrics['tokens/s'] = statistics.median(speeds)
  for header in sorted(path.glob('predictions/*.json')):
    for name, value in (report.read_json(header) or {}).get('metrics', {}).items():
      if _is_number(value):
        metrics[f'{header.stem} {name.replace("_", " ")}'] = value
  metrics['steps'] = max(row['step'] for row in rows)
  config = path / 'config.gin'
  settings = _settings(config.read_text('utf-8')) if config.exists() else {}
  return Run(path, settings, rows, metrics)


def _is_number(value):
  return isinstance(value, (int, float)) and math.isfinite(value)


def _settings(text: str) -> dict[str, str]:
  """The bindings of a saved config; a value may go on in lines that are indented or closed."""
  found, name = {}, None
  for line in text.splitlines():
    binding = _BINDING.match(line)
    if binding:
      name = binding[1]
      found[name] = binding[2].rstrip('\\').strip()
    elif name and line.strip() and not line.startswith(('#', 'from ', 'import ')):
      found[name] += line.strip()
  return {name: value for name, value in found.items() if name not in IGNORED}


def group(runs: Sequence[Run]) -> list[Group]:
  """Groups runs that differ in nothing but the seed, in the order in which they came."""
  groups: dict[Any, list[Run]] = {}
  for run in runs:
    key = tuple(sorted(run.settings.items())) or run.path
    groups.setdefault(key, []).append(run)
  members = list(groups.values())
  names = dict.fromkeys(name for first, *_ in members for name in first.settings)
  differ = [name for name in names if len({first.settings.get(name) for first, *_ in members}) > 1]
  few = 0 < len(differ) <= MOST_SETTINGS and all(first.settings for first, *_ in members)

  def label(run):
    if not few:
      return run.path.name or str(run.path)
    return ', '.join(f'{name}={run.settings.get(name, "absent")}' for name in differ)

  return [Group(label(first), (first, *others)) for first, *others in members]


def compare(paths: Sequence[str]) -> dict[str, Any]:
  """What `lm compare --json` holds: groups with their metrics, and differences to the first.

  Raises:
    UserError: a directory holds no run, or is named twice.
  """
  runs = [read(pathlib.Path(path)) for path in paths]
  places = [run.path.resolve() for run in runs]
  for place in places:
    if places.count(place) > 1:
      raise UserError(f'{place} is given twice; name each run once')
  groups = group(runs)
  names = dict.fromkeys(name for run in runs for name in run.metrics)
  first, *_ = groups
  return {'groups': [{
      'label': one.label, 'runs': [str(run.path) for run in one.runs],
      'metrics': {name: _summary(one.values(name)) for name in names if one.values(name)},
      'differences': {name: difference(one.values(name), first.values(name)) for name in names
                      if one is not first and one.values(name) and first.values(name)},
      'curves': {split: curve(one, split) for split in ('train', 'validation')},
  } for one in groups]}


def _summary(values):
  spread = statistics.stdev(values) if len(values) > 1 else None
  return {'values': values, 'mean': statistics.fmean(values), 'std': spread,
          'half_width': half_width(values)}


def half_width(values: Sequence[float]) -> float | None:
  """Of the 95 % interval of the mean (Student 1908); None of one value."""
  if len(values) < 2:
    return None
  from scipy import stats
  return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values)**0.5


def difference(values: Sequence[float], others: Sequence[float]) -> dict[str, float | None]:
  """Of the means, with half the width of its 95 % interval (Welch 1947), where both have two runs
  or more."""
  mean = statistics.fmean(values) - statistics.fmean(others)
  if min(len(values), len(others)) < 2:
    return {'mean': mean, 'half_width': None}
  parts = [statistics.variance(x) / len(x) for x in (values, others)]
  if not sum(parts):
    return {'mean': mean, 'half_width': 0.0}
  freedom = sum(parts)**2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (values, others)))
  from scipy import stats
  return {'mean': mean, 'half_width': float(stats.t.ppf(0.975, freedom)) * sum(parts)**0.5}


def curve(one: Group, split: str) -> list[tuple[float, float, float, float]]:
  """(step, mean, least, largest) of the loss at the steps that all runs of the group have; of
  training smoothed over a fiftieth of the run."""
  by_run = []
  for run in one.runs:
    points = [(row['step'], row['loss']) for row in run.rows
              if row['split'] == split and _is_number(row.get('loss'))]
    by_run.append(dict(plot.smooth(points, len(points) / 50) if split == 'train' else points))
  shared = sorted(set.intersection(*map(set, by_run)))
  found = []
  for step in shared:
    values = [losses[step] for losses in by_run]
    found.append((step, statistics.fmean(values), min(values), max(values)))
  return found


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Heads and rows: mean and standard deviation of each metric, and the difference of the first
  to the first group's."""
  groups = result['groups']
  names = list(dict.fromkeys(name for one in groups for name in one['metrics']))
  shown = ['runs', *names] + (['difference'] if len(groups) > 1 and names else [])
  rows = [[one['label'], str(len(one['runs'])),
           *(_cell(name, one['metrics'].get(name)) for name in names),
           *([_difference(one['differences'].get(names[0]))] if 'difference' in shown else [])]
          for one in groups]
  return ['', *shown], rows


def _cell(name, summary):
  if summary is None:
    return ''
  digits = 0 if name in ('tokens/s', 'steps') else 4
  mean = f'{summary["mean"]:,.{digits}f}'
  return mean if summary['std'] is None or name == 'steps' else (
      f'{mean} ± {summary["std"]:,.{digits}f}')


def _difference(found):
  if found is None:
    return ''
  mean = f'{found["mean"]:+.4f}'
  return mean if found['half_width'] is None else f'{mean} ± {found["half_width"]:.4f}'


def markdown(result: Mapping[str, Any]) -> str:
  """The table for a README or an issue."""
  heads, rows = table(result)
  escape = lambda cells: [cell.replace('|', r'\|') for cell in cells]
  lines = [heads, ['---', *['--:'] * (len(heads) - 1)], *map(escape, rows)]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def latex(result: Mapping[str, Any]) -> str:
  """The table for a paper, of the package booktabs."""
  heads, rows = table(result)
  special = {'\\': r'\textbackslash{}', '±': r'$\pm$', '~': r'\textasciitilde{}',
             '^': r'\textasciicircum{}', **{c: f'\\{c}' for c in '&%$#_{}'}}
  line = lambda cells: ' & '.join(''.join(special.get(c, c) for c in cell) for cell in cells)
  body = ''.join(f'{line(row)} \\\\\n' for row in rows)
  return (f'\\begin{{tabular}}{{l{"r" * (len(heads) - 1)}}}\n\\toprule\n{line(heads)} \\\\\n'
          f'\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n')


def page(result: Mapping[str, Any]) -> str:
  """Curves over each other, seeds as bands, and the table: HTML that loads nothing."""
  heads, rows = table(result)
  cells = lambda tag, row: ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)
  body = ''.join(f'<tr>{cells("td", row)}</tr>' for row in rows)
  figures = ''
  for split in ('validation', 'train'):
    series = [plot.Series(one['label'], [point[:2] for point in one['curves'][split]],
                          f'c{i % COLOURS}', band=[(x, low, high) for x, _, low, high in
                                                   one['curves'][split]])
              for i, one in enumerate(result['groups'])]
    chart = plot.line_chart(series, 'step', f'{split} loss')
    figures += f'<figure><figcaption>{split.capitalize()} loss</figcaption>{chart}</figure>'
  note = ('± is the standard deviation of the runs of a line, and of a difference (of the first '
          'metric, to the first line) half of its 95 % interval by Welch. Bands go from the least '
          'to the largest of the runs; training losses are smoothed over a fiftieth of a run.')
  return report.document('Comparison', (
      f'<div class="charts">{figures}</div><h2>Table</h2><div class="wide"><table><thead><tr>'
      f'{cells("th", heads)}</tr></thead><tbody>{body}</tbody></table></div>'
      f'<p class="soft">{note}</p>'))


def write(result: Mapping[str, Any], directory: pathlib.Path) -> list[pathlib.Path]:
  """Writes compare.html, compare.md, compare.tex and compare.json.

  Raises:
    UserError: the directory cannot be written.
  """
  texts = {'html': page(result), 'md': markdown(result), 'tex': latex(result),
           'json': json.dumps(result, indent=1) + '\n'}
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'--out={directory} cannot be made ({error.strerror}); choose a directory on a '
                    'disk that is writable') from error
  return [report.write(directory / f'compare.{kind}', text) for kind, text in texts.items()]
