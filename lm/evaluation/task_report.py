"""The page of a task's predictions: metrics with intervals, and where the model is wrong."""
from collections.abc import Mapping, Sequence
import html
from operator import ne
import pathlib
from typing import Any

import numpy as np

from lm.evaluation import metrics
from lm.evaluation import plot
from lm.evaluation import report
from lm.evaluation import significance
from lm.evaluation import tables
from lm.evaluation import watched
from lm.evaluation.metrics import calibration

MOST_CELLS = 20  # classes of a confusion matrix with numbers; of more it is a heat map
MOST_ERRORS = 20
MOST_PAIRS = 15  # of classes that are taken for each other
MOST_CHARACTERS = 400  # of a text
SLICES = 4
FEW = 8  # examples of a slice below which there are fewer slices

Header, Rows = Mapping[str, Any], Sequence[Mapping[str, Any]]


def write(header: Header, rows: Rows, path: pathlib.Path, scorer: metrics.Scorer | None = None,
          intervals: Mapping[str, significance.Interval] | None = None, seed: int = 0,
          progress: bool = False) -> pathlib.Path:
  """Writes the page of predictions; see `page`.

  Raises:
    UserError: the predictions are not as `metrics.contract` says, or the disk is full.
  """
  return report.write(path, page(header, rows, scorer, intervals, seed, progress))


def page(header: Header, rows: Rows, scorer: metrics.Scorer | None = None,
         intervals: Mapping[str, significance.Interval] | None = None, seed: int = 0,
         progress: bool = False) -> str:
  """HTML that loads nothing and runs nothing.

  Args:
    scorer: of these rows, for who has one.
    intervals: of `significance.bootstrap`, for who has them; by default they are computed with
      `seed`.
  """
  scorer = scorer or metrics.scorer(header, rows)
  if intervals is None:
    intervals = significance.bootstrap(scorer, seed, progress=progress)
  values = scorer.metrics()
  about = ', '.join(f'{name} {header[name]}' for name in ('kind', 'split', 'step')
                    if header.get(name) is not None)
  body = [f'<p class="soft">{html.escape(about)}, {len(rows):,} examples</p>',
          _cards(scorer, values, intervals), _metrics(scorer, values, intervals)]
  if header['kind'] == 'classification':
    pairs = [(row['targets'], row['prediction']) for row in rows]
    body += [_confusion(pairs, header), _reliability(header, rows)]
  elif header['kind'] == 'tagging':
    pairs = [pair for row in rows for pair in zip(row['targets'], row['prediction'])]
    body += [_types(values, intervals), _confusion(pairs, header)]
  body += [_lengths(scorer, rows, seed), _errors(scorer, header, rows)]
  if header['kind'] == 'classification':
    body.append(_classes(pairs, header, values, intervals))  # there may be hundreds
  return report.document(html.escape(str(header.get('task', 'Task'))), '\n'.join(body))


def value_text(value: float) -> str:
  """With four significant figures, as a paper needs; a count as it is."""
  if isinstance(value, (int, np.integer)):
    return f'{value:,}'
  return plot.number(value) if abs(value) >= 1000 else f'{value:.4f}' if abs(value) < 10 else (
      f'{value:.2f}')


def interval_text(interval: significance.Interval | None) -> str:
  """'0.81 to 0.85'; '' where there is none."""
  return '' if interval is None else f'{value_text(interval.low)} to {value_text(interval.high)}'


def headline(values: Mapping[str, float]) -> list[str]:
  """The metrics of a task that are not of one class."""
  return [name for name in values if '/' not in name]


def _cards(scorer, values, intervals):
  first = [name for name in ('accuracy', 'span_f1', 'f1_macro', 'mcc', 'pearson', 'spearman', 'f1',
                             'exact_match', 'bleu', 'chrf', 'rougeL', 'ndcg@10', 'mrr@10',
                             'perplexity', 'word_perplexity', 'bits_per_byte') if name in values]
  cards = ''.join(
      f'<div><dt>{html.escape(name)}</dt><dd>{value_text(values[name])}'
      f'<small>{interval_text(intervals.get(name))}</small></dd></div>' for name in first[:4])
  wrong = ''
  if scorer.each.dtype == bool:
    wrong = (f'<div><dt>right</dt><dd>{int(scorer.each.sum()):,}<small>of {scorer.size:,}, by '
             f'{html.escape(scorer.each_is)}</small></dd></div>')
  return f'<dl>{cards}{wrong}</dl>'


