"""The card of a corpus: what is in it, where it came from, what was removed and why.

`card.md` begins with the metadata that Hugging Face reads of a data set, and has the sections of
"Datasheets for Datasets" (arXiv:1803.09010 section 3) that a program can answer; `card.html` is the
same with charts (`card_page.py`). Neither holds a time: the same corpus has the same card.

Names and texts are other people's, and may be made to do harm: they stand in code spans and
indented blocks, in which Markdown renders nothing, and every character that is not seen, or that
turns the direction of writing, is spelt out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
from pathlib import Path
import re
from typing import Any
import unicodedata

from lm.corpus import files
from lm.corpus import passports
from lm.corpus.summary import Counts, KEPT, MAX_DOMAINS, MAX_HITS, SCORE_UNIT, Summary

_ROWS = 30  # Of a table of languages, domains or licences.
_LARGEST = 10  # Clusters.
_QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_LOADERS = {'.parquet': 'parquet', '.zst': 'json'}  # Of Hugging Face datasets, by suffix.


@dataclasses.dataclass(frozen=True)
class Facts:
  """What a card tells.

  Attributes:
    name: of the corpus.
    summary: of all documents.
    shards: for each the fields of `write.Shard`.
    weights: source -> how often its documents are written.
    config: the gin text that makes it again.
    versions: package -> version, and whatever else decided what came out.
    clusters: as `passports.clusters` returns them.
  """

  name: str
  summary: Summary
  shards: Sequence[Mapping[str, Any]]
  weights: Mapping[str, float]
  config: str
  versions: Mapping[str, str]
  clusters: tuple[int, int, list[tuple[str, int]]] = (0, 0, [])

  def total(self, counts: Counts, column: int = 0) -> int:
    """Adds up a column of one of the summary's tables."""
    return sum(values[column] for values in counts.values())


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows under heads: of other people's text, `Ours`, counts, shares (float) and `Bytes`."""

  heads: tuple[str, ...]
  rows: Sequence[tuple[Any, ...]]


class Bytes(int):
  """A size."""


class Ours(str):
  """Text that needs no quoting."""


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the card.

  Attributes:
    title: its heading.
    text: a paragraph of our own.
    table: under it.
    quotes: (title, text) of other people's text.
  """

  title: str
  text: str = ''
  table: Table | None = None
  quotes: Sequence[tuple[str, str]] = ()


def write(run_dir: Path, facts: Facts) -> None:
  """Writes card.md and card.html into the directory of a corpus whose passports stand.

  Raises:
    UserError: the disk is full or the directory cannot be written.
  """
  from lm.corpus import card_page

  facts = dataclasses.replace(facts, clusters=passports.clusters(run_dir / 'passports', _LARGEST))
  files.write(run_dir / 'card.md', markdown(facts))
  files.write(run_dir / 'card.html', card_page.page(facts))


def markdown(facts: Facts) -> str:
  """Returns the card as Markdown with Hugging Face's header."""
  parts = [_header(facts), f'# {_code(facts.name)}', overview(facts)]
  for section in sections(facts):
    parts += [f'## {section.title}', section.text, _markdown_table(section.table)]
    for title, text in section.quotes:
      parts += [f'{_code(title)}:' if title else '', _indented(text)]
  return '\n\n'.join(part for part in parts if part) + '\n'


def overview(facts: Facts) -> str:
  """Returns one sentence that says how much of what there is."""
  summary = facts.summary
  records, size = (facts.total(summary.written, column) for column in (2, 3))
  collected = facts.total(summary.collected)
  return (f'{_count(records, "document")} with {human(Bytes(size))} of text in '
          f'{_count(len(facts.shards), "shard")}, of {collected:,} collected from '
          f'{_count(len(summary.collected), "source")}; {facts.total(summary.removed):,} were '
          'removed.')


