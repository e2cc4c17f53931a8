"""The formats of raw input: how a file is cut into pieces, and how a piece becomes documents.

A format is a module with

    pieces(file, source, report) -> Iterator[Piece]           in the process that splits
    documents(piece, source, report) -> Iterator[Document]    in the process that works

Both hold a bounded part of a file at a time, and raise OSError where it cannot be read.
"""

import os

from lm.corpus.readers import epub
from lm.corpus.readers import examples
from lm.corpus.readers import jsonl
from lm.corpus.readers import streams
from lm.corpus.readers import table
from lm.corpus.readers import warc
from lm.corpus.readers import whole
from lm.corpus.readers import wikipedia

FORMATS = {
    'array_record': examples,
    'arrow': table,
    'epub': epub,
    'html': whole,
    'jsonl': jsonl,
    'markdown': whole,
    'parquet': table,
    'text': whole,
    'tfds': examples,
    'warc': warc,
    'wikipedia': wikipedia,
}

_SUFFIXES = {
    '.arc': 'warc',
    '.array_record': 'array_record',
    '.arrow': 'arrow',
    '.epub': 'epub',
    '.htm': 'html',
    '.html': 'html',
    '.json': 'jsonl',  # C4 and others: a line is a document there.
    '.jsonl': 'jsonl',
    '.markdown': 'markdown',
    '.md': 'markdown',
    '.ndjson': 'jsonl',
    '.parquet': 'parquet',
    '.warc': 'warc',
    '.wet': 'warc',
    '.xhtml': 'html',
    '.xml': 'wikipedia',
}

# Of the formats whose documents say nothing of their own.
MEDIA_TYPES = {'html': 'text/html', 'markdown': 'text/markdown', 'text': 'text/plain'}

# Beside the data in a directory laid out as on Hugging Face.
_NO_DATA = frozenset((
    'readme', 'readme.md', 'readme.txt', 'license', 'license.md', 'license.txt',
    'dataset_dict.json', 'dataset_info.json', 'dataset_infos.json', 'state.json',
))  # fmt: skip


def format_of(path: str) -> str:
  """Returns the format that a file's suffix tells; what is unknown is text."""
  return _SUFFIXES.get(os.path.splitext(streams.stem(path).lower())[1], 'text')


def is_data(path: str) -> bool:
  """Whether a file in a directory that is read whole is data and not about data."""
  return os.path.basename(path).lower() not in _NO_DATA
