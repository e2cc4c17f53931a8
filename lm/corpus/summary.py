"""What happened to the documents, in numbers that add up.

A worker makes a `Summary` of each block, and all of them merged make the card. Merging is exact and
associative: blocks merged in their order, in any grouping, give the same summary. So everything in
it is a sum of integers, a first appearance, or the lowest of all hashes.
"""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import hashlib
from typing import Any
import urllib.parse

from lm.corpus import collect
from lm.corpus import passports
from lm.corpus.document import Document
from lm.corpus.write import well_formed

KEPT = ''  # Stands for a rule among the samples.
MAX_SAMPLES, MAX_KEPT_SAMPLES, SAMPLE_CHARACTERS = 4, 8, 500
MAX_FAULTS = 20  # Named of each kind; all are counted.
MAX_HITS = 200  # Listed; all are counted.
MAX_DOMAINS = 1 << 18
SCORE_UNIT = 1e-6  # Scores are added up as integers, whose sums know no order.
# Labels under which a country's names are given out: bbc.co.uk, but lemonde.fr.
_SHARED_LABELS = frozenset((
    'co', 'com', 'org', 'net', 'ac', 'gov', 'gob', 'edu', 'or', 'ne', 'go', 'gen', 'info', 'ltd',
    'plc', 'sch', 'nhs', 'nom', 'asn', 'id',
))  # fmt: skip

Counts = dict[str, list[int]]
_counts = lambda: dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Summary:
  """Counts of documents; bytes are of text in UTF-8, or of what was collected if not text yet.

  Attributes:
    collected: source -> [documents, bytes].
    kept: source -> [documents, bytes] that no rule removed.
    written: source -> [documents, bytes, records, bytes of them]: of those that are kept the ones
      that stand in the corpus at all, and how often by their source's weight.
    rules: [rule, the one before it in the document where it appeared first] of each that looked at
      a document or removed one, in the order of their first appearance; see `ordered_rules`.
    seen: rule -> [documents it looked at].
    removed: rule -> [documents, bytes] that it was the first to remove.
    failed: rule -> [documents that broke it, documents that broke it alone].
    languages: language -> [documents, bytes, sum of scores in 1e-6, documents with a score], kept.
    lengths: least number of characters of a bin (see `length_bin`) -> [documents], kept.
    licences: licence -> [documents, bytes], kept.
    domains: registered domain -> [documents, bytes], kept: of all, up to MAX_DOMAINS; beyond, of
      those whose hashes are lowest, a fair sample of the domains.
    redactions: rule -> [redactions, documents], kept.
    faults: kind -> [documents].
    fault_examples: kind -> [[name, what happened]], the first ones.
    hits: [[hash, name, rule, what was found]] of decontamination.
    samples: rule, or KEPT -> [[hash, name, source, text]].
  """

  collected: Counts = _counts()
  kept: Counts = _counts()
  written: Counts = _counts()
  rules: list[list[str]] = dataclasses.field(default_factory=list)
  seen: Counts = _counts()
  removed: Counts = _counts()
  failed: Counts = _counts()
  languages: Counts = _counts()
  lengths: Counts = _counts()
  licences: Counts = _counts()
  domains: Counts = _counts()
  redactions: Counts = _counts()
  faults: Counts = _counts()
  fault_examples: dict[str, list[list[str]]] = dataclasses.field(default_factory=dict)
  hits: list[list[str]] = dataclasses.field(default_factory=list)
  samples: dict[str, list[list[str]]] = dataclasses.field(default_factory=dict)

  def add_input(self, document: Document) -> None:
    """Counts a document as it was collected."""
    _add(self.collected, document.source, 1, _size(document))

  def add_fault(self, name: str, reason: str) -> None:
    """Counts what could not be read or processed.

    Args:
      name: of the document, or of the file.
      reason: of which `collect.kind` is counted.
    """
    kind = collect.kind(reason)
    _add(self.faults, kind, 1)
    examples = self.fault_examples.setdefault(kind, [])
    examples.append([well_formed(name), well_formed(reason)])
    del examples[MAX_FAULTS:]

  def add_removed(self, document: Document) -> None:
    """Counts a document that `document.removed_by` removed."""
    rule = document.removed_by
    failed = dict.fromkeys([rule, *document.failed])
    self._look(document, failed)
    _add(self.removed, rule, 1, _size(document))
    for one in failed:
      _add(self.failed, one, 1, int(len(failed) == 1))
    self._sample(rule, document, MAX_SAMPLES)

  def add_kept(self, document: Document) -> None:
    """Counts a document that came through all stages."""
    size = _size(document)
    self._look(document, ())
    _add(self.kept, document.source, 1, size)
    _add(self.licences, document.licence, 1, size)
    _add(self.lengths, str(length_bin(len(document.text))), 1)
    score = document.verdicts.get('language.score')
    scored = isinstance(score, (int, float))
    _add(self.languages, document.language, 1, size, round(score / SCORE_UNIT) if scored else 0,
         int(scored))
    domain = registered_domain(document.url)
    if domain:
      _add(self.domains, domain, 1, size)
      self._prune_domains(2 * MAX_DOMAINS)
    for rule, value in document.verdicts.items():
      if rule.startswith('privacy.') and isinstance(value, int) and value:
        _add(self.redactions, rule, int(value), 1)
    self._sample(KEPT, document, MAX_KEPT_SAMPLES)

  def add_written(self, document: Document, copies: int) -> None:
    """Counts a kept document as it is written; not at all if there are 0 copies."""
    size = _size(document)
    _add(self.written, document.source, int(copies > 0), size * (copies > 0), copies, size * copies)

  def merge(self, other: Summary) -> None:
    """Adds the summary of later blocks."""
    for field in dataclasses.fields(self):
      mine, theirs = getattr(self, field.name), getattr(other, field.name)
      if field.name in ('fault_examples', 'samples', 'hits', 'rules'):
        continue
      for key, values in theirs.items():
        _add(mine, key, *values)
    known = {rule for rule, _ in self.rules}
    self.rules += [pair for pair in other.rules if pair[0] not in known]
    self._prune_domains(MAX_DOMAINS)
    for kind, examples in other.fault_examples.items():
      self.fault_examples[kind] = [*self.fault_examples.get(kind, ()), *examples][:MAX_FAULTS]
    self.hits = sorted(self.hits + other.hits)[:MAX_HITS]
    for rule, samples in other.samples.items():
      most = MAX_SAMPLES if rule else MAX_KEPT_SAMPLES
      self.samples[rule] = sorted(self.samples.get(rule, []) + samples)[:most]

  def to_json(self) -> dict[str, Any]:
    """Returns plain dictionaries and lists; equal summaries give equal ones, key order and all."""
    self._prune_domains(MAX_DOMAINS)
    found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {name: dict(sorted(value.items())) if isinstance(value, dict) else value
            for name, value in found.items()}

  @classmethod
  def from_json(cls, fields: dict[str, Any]) -> Summary:
    """Returns the summary that `to_json` wrote; takes what it is given as its own."""
    return cls(**fields)

  def ordered_rules(self) -> list[str]:
    """Returns the rules in the order in which documents meet them, those of a stage together.

    A rule that says something of few documents may appear after later ones: it is put behind the
    one that stood before it. First come groupings, which say nothing of what they keep.
    """
    order: list[str] = []
    for rule, before in self.rules:
      first = sum(known not in self.seen for known in order) if rule in self.seen else 0
      order.insert(order.index(before) + 1 if before in order else first, rule)
    stages: dict[str, list[str]] = {}
    for rule in order:
      stages.setdefault(rule.partition('.')[0], []).append(rule)
    return [rule for rules in stages.values() for rule in rules]

  def _look(self, document: Document, failed: Iterable[str]) -> None:
    before = ''
    for rule in dict.fromkeys((*document.verdicts, *failed)):
      if not _is_rule(rule):
        continue
      if rule not in self.seen and rule not in self.failed:
        self.rules.append([rule, before])
      before = rule
    for rule, value in document.verdicts.items():
      if not _is_rule(rule):
        continue
      _add(self.seen, rule, 1)
      if rule.startswith('decontaminate.') and value and not isinstance(value, (int, float)):
        hit = [_hash(document.name), well_formed(document.name), rule, passports.spell(value)]
        self.hits = sorted([*self.hits, hit])[:MAX_HITS]

  def _sample(self, rule: str, document: Document, most: int) -> None:
    samples, key = self.samples.setdefault(rule, []), _hash(document.name)
    if len(samples) < most or key <= samples[-1][0]:
      text = document.text or repr((document.raw or b'')[:SAMPLE_CHARACTERS])[2:-1]
      cut = '…' if len(text) > SAMPLE_CHARACTERS else ''
      name, source, text = map(well_formed, (document.name, document.source,
                                             text[:SAMPLE_CHARACTERS]))
      samples.append([key, name, source, text + cut])
      samples.sort()
      del samples[most:]

  def _prune_domains(self, most: int) -> None:
    """A domain that is among the lowest of all was so in every part: its counts are whole."""
    if len(self.domains) > most:
      lowest = sorted(self.domains, key=lambda name: (_hash(name), name))[:MAX_DOMAINS]
      self.domains = {name: self.domains[name] for name in lowest}


