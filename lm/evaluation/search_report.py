"""The page of a search: what was tried, what mattered, and where the best values lie."""
from collections.abc import Mapping, Sequence
import html
import math
from typing import Any

from lm.evaluation import plot, report
from lm.evaluation.plot import Series

STATES = {'complete': 'complete', 'pruned': 'given up', 'fail': 'failed', 'running': 'running'}


def page(result: Mapping[str, Any]) -> str:
  """HTML that loads nothing, of what sweep.json holds."""
  trials, space = result['trials'], result['settings']['space']
  done = [trial for trial in trials if trial['state'] == 'complete']
  figures = [('Loss by trial', _history(done)),
             ('Validation loss by step', _curves(trials, result['best'])),
             ('Importance', plot.bar_chart(
                 [(name, [share]) for name, share in result['importances'].items()], ['share'],
                 'PED-ANOVA: what tells the best quarter of the trials from the rest'))]
  ended = sorted((trial for trial in trials if trial['state'] in ('complete', 'pruned')),
                 key=lambda trial: (trial['curve'][-1][0], -trial['loss']))  # the best come last
  slices = [(name, _slice(name, text, ended)) for name, text in space.items()]
  lines = _parallel(space, ended)
  wide = f'<h2>Parallel coordinates</h2><figure class="wide">{lines}</figure>' if lines else ''
  return report.document('Search', (
      f'{_cards(result)}<h2>Search</h2>{_charts(figures)}<h2>Slices</h2>{_charts(slices)}'
      f'{wide}<h2>Trials</h2>{_table(trials, space)}'))


def _cards(result):
  settings, best = result['settings'], result['best']
  count = {word: sum(trial['state'] == state for trial in result['trials'])
           for state, word in STATES.items()}
  said = ', '.join(f'{n} {word}' for word, n in count.items() if n)
  cards = [('trials', str(len(result['trials'])), said),
           ('sampler', settings['sampler'], f'pruner: {settings["pruner"]}')]
  if best:
    cards.append(('best validation loss', f'{best["loss"]:.4f}', f'trial {best["number"]}'))
    cards += [(name, html.escape(show(best['values'][name])), html.escape(text))
              for name, text in settings['space'].items()]
  return '<dl>' + ''.join(f'<div><dt>{html.escape(name)}</dt><dd>{value}<small>{note}</small></dd>'
                          '</div>' for name, value, note in cards) + '</dl>'


def show(value: Any) -> str:
  """A value of the space: three digits of a number, all of a choice."""
  return f'{value:.3g}' if isinstance(value, float) else str(value)


def _charts(figures):
  return '<div class="charts">' + ''.join(
      f'<figure style="max-width:530px"><figcaption>{html.escape(title)}</figcaption>{chart}'
      '</figure>' for title, chart in figures if chart) + '</div>'


def _history(done):
  points, best = [(trial['number'], trial['loss']) for trial in done], []
  for number, loss in points:
    best.append((number, min([loss, *(y for _, y in best[-1:])])))
  return plot.line_chart([Series('trial', points, 'c0', dots=True, line=False),
                          Series('best so far', best, 'c1')], 'trial', 'validation loss')


def _curves(trials, best):
  """Of every trial; the best on top."""
  series = [Series('', trial['curve'], 'c0 faint', dots=True) for trial in trials
            if trial is not best]
  if best:
    series.append(Series('best', best['curve'], 'c1', dots=True))
  return plot.line_chart(series, 'step', 'validation loss')


def axis(text: str, values: Sequence[Any]) -> tuple[bool, dict[Any, float]]:
  """Whether an axis is logarithmic, and where each value stands on it: numbers where they are,
  other choices at 0, 1, ... in the order of the space."""
  try:
    places = {value: float(value) for value in values}
  except ValueError:
    order = sorted(set(values), key=lambda value: text.find(value))
    return False, {value: float(i) for i, value in enumerate(order)}
  positive = bool(places) and min(places.values()) > 0
  spread = positive and max(places.values()) >= 30 * min(places.values())
  return text.startswith('log') or text.startswith('choice') and spread, places


def _slice(name, text, ended):
  """The last loss of every trial by one parameter; those that were given up are faint."""
  logarithmic, places = axis(text, [trial['values'][name] for trial in ended])
  groups = [None] if all(map(_is_number, places)) else sorted(places, key=places.get)
  series = []
  for state, faint in (('pruned', ' faint'), ('complete', '')):
    for i, group in enumerate(groups):
      points = [(places[trial['values'][name]], trial['loss']) for trial in ended
                if trial['state'] == state and group in (None, trial['values'][name])]
      said = ', '.join(word for word in (group, STATES[state] if faint else '') if word)
      series.append(Series(said, points, f'c{i % 8}{faint}', dots=True, line=False))
  series = [one for one in series if one.points]
  return plot.line_chart(series, name, 'validation loss', log_x=logarithmic)


def _is_number(value):
  try:
    return math.isfinite(float(value))
  except ValueError:
    return False


def _parallel(space, items):
  """Every trial a line through its values to its loss; the best quarter over the others."""
  axes = []
  columns = {name: [trial['values'][name] for trial in items] for name in space}
  for name, text in [*space.items(), ('validation loss', '')]:
    values = columns.get(name, [trial['loss'] for trial in items])
    logarithmic, places = axis(text, values)
    scale = math.log10 if logarithmic else float
    low, high = (end(map(scale, places.values()), default=0) for end in (min, max))
    place = lambda value: (scale(places[value]) - low) / ((high - low) or 1)
    if text.startswith('choice'):
      marks = [(place(value), str(value)) for value in places]
    else:
      marks = [((tick - low) / ((high - low) or 1),
                plot.number(float(f'{10**tick if logarithmic else tick:.3g}')))
               for tick in (low, (low + high) / 2, high)]
    axes.append((name, [place(value) for value in values], marks))
  quarter = len(items) - math.ceil(len(items) / 4)
  classes = ['c0 faint' if i < quarter else 'c1' for i in range(len(items))]
  titles = [f'trial {trial["number"]}: loss {trial["loss"]:.4f}' for trial in items]
  return plot.parallel(axes, classes, titles)


def _table(trials, space):
  heads = ['trial', 'state', 'step', 'loss', *space]
  rows = [[str(trial['number']), STATES.get(trial['state'], trial['state']),
           str(trial['curve'][-1][0]) if trial['curve'] else '',
           f'{trial["loss"]:.4f}' if trial['loss'] is not None else '',
           *(show(trial['values'].get(name, '')) for name in space)]
          for trial in sorted(trials, key=lambda trial: (trial['state'] != 'complete',
                                                         trial['loss'] or math.inf))]
  cells = lambda tag, row: ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)
  errors = ''.join(f'<p>Trial {trial["number"]}: {html.escape(trial["error"])}</p>'
                   for trial in trials if 'error' in trial)
  body = ''.join(f'<tr>{cells("td", row)}</tr>' for row in rows)
  return (f'<div class="wide"><table><thead><tr>{cells("th", heads)}</tr></thead>'
          f'<tbody>{body}</tbody></table></div>{errors}')
