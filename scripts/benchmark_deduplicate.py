#!/usr/bin/env python
"""How well near-duplicates are found, and what that costs as a corpus grows.

  python scripts/benchmark_deduplicate.py recall   # planted pairs, exact pairs of all as gold
  python scripts/benchmark_deduplicate.py growth --documents 10000 100000 1000000

Texts are those of ../shared/data. A pair is planted by replacing words of a text until exactly so
much of the Jaccard similarity of the sets of 5-word shingles is left. Gold are all pairs of the
corpus whose exact similarity, found by the product of the sparse matrices of shingles, reaches the
threshold; a reported pair (two documents of one cluster) below it is false.
"""
import argparse
import bz2
import collections
import gzip
import itertools
import json
import pathlib
import random
import re
import resource
import time
import zipfile

import numpy as np

from lm.corpus import deduplicate
from lm.corpus.document import Document

SHARED = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'data'
WORD = re.compile(r'[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+')  # Not the library's own way.
SHINGLE = 5
BITS = 6  # 64 partitions.
SIMILARITIES = (0.5, 0.6, 0.65, 0.7, 0.725, 0.75, 0.775, 0.8, 0.85, 0.9, 0.95)


def texts(shared: pathlib.Path = SHARED) -> dict:
  """{source: passages of 60 to 400 words}: Wikipedia, the Bible, speeches and Chinese classics."""
  wikitext = gzip.open(shared / 'lm/wikitext-2/valid.txt.gz', 'rt', encoding='utf-8').read()
  verses = gzip.open(shared / 'lm/kjv-bible/bible-kjv.txt.gz', 'rt', encoding='utf-8')
  chapters = collections.defaultdict(list)
  for verse in verses:
    reference, _, text = verse.strip().partition(' ')
    chapters[reference.split(':')[0]].append(text)
  with zipfile.ZipFile(shared / 'lm/inaugural/inaugural.zip') as archive:
    speeches = [archive.read(name).decode('utf-8', 'replace')
                for name in sorted(archive.namelist()) if name.endswith('.txt')]
  dump = bz2.open(shared / 'raw/enwiki-xml/enwiki-shortened.xml.bz2', 'rt', encoding='utf-8').read()
  found = {
      'wikitext': wikitext.split('\n'), 'kjv': [' '.join(c) for c in chapters.values()],
      'inaugural': re.split(r'\n\s*\n', '\n\n'.join(speeches)), 'enwiki': dump.split('\n'),
      'chinese': ['\n'.join(map(str, entry.get('paragraphs') or entry.get('content')))
                  for path in sorted((shared / 'lm/chinese-classics').glob('*.json'))
                  for entry in json.loads(path.read_text(encoding='utf-8'))]}
  return {name: list(filter(None, map(passage, some))) for name, some in found.items()}


def passage(text: str) -> str:
  """The first 400 words, in a number that leaves a ninth of its shingles whole; '' below 60."""
  words = list(itertools.islice(WORD.finditer(text), 400))
  count = (len(words) - SHINGLE + 1) // 9 * 9
  return text[:words[count + SHINGLE - 2].end()] if len(words) >= 60 else ''


def shingles(text: str) -> set:
  words = [word.lower() for word in WORD.findall(text)]
  return set(zip(*(words[i:] for i in range(SHINGLE))))


def similarity(one: str, other: str) -> float:
  a, b = shingles(one), shingles(other)
  return len(a & b) / len(a | b)


