"""Draws line and bar charts and heat maps as SVG text that needs no library to be looked at.

Colours come from the page by the CSS classes c0, c1, c2 (and `faint` for a raw curve), so one chart
serves light and dark pages.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 66, 20, 12, 42
MAX_POINTS = 800  # More than the pixels of a phone; keeps the page small.
MAX_COLUMNS = 60  # Of a heat map.
# Viridis, from low to high: equal steps look equal, in print and to the colour-blind too.
RAMP = ('440154', '481a6c', '472f7d', '414487', '39568c', '31688e', '2a788e', '23888e', '1f988b',
        '22a884', '35b779', '54c568', '7ad151', 'a5db36', 'd2e21b', 'fde725')


@dataclasses.dataclass(frozen=True)
class Series:
  """One curve: its name in the legend ('' for none), its points, its CSS classes, whether they have
  dots and a line, and where it has a spread its band: (x, low, high)."""

  name: str
  points: Sequence[tuple[float, float]]
  classes: str = 'c0'
  dots: bool = False
  line: bool = True
  band: Sequence[tuple[float, float, float]] = ()


def smooth(points: Sequence[tuple[float, float]], window: float) -> list[tuple[float, float]]:
  """Takes the mean over about `window` points around each; fewer towards both ends.

  A running mean of the past would lag behind the steep start of a loss curve; this one does not.
  """
  sums = [0.0, *itertools.accumulate(y for _, y in points)]
  smoothed = []
  for i, (x, _) in enumerate(points):
    half = min(int(window / 2), i, len(points) - 1 - i)
    smoothed.append((x, (sums[i + half + 1] - sums[i - half]) / (2 * half + 1)))
  return smoothed


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Chooses about `count` round numbers (1, 2 or 5 times a power of ten) in [low, high]."""
  if high <= low:
    return [low]
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(math.log(s / rough)))
  # Integers times the step: adding up would turn 0.3 into 0.30000000000000004.
  return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
  """Writes a number shortly: 12,300 or 0.35 or 6e-05."""
  if value == 0:
    return '0'
  if abs(value) >= 1e6 or abs(value) < 1e-3:
    mantissa, exponent = f'{value:.3g}'.split('e') if 'e' in f'{value:.3g}' else (
        f'{value:.2e}'.split('e'))
    return f'{float(mantissa):g}e{int(exponent)}'
  return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'


