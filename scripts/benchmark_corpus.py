#!/usr/bin/env python
"""How fast each stage of a corpus is, beside datatrove's, and the whole on one and two processes.

  python scripts/benchmark_corpus.py                      # ours alone where datatrove is missing
  python scripts/benchmark_corpus.py --only gopher --rounds 9

Stages run in turns in one process, on the same documents of ../shared/data, and are compared by the
medians of processor seconds. Of datatrove that part is timed which does the work of ours, without
the reading and writing around it, and extraction without its sandbox, in favour of it. Both sides
are warm: what they open once is open. The whole is `lm corpus` by processes, in wall seconds.

datatrove (seen: 0.10.1) is no dependency of this project: install it beside, with its extra
[processing], spacy and warcio.
"""
import argparse
import bz2
from collections.abc import Callable, Iterator
import copy
import dataclasses
import gzip
import io
import json
import os
import pathlib
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile

from lm.corpus import collect, deduplicate, extract, normalise, privacy, write
from lm.corpus import quality_c4, quality_fineweb, quality_gopher, steps
from lm.corpus.document import Document

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
  """A stage of ours and what does its work there, each from inputs that it may change."""

  name: str
  inputs: Callable[[], list]
  ours: Callable[[list], object]
  theirs: Callable[[list], object] | None
  size: int  # bytes of all inputs


def stage_pair(name: str, stage: object, documents: list[str], theirs: object) -> Pair:
  """Compares a stage with a filter or a formatter."""
  def ours(some: list[Document]) -> None:
    for _ in stage.apply_all(some):
      pass

  def run(some: list) -> None:
    for document in some:
      if hasattr(theirs, 'filter'):
        theirs.filter(document)
      else:
        document.text = theirs.format(document.text)

  return Pair(name, lambda: documents, ours, run if theirs else None,
              sum(len(text.encode()) for text in documents))


def measure(pair: Pair, rounds: int, as_theirs: Callable[[str], object] | None) -> dict:
  """Medians of both sides' processor seconds, and the median of their ratios."""
  ours, theirs, ratios = [], [], []
  for _ in range(rounds + 1):
    given = pair.inputs()
    took = _seconds(pair.ours, [Document(str(i), text, address=i) if isinstance(text, str) else text
                                for i, text in enumerate(given)])
    ours.append(took)
    if pair.theirs and as_theirs:
      theirs.append(_seconds(pair.theirs, [as_theirs(text) if isinstance(text, str) else text
                                           for text in given]))
      ratios.append(theirs[-1] / took)
  count = len(pair.inputs())
  row = {'stage': pair.name, 'documents_per_second': count / statistics.median(ours[1:]),
         'megabytes_per_second': pair.size / 1e6 / statistics.median(ours[1:])}
  if ratios:
    row |= {'datatrove_documents_per_second': count / statistics.median(theirs[1:]),
            'times_datatrove': statistics.median(ratios[1:])}
  return row


def _seconds(function: Callable[[list], object], inputs: list) -> float:
  started = time.process_time()
  function(inputs)
  return time.process_time() - started