def planted(text: str, jaccard: float, vocabulary: list, rng: random.Random) -> str:
  """The text with words replaced in runs, at places and of lengths drawn by `rng`, so that the sets
  of shingles have this similarity; '' if this text has no such edit or it was not found."""
  words = list(WORD.finditer(text))
  count = len(words) - SHINGLE + 1
  changed = round(count * (1 - jaccard) / (1 + jaccard))
  runs = []  # Each a run of words replaced, by the number of shingles that it changes.
  while changed >= 2 * SHINGLE:
    runs.append(rng.choice((5, 5, 5, 6, 7)) if changed >= 12 else 5)
    changed -= runs[-1]
  edge = changed if changed < SHINGLE else 0
  runs += [changed] if changed >= SHINGLE else []
  slack = count - edge - sum(runs)
  if slack < len(runs):
    return ''
  rng.shuffle(runs)
  gaps = sorted(rng.sample(range(slack + 1), len(runs)))
  replaced, place = list(range(edge)), edge
  for run, gap, before in zip(runs, gaps, [0] + gaps):
    first = place + gap - before + SHINGLE - 1
    replaced += range(first, first + run - SHINGLE + 1)
    place += gap - before + run
  pieces, end = [], 0
  for index in replaced:
    pieces += [text[end:words[index].start()], rng.choice(vocabulary)]
    end = words[index].end()
  edited = ''.join(pieces) + text[end:]
  return edited if abs(similarity(text, edited) - jaccard) < 0.004 else ''


def exact_pairs(corpus: list, threshold: float) -> dict:
  """{(i, j): Jaccard similarity} of all pairs i < j that reach the threshold."""
  from scipy import sparse
  ids = collections.defaultdict(itertools.count().__next__)
  sets = [[ids[s] for s in shingles(text)] for text in corpus]
  sizes = np.array([len(s) for s in sets])
  indices = np.concatenate([np.array(s, np.int32) for s in sets])
  matrix = sparse.csr_matrix((np.ones(len(indices), np.int32), indices,
                              np.concatenate([[0], np.cumsum(sizes)])))
  common = sparse.triu(matrix @ matrix.T, k=1).tocoo()
  jaccard = common.data / (sizes[common.row] + sizes[common.col] - common.data)
  at = jaccard >= threshold
  return dict(zip(zip(common.row[at].tolist(), common.col[at].tolist()), jaccard[at].tolist()))


def planted_corpus(shared: pathlib.Path, similarities, limit: int, seed: int = 0):
  """A shuffled corpus, and {similarity: the pairs of places planted in it}."""
  rng = random.Random(seed)
  sources = {name: rng.sample(some, min(limit, len(some))) for name, some in texts(shared).items()}
  corpus, pairs = [], collections.defaultdict(list)
  for some in sources.values():
    vocabulary = sorted({word for text in some for word in WORD.findall(text)})
    for number, text in enumerate(some):
      jaccard = similarities[number % len(similarities)]
      if edited := planted(text, jaccard, vocabulary, rng):
        pairs[jaccard].append((len(corpus), len(corpus) + 1))
        corpus += [text, edited]
      else:
        corpus.append(text)
  order = list(range(len(corpus)))
  rng.shuffle(order)
  place = {old: new for new, old in enumerate(order)}
  moved = {j: [tuple(sorted((place[a], place[b]))) for a, b in some] for j, some in pairs.items()}
  return [corpus[old] for old in order], moved


def clustered(grouping, corpus: list) -> set:
  """All pairs i < j of one cluster."""
  documents = [Document(str(i), text) for i, text in enumerate(corpus)]
  deduplicate.run(grouping, documents)
  groups = collections.defaultdict(list)
  for document in documents:
    if document.cluster >= 0:
      groups[document.cluster].append(document.address)
  return {pair for group in groups.values() for pair in itertools.combinations(group, 2)}


def recall(args) -> dict:
  grouping = deduplicate.MinHash()
  found = collections.Counter()
  for seed in range(args.repeats):
    corpus, planted_pairs = planted_corpus(args.shared, SIMILARITIES if args.curve else (0.8,),
                                           args.limit, seed)
    gold = exact_pairs(corpus, 0.3)
    reported = clustered(grouping, corpus)
    for jaccard, pairs in planted_pairs.items():
      found[f'planted {jaccard}'] += len(pairs)
      found[f'found {jaccard}'] += len(reported & set(pairs))
    strict = {pair for pair, jaccard in gold.items() if jaccard >= grouping.threshold}
    found['documents'] += len(corpus)
    found['reported'] += len(reported)
    found['gold'] += len(strict)
    found['gold found'] += len(reported & strict)
    found['false: below threshold'] += len(reported - strict)
    found['false: below 0.7'] += sum(gold.get(pair, 0) < 0.7 for pair in reported)
  return dict(found)


