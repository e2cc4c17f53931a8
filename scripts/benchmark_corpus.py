#!/usr/bin/env python
"""How fast each stage of a corpus is, beside datatrove's, and the whole on one and two processes.

  python scripts/benchmark_corpus.py                      # ours alone where datatrove is missing
  python scripts/benchmark_corpus.py --only gopher --rounds 9

Stages run in turns in one process, on the same documents of ../shared/data, and are compared by the
medians of processor seconds. Of datatrove that part is timed which does the work of ours, without
the reading and writing around it, and extraction without its sandbox, in favour of it. Both sides
are warm: what they open once is open. The whole is `lm corpus` by processes, in wall seconds.

datatrove (seen: 0.10.1) is no dependency of this project: install it beside, with its extra
[processing], spacy, warcio, fasttext-numpy2-wheel and an xxhash below 4.

Seen on two cores, MB/s on one of them and times datatrove's: read WARC 323, 2.5; extract 10.3, 2.3;
normalise 69, 4.8 (15.4, 1.5 where every apostrophe is spoilt); language 19.6, 2.1; Gopher's
repetition 7.6, 14.4 and quality 8.9, 13.0; C4 12.2, 19.9; FineWeb 13.2, 18.8; e-mail and IP 72, 4.2
(all kinds 10.5); spam 17; decontaminate 36; exact 624, 1.4; MinHash 115, 161; paragraphs 363;
substrings 92; write JSONL 94, 2.8. 224 MB of pages: 35.4 s on one process, 18.8 on two (1.88
times), with 287 MiB at most in a process; 37 MB: 3.9 s on two, datatrove 20.3.
"""
import argparse
from collections.abc import Callable
import dataclasses
import gzip
import json
import os
import pathlib
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile

from lm.corpus import collect, decontaminate, deduplicate, extract, harm, language, normalise
from lm.corpus import privacy, quality_c4, quality_fineweb, quality_gopher, write
from lm.corpus.document import Document

try:
  import benchmark_corpus_datatrove  # Beside this file.
except ImportError:
  benchmark_corpus_datatrove = None

SHARED = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'data'


def pages() -> list[bytes]:
  """Web pages as they were fetched."""
  directory = SHARED / 'raw' / 'html-cc'
  found = [path.read_bytes() for path in sorted(directory.rglob('*.html*'))]
  return [gzip.decompress(page) if page[:2] == b'\x1f\x8b' else page for page in found]


def texts() -> list[str]:
  """Clean text: articles of Wikipedia, speeches, chapters of the Bible."""
  source = collect.Source('wiki', str(SHARED / 'raw/enwiki-xml/*.bz2'), format='wikipedia')
  documents = [document for group in collect.groups([source])
               for block in collect.split(group, _ignore) for document in
               collect.read(block, _ignore)]
  stage = extract.Extract()
  for document in documents:
    stage.apply(document)
  with zipfile.ZipFile(SHARED / 'lm/inaugural/inaugural.zip') as archive:
    speeches = [archive.read(name).decode('utf-8', 'replace')
                for name in sorted(archive.namelist()) if name.endswith('.txt')]
  verses = gzip.open(SHARED / 'lm/kjv-bible/bible-kjv.txt.gz', 'rt', encoding='utf-8')
  chapters: dict[str, list[str]] = {}
  for verse in verses:
    reference, _, text = verse.strip().partition(' ')
    chapters.setdefault(reference.split(':')[0], []).append(text)
  return [text for text in [*(document.text for document in documents), *speeches,
                            *('\n'.join(lines) for lines in chapters.values())] if text]


def _ignore(name: str, reason: str) -> None:
  del name, reason


@dataclasses.dataclass
class Pair:
  """What is timed: a function of fresh documents of ours, and one of theirs with the same work."""

  name: str
  inputs: list
  ours: Callable[[list[Document]], object]
  theirs: Callable[[list], object] | None = None
  count: int = 0  # Of documents and bytes, where the inputs are not those themselves.
  size: int = 0

  def measure(self, rounds: int) -> dict:
    """Medians of processor seconds and of their ratios, the first round left out."""
    ours, theirs = [], []
    for _ in range(rounds + 1):
      ours.append(_seconds(self.ours, [_ours(i, given) for i, given in enumerate(self.inputs)]))
      if self.theirs:
        theirs.append(_seconds(self.theirs, [
            given.decode('utf-8', 'replace') if isinstance(given, bytes) else given
            for given in self.inputs]))
    size = self.size or sum(len(given if isinstance(given, bytes) else given.encode())
                            for given in self.inputs)
    median = statistics.median(ours[1:])
    row = {'stage': self.name,
           'documents_per_second': (self.count or len(self.inputs)) / median,
           'megabytes_per_second': size / 1e6 / median}
    if theirs:
      row['times_datatrove'] = statistics.median(
          their / our for our, their in zip(ours[1:], theirs[1:]))
    return row


def _seconds(function: Callable[[list], object], inputs: list) -> float:
  started = time.process_time()
  function(inputs)
  return time.process_time() - started


def _ours(index: int, given: str | bytes) -> Document:
  if isinstance(given, bytes):
    return Document(str(index), '', raw=given, media_type='text/html', address=index)
  fresh = (given + ' ')[:-1]  # Another object: what is remembered of a text helps no other round.
  return Document(str(index), fresh, address=index, language='en')


def _all(stage: object) -> Callable[[list[Document]], None]:
  def run(documents: list[Document]) -> None:
    for _ in stage.apply_all(documents):
      pass
  return run


def _grouped(grouping: object) -> Callable[[list[Document]], None]:
  return lambda documents: deduplicate.run(grouping, documents)


