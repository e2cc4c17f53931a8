"""Tables as HTML and as Markdown."""
from collections.abc import Sequence
import html


def page(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table of HTML, every cell escaped; '' without rows."""
  if not rows:
    return ''
  cells = lambda tag, row: ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)
  body = ''.join(f'<tr>{cells("td", row)}</tr>' for row in rows)
  return (f'<div class="wide"><table><thead><tr>{cells("th", heads)}</tr></thead>'
          f'<tbody>{body}</tbody></table></div>')


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """The same for a README or an issue."""
  escape = lambda cells: [cell.replace('|', r'\|').replace('\n', ' ') for cell in cells]
  lines = [escape(heads), ['---', *['--:'] * (len(heads) - 1)], *map(escape, rows)]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)
