"""Writes a run's report.html: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import html
import json
import os
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from lm.errors import UserError
from lm.evaluation import plot, watched

REFRESH_SECONDS = 30
MODEL, GZIP, XZ = 'model', 'gzip -9', 'xz -9'

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #e0e1e6; --page: #fcfcfd;
  --card: #ffffff; --c0: #2563c9; --c1: #d9730d; --c2: #5b8c5a; --c3: #a8326e; --c4: #7a5bc7;
  --c5: #8a6d00; --c6: #0d8a8f; --c7: #7b4a2b; }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --soft: #a3a7ae; --line: #34373c;
  --page: #111113; --card: #18191b; --c0: #70a5ff; --c1: #ff9f4a; --c2: #8fca8c; --c3: #f08bb9;
  --c4: #b9a3f5; --c5: #e0c04a; --c6: #5fd0d3; --c7: #d3a07c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1080px; color: var(--ink);
  background: var(--page); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 8px 0 0; } h2 { font-size: 17px; margin: 32px 0 8px; }
p.soft, span.soft, dt { color: var(--soft); } p { margin: 4px 0; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 8px; }
dl div, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 12px; margin: 0; }
dt { font-size: 13px; } dd { margin: 0; font-size: 20px; font-variant-numeric: tabular-nums; }
dd small { display: block; font-size: 13px; color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
  gap: 12px; align-items: start; }
figcaption { font-weight: 600; margin-bottom: 4px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg text.name { fill: var(--ink); } svg text.value { font-size: 9px; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); fill: none; }
.curve { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.curve.faint { stroke-width: 1; opacity: .3; } .dot.faint { opacity: .35; } i.faint { opacity: .3; }
.c0 { --own: var(--c0); } .c1 { --own: var(--c1); } .c2 { --own: var(--c2); }
.c3 { --own: var(--c3); } .c4 { --own: var(--c4); } .c5 { --own: var(--c5); }
.c6 { --own: var(--c6); } .c7 { --own: var(--c7); }
.curve { stroke: var(--own); } rect, circle { fill: var(--own); }
.cells { shape-rendering: crispEdges; stroke-width: 1; } .cells path, path.key { fill: none; }
.status { display: flex; flex-wrap: wrap; gap: 2px 16px; align-items: baseline; margin: 8px 0; }
.status b { color: var(--c2); } .status.ended b { color: var(--c0); }
.status.stopped b { color: var(--c1); }
progress { width: 100%; height: 8px; accent-color: var(--c2); }
.legend i { background: var(--own); }
.band { fill: var(--own); opacity: .18; stroke: none; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 12px; height: 4px; margin-right: 6px;
  vertical-align: middle; border-radius: 2px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 4px 5px; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left;
  white-space: normal; overflow-wrap: anywhere; min-width: 90px; }
td.best { font-weight: 700; color: var(--c0); } tr.total td { border-bottom-width: 2px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0 0; tab-size: 4;
  font: 13px/1.45 ui-monospace, monospace; }
pre b { color: var(--c0); font-weight: 600; } .samples figure { margin-bottom: 12px; }
summary { cursor: pointer; }
"""


@dataclasses.dataclass(frozen=True)
class Status:
  """How far a run is.

  step, total: of its steps.  state: 'live', 'ended' or 'stopped'.
  seconds_left: of training; None if nobody knows.  at: seconds since 1970.
  """
  step: int
  total: int
  state: str
  seconds_left: float | None = None
  at: float = dataclasses.field(default_factory=time.time)

  @property
  def html(self) -> str:
    """A line of words, and a bar."""
    step, share = min(self.step, self.total), min(self.step / self.total, 1)
    left = '' if self.seconds_left is None else (
        f'<span>about {watched.duration(self.seconds_left)} left</span>')
    at = time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(self.at))
    if self.state == 'live':
      at = (f'{at}: if that is long ago, the process is gone or stuck. This page loads itself '
            f'again every {REFRESH_SECONDS} s.')
    return (f'<p class="status {self.state}"><b>{self.state}</b><span>step {step:,} of '
            f'{self.total:,}, {100 * share:.0f} %</span>{left}<span class="soft">last sign of life '
            f'{at}</span></p><progress value="{share:.4f}" max="1"></progress>')


