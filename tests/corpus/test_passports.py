"""Passports tell of every document; a summary is the same however its blocks were put together."""

import copy
import json
import random

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from lm.corpus import passports
from lm.corpus import summary
from lm.corpus import write
from lm.corpus.document import Document

RULES = ('gopher.word_count', 'gopher.symbols', 'c4.curly', 'language.score', 'privacy.email',
         'decontaminate.overlap')  # fmt: skip


def make(seed):
  """A document of any fate, a function of the seed."""
  rng = random.Random(seed)
  text = ' '.join(rng.choices(['the', 'cat', '日本', '\ud800', 'x\x00y'], k=rng.randrange(40)))
  document = Document(
      f'web/a:{seed}', text, source=rng.choice(['web', 'wiki']), address=seed,
      url=rng.choice(['', f'https://www.a{seed % 7}.co.uk/x', 'http://[bad',
                      f'http://b{seed}.org']),
      licence=rng.choice(['', 'MIT']), language=rng.choice(['', 'en', 'zh']),
  )  # fmt: skip
  for rule in RULES[: rng.randrange(len(RULES) + 1)]:
    value = {'c4.curly': rng.random() < 0.5, 'decontaminate.overlap': rng.choice(['', 'sst2: a b'])}
    document.verdicts[rule] = value.get(rule, rng.choice([rng.random(), rng.randrange(3)]))
    if rng.random() < 0.1:
      document.remove(rule)
  return document


def summarise(seeds):
  """The summary of a block."""
  found = summary.Summary()
  for document in map(make, seeds):
    found.add_input(document)
    if document.removed_by:
      found.add_removed(document)
    else:
      found.add_kept(document)
      found.add_written(document, write.copies(document.name, 1.5))
    if document.address % 5 == 0:
      found.add_fault(document.name, f'Error{document.address % 3}: broken')
  return found


def merged(parts):
  """Those of the parts, from left to right."""
  first, *others = copy.deepcopy(parts)
  for other in others:
    first.merge(other)
  return first


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 400), max_size=12), min_size=1, max_size=8), st.data())
def test_a_summary_is_the_same_in_any_grouping_of_its_blocks(blocks, data):
  parts = [summarise(block) for block in blocks]
  whole = merged(parts)
  cut = data.draw(st.integers(0, len(parts)))
  halves = [merged(half) for half in (parts[:cut], parts[cut:]) if half]
  assert merged(halves) == whole
  assert merged([summarise(sum(blocks, []))]) == whole


def test_domains_beyond_the_limit_are_whole_and_the_same_in_any_grouping(monkeypatch):
  monkeypatch.setattr(summary, 'MAX_DOMAINS', 5)
  blocks = [range(i, i + 30) for i in range(0, 300, 20)]
  parts = [summarise(block) for block in blocks]
  whole = merged(parts)
  assert merged([merged(parts[:4]), merged(parts[4:9]), merged(parts[9:])]) == whole
  monkeypatch.undo()
  exact = merged([summarise(block) for block in blocks]).domains
  assert len(whole.domains) == 5 < len(exact)
  assert all(exact[name] == counts for name, counts in whole.domains.items())


def test_a_summary_survives_json():
  found = summarise(range(100))
  text = json.dumps(found.to_json())
  assert summary.Summary.from_json(json.loads(text)) == found
  assert json.dumps(summary.Summary.from_json(json.loads(text)).to_json()) == text


def test_a_summary_counts_every_document_once():
  found = summarise(range(400))
  documents = list(map(make, range(400)))
  removed = [document for document in documents if document.removed_by]
  total = lambda counts, column=0: sum(values[column] for values in counts.values())
  assert total(found.collected) == 400 == total(found.kept) + total(found.removed)
  assert total(found.removed) == len(removed) > 0
  assert total(found.lengths) == total(found.languages) == total(found.kept)
  both = [d for d in removed if len(set(d.failed)) > 1]
  assert both and total(found.failed) == sum(len(set(d.failed)) for d in removed)
  assert total(found.failed, 1) == len(removed) - len(both)
  assert found.seen[RULES[0]] == [sum(RULES[0] in d.verdicts for d in documents)]
  assert total(found.written, 2) == sum(write.copies(d.name, 1.5) for d in documents
                                        if not d.removed_by)
  assert found.ordered_rules() == ['gopher.word_count', 'gopher.symbols', *RULES[2:]]
  assert total(found.faults) == 80 and len(found.fault_examples['Error0']) == summary.MAX_FAULTS


