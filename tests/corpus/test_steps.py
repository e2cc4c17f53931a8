"""The steps of a corpus lose no document, blame the right one, and keep what they are given."""
import dataclasses

from hypothesis import given, strategies as st
import numpy as np
import pytest

from lm.corpus import collect, stage, steps
from lm.corpus.document import ADDRESS_BITS, Document
from lm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Judge(stage.Stage):
  """Does what the text says, to one document after the other."""

  def apply(self, document):
    if document.text == 'fault':
      raise RuntimeError('it broke')
    if document.text == 'user':
      raise UserError('a file is missing')
    if document.text == 'remove':
      document.remove('judge.text')
    document.verdicts['judge.seen'] = True


@dataclasses.dataclass(frozen=True)
class Marks(stage.Grouping):
  """Writes what was decided into the documents."""

  def carry_out(self, document, decisions):
    document.verdicts['marks'] = decisions['value'].tolist()


def documents(*texts, block=0):
  return [Document(f'd{i}', text, address=block << ADDRESS_BITS | i)
          for i, text in enumerate(texts)]


def test_stages_are_cut_at_groupings():
  a, b, c, group, other = Judge(), Judge(), Judge(), Marks(), Marks()
  cut = steps.segments((a, group, other, b, c))
  assert [(s.first, s.before, s.stages, s.after) for s in cut] == [
      (0, None, (a,), group), (2, group, (), other), (3, other, (b, c), None)]


@given(st.lists(st.sampled_from(('keep', 'remove', 'fault')), max_size=12),
       st.sets(st.integers(0, 11)))
def test_each_document_ends_kept_or_removed_and_only_the_guilty_are_blamed(texts, poison):
  given_ = documents(*texts)
  found = steps.advance(steps.Segment(4, None, (Judge(), Judge()), None), given_, None,
                        [(5, index, 'timeout: too long') for index in poison])
  expected = {f'd{i}': 'judge.text' if text == 'remove' else 'fault.RuntimeError'
              if text == 'fault' else 'fault.timeout' if i in poison else ''
              for i, text in enumerate(texts)}
  assert {d.name: d.removed_by for d in [*found.kept, *found.removed]} == expected
  assert len(found.kept) + len(found.removed) == len(texts)
  assert [d.name for d in found.kept] == [name for name, rule in expected.items() if not rule]
  assert {name for name, _ in found.faults} == {
      name for name, rule in expected.items() if rule.startswith('fault.')}
  assert all(document.verdicts['judge.seen'] for document in found.kept)


def test_a_mistake_of_the_user_is_no_fault_of_a_document():
  with pytest.raises(UserError, match='a file is missing'):
    steps.advance(steps.Segment(0, None, (Judge(),), None), documents('keep', 'user'), None)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), max_size=30))
def test_decisions_reach_the_documents_that_they_are_about(pairs):
  decisions = np.array([(3 << ADDRESS_BITS | index, value) for index, value in sorted(pairs)],
                       [('address', np.int64), ('value', np.int64)])
  others = np.array([(2 << ADDRESS_BITS, 7), (4 << ADDRESS_BITS, 8)], decisions.dtype)
  everything = np.concatenate([others[:1], decisions, others[1:]])
  assert steps.slices(everything, 3).tolist() == decisions.tolist()
  some = documents(*'abcdefgh', block=3)
  steps.advance(steps.Segment(1, Marks(), (), None), some, steps.slices(everything, 3))
  for index, document in enumerate(some):
    values = [value for at, value in sorted(pairs) if at == index]
    assert document.verdicts.get('marks', []) == values


@given(st.lists(st.integers(0, 2**64 - 1)), st.integers(0, 9))
def test_partitions_hold_every_record_once(keys, bits):
  records = np.zeros(len(keys), [('key', np.uint64)])
  records['key'] = sorted(keys)
  parts = [steps.partition(records, part, bits)['key'].tolist() for part in range(1 << bits)]
  assert [key for part in parts for key in part] == sorted(keys)
  assert all(key >> (64 - bits) == part for part, found in enumerate(parts) for key in found)


@given(st.text(), st.binary(), st.dictionaries(st.text(), st.one_of(
    st.none(), st.booleans(), st.integers(-2**60, 2**60), st.floats(allow_nan=False), st.text(),
    st.lists(st.lists(st.text())))))
def test_documents_are_packed_and_unpacked_whole(text, raw, verdicts):
  document = Document('\ud800', text, raw, verdicts=verdicts, address=2**62, failed=['a.b'])
  assert steps.unpack(steps.pack([document, document])) == [document, document]
  verdicts['n'] = np.float64(0.5)
  assert steps.unpack(steps.pack([document]))[0].verdicts['n'] == 0.5


def test_a_file_that_ended_a_process_is_named_and_those_beside_it_are_read(tmp_path):
  for name in 'abc':
    (tmp_path / f'{name}.txt').write_text(f'text of {name}')
  group, = collect.groups([collect.Source('s', f'{tmp_path}/*.txt')])
  block, = collect.split(group, lambda name, reason: None)
  faults, seen = [], []
  found = steps.read(block, 5, [(-1, 1, 'crash: twice'), (0, 0, 'another place')],
                     lambda place, index: seen.append((place, index)),
                     lambda name, reason: faults.append((name, reason)))
  assert [document.name for document in found] == ['s/a.txt', 's/c.txt']
  assert [document.address for document in found] == [5 << ADDRESS_BITS, 5 << ADDRESS_BITS | 1]
  assert faults == [('s/b.txt', 'crash: twice')] and seen == [(-1, 0), (-1, 2)]
