"""A record with named fields as a document: of JSON, a row of a table, an example of TFDS."""

from __future__ import annotations

from typing import Any

from lm.corpus.document import Document
from lm.corpus.readers.piece import Report
from lm.corpus.write import FIELDS

# How data sets of the field name what we know: C4, Dolma, datatrove, RedPajama, Wikipedia's rows.
NAMES = {
    'url': ('url', 'source_url'),
    'date': ('date', 'timestamp', 'created'),
    'title': ('title',),
    'licence': ('licence', 'license'),
    'language': ('language', 'lang'),
}
_OWN = frozenset(FIELDS)
COLUMNS = _OWN.union(*NAMES.values())


def document(record: Any, name: str, report: Report, key: str = 'text') -> Document | None:
  """Returns the document of a record, None if it has no text (which is reported).

  A record that a corpus of `lm corpus` has is known by its fields, and keeps its name.
  """
  text = record.get(key) if isinstance(record, dict) else None
  if isinstance(text, bytes):
    text = text.decode('utf-8', 'replace')
  if not isinstance(text, str):
    report(name, f'has no string under the key "{key}"')
    return None
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as error:
    code = ord(text[error.start])
    report(name, f'holds a lone surrogate U+{code:04X}, which is not a character')
    return None
  own = key == 'text' and _OWN <= record.keys()
  found = Document(record['name'] if own else name, text)
  inner = record.get('metadata', record.get('meta'))
  for field, names in NAMES.items():
    for where in (record, inner if isinstance(inner, dict) else {}):
      value = next((where[name] for name in names if where.get(name)), None)
      if value is not None and not getattr(found, field) and not isinstance(value, (dict, list)):
        setattr(found, field, _plain(value))
  return found


def _plain(value: Any) -> str:
  """Returns a field of metadata as text of a line; dates by ISO 8601."""
  if isinstance(value, bytes):
    value = value.decode('utf-8', 'replace')
  text = value.isoformat() if hasattr(value, 'isoformat') else str(value)
  return text.encode('utf-8', 'replace').decode('utf-8')