def write_report(run_dir: str | pathlib.Path, status: Status | None = None,
                 rows: Sequence[Mapping[str, Any]] | None = None) -> pathlib.Path:
  """Writes `report.html` of a run from what stands in its directory.

  Reads metrics.jsonl, evaluation.json, samples.json, samples.jsonl, goodput.json and config.gin;
  what is absent is left out.

  Args:
    run_dir: the run directory.
    status: of who trains; with it a page may be without numbers yet.
    rows: of metrics.jsonl, for who has read them.

  Returns:
    The path of the report.

  Raises:
    UserError: there is nothing to report, a file is not what a run writes, or the disk is full.
  """
  run_dir = pathlib.Path(run_dir)
  rows = read_rows(run_dir / 'metrics.jsonl') if rows is None else rows
  evaluation = read_json(run_dir / 'evaluation.json')
  samples = read_json(run_dir / 'samples.json')
  if not rows and evaluation is None and status is None:
    raise UserError(f'{run_dir} has neither metrics.jsonl nor evaluation.json to report on; '
                    'give the --run_dir of a run of `lm train`')
  try:
    config = (run_dir / 'config.gin').read_text(encoding='utf-8')
  except OSError:
    config = ''
  try:
    seconds = (read_json(run_dir / 'goodput.json') or {}).get('seconds')
    body = [status.html if status else '', _summary(rows, evaluation), _curves(rows),
            watched.goodput(seconds), watched.norms(rows), watched.activations(rows),
            watched.experts(rows), _comparison(evaluation), _tasks(evaluation), _samples(samples),
            watched.samples(read_rows(run_dir / 'samples.jsonl')), _config(config)]
  except (KeyError, TypeError, AttributeError) as error:
    raise UserError(f'a JSON file in {run_dir} lacks a field ({error!r}); run `lm evaluate '
                    '--run_dir` again') from error
  title = html.escape(run_dir.absolute().name)
  is_live = status is not None and status.state == 'live'
  return write(run_dir / 'report.html', document(title, '\n'.join(body), is_live))


def document(title: str, body: str, is_live: bool = False) -> str:
  """A whole page; title and body are HTML. A live one loads itself again and again."""
  refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">' if is_live else ''
  return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
          '<meta name="viewport" content="width=device-width, initial-scale=1">'
          f'{refresh}<title>{title}</title><style>{STYLE}</style></head><body>\n'
          f'<h1>{title}</h1>\n{body}\n</body></html>\n')