def _metrics(scorer, values, intervals):
  notes = dict(scorer.notes)
  shown = [[name, value_text(values[name]), interval_text(intervals.get(name)),
            notes.pop(name, '')] for name in headline(values)]
  table = tables.page(['metric', 'value', '95 % interval'], [row[:3] for row in shown])
  said = [(name, note) for name, _, _, note in shown if note] + list(notes.items())
  lines = ''.join(f'<p class="soft"><b>{html.escape(name)}</b>: {html.escape(note)}</p>'
                  for name, note in said)
  some = next(iter(intervals.values()), None)
  how = '' if some is None else (
      f'<p class="soft">Intervals are percentile bootstraps over {some.n:,} examples, '
      f'{some.repeats:,} resamples: of other examples, not of other seeds.</p>')
  return f'<h2>Metrics</h2>{table}{how}{lines}'


def _classes(pairs, header, values, intervals):
  rows = []
  for number, label in enumerate(_labels(pairs, header)):
    count = [sum(pair[side] == label for pair in pairs) for side in (0, 1)]
    if any(count):
      rows.append([label, str(number), *(f'{n:,}' for n in count),
                   *_of_class(label, values, intervals)])
  heads = ['class', 'number', 'targets', 'predictions', 'precision', 'recall', 'F1',
           '95 % interval of F1']
  return f'<h2>Classes</h2>{tables.page(heads, rows)}'


def _labels(pairs, header):
  """Those of the task, and after them what else was predicted."""
  labels = list(header.get('labels') or sorted({target for target, _ in pairs}))
  return labels + sorted({prediction for _, prediction in pairs} - {*labels})


def _of_class(label, values, intervals):
  names = [f'{kind}/{label}' for kind in ('precision', 'recall', 'f1')]
  return [*(value_text(values[name]) for name in names), interval_text(intervals.get(names[-1]))]


def _types(values, intervals):
  types = [name.removeprefix('f1/') for name in values if name.startswith('f1/')]
  rows = [[name, *_of_class(name, values, intervals)] for name in types]
  return '<h2>Types</h2>' + tables.page(['', 'precision', 'recall', 'F1', '95 % interval of F1'],
                                         rows)


def _confusion(pairs, header):
  """The matrix: with numbers, or of many classes as colours; and who is taken for whom."""
  labels = _labels(pairs, header)
  code = {label: i for i, label in enumerate(labels)}
  counts = np.zeros((len(labels), len(labels)), int)
  np.add.at(counts, tuple(np.array([[code[label] for label in pair] for pair in pairs]).T), 1)
  share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  found = sorted(((-counts[i, j], i, j) for i in range(len(labels)) for j in range(len(labels))
                  if i != j and counts[i, j]))[:MOST_PAIRS]
  confused = tables.page(['target', 'taken for', 'times', 'of its targets'], [
      [labels[i], labels[j], f'{-count:,}', f'{100 * share[i, j]:.1f} %'] for count, i, j in found])
  if len(labels) <= MOST_CELLS:
    matrix = _cells(labels, counts, share)
  else:
    chart = plot.heat_map([(j, share[:, j]) for j in range(len(labels))],
                          'number of the predicted class', 'number of the target',
                          'share of the targets', max_columns=len(labels))
    matrix = f'<div class="charts"><figure>{chart}</figure></div>'
  return (f'<h2>Confusion</h2>{matrix}<h2>Most confused</h2>'
          f'{confused or "<p>No example is wrong.</p>"}')


def _cells(labels, counts, share):
  heads = ''.join(f'<th title="{html.escape(label)}">{i}</th>' for i, label in enumerate(labels))
  rows = ''
  for i, label in enumerate(labels):
    # One colour, more or less of it, is read on light and on dark pages.
    cells = ''.join(f'<td style="background: rgb(60 120 220 / {0.75 * share[i, j]:.3f})">'
                    f'{counts[i, j]:,}</td>' for j in range(len(labels)))
    rows += f'<tr><td>{i} {html.escape(label)}</td>{cells}</tr>'
  return ('<p class="soft">Rows are targets, columns predictions; the colour is the share of a '
          f'row.</p><div class="wide"><table><thead><tr><th></th>{heads}</tr></thead>'
          f'<tbody>{rows}</tbody></table></div>')


def _reliability(header, rows):
  if any(row.get('scores') is None for row in rows):
    return ''
  labels = header.get('labels') or sorted({row['targets'] for row in rows})
  code = {label: i for i, label in enumerate(labels)}
  truth, chosen = (np.array([code.get(row[field], -1) for row in rows])
                   for field in ('targets', 'prediction'))
  found = calibration.Probabilities.of_scores(truth, chosen, np.array([r['scores'] for r in rows]))
  mean, accuracy, counts = found.reliability(np.arange(len(rows)))
  points = [(float(x), float(y)) for x, y in zip(mean, accuracy)]
  chart = plot.line_chart(
      [plot.Series('as sure as right', [(0.0, 0.0), (1.0, 1.0)], 'c2 faint'),
       plot.Series('the model', points, 'c0', dots=True)], 'confidence in the prediction',
      'share that is right', y_from_zero=True)
  sizes = plot.line_chart([plot.Series('', [(float(x), float(n)) for x, n in zip(mean, counts)],
                                       dots=True)], 'confidence in the prediction',
                          'examples of the bin', y_from_zero=True)
  return watched.section('Calibration', [('Reliability', chart), ('How sure', sizes)])


