"""The page of a sweep over vocabularies: how short each makes the text, how rare its pieces are."""
from collections.abc import Mapping, Sequence
import html
from typing import Any

from lm.evaluation import plot, report
from lm.evaluation.plot import number, Series

OFTEN = 100  # times that 95 % of the pieces shall occur in the training split
COLOURS = 8
CHARTS = 8  # of languages, those of the most held-out bytes

NOTE = (
    'All of held-out text but the last columns. Fertility is tokens a word (Rust et al. 2021, '
    'arXiv:2012.15613), where a word is a run of what is not space; in scripts that put no spaces '
    'between words (Han, kana, Thai, ...) each character counts as one. Unknown: share of tokens; '
    'a WordPiece has one for a whole word that it cannot spell, and none for spaces. '
    'Used: learnt pieces that the sample of the training split holds. 95 % occur: so often, or '
    'more, do 95 % of the learnt pieces occur in the training split; pieces that are rarer than '
    f'{OFTEN} times are learnt badly (Gowda and May 2020, arXiv:2004.02334, of translation).')


def largest(rows: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
  """By kind the largest size of which 95 % of the pieces occur 100 times; None if none does."""
  found: dict[str, int | None] = {}
  for row in rows:
    size = row['size'] if row['rarest'] >= OFTEN else None
    found[row['kind']] = max(filter(None, (found.get(row['kind']), size)), default=None)
  return found


def _name(language: str) -> str:
  return language or 'not stated'


def _unit(facts: Mapping[str, Any]) -> str:
  return 'character' if facts['unspaced'] > 0.5 else 'word'


def _overall(result):
  d_model = result['d_model']
  heads = ['vocabulary', 'bytes per token', 'fertility', 'unknown', 'used', '95 % occur']
  heads += [f'parameters at d_model={d_model}'] if d_model else []
  rows = []
  for row in result['vocabularies']:
    rows.append([f'{row["kind"]} {row["size"]:,}', f'{row["bytes_per_token"]:.3f}',
                 f'{row["fertility"]:.3f}', _percent(row['unknown']), _percent(row['used']),
                 number(round(row['rarest']))])
    rows[-1] += [f'{row["size"] * d_model:,}'] if d_model else []
  return heads, rows


def _percent(share: float) -> str:
  return '0' if share == 0 else f'{100 * share:.2g} %' if share < 0.01 else f'{100 * share:.1f} %'


def _by_language(result, measure, digits=3):
  languages = result['languages']
  heads = ['vocabulary']
  heads += [f'{_name(language)}, a {_unit(facts)}' if measure == 'fertility' else _name(language)
            for language, facts in languages.items()]
  rows = [[f'{row["kind"]} {row["size"]:,}',
           *(f'{row["languages"][language][measure]:.{digits}f}' for language in languages)]
          for row in result['vocabularies']]
  return heads, rows


def _tables(result):
  """(title, heads, rows)."""
  tables = [('All text', *_overall(result))]
  if len(result['languages']) > 1:
    tables += [('Fertility: tokens', *_by_language(result, 'fertility')),
               ('Bytes per token', *_by_language(result, 'bytes_per_token'))]
  return tables


def _sentences(result):
  """What the sizes say, a sentence a kind that was trained at several."""
  kinds = [row['kind'] for row in result['vocabularies']]
  for kind, size in result['largest'].items():
    if kinds.count(kind) > 1:
      yield (f'{kind}: of these sizes {size:,} is the largest of which 95 % of the pieces occur '
             f'{OFTEN} times or more in the training split.' if size else
             f'{kind}: at none of these sizes do 95 % of the pieces occur {OFTEN} times in the '
             'training split.')


def _about(result) -> str:
  held_out = ', '.join(f'{facts["bytes"]:,} bytes {_name(language)}'
                       for language, facts in result['languages'].items())
  return (f'Trained on {result["sample_bytes"]:,} of the {result["training_bytes"]:,} bytes of the '
          f'training split, measured on held-out text: {held_out}.')


def markdown(result: Mapping[str, Any]) -> str:
  """The tables for a README or an issue."""
  parts = [_about(result) + '\n']
  for title, heads, rows in _tables(result):
    lines = [heads, ['---', *['--:'] * (len(heads) - 1)], *rows]
    parts.append(f'**{title}**\n\n' + ''.join(f'| {" | ".join(line)} |\n' for line in lines))
  parts += [sentence + '\n' for sentence in _sentences(result)]
  return '\n'.join([*parts, NOTE + '\n'])


def page(result: Mapping[str, Any]) -> str:
  """HTML that loads nothing: the curves and the tables of what tokenizer.json holds."""
  overall = _chart(result, lambda row: row['bytes_per_token'], 'bytes a token')
  charts = [('Bytes per token', overall)]
  for language, facts in list(result['languages'].items())[:CHARTS]:
    of = lambda row, language=language: row['languages'][language]['fertility']
    charts.append((f'Fertility, {html.escape(_name(language))}',
                   _chart(result, of, f'tokens a {_unit(facts)}')))
  charts.append(('How often 95 % of the pieces occur', _rarest(result)))
  figures = ''.join(f'<figure><figcaption>{title}</figcaption>{chart}</figure>'
                    for title, chart in charts if chart)
  cells = lambda tag, row: ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)
  tables = ''
  for title, heads, rows in _tables(result):
    body = ''.join(f'<tr>{cells("td", row)}</tr>' for row in rows)
    tables += (f'<h2>{title}</h2><div class="wide"><table><thead><tr>{cells("th", heads)}</tr>'
               f'</thead><tbody>{body}</tbody></table></div>')
  said = ''.join(f'<p>{html.escape(sentence)}</p>' for sentence in _sentences(result))
  return report.document('Vocabularies', (
      f'<p class="soft">{html.escape(_about(result))}</p>{said}<div class="charts">{figures}</div>'
      f'{tables}<p class="soft">{html.escape(NOTE)}</p>'))


def _points(result, value):
  """(kind, its points by size), in the order of the kinds."""
  kinds = dict.fromkeys(row['kind'] for row in result['vocabularies'])
  return [(kind, [(row['size'], value(row)) for row in result['vocabularies']
                  if row['kind'] == kind]) for kind in kinds]


def _chart(result, value, label):
  series = [Series(kind, points, f'c{i % COLOURS}', dots=True)
            for i, (kind, points) in enumerate(_points(result, value))]
  return plot.line_chart(series, 'ids of the vocabulary', label, log_x=True)


def _rarest(result):
  found = _points(result, lambda row: row['rarest'])
  sizes = [size for _, points in found for size, _ in points]
  series = [Series(kind, points, f'c{i % COLOURS}', dots=True)
            for i, (kind, points) in enumerate(found)]
  series.append(Series(f'{OFTEN} times', [(size, OFTEN) for size in (min(sizes), max(sizes))],
                       f'c{len(found) % COLOURS} faint'))
  return plot.line_chart(series, 'ids of the vocabulary', 'times in the training split', log_x=True,
                         log_y=True)
