"""Mixtures: rates as SeqIO's and T5's, rows in their proportions, any row found directly."""

import collections
import dataclasses
import json

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from lm.data import examples
from lm.data import loader
from lm.data import mixtures
from lm.data import objectives
from lm.data import tasks
from lm.errors import UserError


class Rows:
  """A stream of rows that tell which they are."""

  def __init__(self, size, stream=0, length=4, name='decoder_loss_weights'):
    self.size, self.stream, self.length, self.name = size, stream, length, name

  def __len__(self):
    return self.size

  def __getitem__(self, row):
    value = np.full(self.length, 1.0, np.float32)
    return {self.name: value, 'tokens': np.array([self.stream, row], np.int32)}


def mix(sizes, rates, weights=None):
  streams = [Rows(size, index) for index, size in enumerate(sizes)]
  names = [f'stream {index}' for index in range(len(sizes))]
  return mixtures.MixedRows(streams, rates, weights or [1.0] * len(sizes), names)


def component(name='a', **fields):
  return mixtures.Component(tasks.TextTask(name=name), **fields)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(any))
def test_each_stream_is_shown_in_order_and_at_its_rate(rates):
  mixed = mix([10] * len(rates), rates)
  shown = np.zeros(len(rates), int)
  for row in range(200):
    stream, place = mixed.locate(row)
    assert place == shown[stream]  # No row of a stream is skipped or shown twice.
    shown[stream] += 1
    expected = (row + 1) * np.array(rates) / sum(rates)
    assert np.abs(shown - expected).max() < len(rates)
  assert not shown[np.array(rates) == 0].any()


def test_rows_far_away_are_found_directly():
  mixed = mix([10, 10, 10], [0.7, 0.2, 0.1])
  row = 10**12
  found = [mixed.locate(row + i) for i in range(1000)]
  for stream, share in enumerate((0.7, 0.2, 0.1)):
    places = [place for s, place in found if s == stream]
    assert places == list(range(places[0], places[0] + len(places)))
    assert abs(places[0] - share * row) < 3 and abs(len(places) - 1000 * share) < 3


def test_an_epoch_shows_every_stream_whole():
  mixed = mix([30, 5], [2.0, 1.0])
  found = [mixed.locate(row) for row in range(len(mixed))]
  assert len(mixed) == 45 and {place for s, place in found if s == 0} == set(range(30))


def test_loss_weights_are_multiplied():
  mixed = mix([4, 4], [1.0, 1.0], [1.0, 0.25])
  batch = loader.Loader.of_rows(mixed, 4).batch(0)
  assert batch['decoder_loss_weights'].dtype == np.float32
  assert [tuple(row) for row in batch['tokens']] == [mixed.locate(row) for row in range(4)]
  for (stream, _), weights in zip(batch['tokens'], batch['decoder_loss_weights']):
    assert (weights == (0.25 if stream else 1.0)).all()
  with pytest.raises(UserError, match='loss_weight=2.0 .* no loss weights'):
    mixtures.MixedRows([Rows(3, name='query_tokens')], [1.0], [2.0], ['crops'])


def test_different_features_are_refused_by_name():
  with pytest.raises(UserError, match=r'decoder_loss_weights is .*\(4,\).* of \(a\) and .*\(5,\)'):
    mixtures.MixedRows([Rows(3), Rows(3, length=5)], [1, 1], [1, 1], ['a', 'b'])
  with pytest.raises(UserError, match=r'no such feature of \(b\)'):
    mixtures.MixedRows([Rows(3), Rows(3, name='other')], [1, 1], [1, 1], ['a', 'b'])


@pytest.mark.parametrize('temperature, maximum, expected', [
    (1.0, None, [100, 10_000, 40]), (1.0, 200, [100, 200, 40]), (2.0, 400, [10, 20, 40**0.5])])
def test_rates_follow_seqios_formula(temperature, maximum, expected):
  mixture = mixtures.Mixture((component(),) * 3, temperature, maximum)
  np.testing.assert_allclose(mixture.rates([100, 10_000, 40]), expected)


@pytest.fixture
def mixture(task, prepared):
  """A task twice, of which the cache stands."""
  return mixtures.Mixture((
      mixtures.Component(task, objectives.FillInTheMiddle()),
      mixtures.Component(task, loss_weight=0.5)), name='both')  # fmt: skip


@pytest.mark.supports('data', 'mixtures by rate, temperature and cap')
def test_a_mixture_of_tasks_makes_batches_by_seed_and_step_alone(mixture):
  prepared = mixture.prepare()
  data = prepared.loader('train', 32, 4, seed=3)
  with data.iterate(7, 2, num_threads=2) as batches:
    found = list(batches)
  again = prepared.loader('train', 32, 4, seed=3)
  for step, batch in zip((7, 8), found):
    parts = [again.batch(step, slice(h, h + 2)) for h in (0, 2)]
    for key, value in batch.items():
      np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), value)
  weights = np.concatenate([data.batch(s)['decoder_loss_weights'].max(1) for s in range(20)])
  assert [(weights == weight).sum() for weight in (1.0, 0.5)] == [40, 40]
  rows = data.batch(0)['decoder_target_tokens']
  assert len({tuple(row) for row in rows}) == 4  # Both components do not show the same text.
  for number, row in enumerate(rows):
    (example,) = data.from_row(0, 4).examples(number)
    stream = prepared.prepared[example.stream].cache('train')
    parts = [stream.slice(piece.document, piece.start, piece.stop) for piece in example.pieces]
    lost = collections.Counter(np.concatenate(parts).tolist()) - collections.Counter(row.tolist())
    assert lost.total() <= 3 * (len(parts) - 1)  # What does not fit in behind a moved middle.
    assert weights[number] == (1.0, 0.5)[example.stream]


