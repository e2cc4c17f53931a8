"""Real labelled data of ../shared/data, and predictions of a model that is wrong now and then."""
import collections
import csv
import gzip
import json
import pathlib
import zipfile

import numpy as np
import pytest

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'


def text(name, errors='strict'):
  """Of a file of ../shared/data; the test is skipped where there is none."""
  path = SHARED / name
  if not path.exists():
    pytest.skip(f'shared/data/{name} is not here')
  raw = path.read_bytes()
  return (gzip.decompress(raw) if name.endswith('.gz') else raw).decode('utf-8', errors)


def banking():
  return [{'id': str(i), 'a': row['text'], 'label': row['category']}
          for i, row in enumerate(csv.DictReader(text('cls/banking77/train.csv.gz').splitlines()))]


def snips(split):
  """split: 'train' or 'validate'."""
  found = []
  intents = ('AddToPlaylist', 'BookRestaurant', 'GetWeather', 'PlayMusic', 'RateBook',
             'SearchCreativeWork', 'SearchScreeningEvent')
  for intent in intents:
    end = '_full' if split == 'train' else ''
    raw = text(f'cls/snips/{split}_{intent}{end}.json.gz', 'replace')  # some bytes are of Latin-1
    for one in json.loads(raw)[intent]:
      words = ''.join(part['text'] for part in one['data']).strip()
      found.append({'id': f'{split}{len(found)}', 'a': words, 'label': intent})
  return found


def polarity():
  path = SHARED / 'cls/mr-sentence-polarity/sentence_polarity.zip'
  if not path.exists():
    pytest.skip('shared/data/cls/mr-sentence-polarity is not here')
  found = []
  with zipfile.ZipFile(path) as archive:
    for end, label in ('neg', 'negative'), ('pos', 'positive'):
      lines = archive.read(f'sentence_polarity/rt-polarity.{end}').decode('latin-1').splitlines()
      found += [{'id': f'{end}{i}', 'a': line.strip(), 'label': label}
                for i, line in enumerate(lines)]
  return found


def wnut(split='emerging.dev'):
  found = []
  lines = [line.strip() for line in text(f'seqlab/wnut17/{split}.conll.gz').split('\n')]
  for block in '\n'.join(lines).split('\n\n'):
    pairs = [line.split('\t') for line in block.split('\n') if '\t' in line]
    if pairs:
      words, tags = zip(*pairs)
      found.append({'id': str(len(found)), 'words': list(words), 'tags': list(tags)})
  return found


def parts_of_speech(split='dev'):
  found = []
  for block in text(f'seqlab/ud-english-ewt/en_ewt-ud-{split}.conllu.gz').split('\n\n'):
    rows = [line.split('\t') for line in block.splitlines() if line and line[0] != '#']
    rows = [row for row in rows if row[0].isdigit()]
    if rows:
      found.append({'id': str(len(found)), 'words': [row[1] for row in rows],
                    'tags': [row[3] for row in rows]})
  return found


def captions(split='dev'):
  found = []
  for line in text(f'pairs/stsb-captions/sts-{split}.captions.tsv').splitlines():
    fields = line.split('\t')
    found.append({'id': f'{split}{fields[3]}', 'a': fields[5], 'b': fields[6],
                  'score': float(fields[4])})
  return found


def translations(pair, limit=None):
  """One example an English sentence, with all its translations; pair: 'eng-deu' or 'eng-cmn'."""
  other = pair.split('-')[1]
  targets = collections.defaultdict(list)
  for line in text(f'mt/tatoeba-{pair}/{other}.txt.gz').splitlines():
    source, target = line.split('\t')[:2]
    targets[source].append(target)
  chosen = list(targets.items())
  chosen = chosen[::max(1, len(chosen) // limit)][:limit] if limit else chosen
  return [{'id': str(i), 'source': source, 'targets': found}
          for i, (source, found) in enumerate(chosen)]


def summaries(limit=None):
  rows = [json.loads(line) for line in text('sum/scitldr-a/dev.jsonl.gz').splitlines()][:limit]
  return [{'id': row.get('paper_id', str(i)), 'source': ' '.join(row['source']),
           'targets': row['target']} for i, row in enumerate(rows)]


def questions(limit=None):
  found = []
  for article in json.loads(text('eval/xquad/xquad.en.json.gz'))['data']:
    for paragraph in article['paragraphs']:
      for one in paragraph['qas']:
        found.append({'id': one['id'], 'question': one['question'],
                      'context': paragraph['context'],
                      'answers': [answer['text'] for answer in one['answers']],
                      'starts': [answer['answer_start'] for answer in one['answers']]})
  return found[:limit]


def classified(examples, accuracy=0.8, seed=0):
  """(header, rows) of a classifier that is right with this probability and half sure of itself."""
  rng = np.random.default_rng(seed)
  labels = sorted({example['label'] for example in examples})
  rows = []
  for example in examples:
    logits = rng.normal(size=len(labels))
    if rng.random() < accuracy:
      logits[labels.index(example['label'])] = logits.max() + rng.exponential()
    log_p = logits - np.logaddexp.reduce(logits)
    rows.append({'id': example['id'], 'inputs': example['a'], 'targets': example['label'],
                 'prediction': labels[int(log_p.argmax())], 'scores': log_p.tolist()})
  return {'task': 'real', 'kind': 'classification', 'labels': labels, 'split': 'validation',
          'step': 3}, rows


def tagged(examples, accuracy=0.9, seed=0):
  """(header, rows) of a tagger that now and then takes another tag, whatever stands before it."""
  rng = np.random.default_rng(seed)
  labels = sorted({tag for example in examples for tag in example['tags']})
  rows = [{'id': example['id'], 'inputs': example['words'], 'targets': example['tags'],
           'prediction': [tag if rng.random() < accuracy else labels[rng.integers(len(labels))]
                          for tag in example['tags']]} for example in examples]
  return {'task': 'real', 'kind': 'tagging', 'labels': labels, 'split': 'validation',
          'step': 3}, rows


def generated(examples, seed=0, characters=False, **header):
  """(header, rows) of a writer who loses, doubles and swaps words (or characters) of one of the
  references."""
  rng = np.random.default_rng(seed)
  rows = []
  for example in examples:
    target = example['targets'][rng.integers(len(example['targets']))]
    words = list(target) if characters else target.split()
    words = [word for word in words for _ in range(rng.choice([0, 1, 1, 1, 1, 2]))]
    if len(words) > 2 and rng.random() < 0.5:
      i = rng.integers(len(words) - 1)
      words[i], words[i + 1] = words[i + 1], words[i]
    rows.append({'id': example['id'], 'inputs': example['source'], 'targets': example['targets'],
                 'prediction': ('' if characters else ' ').join(words)})
  return {'task': 'real', 'kind': 'generation', 'labels': None, 'split': 'validation', 'step': 3,
          **header}, rows