def sections(facts: Facts) -> Iterator[Section]:
  """Yields the parts of the card, in order; what there is nothing to say of is left out."""
  summary = facts.summary
  yield Section('Composition', 'Records are written documents, as often as the weight of their '
                'source says.', _sources(facts))
  yield Section('Languages', '', _shares('language', summary.languages, facts))
  yield Section('Lengths', 'Characters that a share of the kept documents does not exceed, by bins '
                'of a quarter of an octave.',
                Table(('share', 'characters'), quantiles(summary.lengths)))
  if summary.domains:
    sampled = ('' if len(summary.domains) < MAX_DOMAINS else
               f' Counted are {MAX_DOMAINS:,} domains, chosen by a hash.')
    yield Section('Domains', 'Registered domains of the kept documents.' + sampled,
                  _shares('domain', summary.domains, facts))
  yield Section('Licences', 'As the sources state them; nobody has checked them.',
                _shares('licence', summary.licences, facts))
  yield Section('Cleaning', 'Rules in their order. A document goes no further than the stage whose '
                'rule removed it; of the rules of that stage, all that it broke are counted.',
                Table(('rule', 'looked at', 'removed', 'share', 'bytes', 'broken', 'broken alone'),
                      list(_rules(summary))))
  yield from _findings(facts)
  yield from _samples(summary)
  yield Section('Use', 'Train on it, read it elsewhere, and ask of any row of a batch where it '
                'came from:', quotes=[('', usage(facts))])
  yield Section('Files', '', Table(('shard', 'documents', 'bytes', 'bytes of file', 'SHA-256'), [
      (shard['file'], shard['documents'], Bytes(shard['text_bytes']), Bytes(shard['file_bytes']),
       shard['sha256']) for shard in facts.shards]))
  yield Section('Versions', '', Table(('what', 'version'), sorted(facts.versions.items())))
  yield Section('Configuration', 'Makes it again, with the same bytes:',
                quotes=[('', facts.config)])


def _findings(facts: Facts) -> Iterator[Section]:
  """Duplicates, redactions, overlap with evaluations, and faults."""
  summary, (clusters, removed, largest) = facts.summary, facts.clusters
  if clusters:
    yield Section('Duplicates', f'{removed:,} documents were removed for {clusters:,} that stand '
                  'for them. The largest clusters:',
                  Table(('kept', 'removed for it'), largest))
  if summary.redactions:
    yield Section('Redactions', 'In the kept documents.',
                  Table(('rule', 'redactions', 'documents'), _most(summary.redactions, len)))
  if summary.hits:
    yield Section('Overlap with evaluations', '' if len(summary.hits) < MAX_HITS else
                  f'{MAX_HITS} of the documents, chosen by a hash of the name.', Table(
                      ('document', 'what was found'), [row[1::2] for row in summary.hits]))
  if summary.faults:
    yield Section('Faults', f'{facts.total(summary.faults):,} times something could not be read or '
                  'processed; it was passed over.',
                  Table(('kind', 'times'), _most(summary.faults, len)),
                  [(kind, '\n'.join(f'{name}: {reason}' for name, reason in examples))
                   for kind, examples in summary.fault_examples.items()])


def _samples(summary: Summary) -> Iterator[Section]:
  quotes = lambda rule: [(f'{source}: {name}', text)
                         for _, name, source, text in summary.samples.get(rule, ())]
  yield Section('Samples of what is kept', 'Chosen by a hash of the name.', quotes=quotes(KEPT))
  for rule in summary.ordered_rules():
    if rule in summary.removed:
      yield Section(f'Samples removed by {_code(rule)}', quotes=quotes(rule))


def _rules(summary: Summary) -> Iterator[tuple[Any, ...]]:
  collected = sum(values[0] for values in summary.collected.values())
  for rule in summary.ordered_rules():
    removed, size = summary.removed.get(rule, [0, 0])
    seen = summary.seen.get(rule, [Ours('all')])  # Groupings leave no verdict where they keep.
    yield (rule, seen[0], removed, removed / max(collected, 1), Bytes(size),
           *summary.failed.get(rule, [0, 0]))


def _sources(facts: Facts) -> Table:
  summary, rows = facts.summary, []
  size = max(facts.total(summary.written, 3), 1)
  for source, (documents, collected) in summary.collected.items():
    kept = summary.kept.get(source, [0, 0])
    _, _, records, written = summary.written.get(source, [0, 0, 0, 0])
    rows.append((source, documents, Bytes(collected), kept[0], Bytes(kept[1]),
                 Ours(f'{facts.weights.get(source, 1.0):g}'), records, Bytes(written),
                 written / size))
  return Table(('source', 'collected', 'bytes', 'kept', 'bytes', 'weight', 'records', 'bytes',
                'share'), rows)


def _shares(what: str, counts: Counts, facts: Facts) -> Table:
  """The most frequent of [documents, bytes, ...], and the rest in one row."""
  total, scored = max(facts.total(facts.summary.kept), 1), what == 'language'
  rows = []
  for name, documents, size, *score in _most(counts, _ROWS):
    mean = (Ours(f'{score[0] * SCORE_UNIT / score[1]:.3f}' if score[1] else ''),) if scored else ()
    rows.append((name or Ours('unknown'), documents, Bytes(size), documents / total, *mean))
  rest = _most(counts, len)[_ROWS:]
  if rest:
    documents, size = (sum(row[column] for row in rest) for column in (1, 2))
    rows.append((Ours(f'{len(rest):,} others'), documents, Bytes(size), documents / total,
                 *((Ours(),) if scored else ())))
  return Table((what, 'documents', 'bytes', 'share', *(('mean score',) if scored else ())), rows)