def test_rates_are_part_of_the_digest_and_of_the_examples(mixture):
  rated = [dataclasses.replace(c, rate=r) for c, r in zip(mixture.components, (3.0, 1.0))]
  other = dataclasses.replace(mixture, components=tuple(rated)).prepare()
  prepared = mixture.prepare()
  assert other.rates == [3.0, 1.0] and other.info['digests'] != prepared.info['digests']
  assert prepared.rates == [prepared.prepared[0].info['splits']['train']['documents']] * 2


def test_components_agree_on_the_ids_at_the_top(mixture):
  parts = [dataclasses.replace(c, objective=o) for c, o in zip(
      mixture.components, (objectives.SpanCorruption(), objectives.UL2()))]
  bound = dataclasses.replace(mixture, components=tuple(parts)).prepare().bound_objectives
  assert [o.vocab_size for o in bound] == [320 + 103] * 2


@pytest.mark.supports('data', 'SeqIO mixtures')
def test_seqio_knows_the_mixture_and_gives_the_same_rates(mixture):
  seqio = pytest.importorskip('seqio')
  for _ in range(2):  # A second time replaces the first.
    registered = mixture.register()
  task, = registered.tasks
  examples = mixture.prepare().rates[0]
  assert task.name == 'tiny' and registered.get_rate(task) == 2 * examples

  class Cached:
    """What `seqio.mixing_rate_num_examples` asks of a task."""

    cache_dir = 'cache'
    get_cached_stats = staticmethod(lambda split: {'examples': examples})

  ours = dataclasses.replace(mixture, temperature=2.0, maximum=5.0).prepare().rates[0]
  assert ours == seqio.mixing_rate_num_examples(Cached(), 5.0, temperature=2.0) == 5**0.5


@pytest.mark.parametrize('make, match', [
    (lambda: mixtures.Mixture(()), 'components is empty'),
    (lambda: mixtures.Mixture((component(rate=1.0), component())), 'give one to all'),
    (lambda: mixtures.Mixture((component(rate=1.0),), temperature=2.0), 'temperature=2.0'),
    (lambda: mixtures.Mixture((component(),), temperature=0.0), 'must be above 0'),
    (lambda: component(rate=-1.0), "rate=-1.0 of task 'a'"),
    (lambda: component(objective=objectives.CausalLM(contiguous=True)), 'contiguous=True'),
    (lambda: mix([1, 1], [0.0, 0.0]), 'sum to 0'),
    (lambda: loader.Loader.of_rows(mix([1], [1.0]), 0), 'batch_size=0'),
    (lambda: tasks.register_mixture('m', {tasks.TextTask(): 1, tasks.TextTask('x'): 1}),
     'different names')])
def test_mistakes_in_mixtures_are_refused_in_one_sentence(make, match):
  with pytest.raises(UserError, match=match):
    make()


def labelled(folder, form, **changes):
  (folder / 'some.jsonl').write_text(''.join(
      json.dumps({'a': f'the text {i}', 'label': 'odd' if i % 2 else 'even'}) + '\n'
      for i in range(20)))
  source = examples.Files(str(folder / 'some.jsonl'), str(folder / 'some.jsonl'))
  return examples.ExampleTask(source, examples.Classification(), form, name='parity',
                              cache_dir=str(folder / 'cache'), **changes)


@pytest.mark.supports('data', 'mixtures of texts and labelled examples')
@pytest.mark.parametrize('form, objective', [('text_to_text', objectives.SpanCorruption()),
                                             ('decoder', objectives.CausalLM())])
def test_labelled_examples_stand_beside_texts(task, prepared, tmp_path, form, objective):
  mixture = mixtures.Mixture((mixtures.Component(task, objective, 3.0),
                              mixtures.Component(labelled(tmp_path, form), rate=1.0)))
  assert prepared.vocabulary.digest == mixture.prepare().prepared[1].vocabulary.digest
  prepared = mixture.prepare()
  stream = prepared.loader('train', 64, 4, 0)
  batch, decode = stream.batch(0), prepared.vocabulary.decode
  is_labelled = [found.stream == 1 for row in range(4) for found in stream.examples(row)[:1]]
  assert sum(is_labelled) == 1
  row = {name: values[is_labelled.index(True)] for name, values in batch.items()}
  targets = decode(row['decoder_target_tokens'])
  if form == 'text_to_text':
    assert 'the text' in decode(row['encoder_input_tokens'])
    assert set(targets.replace('even', 'odd').split('odd')) == {''}
    assert not row['decoder_span_ids'].any() and batch['decoder_span_ids'].any()
  else:
    assert 'the text' in targets and 0 < row['decoder_loss_weights'].sum() < 64
  again = prepared.loader('train', 64, 4, 0).batch(0)
  assert all((again[name] == batch[name]).all() for name in batch)


def test_forms_that_do_not_mix_are_refused(tmp_path):
  with pytest.raises(UserError, match="form='encoder' of task 'parity' does not go into a mixture"):
    mixtures.Component(labelled(tmp_path, 'encoder'))
  both = mixtures.Mixture((component(), mixtures.Component(labelled(tmp_path, 'decoder'))))
  with pytest.raises(UserError, match='register the tasks of each alone'):
    both.register()
