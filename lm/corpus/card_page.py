"""The card of a corpus as a page: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
import html

from lm.corpus import card
from lm.corpus.summary import Counts
from lm.evaluation import plot
from lm.evaluation import report

_MOST = 20  # bars of a chart


def page(facts: card.Facts) -> str:
  """Returns HTML; every name and text in it is escaped."""
  charts = ''.join(f'<figure><figcaption>{title}</figcaption>{chart}</figure>'
                   for title, chart in _charts(facts) if chart)
  body = [f'<p>{html.escape(card.overview(facts))}</p>', _cards(facts),
          f'<div class="charts">{charts}</div>', *map(_section, card.sections(facts))]
  return report.document(html.escape(card.human(facts.name)), '\n'.join(body))


def _cards(facts: card.Facts) -> str:
  summary = facts.summary
  collected, removed = facts.total(summary.collected), facts.total(summary.removed)
  clusters, duplicates, _ = facts.clusters
  cards = [
      ('documents', f'{facts.total(summary.written, 2):,}', f'of {collected:,} collected'),
      ('text', card.human(card.Bytes(facts.total(summary.written, 3))),
       f'of {card.human(card.Bytes(facts.total(summary.collected, 1)))} collected'),
      ('removed', f'{100 * removed / max(collected, 1):.1f} %', f'by {len(summary.removed)} rules'),
      ('duplicates', f'{duplicates:,}', f'of {clusters:,} documents'),
      ('redactions', f'{facts.total(summary.redactions):,}', 'in kept documents'),
      ('faults', f'{facts.total(summary.faults):,}', f'of {len(summary.faults)} kinds')]
  return '<dl>' + ''.join(f'<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>'
                          for name, value, note in cards) + '</dl>'


def _charts(facts: card.Facts) -> Iterator[tuple[str, str]]:
  summary = facts.summary
  yield 'What is left after each stage', plot.bar_chart(
      list(_waterfall(facts)), ['documents'], 'share of the documents collected')
  yield 'Documents that each rule removed', plot.bar_chart(
      [(card.human(rule), [removed]) for removed, rule in sorted(
          ((values[0], rule) for rule, values in summary.removed.items()), reverse=True)[:_MOST]],
      ['documents'], 'documents')
  yield 'Lengths', plot.line_chart([plot.Series('', list(_lengths(summary.lengths)))],
                                   'characters', 'documents', y_from_zero=True, log_x=True)
  yield 'Sources', _shares(summary.written, 3, 'bytes written')
  yield 'Languages', _shares(summary.languages, 0, 'documents')
  yield 'Domains', _shares(summary.domains, 0, 'documents')


def _waterfall(facts: card.Facts) -> Iterator[tuple[str, list[float]]]:
  summary = facts.summary
  collected = max(facts.total(summary.collected), 1)
  left, stages = facts.total(summary.collected), {}
  for rule in summary.ordered_rules():
    stage = rule.partition('.')[0]
    stages[stage] = stages.get(stage, 0) + summary.removed.get(rule, [0])[0]
  yield 'collected', [left / collected]
  for stage, removed in stages.items():
    left -= removed
    yield card.human(stage), [left / collected]


def _lengths(counts: Counts) -> Iterator[tuple[float, int]]:
  """The bins from the shortest to the longest document, the empty ones between them too."""
  low, high = (pick(map(int, counts), default=0) for pick in (min, max))
  while low <= high:
    yield max(low, 1), counts.get(str(low), [0])[0]
    low += 1 << max(low.bit_length() - 3, 0)


def _shares(counts: Counts, column: int, label: str) -> str:
  rows = sorted(((values[column], name) for name, values in counts.items()), reverse=True)
  total = sum(count for count, _ in rows) or 1
  shares = [(card.human(name) or 'unknown', count / total) for count, name in rows[:7]]
  rest = sum(count for count, _ in rows[7:])
  return plot.stacked_bar([*shares, ('others', rest / total)], label) if rows else ''


def _section(section: card.Section) -> str:
  parts = [f'<h2>{html.escape(section.title.replace("`", ""))}</h2>']
  if section.text:
    parts.append(f'<p class="soft">{html.escape(section.text)}</p>')
  if section.table is not None and section.table.rows:
    parts.append(_table(section.table))
  figures = ''.join(_quote(*quote) for quote in section.quotes)
  if figures:
    parts.append(f'<div class="samples">{figures}</div>')
  return ''.join(parts)


def _table(table: card.Table) -> str:
  cells = lambda tag, row: ''.join(
      f'<{tag}>{html.escape(card.human(cell))}</{tag}>' for cell in row)
  body = ''.join(f'<tr>{cells("td", row)}</tr>' for row in table.rows)
  return (f'<div class="wide"><table><thead><tr>{cells("th", table.heads)}</tr></thead>'
          f'<tbody>{body}</tbody></table></div>')


def _quote(title: str, text: str) -> str:
  note = f'<p class="soft">{html.escape(card.human(title))}</p>' if title else ''
  return f'<figure>{note}<pre>{html.escape(card.visible(text))}</pre></figure>'
