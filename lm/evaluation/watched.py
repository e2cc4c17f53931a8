"""The parts of a report that look inside a run: norms by group and layer, activations, attention,
experts, where the time went, and what the model wrote while it learnt."""
from collections.abc import Mapping, Sequence
import html
import math
from typing import Any

from lm.evaluation import plot

COLOURS = 8
MOST_SAMPLES = 6  # of one prompt
MOST_CHARACTERS = 600  # of a sample that is not the last

Rows = Sequence[Mapping[str, Any]]


def norms(rows: Rows) -> str:
  """Of rows of the split 'norms': curves by group, and heat maps by layer."""
  rows = [row for row in rows if row.get('split') == 'norms']
  total = lambda values: math.sqrt(sum(value**2 for value in values))
  mean = lambda values: sum(values) / len(values)
  figures = []
  for kind, title, label, together in (
      ('grad_norm', 'Gradient norm by group', 'norm before clipping', total),
      ('update_ratio', 'Updates by group', 'update norm / parameter norm', mean),
      ('param_norm', 'Parameter norm by group', 'norm', total)):
    series = [plot.Series(group, _points(rows, f'{kind}/{group}', together), f'c{i % COLOURS}')
              for i, group in enumerate(_names(rows, kind))]
    figures.append((title, plot.line_chart(series, 'step', label, log_y=True)))
  for kind, title, label in (('grad_norm', 'Gradient norm', 'norm before clipping'),
                             ('update_ratio', 'Updates', 'update norm / parameter norm')):
    for group in _names(rows, kind):
      columns = _columns(rows, f'{kind}/{group}')
      if not group.endswith('norms') and columns:
        figures.append((f'{title} of {group} by layer',
                        plot.heat_map(columns, 'step', 'layer', label, log=True)))
  return section('Norms', figures)


def activations(rows: Rows) -> str:
  """Of rows of the split 'probe': heat maps of layer and step, and the heads of the last row."""
  rows = [row for row in rows if row.get('split') == 'probe']
  figures = []
  for kind, end, title, label, log in (
      ('entropy', '', 'Entropy of {}', 'nats', False),
      ('rms', 'residual', 'RMS of {}', 'root mean square', True),
      ('max', 'residual', 'Largest of {}', 'largest magnitude', True),
      ('rms', 'attention_out', 'RMS of {}', 'root mean square', True),
      ('rms', 'mlp_out', 'RMS of {}', 'root mean square', True),
      ('zeros', 'mlp_hidden', 'Zeros of {}', 'share that is exactly 0', False)):
    for name in _names(rows, kind):
      columns = _columns(rows, f'{kind}/{name}')
      is_flat = kind == 'zeros' and not any(any(values) for _, values in columns)
      if name.endswith(end) and columns and not is_flat:
        figures.append((title.format(name), plot.heat_map(columns, 'step', 'layer', label, log)))
  for name in _names(rows, 'entropy_of_heads'):
    figures.append(_last(rows, f'entropy_of_heads/{name}', f'Entropy of the heads of {name}',
                         'head', 'nats'))
  note = '<p class="soft">Of a few held-out rows, the same each time.</p>'
  return section('Inside the model', figures, note)


def experts(rows: Rows) -> str:
  """Of rows of the split 'probe': who does the work."""
  rows = [row for row in rows if row.get('split') == 'probe']
  figures = []
  for name in _names(rows, 'load'):
    figures.append(_last(rows, f'load/{name}', f'Load of the experts of {name}', 'expert',
                         'share of choices'))
    most = math.log(len(_value(rows[-1], f'load/{name}')[0]))
    for kind, title, label, scale in (
        ('load_entropy', 'How even the load is', 'entropy / that of an even load', 1 / most),
        ('dropped', 'Dropped', 'share of choices without room', 1)):
      columns = [(step, [value * scale for value in values])
                 for step, values in _columns(rows, f'{kind}/{name}')]
      if any(any(values) for _, values in columns):
        figures.append((f'{title}, {name}', plot.heat_map(columns, 'step', 'layer', label)))
  return section('Experts', figures)


def goodput(seconds: Mapping[str, float] | None) -> str:
  """Where the time went, in seconds by category."""
  total = sum(seconds.values()) if seconds else 0
  if not total:
    return ''
  bar = plot.stacked_bar([(name, value / total) for name, value in seconds.items()],
                         'shares of the time')
  return (f'<h2>Time</h2><figure><figcaption>{duration(total)} since the first start'
          f'</figcaption>{bar}</figure>')


def samples(rows: Rows) -> str:
  """What prompts were completed by, from the first step to the last."""
  by_prompt: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    by_prompt.setdefault(row['prompt'], []).append(row)
  figures = []
  for prompt, found in by_prompt.items():
    last = len(found) - 1
    chosen = sorted({round(i * last / (MOST_SAMPLES - 1)) for i in range(MOST_SAMPLES)})
    texts = ''.join(
        f'<p class="soft">step {found[i]["step"]:,}</p><pre><b>{html.escape(prompt)}</b>'
        f'{html.escape(_shortened(found[i]["text"], i == last))}</pre>' for i in chosen)
    figures.append(f'<figure>{texts}</figure>')
  return ('<h2>Samples while it learnt</h2><p class="soft">The prompt is in bold, what follows is '
          f'the model.</p><div class="samples">{"".join(figures)}</div>') if figures else ''


def section(title: str, figures: Sequence[tuple[str, str]], note: str = '') -> str:
  """Figures, (caption, chart), under a heading; '' where none has a chart."""
  drawn = ''.join(f'<figure><figcaption>{html.escape(caption)}</figcaption>{chart}</figure>'
                  for caption, chart in figures if chart)
  return f'<h2>{title}</h2>{note}<div class="charts">{drawn}</div>' if drawn else ''


def duration(seconds: float) -> str:
  """In the two largest units: '3 h 05 min', '12 s'."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  parts = [(days, 'd'), (hours, 'h'), (minutes, 'min'), (seconds, 's')]
  while len(parts) > 1 and not parts[0][0]:
    parts.pop(0)
  return ' '.join(f'{value} {unit}' for value, unit in parts[:2])


def _shortened(text, is_last):
  return text if is_last or len(text) <= MOST_CHARACTERS else f'{text[:MOST_CHARACTERS]} ...'


def _names(rows, kind):
  """What stands behind 'kind/' in any row."""
  return list(dict.fromkeys(name.removeprefix(f'{kind}/') for row in rows for name in row
                            if name.startswith(f'{kind}/')))


def _value(row, name):
  """With NaN for what was not finite."""
  of = lambda x: [of(y) for y in x] if isinstance(x, list) else math.nan if x is None else x
  return of(row[name])


def _points(rows, name, together):
  points = []
  for row in rows:
    if name in row:
      value = _value(row, name)
      points.append((row['step'], together(value) if isinstance(value, list) else value))
  return points


def _columns(rows, name):
  """(step, a value a layer) of vectors; none of numbers."""
  return [(row['step'], _value(row, name)) for row in rows if isinstance(row.get(name), list)]


def _last(rows, name, title, x_label, label):
  """Of a matrix of the last row: layers upwards."""
  found = [row for row in rows if name in row]
  columns = list(enumerate(zip(*_value(found[-1], name))))
  return f'{title}, step {found[-1]["step"]:,}', plot.heat_map(columns, x_label, 'layer', label)