def _collect(documents: list[Document]) -> None:
  """Reads the archive that the only document names."""
  source = collect.Source('web', documents[0].text)
  for group in collect.groups([source]):
    for block in collect.split(group, _ignore):
      for _ in collect.read(block, _ignore):
        pass


def pairs(directory: pathlib.Path) -> list[Pair]:
  """All stages, each with datatrove's where that has it; `directory` gets what they read."""
  path = directory / 'pages.warc.gz'
  size = archive(path, 8)
  html, text = pages() * 2, texts()
  spoilt = [one.encode().decode('cp1252', 'replace') for one in text]  # As of a wrong charset.
  evaluations = tuple(str(SHARED / f'eval/{name}/*.jsonl*') for name in ('lambada', 'piqa'))
  theirs = benchmark_corpus_datatrove.STAGES if benchmark_corpus_datatrove else {}
  rows = [
      ('extract', html, _all(extract.Extract())),
      ('normalise', text, _all(normalise.Normalise())),
      ('normalise, spoilt', spoilt, _all(normalise.Normalise())),
      ('language', text, _all(language.Language())),
      ('Gopher repetition', text, _all(quality_gopher.GopherRepetition())),
      ('Gopher quality', text, _all(quality_gopher.Gopher())),
      ('C4', text, _all(quality_c4.C4())),
      ('FineWeb', text, _all(quality_fineweb.FineWeb())),
      ('e-mail and IP', text, _all(privacy.Redact(kinds=('email', 'ip')))),
      ('all that is private', text, _all(privacy.Redact())),
      ('spam', text, _all(harm.Spam())),
      ('decontaminate', text, _all(decontaminate.Decontaminate(tasks=evaluations))),
      ('exact', text, _grouped(deduplicate.Exact())),
      ('MinHash, signatures', text, lambda some: deduplicate.MinHash().emit(some, None)),
      ('MinHash, whole', text, _grouped(deduplicate.MinHash())),
      ('paragraphs', text, _grouped(deduplicate.Paragraphs())),
      ('substrings', text, _grouped(deduplicate.Substrings())),
      ('write jsonl', text, _write),
  ]
  return [Pair('read WARC', [str(path)], _collect, theirs.get('read WARC'), 8 * len(pages()), size),
          *(Pair(name, inputs, ours, theirs.get(name)) for name, inputs, ours in rows)]


def _write(documents: list[Document]) -> None:
  with tempfile.TemporaryDirectory() as directory:
    write.Writer('jsonl').write(os.path.join(directory, 'shard'), documents)


def archive(path: pathlib.Path, copies: int) -> int:
  """Writes a WARC, a gzip member a record, of the pages of ../shared/data, each `copies` times with
  English sentences in its paragraphs' place; returns its bytes inflated."""
  rng = random.Random(0)
  some = [line.encode() for text in texts() for line in text.split('\n') if 80 < len(line) < 800]
  size = 0
  with open(path, 'wb') as file:
    for number in range(copies):
      for index, page in enumerate(pages()):
        body = re.sub(rb'(?s)(<p\b[^>]*>).*?</p>',
                      lambda match: b'%s%s</p>' % (match[1], rng.choice(some)), page)
        http = b'HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n' + body
        head = (f'WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: https://a{index}.org/{number}'
                f'\r\nWARC-Date: 2026-01-01T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:{number:08d}-'
                f'0000-0000-0000-{index:012d}>\r\nContent-Type: application/http; msgtype=response'
                f'\r\nContent-Length: {len(http)}\r\n\r\n').encode()
        record = head + http + b'\r\n\r\n'
        file.write(gzip.compress(record, 6))
        size += len(record)
  return size


def whole(copies: int) -> list[dict]:
  """`lm corpus` on one and on two processes, and datatrove's pipeline on two, in wall seconds."""
  rows = []
  with tempfile.TemporaryDirectory() as directory:
    root = pathlib.Path(directory)
    path = root / 'pages.warc.gz'
    size = archive(path, copies)
    seconds = {}
    for processes in (1, 2, 1, 2):
      shutil.rmtree(root / 'out', ignore_errors=True)
      started = time.perf_counter()
      subprocess.run([sys.executable, '-m', 'lm.main', 'corpus', '--gin_file=gin/corpus/web.gin',
                      f'--run_dir={root / "out"}', f'--gin.FILES="{path}"',
                      f'--workers={processes}'], check=True, stderr=subprocess.DEVNULL)
      seconds.setdefault(processes, []).append(time.perf_counter() - started)
    for processes, took in seconds.items():
      rows.append({'whole': f'lm corpus, {processes} processes', 'seconds': min(took),
                   'megabytes_per_second': size / 1e6 / min(took)})
    rows.append({'whole': 'two processes against one', 'times': min(seconds[1]) / min(seconds[2])})
    if benchmark_corpus_datatrove:
      took = benchmark_corpus_datatrove.whole(path, root / 'theirs')
      rows.append({'whole': 'datatrove, 2 processes', 'seconds': took,
                   'megabytes_per_second': size / 1e6 / took})
  rows.append({'whole': 'peak of a process, MiB',
               'value': resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024})
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--only', default='', help="stages whose name has this; 'whole'")
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--copies', type=int, default=30, help='of each page, for the whole')
  parser.add_argument('--json')
  args = parser.parse_args()
  rows = []
  with tempfile.TemporaryDirectory() as directory:
    for pair in pairs(pathlib.Path(directory)):
      if args.only in pair.name:
        rows.append(pair.measure(args.rounds))
        print('  '.join(f'{key} {value:,.1f}' if isinstance(value, float) else f'{value:24}'
                        for key, value in rows[-1].items()), flush=True)
  if args.only in ('', 'whole'):
    for row in whole(args.copies):
      rows.append(row)
      print(row, flush=True)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == '__main__':
  main()
