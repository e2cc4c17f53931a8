"""Packing and loading: every token once an epoch, and batches that depend on (seed, step) alone."""

import pickle
import threading
import time

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from lm.data import loader
from lm.data import objectives
from lm.data import packing
from lm.errors import UserError


class Documents:
  """Documents in memory; ids are unique, so each can be followed, except the ends, which are 1."""

  def __init__(self, lengths):
    self.lengths = np.array(lengths, np.int64)
    ends = np.cumsum(self.lengths)
    self.texts = [np.arange(end - length, end) + 2 for length, end in zip(lengths, ends)]
    for text in self.texts:
      text[-1] = 1

  def slice(self, index, start, stop):
    assert 0 <= start < stop <= self.lengths[index]
    return self.texts[index][start:stop]


lengths_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def _epoch(dataset, number):
  return [dataset[number * len(dataset) + index] for index in range(len(dataset))]


@settings(deadline=None)
@given(lengths_strategy, st.integers(1, 50), st.integers(0, 3))
def test_every_token_of_an_epoch_appears_exactly_once(lengths, sequence_length, epoch):
  documents = Documents(lengths)
  rows = _epoch(packing.ConcatThenSplit(documents, sequence_length, seed=3), epoch)
  tokens = np.concatenate([row.tokens[row.segment_ids > 0] for row in rows])
  assert sorted(tokens) == sorted(np.concatenate(documents.texts))
  assert sum((row.segment_ids == 0).sum() for row in rows) < sequence_length


@pytest.mark.supports('data', 'packing with segments')
@settings(deadline=None)
@given(lengths_strategy, st.integers(1, 50))
def test_each_piece_is_a_run_of_one_document(lengths, sequence_length):
  documents = Documents(lengths)
  whole = {tuple(text): text for text in documents.texts}
  for row in _epoch(packing.ConcatThenSplit(documents, sequence_length, seed=1), 0):
    count = int((row.segment_ids > 0).sum())
    assert (row.tokens[count:] == 0).all() and (row.positions[count:] == 0).all()
    for segment in range(1, row.segment_ids.max() + 1):
      inside = row.segment_ids == segment
      piece = row.tokens[inside]
      assert row.positions[inside].tolist() == list(range(len(piece)))
      before = int(row.previous) if segment == 1 else -1
      extended = [before, *piece] if before >= 0 else list(piece)
      assert any(
          list(text[start : start + len(extended)]) == extended
          for text in whole.values()
          for start in (range(len(text)) if before >= 0 else [0])
      )


@settings(deadline=None)
@given(lengths_strategy, st.integers(1, 50), st.integers(0, 4), st.integers(0, 99))
def test_pieces_say_what_a_row_is_made_of(lengths, sequence_length, batch_size, index):
  documents = Documents(lengths)
  dataset = packing.ConcatThenSplit(documents, sequence_length, seed=3)
  if batch_size:
    dataset = packing.Contiguous(documents, sequence_length, 3, batch_size)
  row, rebuilt, segments = dataset[index], *np.zeros((2, sequence_length), np.int32)
  for number, piece in enumerate(dataset.pieces(index), start=1):
    here = slice(piece.place, piece.place + piece.stop - piece.start)
    rebuilt[here] = documents.slice(piece.document, piece.start, piece.stop)
    segments[here] = number
  assert rebuilt.tolist() == row.tokens.tolist()
  assert segments.tolist() == row.segment_ids.tolist()


@settings(deadline=None)
@given(lengths_strategy, st.integers(1, 30), st.integers(1, 4))
def test_inputs_are_targets_shifted_within_documents(lengths, sequence_length, batch_size):
  batch = loader.Loader(Documents(lengths), sequence_length, batch_size, seed=0).batch(5)
  inputs, targets = batch['decoder_input_tokens'], batch['decoder_target_tokens']
  segments, positions = batch['decoder_segment_ids'], batch['decoder_positions']
  same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
  assert (inputs[:, 1:][same] == targets[:, :-1][same]).all()
  assert (inputs[:, 1:][~same] == 0).all()
  assert (positions[:, 1:][same] == positions[:, :-1][same] + 1).all()
  assert (batch['decoder_loss_weights'] == (targets > 0)).all()
  assert {key: value.dtype for key, value in batch.items()} == {
      key: np.dtype(np.float32 if 'weights' in key else np.int32) for key in batch
  }


@settings(deadline=None)
@given(lengths_strategy, st.integers(1, 50), st.integers(1, 5), st.integers(0, 2))
def test_contiguous_rows_go_on_where_they_ended(lengths, sequence_length, batch_size, epoch):
  documents = Documents(lengths)
  dataset = packing.Contiguous(documents, sequence_length, 3, batch_size)
  rows = _epoch(dataset, epoch)
  real = lambda row: row.tokens[row.segment_ids > 0]
  assert [int(row.restart) for row in rows] == [
      int(index < batch_size) for index in range(len(rows))
  ]
  streams = [np.concatenate([real(row) for row in rows[r::batch_size]]) for r in range(batch_size)]
  text = np.concatenate(streams)
  assert sorted(text) == sorted(np.concatenate(documents.texts))
  for document in documents.texts:  # Each is found whole in the streams laid end to end.
    if len(document) > 1:
      start = int(np.flatnonzero(text == document[0])[0])
      assert text[start : start + len(document)].tolist() == document.tolist()
  for stream_rows in (rows[r::batch_size] for r in range(batch_size)):
    for before, after in zip(stream_rows, stream_rows[1:]):
      if len(real(after)) and len(real(before)):
        goes_on = int(real(before)[-1]) != 1
        assert int(after.previous) == (int(real(before)[-1]) if goes_on else -1)