def _lengths(scorer, rows, seed):
  """The mean of `each` by the length of the input, in quarters of the examples."""
  texts = [row.get('inputs') for row in rows]
  if not all(isinstance(text, (str, list)) and text for text in texts):
    return ''
  unit, of = _unit(texts)
  lengths = np.array([of(text) for text in texts])
  order = np.argsort(lengths, kind='stable')
  shown = []
  for part in np.array_split(order, max(1, min(SLICES, len(rows) // FEW))):
    each = scorer.each[part]
    mean = metrics.Scorer(each, scorer.each_is, lambda i, x=each: {'mean': float(np.mean(x[i]))})
    interval = significance.bootstrap(mean, seed).get('mean')
    shown.append([f'{lengths[part[0]]:,} to {lengths[part[-1]]:,} {unit}', f'{len(part):,}',
                  value_text(float(np.mean(each))), interval_text(interval)])
  heads = ['length of the input', 'examples', f'mean {scorer.each_is}', '95 % interval']
  return f'<h2>By length</h2>{tables.page(heads, shown)}'


def _unit(texts):
  """(name, count): words, or characters where spaces do not part words."""
  words = [len(text.split() if isinstance(text, str) else text) for text in texts]
  size = sum(map(len, texts)) / max(sum(words), 1)
  if any(isinstance(text, str) for text in texts) and size > 15:
    return 'characters', len
  return 'words', lambda text: len(text.split() if isinstance(text, str) else text)


def _errors(scorer, header, rows):
  """What it is wrong about: first where it is most sure, or else what is done worst."""
  what, shown, badness = _badness(scorer, header, rows)
  wrong = ~scorer.each if scorer.each.dtype == bool else np.ones(len(rows), bool)
  chosen = [i for i in np.argsort(-badness, kind='stable') if wrong[i]][:MOST_ERRORS]
  body = ''
  for i in chosen:
    target, prediction = said(header, rows[i])
    about = f'id {rows[i].get("id", "")}, {what} {value_text(shown[i])}'
    body += (f'<figure><p class="soft">{html.escape(about)}</p>'
             f'<pre>{html.escape(shortened(rows[i].get("inputs", "")))}\n<b>target</b>     '
             f'{html.escape(target)}\n<b>prediction</b> {html.escape(prediction)}</pre></figure>')
  title = 'Mistakes of the highest confidence' if what == 'confidence' else 'Worst examples'
  return f'<h2>{title}</h2><div class="samples">{body}</div>' if body else ''


def _badness(scorer, header, rows) -> tuple[str, np.ndarray, np.ndarray]:
  """What is shown of each example: its name and values; and how bad it is, larger is worse."""
  sure = [_confidence(row, header) for row in rows]
  if header['kind'] == 'tagging':
    wrong = np.array([sum(map(ne, row['targets'], row['prediction'])) for row in rows])
    return 'wrong words', wrong, wrong
  if None in sure:
    return scorer.each_is, scorer.each.astype(float), -scorer.each.astype(float)
  return 'confidence', np.array(sure), np.array(sure)


def _confidence(row, header) -> float | None:
  """p of the prediction; None where there are no scores of choices."""
  scores = row.get('scores')
  if header['kind'] not in ('classification', 'multiple_choice') or scores is None or (
      len(scores) < 2):
    return None
  p = np.exp(np.array(scores) - np.logaddexp.reduce(scores))
  names = header.get('labels') if header['kind'] == 'classification' else range(len(p))
  return float(dict(zip(names or (), p)).get(row['prediction'], 0.0))


def said(header: Header, row: Mapping[str, Any]) -> tuple[str, str]:
  """(target, prediction) as text; of tags those words alone whose tags differ."""
  if header['kind'] == 'tagging':
    pairs = zip(row.get('inputs') or row['targets'], row['targets'], row['prediction'])
    differ = [(word, *tags) for word, *tags in pairs if tags[0] != tags[1]]
    return tuple(shortened(' '.join(f'{one[0]}/{one[side]}' for one in differ)) for side in (1, 2))
  target, prediction = row.get('targets', ''), row.get('prediction', '')
  texts = [' | '.join(map(str, value)) if isinstance(value, list) else str(value)
           for value in (target, prediction)]
  return shortened(texts[0]), shortened(texts[1])


def shortened(text: Any) -> str:
  """At most MOST_CHARACTERS of a text, or of words."""
  text = ' '.join(map(str, text)) if isinstance(text, list) else str(text)
  return text if len(text) <= MOST_CHARACTERS else f'{text[:MOST_CHARACTERS]} ...'