def write(path: pathlib.Path, page: str) -> pathlib.Path:
  """Replaces a file at once.

  Raises:
    UserError: the disk is full, or not writable.
  """
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    temporary.write_text(page, encoding='utf-8')
    os.replace(temporary, path)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise UserError(f'{path} cannot be written ({error.strerror}); free some space or mend the '
                    'directory, then write the report again') from error
  return path


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a metrics.jsonl, up to one that is torn."""
  rows = []
  if path.exists():
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
      try:
        rows.append(json.loads(line))
      except ValueError:
        break  # Torn by a kill, or being written at this moment.
  return rows


def read_json(path: pathlib.Path) -> Any:
  """What a JSON file holds; None where there is none."""
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise UserError(f'{path} is not JSON ({error}); delete it and run `lm evaluate` again'
                    ) from error


def _points(rows: Sequence[Mapping], split: str, name: str) -> list[tuple[float, float]]:
  return [(row['step'], row[name]) for row in rows
          if row.get('split') == split and isinstance(row.get(name), (int, float))]


def _unit(rows: Sequence[Mapping]) -> str:
  """What a loss is the mean of."""
  return 'query' if any('retrieval_at_1' in row for row in rows) else 'token'


def _summary(rows: Sequence[Mapping], evaluation: Mapping | None) -> str:
  train, validation = (_points(rows, split, 'loss') for split in ('train', 'validation'))
  cards = []
  if rows:
    cards.append(('steps', f'{max(row["step"] for row in rows):,}', ''))
  if evaluation and 'loss' in evaluation and 'files' not in evaluation:
    cards += [(f'held-out {name.replace("_", " ")}', f'{value:.4g}',
               f'at step {evaluation["step"]:,}')
              for name, value in evaluation.items() if name != 'step']
  elif evaluation and ('files' in evaluation or 'tasks' not in evaluation):
    model = evaluation['bits_per_byte']
    cards.append(('held-out bits per byte', f'{model:.3f}', f'at step {evaluation["step"]:,}'))
    for name, key in (GZIP, 'gzip_bits_per_byte'), (XZ, 'xz_bits_per_byte'):
      change = 100 * (model / evaluation[key] - 1)
      cards.append((f'against {name}', f'{change:+.1f} %', f'{evaluation[key]:.3f} bits'))
    cards.append(('held-out files won', _wins(evaluation['files']), ''))
  if validation:
    step, loss = min(validation, key=lambda point: point[1])
    cards.append(('best validation loss', f'{loss:.4f}', f'nats/{_unit(rows)}, step {step:,}'))
  if train:
    last = [loss for _, loss in train[-max(1, len(train) // 50):]]
    cards.append(('final train loss', f'{statistics.fmean(last):.4f}',
                  f'nats/{_unit(rows)}, mean of {len(last)} rows'))
  for name, key, scale, unit in (('speed', 'tokens_per_second', 1, 'tokens/s'),
                                 ('MFU', 'mfu', 100, '%'),
                                 ('waiting for data', 'data_wait_share', 100, '%')):
    values = [y * scale for _, y in _points(rows, 'train', key)]
    if values:
      middle = statistics.median(values)
      cards.append((name, f'{middle:,.0f}' if middle >= 1000 else f'{middle:.3g}',
                    f'{unit}, median'))
  return '<dl>' + ''.join(
      f'<div><dt>{name}</dt><dd>{value}<small>{unit}</small></dd></div>'
      for name, value, unit in cards) + '</dl>'


def _wins(files: Sequence[Mapping]) -> str:
  return f'{sum(_best(file) == 0 for file in files)} of {len(files)}'


def _best(file: Mapping) -> int:
  values = _values(file)
  # On a tie the compressor wins: to beat is to be smaller.
  return max(i for i, value in enumerate(values) if value == min(values))


def _values(file: Mapping) -> list[float]:
  return [file['bits_per_byte'], file['gzip'], file['xz']]


def _curves(rows: Sequence[Mapping]) -> str:
  figures = []
  train, validation = (_points(rows, split, 'loss') for split in ('train', 'validation'))
  loss = plot.line_chart(
      [plot.Series('train, every row', train, 'c0 faint'),
       plot.Series('train, smoothed', plot.smooth(train, len(train) / 50), 'c0'),
       plot.Series('validation', validation, 'c1', dots=True)], 'step',
      f'loss (nats per {_unit(rows)})')
  figures.append(('Loss', loss))
  for title, name, label, scale, from_zero in (
      ('Learning rate', 'learning_rate', 'learning rate', 1, True),
      ('Gradient norm', 'grad_norm', 'norm before clipping', 1, True),
      ('Speed', 'tokens_per_second', 'tokens per second', 1, True),
      ('Model FLOP utilisation', 'mfu', 'MFU (% of peak)', 100, True),
      ('Waiting for data', 'data_wait_share', 'share of time (%)', 100, True)):
    points = [(x, y * scale) for x, y in _points(rows, 'train', name)]
    figures.append((title, plot.line_chart([plot.Series(title, points)], 'step', label, from_zero)))
  drawn = ''.join(f'<figure><figcaption>{title}</figcaption>{chart}</figure>'
                  for title, chart in figures if chart)
  bad = [row['step'] for row in rows if row.get('non_finite')]
  note = f'<p>Not finite: {len(bad)} rows, the first at step {bad[0]:,}.</p>' if bad else ''
  note += _guarded(rows)
  return f'<h2>Training</h2>{note}<div class="charts">{drawn}</div>' if drawn or note else ''


def _guarded(rows: Sequence[Mapping]) -> str:
  """What a guard did: how many steps were skipped, and each rollback."""
  skipped = max((count for _, count in _points(rows, 'train', 'skipped_steps')), default=0)
  lines = [f'Skipped steps: {skipped:,.0f}.'] if skipped else []
  for row in rows:
    if row.get('split') == 'rollback':
      loss = 'not finite' if row['loss'] is None else f'{row["loss"]:.4g}'
      lines.append(f'Rolled back from step {row["from_step"]:,} (loss {loss}) to step '
                   f'{row["step"] - 1:,}, over sequences {row["first_sequence"]:,} to '
                   f'{row["end_sequence"]:,}.')
  return ''.join(f'<p>{line}</p>' for line in lines)


def _comparison(evaluation: Mapping | None) -> str:
  if not evaluation or 'files' not in evaluation:
    return ''
  files = evaluation['files']
  total = {'name': 'all files', 'bytes': evaluation['bytes'],
           'bits_per_byte': evaluation['bits_per_byte'],
           'gzip': evaluation['gzip_bits_per_byte'], 'xz': evaluation['xz_bits_per_byte']}
  body = ''.join(_file_row(file, 'total' if file is total else '') for file in [total, *files])
  bars = plot.bar_chart([(file['name'], _values(file)) for file in [total, *files]],
                        [MODEL, GZIP, XZ], 'bits per byte (less is better)')
  together = evaluation.get('xz_together_bits_per_byte')
  note = f' All files in one {XZ}: {together:.3f} bits per byte.' if together else ''
  return (
      '<h2>Held-out files against compressors</h2>'
      f'<p>Bits per byte, less is better. The model is the best on {_wins(files)} files; '
      f'it read {evaluation["tokens"]:,} tokens of {evaluation["bytes"]:,} bytes at '
      f'{evaluation["loss"]:.4f} nats per token.{note}</p>'
      f'<div class="charts"><figure class="wide"><table><thead><tr><th>file</th><th>bytes</th>'
      f'<th>{MODEL}</th><th>{GZIP}</th><th>{XZ}</th><th>winner</th></tr></thead>'
      f'<tbody>{body}</tbody></table></figure><figure>{bars}</figure></div>')


def _file_row(file: Mapping, kind: str) -> str:
  best = _best(file)
  cells = ''.join(f'<td{" class=best" if i == best else ""}>{value:.3f}</td>'
                  for i, value in enumerate(_values(file)))
  return (f'<tr class="{kind}"><td>{html.escape(file["name"])}</td><td>{file["bytes"]:,}</td>'
          f'{cells}<td>{(MODEL, GZIP, XZ)[best]}</td></tr>')


def _tasks(evaluation: Mapping | None) -> str:
  """The metrics of each task but those of single classes, and where its page is."""
  found = (evaluation or {}).get('tasks', {})
  rows = ''.join(
      f'<tr><td><a href="predictions/{html.escape(name)}.html">{html.escape(name)}</a></td><td>'
      + ', '.join(f'{html.escape(key.replace("_", " "))} {value:.4g}'
                  for key, value in metrics.items() if '/' not in key) + '</td></tr>'
      for name, metrics in found.items())
  return f'<h2>Tasks</h2><div class="wide"><table>{rows}</table></div>' if rows else ''


def _samples(samples: Sequence[Mapping] | None) -> str:
  if not samples:
    return ''
  figures = []
  for sample in samples:
    settings = ', '.join(f'{name} {value}' for name, value in sample.items()
                         if name not in ('prompt', 'text') and isinstance(value, (int, float, str)))
    prompt, text = html.escape(sample['prompt']), html.escape(sample['text'])
    figures.append(f'<figure><p class="soft">{html.escape(settings)}</p>'
                   f'<pre><b>{prompt}</b>{text}</pre></figure>')
  return ('<h2>Samples</h2><p class="soft">The prompt is in bold, what follows is the model.</p>'
          f'<div class="samples">{"".join(figures)}</div>')


def _config(config: str) -> str:
  if not config:
    return ''
  return (f'<h2>Configuration</h2><details><summary>config.gin</summary><pre>'
          f'{html.escape(config)}</pre></details>')