def test_rules_stand_in_the_order_in_which_documents_meet_them():
  order = ['url.duplicate', 'extract.empty', 'gopher.a', 'gopher.b', 'substrings.duplicate',
           'privacy.email']
  documents = [Document(f'{i}', 'x', verdicts=dict.fromkeys(rules, 1)) for i, rules in enumerate([
      ['extract.empty', 'gopher.a', 'privacy.email'],  # which no later rule removed
      ['extract.empty', 'gopher.a', 'gopher.b', 'substrings.duplicate', 'privacy.email'], []])]
  documents[2].verdicts['url.duplicate_of'] = 0
  documents[2].remove('url.duplicate')
  for _ in range(2):
    found = summary.Summary()
    for document in documents:
      (found.add_removed if document.removed_by else found.add_kept)(document)
    assert found.ordered_rules() == order
    documents.reverse()


def test_samples_are_of_the_lowest_hashes_and_short():
  found = summarise(range(400))
  kept = sorted(summary._hash(d.name) for d in map(make, range(400)) if not d.removed_by)
  assert [row[0] for row in found.samples['']] == kept[: summary.MAX_KEPT_SAMPLES]
  one = summary.Summary()
  one.add_kept(Document('long', 'x' * 10_000))
  assert one.samples[''][0][3] == 'x' * summary.SAMPLE_CHARACTERS + '…'


@pytest.mark.parametrize('length', [0, 1, 7, 8, 9, 10, 100, 1023, 1024, 10**9])
def test_a_length_lies_in_its_bin(length):
  low = summary.length_bin(length)
  assert low <= length and summary.length_bin(low) == low
  assert length < 8 or (length - low) / length <= 0.25


@pytest.mark.parametrize('url, domain', [
    ('https://www.bbc.co.uk/news', 'bbc.co.uk'), ('http://lemonde.fr', 'lemonde.fr'),
    ('https://a.b.example.com:8080/?q', 'example.com'), ('example.org/page', 'example.org'),
    ('http://127.0.0.1/x', '127.0.0.1'), ('http://[::1]/', '::1'), ('', ''), ('http://[bad', ''),
    ('file:///etc/passwd', ''),
    ('https://xn--bcher-kva.example.', 'xn--bcher-kva.example')])  # fmt: skip
def test_what_was_registered_of_a_host(url, domain):
  assert summary.registered_domain(url) == domain


def test_every_document_has_a_passport_that_is_found_by_its_name(tmp_path):
  documents = list(map(make, range(300)))
  kept = [d for d in documents if not d.removed_by]
  removed = [d for d in documents if d.removed_by]
  blocks = []
  for number in range(3):
    blocks.append(tmp_path / 'blocks' / f'{number}.parquet')
    passports.write(blocks[-1], kept[number::3])
  ordered = [d for number in range(3) for d in kept[number::3]]
  home = tmp_path / 'passports'
  shard = write.Writer().write(tmp_path / 'data-00000-of-00001', ordered)
  assert passports.merge(blocks, home / 'kept-00000-of-00001.parquet', shard.file) == len(kept)
  assert passports.write(home / 'removed-00000-of-00001.parquet', removed) == len(removed)
  rows = list(passports.read(home / 'kept-00000-of-00001.parquet'))
  for record, row in zip(write.read(tmp_path / shard.file), rows, strict=True):
    assert (record['name'], record['url']) == (row['name'], row['url'])
    assert row['bytes'] == len(record['text'].encode())
  for document in documents:
    (found,) = passports.find(home, document.name)
    assert found['removed_by'] == document.removed_by and found['address'] == document.address
    assert found['verdicts'] == {k: passports.spell(v) for k, v in document.verdicts.items()}
    where = (shard.file, ordered.index(document)) if not document.removed_by else ('', -1)
    assert (found['shard'], found['index']) == where
  assert passports.at(home, [7, 10**6]).keys() == {7}
  assert passports.find(home, 'nobody') == []


def test_merging_gives_the_same_bytes_and_groups_rows(tmp_path, monkeypatch):
  monkeypatch.setattr(passports, '_GROUP_ROWS', 64)
  paths = []
  for number in range(5):
    paths.append(tmp_path / f'{number}.parquet')
    passports.write(paths[-1], map(make, range(40 * number, 40 * number + 40)))
  for out in ('a', 'b'):
    passports.merge(paths, tmp_path / out, 'x.parquet')
  assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()
  rows = list(passports.read(tmp_path / 'a'))
  assert [row['address'] for row in rows] == [row['index'] for row in rows] == list(range(200))
  assert passports.merge([], tmp_path / 'none') == 0 and not list(passports.read(tmp_path / 'none'))
