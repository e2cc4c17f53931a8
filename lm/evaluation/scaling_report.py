"""The page of a scaling law: IsoFLOP curves, the frontier, the fit, and a prediction, tested."""
from collections.abc import Mapping
import html
import math
from typing import Any

from lm.evaluation import plot, report
from lm.evaluation.plot import number, Series
from lm.evaluation.scaling_law import Law

FIELDS = 'E', 'A', 'B', 'alpha', 'beta'


def _target(result):
  """The last model that was trained to test the law, or None."""
  found = [trial for trial in result['trials'] if 'target' in trial]
  return found[-1] if found else None


def text(result: Mapping[str, Any]) -> str:
  """The law, its intervals, and the prediction beside what came, in a few lines."""
  law = result['law']
  if law is None:
    return 'too few runs are complete to fit a law'
  span = lambda pair: f'[{pair[0]:.4g}, {pair[1]:.4g}]'
  lines = ['L(N, D) = E + A / N^alpha + B / D^beta, with 95 % intervals:']
  lines += [f'  {name:<6} {law["law"][name]:<10.4g} {span(law["intervals"][name])}'
            for name in FIELDS]
  lines.append(f'N_opt ~ C^{law["exponent"]:.3f} {span(law["exponent_interval"])}')
  if law['parabolas']['exponent'] is not None:
    lines[-1] += (f'; by parabolas C^{law["parabolas"]["exponent"]:.3f} '
                  f'{span(law["parabolas"]["exponent_interval"])}')
  trial = _target(result)
  if trial:
    predicted = trial['predicted']
    lines.append(f'{trial["target"]:.3g} FLOPs: {trial["params"]:,.0f} parameters, '
                 f'{trial["tokens"]:,} tokens; predicted {predicted["loss"]:.4f} '
                 f'{span(predicted["interval"])}')
    if trial['state'] == 'complete':
      inside = predicted['interval'][0] <= trial['loss'] <= predicted['interval'][1]
      lines[-1] += (f', measured {trial["loss"]:.4f} ({trial["loss"] - predicted["loss"]:+.4f}, '
                    f'{"inside" if inside else "outside"} of the interval)')
  return '\n'.join(lines)


def page(result: Mapping[str, Any]) -> str:
  """HTML that loads nothing, of what sweep.json holds."""
  trials, law = result['trials'], result['law']
  done = [trial for trial in trials if trial['state'] == 'complete']
  figures = [('IsoFLOP curves', _isoflop(done, law)), ('Frontier', _frontier(done, law, 'params')),
             ('Loss at the frontier', _frontier(done, law, 'loss')), ('Fit', _fit(done, law))]
  drawn = ''.join(f'<figure><figcaption>{title}</figcaption>{chart}</figure>'
                  for title, chart in figures if chart)
  note = ('N is FLOPs of a token / 6, D tokens. Lines are of the law that is fitted to all runs '
          'but the target (Hoffmann et al. 2022, approach 3), with 95 % intervals of a residual '
          'bootstrap; the parabolas, one a budget, are approach 2.')
  said = '' if law is None else f'<pre>{html.escape(text(result))}</pre>'
  errors = ''.join(f'<p>Trial {trial["number"]}: {html.escape(trial["error"])}</p>'
                   for trial in trials if 'error' in trial)
  return report.document('Scaling law', (
      f'<figure>{said}</figure><p class="soft">{note}</p><div class="charts">{drawn}</div>'
      f'<h2>Runs</h2>{_table(trials, law)}{errors}'))


def _law(law):
  return Law(**law['law'])


def _span(low, high, count=40):
  """Points with equal ratios."""
  return [low * (high / low)**(i / (count - 1)) for i in range(count)]


def _isoflop(done, law):
  """Loss by parameters, of every budget its runs, the law and the least."""
  series = []
  for i, flops in enumerate(sorted({trial['flops'] for trial in done})):
    runs = sorted((t['params'], t['loss']) for t in done if t['flops'] == flops)
    of = f'c{i % 8}'
    series.append(Series(f'{number(flops)} FLOPs', runs, of, dots=True, line=law is None))
    if law and len(runs) > 1:
      ends = runs[0][0] / 1.3, runs[-1][0] * 1.3
      series.append(Series('', [(n, _law(law).loss(n, flops / 6 / n)) for n in _span(*ends)], of))
  return plot.line_chart(series, 'parameters N', 'validation loss', log_x=True)


def _frontier(done, law, name):
  """The best size, or the least loss, by budget: of the law with its band, and of the parabolas;
  the target as it was measured."""
  if law is None:
    return ''
  optima = sorted((float(flops), found) for flops, found in law['optima'].items())
  target = [trial for trial in done if 'target' in trial]
  optima += [(trial['target'], trial['predicted']['optimum']) for trial in target]
  band = [(flops, *found[f'{name}_interval']) for flops, found in optima]
  series = [Series('law', [(flops, found[name]) for flops, found in optima], 'c0', band=band),
            Series('parabolas', [(found['flops'], found[name])
                                 for found in law['parabolas']['minima']], 'c1', True, False)]
  if target:
    series.append(Series('trained', [(t['target'], t[name]) for t in target], 'c3', True, False))
  label = {'params': 'best N', 'loss': 'validation loss'}[name]
  return plot.line_chart(series, 'FLOPs', label, log_x=True, log_y=name == 'params')


def _fit(done, law):
  """Measured against predicted."""
  if law is None:
    return ''
  points = lambda trials: [(_law(law).loss(t['params'], t['tokens']), t['loss']) for t in trials]
  fitted, target = (points(t for t in done if ('target' in t) == is_target)
                    for is_target in (False, True))
  ends = [min(map(min, fitted + target)), max(map(max, fitted + target))]
  return plot.line_chart([Series('equal', [(x, x) for x in ends], 'c1 faint'),
                          Series('fitted', fitted, 'c0', True, False),
                          *([Series('predicted before it was trained', target, 'c3', True, False)]
                            if target else [])], 'loss by the law', 'validation loss')


def _table(trials, law):
  heads = ['run', 'FLOPs', 'N', 'all parameters', 'layers x width', 'tokens', 'D / N', 'loss',
           'by the law']
  rows = []
  for trial in trials:
    fitted = law and _law(law).loss(trial['params'], trial['tokens'])
    loss = f'{trial["loss"]:.4f}' if trial['state'] == 'complete' else trial['state']
    rows.append([f'trial_{trial["number"]:04}', number(trial['flops']), f'{trial["params"]:,.0f}',
                 f'{trial["all_params"]:,}', f'{trial["num_layers"]} x {trial["d_model"]}',
                 f'{trial["tokens"]:,}', f'{trial["tokens"] / trial["params"]:.1f}', loss,
                 f'{fitted:.4f}' if fitted and math.isfinite(fitted) else ''])
  cells = lambda tag, row: ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)
  body = ''.join(f'<tr>{cells("td", row)}</tr>' for row in rows)
  return (f'<div class="wide"><table><thead><tr>{cells("th", heads)}</tr></thead>'
          f'<tbody>{body}</tbody></table></div>')