def length_bin(length: int) -> int:
  """Returns the least length of its bin: each octave has four, of equal width."""
  shift = max(length.bit_length() - 3, 0)
  return length >> shift << shift


def registered_domain(url: str) -> str:
  """Returns what someone registered of a URL's host: 'bbc.co.uk' of 'https://www.bbc.co.uk/news'.

  A guess by the labels' forms, without the list of public suffixes; '' if there is no host.
  """
  try:
    host = (urllib.parse.urlsplit(url if '//' in url else f'//{url}').hostname or '').rstrip('.')
  except ValueError:
    return ''
  labels = well_formed(host).split('.')
  if labels[-1].isdigit() or ':' in host:  # An IP address.
    return host
  shared = len(labels) > 2 and len(labels[-1]) == 2 and labels[-2] in _SHARED_LABELS
  return '.'.join(labels[-3 if shared else -2:])


def _is_rule(verdict: str) -> bool:
  """A fault, and of whom a document is a duplicate, are said besides."""
  return '.' in verdict and not verdict.endswith('.duplicate_of')


def _add(counts: Counts, key: str, *values: int) -> None:
  key = key if key.isascii() else well_formed(key)
  standing = counts.get(key)
  if standing is None:
    counts[key] = list(values)
  else:
    for index, value in enumerate(values):
      standing[index] += value


def _size(document: Document) -> int:
  if document.text or document.raw is None:
    return len(document.text.encode('utf-8', 'surrogatepass'))
  return len(document.raw)


def _hash(name: str) -> str:
  return hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:16]