def _count(number: int, thing: str) -> str:
  return f'{number:,} {thing}{"s" * (number != 1)}'


def _most(counts: Counts, most: Any) -> list[tuple[Any, ...]]:
  rows = sorted(((name, *values) for name, values in counts.items()),
                key=lambda row: (-row[1], row[0]))
  return rows if most is len else rows[:most]


def quantiles(lengths: Counts) -> list[tuple[float, int]]:
  """Returns (share, the bin of lengths at which that share of the documents is reached)."""
  bins = sorted((int(low), count) for low, (count,) in lengths.items())
  total, rows = sum(count for _, count in bins), []
  for share in _QUANTILES:
    below = 0
    for low, count in bins:
      below += count
      if below >= share * total:
        rows.append((share, low))
        break
  return rows


def usage(facts: Facts) -> str:
  """Returns commands that use the corpus, from its directory."""
  first = facts.shards[0]['file'] if facts.shards else ''
  suffix = re.sub(r'.*-of-\d+', '', first)
  pattern = f'data/{facts.name}-*{suffix}'
  lines = [f'lm train --gin_file=gin/experiments/quickstart.gin --gin.FILES="\'{pattern}\'" '
           '--run_dir=RUN', 'lm corpus why --run_dir=RUN --step=1 --index=0']
  loader = _LOADERS.get(Path(first).suffix)
  if loader:
    lines.append(f'datasets.load_dataset("{loader}", data_files="{pattern}")  # Python')
  lines.append('SELECT removed_by, count(*) FROM \'passports/*.parquet\' GROUP BY 1 ORDER BY 2 DESC'
               '  -- DuckDB')
  return '\n'.join(lines)


def _header(facts: Facts) -> str:
  """YAML; what comes from documents stands in it only if it has the form of a code."""
  summary, total = facts.summary, max(facts.total(facts.summary.kept), 1)
  languages = [name for name, documents, *_ in _most(summary.languages, _ROWS)
               if re.fullmatch('[a-z]{2,3}', name) and documents >= total / 100]
  licences = [name.lower() for name in summary.licences]
  licence = licences[0] if len(licences) == 1 else 'other'
  if not re.fullmatch(r'[a-z0-9][a-z0-9.+-]{1,40}', licence):
    licence = 'other' if licence else 'unknown'
  records = facts.total(summary.written, 2)
  power = max(len(str(records)) - 1, 2)
  name = lambda exponent: f'{10 ** (exponent % 3)}{"_KMBT"[exponent // 3]}'.replace('_', '')
  size = 'n<1K' if power == 2 else f'{name(power)}<n<{name(power + 1)}'
  lines = [f'pretty_name: {json.dumps(facts.name)}', f'license: {licence}',
           'task_categories: [text-generation]', f'size_categories: [{size}]']
  if languages:  # Quoted: `no` is Norwegian, and false in YAML.
    lines.append(f'language: [{", ".join(map(json.dumps, languages))}]')
  first = facts.shards[0]['file'] if facts.shards else ''
  if Path(first).suffix in _LOADERS:
    pattern = re.sub(r'-\d+-of-\d+', '-*', first)
    lines += ['configs:', '- config_name: default',
              f'  data_files: {json.dumps("data/" + pattern)}']
  return '\n'.join(['---', *lines, '---'])


def visible(text: str) -> str:
  """Returns text with its line breaks and spaces, and every other character that is not seen, or
  that turns the direction of writing, spelt out."""
  return ''.join(
      c if c.isprintable() or c == '\n' or unicodedata.category(c) == 'Zs' else
      '    ' if c == '\t' else f'\\u{ord(c):04x}' for c in text.replace('\r\n', '\n'))


def human(cell: Any) -> str:
  """Returns a cell of a table for a person to read."""
  if isinstance(cell, Bytes):
    size = float(cell)
    for unit in ('B', 'kB', 'MB', 'GB'):
      if size < 1000:
        return f'{size:.3g} {unit}'
      size /= 1000
    return f'{size:.3g} TB'
  if isinstance(cell, float):
    return f'{100 * cell:.1f} %'
  return f'{cell:,}' if isinstance(cell, int) else visible(cell).replace('\n', ' ')


def _markdown_table(table: Table | None) -> str:
  if table is None or not table.rows:
    return ''
  cell = lambda value: _code(value) if type(value) is str else human(value)
  lines = [table.heads, ['---', *['--:'] * (len(table.heads) - 1)]]
  lines += [map(cell, row) for row in table.rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _code(text: str) -> str:
  """Text as a code span, also within a table, where a bar would end the cell."""
  return f'`{human(text).replace("`", chr(0x2019)).replace("|", chr(0xa6))}`' if text else ''


def _indented(text: str) -> str:
  return '\n'.join('    ' + line for line in visible(text).split('\n'))