@pytest.mark.supports('data', 'contiguous rows for segment recurrence')
def test_contiguous_batches_are_a_function_of_seed_and_step():
  objective = objectives.CausalLM(contiguous=True)
  data = loader.Loader(_documents(), 16, 4, seed=7, objective=objective)
  for step in (5, 0, 1_000_000):
    batch = loader.Loader(_documents(), 16, 4, seed=7, objective=objective).batch(step)
    parts = [data.batch(step, slice(h, h + 1)) for h in range(4)]
    _assert_equal({key: np.concatenate([p[key] for p in parts]) for key in batch}, batch)
  restarts = [data.batch(step)['decoder_restart'].tolist() for step in range(8)]
  assert restarts[0] == restarts[4] == [1] * 4 and restarts[1] == restarts[3] == [0] * 4


def _documents():
  return Documents([3, 50, 1, 17, 8, 8, 120, 2, 33])


def _assert_equal(left, right):
  assert left.keys() == right.keys()
  for key in left:
    np.testing.assert_array_equal(left[key], right[key])


def test_seeds_and_epochs_give_other_orders_of_the_same_tokens():
  datasets = [packing.ConcatThenSplit(_documents(), 16, seed) for seed in (0, 1)]
  orders = [
      tuple(np.concatenate([row.tokens for row in _epoch(dataset, epoch)]))
      for dataset in datasets
      for epoch in (0, 1, 2)
  ]
  rows = [{tuple(row.tokens) for row in _epoch(datasets[0], epoch)} for epoch in (0, 1)]
  assert rows[0] != rows[1]  # Not the same sequences in another order: documents meet others too.
  assert len(set(orders)) == 6 and len({tuple(sorted(order)) for order in orders}) == 1


@pytest.mark.supports('data', 'batches by (seed, step) alone')
@pytest.mark.parametrize('num_threads', [0, 1, 4])
@pytest.mark.parametrize('start', [0, 3, 1_000_000])
def test_batches_do_not_depend_on_threads_or_start(num_threads, start):
  data = loader.Loader(_documents(), 16, 4, seed=7)
  with data.iterate(start, 6, num_threads=num_threads) as batches:
    found = list(batches)
  assert len(found) == 6
  other = loader.Loader(_documents(), 16, 4, seed=7)
  for step in (5, 0, 3):
    _assert_equal(found[step], other.batch(start + step))


@pytest.mark.parametrize('num_hosts', [1, 2, 4])
def test_hosts_rows_together_are_the_global_batch(num_hosts):
  data = loader.Loader(_documents(), 16, 4, seed=7)
  share = 4 // num_hosts
  hosts = [data.iterate(2, 3, rows=slice(h * share, (h + 1) * share)) for h in range(num_hosts)]
  for step in range(3):
    parts = [next(host) for host in hosts]
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    _assert_equal(joined, data.batch(2 + step))
  for host in hosts:
    host.close()


def test_closing_ends_the_threads():
  batches = loader.Loader(_documents(), 16, 4, seed=7).iterate(num_threads=3)
  next(batches)
  assert any(thread.name.startswith('grain') for thread in threading.enumerate())
  batches.close()
  deadline = time.monotonic() + 10
  while any(thread.name.startswith('grain') for thread in threading.enumerate()):
    assert time.monotonic() < deadline, [thread.name for thread in threading.enumerate()]
    time.sleep(0.05)
  with pytest.raises(StopIteration):
    next(batches)


def test_a_dataset_travels_to_other_processes():
  dataset = packing.ConcatThenSplit(_documents(), 16, seed=2)
  dataset[40]
  copy = pickle.loads(pickle.dumps(dataset))
  for index in (0, 40):
    for left, right in zip(dataset[index], copy[index]):
      np.testing.assert_array_equal(left, right)


def test_the_order_is_the_same_in_every_version():
  """A golden order: were it to change, no run could be resumed by a newer installation."""
  assert packing.permutation(8, 1, 2, 0).tolist() == [5, 6, 3, 2, 1, 0, 4, 7]


def test_sizes_out_of_range_are_refused():
  with pytest.raises(UserError, match='sequence_length=0'):
    loader.Loader(_documents(), 0, 1, seed=0)
  with pytest.raises(UserError, match='batch_size=0'):
    loader.Loader(_documents(), 1, 0, seed=0)
  with pytest.raises(UserError, match='no token'):
    loader.Loader(Documents([]), 1, 1, seed=0)
