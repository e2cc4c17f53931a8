"""Draws line and bar charts as SVG text that needs no library to be looked at.

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


@dataclasses.dataclass(frozen=True)
class Series:
  """One curve: its name in the legend ('' for none), its points, its CSS classes, and where it has
  a spread its band: (x, low, high)."""

  name: str
  points: Sequence[tuple[float, float]]
  classes: str = 'c0'
  dots: bool = False
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


def line_chart(series: Sequence[Series], x_label: str, y_label: str,
               y_from_zero: bool = False) -> str:
  """Draws curves over a common pair of axes with ticks, units and a legend.

  Args:
    series: the curves; later ones lie above earlier ones.
    x_label: quantity and unit of the horizontal axis.
    y_label: quantity and unit of the vertical axis.
    y_from_zero: makes the vertical axis begin at zero.

  Returns:
    An `<svg>` element, or '' when there is no finite point.
  """
  kept = [dataclasses.replace(s, points=[p for p in s.points if all(map(math.isfinite, p))])
          for s in series]
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
  for value in ticks(y_low, y_high):
    y = place(x_low, value)[1]
    parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
  for value in ticks(x_low, x_high):
    x = place(value, y_low)[0]
    parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
                 f'{number(value)}</text>')
  parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
  parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
               f'{html.escape(x_label)}</text>')
  parts.append(f'<text transform="rotate(-90)" x="{-(TOP + HEIGHT - BOTTOM) / 2}" y="12" '
               f'text-anchor="middle">{html.escape(y_label)}</text>')
  parts += [_band([place(x, high) for x, _, high in s.band] +
                  [place(x, low) for x, low, _ in reversed(s.band)], s.classes)
            for s in kept if any(high > low for _, low, high in s.band)]
  parts += [_curve(s, [place(*p) for p in _thin(s.points)]) for s in kept]
  named = [s for s in kept if s.name]
  return _svg(parts, HEIGHT, y_label) + (_legend(named) if len(named) > 1 else '')


def _range(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
  low, high = min(values), max(values)
  if low == high:  # A single value still needs an axis of some length.
    pad = abs(low) / 2 or 0.5
  else:
    pad = margin * (high - low)
  return low - pad, high + pad


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
  """Keeps the extremes of every stretch, so that no spike disappears."""
  if len(points) <= MAX_POINTS:
    return points
  size = math.ceil(2 * len(points) / MAX_POINTS)
  kept = []
  for i in range(0, len(points), size):
    stretch = points[i:i + size]
    kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
  return kept


def _curve(series: Series, points: Sequence[tuple[float, float]]) -> str:
  path = 'L'.join(f'{x:.1f} {y:.1f}' for x, y in points)
  parts = [f'<path class="curve {series.classes}" d="M{path}"/>'] if len(points) > 1 else []
  if series.dots or len(points) == 1:
    for (x, y), (step, value) in zip(points, _thin(series.points)):
      parts.append(f'<circle class="dot {series.classes}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>'
                   f'{html.escape(series.name)} {number(value)} at {number(step)}</title></circle>')
  return ''.join(parts)


def _band(outline: Sequence[tuple[float, float]], classes: str) -> str:
  path = 'L'.join(f'{x:.1f} {y:.1f}' for x, y in outline)
  return f'<path class="band {classes}" d="M{path}Z"/>'


def _legend(series: Sequence[Series]) -> str:
  return '<p class="legend">' + ''.join(
      f'<span><i class="{s.classes}"></i>{html.escape(s.name)}</span>' for s in series) + '</p>'


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
      parts.append(
          f'<rect class="c{j}" x="2" y="{top}" width="{width:.1f}" height="{bar - 1}"/>'
          f'<text class="value" x="{width + 6:.1f}" y="{top + bar - 2}">{value:.3f}</text>')
  parts.append(f'<text x="{WIDTH / 2}" y="{bottom + 32}" text-anchor="middle">'
               f'{html.escape(label)}</text>')
  legend = _legend([Series(name, (), f'c{j}') for j, name in enumerate(names)])
  return legend + _svg(parts, bottom + 38, label)
