"""A document on its way from a source to a shard, and what each rule said of it."""

from __future__ import annotations

import dataclasses
from typing import Any

ADDRESS_BITS = 24  # Of an address, the documents of one block; the rest count the blocks.


@dataclasses.dataclass(slots=True)
class Document:
  """One text and where it comes from.

  Attributes:
    name: the same on every machine, for instance 'web/crawl-00.warc.gz:17'; the held-out split, the
      reports and the passports know the document by it.
    text: what the stages made of it so far; '' before it is extracted.
    raw: the bytes that were collected, where they are not text yet; None once extracted.
    media_type: of `raw`: 'text/html', 'text/x-wiki', 'text/markdown', 'text/plain'.
    charset: that the source declared for `raw`; '' if none.
    source: name of the `collect.Source` that it is of.
    url: where it was published; '' if unknown.
    date: of its publication or its crawl as the source writes it, ISO 8601 where it can be.
    title: '' if unknown.
    licence: SPDX name or the address of a licence; '' if unknown.
    language: ISO 639-1 where there is one, 639-3 otherwise; '' before it is identified.
    verdicts: rule -> what the rule measured or did: `{'gopher.word_count': 312}`. Every rule that
      looked at the document has its entry, whether or not it removed it.
    removed_by: the first rule that removed it, '' as long as it is kept.
    failed: all rules for which `remove` was called, for the report.
    address: its place in the order of the input: block << ADDRESS_BITS | index in the block.
    cluster: address of the document that stands for this one and its duplicates; -1 without any.
  """

  name: str
  text: str
  raw: bytes | None = None
  media_type: str = 'text/plain'
  charset: str = ''
  source: str = ''
  url: str = ''
  date: str = ''
  title: str = ''
  licence: str = ''
  language: str = ''
  verdicts: dict[str, Any] = dataclasses.field(default_factory=dict)
  removed_by: str = ''
  address: int = -1
  cluster: int = -1
  failed: list[str] = dataclasses.field(default_factory=list)

  def remove(self, rule: str) -> None:
    """Marks it removed by `rule`, if no rule removed it before; call it for every rule it fails."""
    self.failed.append(rule)
    self.removed_by = self.removed_by or rule

  def judge(self, rule: str, value: Any, keep: bool) -> None:
    """Writes what `rule` measured or did, and marks the document removed unless `keep`."""
    self.verdicts[rule] = value
    if not keep:
      self.remove(rule)