def line_chart(series: Sequence[Series], x_label: str, y_label: str, y_from_zero: bool = False,
               log_y: bool = False, log_x: bool = False) -> str:
  """Draws curves over a common pair of axes with ticks, units and a legend.

  Args:
    series: the curves; later ones lie above earlier ones.
    x_label: quantity and unit of the horizontal axis.
    y_label: quantity and unit of the vertical axis.
    y_from_zero: makes the vertical axis begin at zero.
    log_y, log_x: make an axis logarithmic; only points above zero are drawn.

  Returns:
    An `<svg>` element, or '' when there is no finite point.
  """
  kept = [dataclasses.replace(s, points=[p for p in s.points if all(map(math.isfinite, p))])
          for s in series]
  if log_x or log_y:
    scales = [math.log10 if log else float for log in (log_x, log_y, log_y)]
    above = lambda p: (p[0] > 0 or not log_x) and (min(p[1:]) > 0 or not log_y)
    scaled = lambda ps: [tuple(f(v) for f, v in zip(scales, p)) for p in ps if above(p)]
    kept = [dataclasses.replace(s, points=scaled(s.points), band=scaled(s.band)) for s in kept]
  points = [point for s in kept for point in s.points]
  points += [(x, y) for s in kept for x, *both in s.band for y in both]
  if not points:
    return ''
  x_low, x_high = _range([x for x, _ in points])
  y_low, y_high = _range([y for _, y in points] + ([0.0] if y_from_zero else []), margin=0.04)
  if y_from_zero:
    y_low = 0.0

  def place(x: float, y: float) -> tuple[float, float]:
    return (LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM))

  parts = []
  for value, text in _ticks(y_low, y_high, log_y):
    y = place(x_low, value)[1]
    parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
  for value, text in _ticks(x_low, x_high, log_x):
    x = place(value, y_low)[0]
    parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>')
  parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
  parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
               f'{html.escape(x_label)}</text>')
  parts.append(f'<text transform="rotate(-90)" x="{-(TOP + HEIGHT - BOTTOM) / 2}" y="12" '
               f'text-anchor="middle">{html.escape(y_label)}</text>')
  parts += [_band([place(x, high) for x, _, high in s.band] +
                  [place(x, low) for x, low, _ in reversed(s.band)], s.classes)
            for s in kept if any(high > low for _, low, high in s.band)]
  most = max(MAX_POINTS // len(kept), MAX_POINTS // 4)
  parts += [_curve(s, [place(*p) for p in _thin(s.points, most)], log_x, log_y) for s in kept]
  named = [s for s in kept if s.name]
  return _svg(parts, HEIGHT, y_label) + (_legend(named) if len(named) > 1 else '')


def _ticks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
  """(place, text); of a logarithmic axis powers of ten, or where these are few with 2 and 5 times
  them, or else round numbers."""
  if not log:
    return [(value, number(value)) for value in ticks(low, high)]
  for digits in ((1,), (1, 2, 5)):
    found = [(place, number(digit * 10.0**power)) for digit in digits
             for power in range(math.floor(low), math.ceil(high) + 1)
             if low <= (place := power + math.log10(digit)) <= high]
    if len(found) > 2:
      return sorted(found)[::-(-len(found) // 8)]
  return [(math.log10(value), number(value)) for value in ticks(10**low, 10**high) if value > 0]


def _range(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
  low, high = min(values), max(values)
  if low == high:  # A single value still needs an axis of some length.
    pad = abs(low) / 2 or 0.5
  else:
    pad = margin * (high - low)
  return low - pad, high + pad


def _thin(points: Sequence[tuple[float, float]], most: int = MAX_POINTS
          ) -> Sequence[tuple[float, float]]:
  """Keeps the extremes of every stretch, so that no spike disappears."""
  if len(points) <= most:
    return points
  size = math.ceil(2 * len(points) / most)
  kept = []
  for i in range(0, len(points), size):
    stretch = points[i:i + size]
    kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
  return kept


def _curve(series: Series, points: Sequence[tuple[float, float]], log_x: bool, log_y: bool) -> str:
  path = 'L'.join(f'{x:.1f} {y:.1f}' for x, y in points)
  parts = []
  if len(points) > 1 and series.line:
    parts.append(f'<path class="curve {series.classes}" d="M{path}"/>')
  if series.dots or len(points) == 1:
    for (x, y), (step, value) in zip(points, _thin(series.points, len(points))):
      step, value = 10**step if log_x else step, 10**value if log_y else value
      parts.append(f'<circle class="dot {series.classes}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>'
                   f'{html.escape(series.name)} {number(value)} at {number(step)}</title></circle>')
  return ''.join(parts)


def _band(outline: Sequence[tuple[float, float]], classes: str) -> str:
  path = 'L'.join(f'{x:.1f} {y:.1f}' for x, y in outline)
  return f'<path class="band {classes}" d="M{path}Z"/>'


def _legend(series: Sequence[Series]) -> str:
  return '<p class="legend">' + ''.join(
      f'<span><i class="{s.classes}"></i>{html.escape(s.name)}</span>' for s in series) + '</p>'


def parallel(axes: Sequence[tuple[str, Sequence[float], Sequence[tuple[float, str]]]],
             classes: Sequence[str], titles: Sequence[str]) -> str:
  """Draws parallel coordinates: an upright axis a quantity, a line through all of them an item.

  Args:
    axes: of each axis the name, the place of every item in [0, 1], and its ticks (place, label).
    classes, titles: of every item its CSS classes, and what it shows under the pointer; later items
      lie above earlier ones.

  Returns:
    An `<svg>` element as wide as there are axes, or '' when there is no item.
  """
  if not titles:
    return ''
  height, step = HEIGHT + 30, 170
  width = step * len(axes)
  xs = [60 + step * i for i in range(len(axes))]
  y_of = lambda place: height - 20 - place * (height - 60)
  parts = []
  for i, (of, title) in enumerate(zip(classes, titles)):
    path = 'L'.join(f'{x} {y_of(places[i]):.1f}' for x, (_, places, _) in zip(xs, axes))
    parts.append(f'<path class="curve {of}" d="M{path}"><title>{html.escape(title)}</title></path>')
  for i, (x, (name, _, marks)) in enumerate(zip(xs, axes)):
    parts.append(f'<path class="axis" d="M{x} {y_of(0)}V{y_of(1)}"/><text class="name" x="{x}" '
                 f'y="{12 + 14 * (i % 2)}" text-anchor="middle">{html.escape(name)}</text>')
    parts += [f'<text x="{x - 5}" y="{y_of(place) + 4:.1f}" text-anchor="end">{html.escape(label)}'
              '</text>' for place, label in marks]
  return (f'<svg viewBox="0 0 {width} {height}" style="max-width:{width * 2}px" role="img" '
          f'aria-label="parallel coordinates">{"".join(parts)}</svg>')


def _svg(parts: Sequence[str], height: float, label: str) -> str:
  return (f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{html.escape(label)}">'
          f'{"".join(parts)}</svg>')


def bar_chart(groups: Sequence[tuple[str, Sequence[float]]], names: Sequence[str],
              label: str) -> str:
  """Draws horizontal bars in groups, the name of each group above its bars.

  Args:
    groups: (name, one value a bar) of each group.
    names: the bars' names for the legend, in the order of the values.
    label: quantity and unit of the values.

  Returns:
    An `<svg>` element with its legend, or '' when there is no group.
  """
  if not groups:
    return ''
  bar, gap, title = 10, 12, 15
  longest = max(value for _, values in groups for value in values) or 1.0
  room = WIDTH - RIGHT - 48  # 48: for the number that follows the longest bar.
  step = title + bar * len(names) + gap
  bottom = step * len(groups)
  parts = []
  for value in ticks(0, longest):
    x = 2 + value / longest * room
    parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>'
                 f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{number(value)}</text>')
  for i, (name, values) in enumerate(groups):
    y = step * i + title
    parts.append(f'<text class="name" x="2" y="{y - 4}">{html.escape(name)}</text>')
    for j, value in enumerate(values):
      width, top = value / longest * room, y + bar * j
      said = f'{value:,}' if isinstance(value, int) else f'{value:.3f}'
      parts.append(
          f'<rect class="c{j}" x="2" y="{top}" width="{width:.1f}" height="{bar - 1}"/>'
          f'<text class="value" x="{width + 6:.1f}" y="{top + bar - 2}">{said}</text>')
  parts.append(f'<text x="{WIDTH / 2}" y="{bottom + 32}" text-anchor="middle">'
               f'{html.escape(label)}</text>')
  legend = _legend([Series(name, (), f'c{j}') for j, name in enumerate(names)])
  return legend + _svg(parts, bottom + 38, label)


def heat_map(columns: Sequence[tuple[float, Sequence[float]]], x_label: str, y_label: str,
             label: str, log: bool = False, max_columns: int = MAX_COLUMNS) -> str:
  """Draws numbers as colours, with a scale of them beside it.

  Args:
    columns: (x, the values from y = 0 up) of each column, all of one length. What is not finite
      stays empty.
    x_label, y_label: quantities of the axes, which count in whole numbers.
    label: quantity and unit of the values.
    log: makes the scale of colours logarithmic; only values above zero are drawn.
    max_columns: of more columns so many are drawn, the first and the last among them.

  Returns:
    An `<svg>` element, or '' when there is nothing to draw.
  """
  if len(columns) > max_columns:
    columns = [columns[round(i * (len(columns) - 1) / (max_columns - 1))]
               for i in range(max_columns)]
  scale = (lambda v: math.log10(v) if v > 0 else math.nan) if log else float
  rows = [[scale(v) for v in values] for values in zip(*(values for _, values in columns))]
  finite = [v for row in rows for v in row if math.isfinite(v)]
  if not finite:
    return ''
  low, high = min(finite), max(finite)
  level = lambda v: min(int((v - low) / ((high - low) or 1) * len(RAMP)), len(RAMP) - 1)
  runs: dict[int, list[str]] = {}
  for y, row in enumerate(rows):
    x = 0
    # Neighbours of one colour are one line, and all lines of a colour one path.
    for key, cells in itertools.groupby(level(v) if math.isfinite(v) else -1 for v in row):
      count = len(list(cells))
      runs.setdefault(key, []).append(f'M{x} {len(rows) - 1 - y}h{count}')
      x += count
  runs.pop(-1, None)
  right = WIDTH - RIGHT - 70  # 70: for the scale of colours
  height = min(HEIGHT, TOP + BOTTOM + max(60, 22 * len(rows)))
  across, down = (right - LEFT) / len(columns), (height - TOP - BOTTOM) / len(rows)
  cells = ''.join(f'<path stroke="#{RAMP[key]}" d="{"".join(lines)}"/>'
                  for key, lines in sorted(runs.items()))
  parts = [f'<g class="cells" transform="translate({LEFT} {TOP + down / 2:.3f}) '
           f'scale({across:.4f} {down:.4f})">{cells}</g>']
  for i in _places(len(rows)):
    y = height - BOTTOM - (i + 0.5) * down
    parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{i}</text>')
  for i in _places(len(columns)):
    parts.append(f'<text x="{LEFT + (i + 0.5) * across:.1f}" y="{height - BOTTOM + 16}" '
                 f'text-anchor="middle">{number(columns[i][0])}</text>')
  parts.append(f'<text x="{(LEFT + right) / 2}" y="{height - 6}" text-anchor="middle">'
               f'{html.escape(x_label)}</text>')
  parts.append(f'<text transform="rotate(-90)" x="{-(TOP + height - BOTTOM) / 2}" y="12" '
               f'text-anchor="middle">{html.escape(y_label)}</text>')
  back = (lambda v: 10**v) if log else (lambda v: v)
  step = (height - TOP - BOTTOM) / len(RAMP)
  parts += [f'<path class="key" stroke="#{colour}" stroke-width="{step + 0.5:.2f}" '
            f'd="M{right + 14} {height - BOTTOM - (i + 0.5) * step:.2f}h12"/>'
            for i, colour in enumerate(RAMP)]
  ends = ((low, height - BOTTOM), (high, TOP + 10)) if high > low else ((low, height - BOTTOM),)
  parts += [f'<text x="{right + 32}" y="{y:.1f}">{number(back(v))}</text>' for v, y in ends]
  return _svg(parts, height, label)


def _places(count: int) -> list[int]:
  """About five of 0 .. count - 1, at equal distances."""
  return list(range(0, count, max(1, math.ceil(count / 6))))


def stacked_bar(shares: Sequence[tuple[str, float]], label: str) -> str:
  """Draws shares of a whole as one bar, and a legend that says each.

  Args:
    shares: (name, share of 1); those that are 0 stand in neither.
    label: what is shared.
  """
  x, parts, named = 0.0, [], []
  for i, (name, share) in enumerate(shares):
    if share <= 0:
      continue
    parts.append(f'<rect class="c{i % 8}" x="{x:.2f}" y="0" width="{share * WIDTH:.2f}" '
                 'height="22"/>')
    named.append(Series(f'{name} {100 * share:.1f} %', (), f'c{i % 8}'))
    x += share * WIDTH
  return _svg(parts, 22, label) + _legend(named)