def synthetic(sentences: list, count: int, seed: int):
  """Yields texts of 50 to 100 words of random sentences, each tenth an edit of one before it."""
  rng = random.Random(seed)
  before = ['']
  for number in range(count):
    if number % 10 == 9:
      words = rng.choice(before).split()
      words[rng.randrange(len(words))] = 'edited'
      yield ' '.join(words)
      continue
    text, size = [], 0
    while size < 50:
      text.append(rng.choice(sentences))
      size += text[-1].count(' ') + 1
    text = ' '.join(' '.join(text).split()[:100])
    before = [*before[-500:], text] if before[0] else [text]
    yield text


def growth(args) -> dict:
  """CPU seconds of each step, documents/s in all, and MB of records, at several sizes."""
  import scipy.sparse.csgraph  # pylint: disable=unused-import
  sentences = sorted({s.strip() for some in texts(args.shared).values() for text in some
                      for s in re.split(r'(?<=[.;:])\s', text) if 4 < s.count(' ') < 30})
  rows = {}
  for count in args.documents:
    blocks, stream = [], synthetic(sentences, count, seed=1)
    while block := list(itertools.islice(stream, 4096)):
      blocks.append([Document('', text, address=(len(blocks) << 24) + i)
                     for i, text in enumerate(block)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, megabytes, decisions = stepwise(deduplicate.MinHash(), blocks)
    rows[count] = {name: round(value, 2) for name, value in seconds.items()} | {
        'documents/s': round(count / sum(seconds.values())), 'records MB': megabytes,
        'removed': int(np.sum(decisions['address'] != decisions['cluster'])),
        'texts MB': sum(len(d.text) for block in blocks for d in block) // 10**6,
        'peak MiB before and after': [
            before // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024]}
    print(count, rows[count], flush=True)
  return rows


def stepwise(grouping, blocks: list) -> tuple:
  """CPU seconds of each step, MB of the records of each round, and the decisions."""
  seconds, megabytes, decisions = collections.Counter(), [], None
  for number in range(1, grouping.rounds + 1):
    start, records = time.process_time(), []
    for block in blocks:
      about = decisions
      if decisions is not None:
        limits = [block[0].address, block[-1].address + 1]
        about = decisions[slice(*np.searchsorted(decisions['address'], limits))]
      records.append(grouping.emit(block, about))
    records, start = np.concatenate(records), tick(seconds, f'emit {number}', start)
    partition = records['key'] >> np.uint64(64 - BITS)
    records = records[np.argsort(partition, kind='stable')]
    limits = np.searchsorted(np.sort(partition), np.arange(1, 1 << BITS))
    start = tick(seconds, f'shuffle {number}', start)
    resolved = np.concatenate([grouping.resolve(some) for some in np.split(records, limits)])
    start = tick(seconds, f'resolve {number}', start)
    decisions = grouping.conclude(resolved)
    tick(seconds, f'conclude {number}', start)
    megabytes.append(records.nbytes // 10**6)
  return seconds, megabytes, decisions


def tick(seconds, name, start) -> float:
  now = time.process_time()
  seconds[name] += now - start
  return now


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('what', choices=('recall', 'growth'))
  parser.add_argument('--shared', type=pathlib.Path, default=SHARED)
  parser.add_argument('--curve', action='store_true', help='other similarities than 0.8 too')
  parser.add_argument('--repeats', type=int, default=1)
  parser.add_argument('--limit', type=int, default=2000, help='texts of each source')
  parser.add_argument('--documents', type=int, nargs='*', default=[10_000, 100_000])
  args = parser.parse_args()
  print(json.dumps({'recall': recall, 'growth': growth}[args.what](args), indent=1))


if __name__ == '__main__':
  main()
