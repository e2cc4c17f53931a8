"""Objectives: statistics of the papers, nothing lost, and rows that depend on (seed, row) alone."""

import dataclasses
import itertools
import re

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from lm.data import loader
from lm.data import objectives
from lm.data.objectives import masked
from lm.data.objectives import noise
from lm.data.objectives import spans
from lm.data.packing import Packed
from lm.data.vocabularies import ByteVocabulary
from lm.errors import UserError

V = 200  # Ids of the tests' vocabulary; extra ids stand at its top.
OBJECTIVES = [
    objectives.CausalLM(),
    objectives.PrefixLM(),
    objectives.FillInTheMiddle(V),
    objectives.MaskedLM(V),
    objectives.MaskedLM(V, framing=True, masking='whole_word', word_starts=np.arange(V) % 3 > 0),
    objectives.MaskedLM(V, next_sentence='nsp'),
    objectives.MaskedLM(V, next_sentence='sop', masking='span', word_starts=np.arange(V) % 3 > 0),
    objectives.SpanCorruption(V),
    objectives.UL2(V),
    objectives.Contrastive(V),
    objectives.Contrastive(V, same=True, framing=True),
]
NAMES = ['CausalLM', 'PrefixLM', 'FillInTheMiddle', 'MaskedLM', 'SpanCorruption', 'UL2',
         'Contrastive']


class Documents:
  """Random documents in memory, each ended by 1."""

  def __init__(self, lengths, seed=0, top=60):
    rng = np.random.default_rng(seed)
    self.lengths = np.array(lengths, np.int64)
    self.texts = [np.append(rng.integers(3, top, n - 1), 1).astype(np.int32) for n in lengths]

  def slice(self, index, start, stop):
    return self.texts[index][start:stop]


def pack(tokens, previous=-1):
  """A row of documents that end in 1, padded with 0."""
  tokens = np.array(tokens, np.int32)
  real = tokens > 0
  begins = np.concatenate([[True], tokens[:-1] == 1])
  places = np.arange(len(tokens))
  positions = (places - np.maximum.accumulate(np.where(begins, places, 0))) * real
  segment_ids = np.cumsum(begins) * real
  return Packed(tokens, segment_ids.astype(np.int32), positions.astype(np.int32),
                np.int32(previous))


def rows(objective, packed, count, seed=0):
  """The features of `count` calls on one row, and every draw of `packed` reversed."""
  rng = np.random.default_rng(seed)
  other = packed._replace(tokens=packed.tokens[::-1].copy())
  return [objective(packed, rng, lambda: other) for _ in range(count)]


def text_of(length, seed=0):
  return np.random.default_rng(seed).integers(3, 60, length)


@pytest.mark.supports('objectives', 'causal LM', 'prefix LM', 'masked LM', 'span corruption', 'UL2',
                      'fill in the middle', 'contrastive pairs')
@pytest.mark.parametrize('name', NAMES)
def test_the_example_of_each_docstring_is_true(name):
  doc = getattr(objectives, name).__doc__
  call = re.search(r'Example, `(.+?)`(?=\s|:)', doc).group(1)
  seed = re.search(r'default_rng\((\d+)\)', doc)
  lines = re.findall(r'^ {6}(\w+)((?: +\d+)+)$', doc, re.MULTILINE)
  table = {key: [float(value) for value in values.split()] for key, values in lines}
  row = pack(table.pop('tokens'), *map(int, table.pop('previous', ())))
  rng = np.random.default_rng(int(seed.group(1)) if seed else 0)
  features = eval(call, vars(objectives))(row, rng, None)
  assert {key: value.tolist() for key, value in features.items()} == table


@pytest.mark.parametrize('objective', OBJECTIVES, ids=lambda o: type(o).__name__)
def test_rows_depend_on_seed_and_row_alone(objective):
  documents = Documents([3, 90, 40, 17, 8, 8, 120, 2, 33])
  data = loader.Loader(documents, 32, 4, seed=7, objective=objective)
  batches = [data.batch(step) for step in (2, 3, 1_000_000)]
  fresh = loader.Loader(documents, 32, 4, seed=7, objective=objective)
  for step, batch in zip((1_000_000, 3, 2), batches[::-1]):
    parts = [fresh.batch(step, slice(h, h + 1)) for h in (3, 1, 0, 2)]
    for key, value in batch.items():
      joined = np.concatenate([parts[i][key] for i in (2, 1, 3, 0)])
      np.testing.assert_array_equal(joined, value)
      assert value.dtype in (np.int32, np.float32, bool) and value.dtype == batches[0][key].dtype
      assert value.shape == batches[0][key].shape and value.shape[0] == 4
  other = loader.Loader(documents, 32, 4, seed=8, objective=objective).batch(2)
  assert any((other[key] != batches[0][key]).any() for key in other)
  inputs = [key for key in other if key.endswith('_tokens') and 'masked' not in key]
  lengths = {key: other[key].shape[1] for key in inputs}
  assert 32 in lengths.values() and max(lengths.values()) <= 32 or type(objective).__name__ == 'UL2'


def test_the_loaders_random_numbers_are_new_in_each_row_and_epoch():
  objective = objectives.MaskedLM(V)
  data = loader.Loader(Documents([64]), 64, 1, seed=0, objective=objective)
  masks = {tuple(data.batch(step)['masked_positions'][0]) for step in range(20)}
  assert len(masks) == 20  # The text is the same in all 20 epochs.


def test_draws_are_other_rows_of_the_epoch_by_seed_and_row():
  class Drawing(objectives.CausalLM):
    """Gives the row and what it draws."""

    def __call__(self, packed, rng, draw):
      return {'row': packed.tokens, 'drawn': np.stack([draw().tokens for _ in range(40)])}

  data = loader.Loader(Documents([100]), 10, 10, seed=0, objective=Drawing())
  for step in (0, 7):
    batch = data.batch(step)
    own = [tuple(row) for row in batch['row']]
    for row, drawn in zip(own, batch['drawn']):
      found = {tuple(other) for other in drawn}
      assert found <= set(own) - {row} and len(found) >= 7
    for number, (row, drawn) in enumerate(zip(own, batch['drawn'])):  # and the loader names them
      told = data.examples(step * 10 + number)
      rows = [[data.batch(e.row // 10)['row'][e.row % 10].tolist() for e in told]]
      assert rows == [[list(row), *drawn.tolist()]] and len(told[0].pieces) == 1
    np.testing.assert_array_equal(batch['drawn'][3:4], data.batch(step, slice(3, 4))['drawn'])


def test_a_prefix_is_seen_by_all_of_its_document_and_carries_no_loss():
  row = pack([*text_of(20), 1, *text_of(9), 1, 5, 1, 0, 0])
  sizes = []
  for features in rows(objectives.PrefixLM(), row, 300):
    prefix, weights = features['decoder_prefix'], features['decoder_loss_weights'] > 0
    for segment in (1, 2, 3):
      inside = row.segment_ids == segment
      size = int((inside & ~weights).sum())
      assert 1 <= size < inside.sum()
      assert prefix[inside].tolist() == [True] * (size + 1) + [False] * (inside.sum() - size - 1)
      assert weights[inside].tolist() == [False] * size + [True] * (inside.sum() - size)
      sizes += [size] * (segment == 1)
    assert not prefix[-2:].any() and not weights[-2:].any()
  assert set(sizes) == set(range(1, 21))


def test_fill_in_the_middle_loses_nothing_and_keeps_its_rates():
  objective = objectives.FillInTheMiddle(V)
  before, middle, after = 199, 198, 197
  text, orders = text_of(60), []
  for features in rows(objective, pack([*text, 1]), 2000):
    target = features['decoder_target_tokens'].tolist()
    if before not in target:
      orders.append('plain')
      assert target == [*text, 1, 0, 0, 0]
      continue
    assert target[0] == before and target[-1] == 1
    at = {id_: target.index(id_) for id_ in (middle, after)}
    if at[after] == 1:
      orders.append('spm')
      assert target[at[middle] + 1 : -1] + target[2 : at[middle]] == text.tolist()
    else:
      orders.append('psm')
      found = target[1 : at[after]] + target[at[middle] + 1 : -1]
      assert found + target[at[after] + 1 : at[middle]] == text.tolist()
  counts = [orders.count(order) for order in ('plain', 'psm', 'spm')]
  assert np.abs(np.array(counts) - [1000, 500, 500]).max() < 4 * np.sqrt(2000) / 2


def test_fill_in_the_middle_keeps_documents_apart():
  row = pack([*text_of(9), 1, *text_of(12), 1, *text_of(5)], previous=40)
  for features in rows(objectives.FillInTheMiddle(V, rate=1.0), row, 50):
    segments, positions = features['decoder_segment_ids'], features['decoder_positions']
    sizes = np.bincount(segments)[1:]
    assert sizes[0] == 13 and sizes.sum() == len(segments) == 31
    assert positions.tolist() == list(itertools.chain(*map(range, sizes)))
    assert features['decoder_input_tokens'][0] == 0  # What was before is not before the suffix.


def _masked_counts(features, row):
  """(chosen, masked, random, kept) of one row, after checking that the originals are told."""
  number = int(features['masked_loss_weights'].sum())
  places = features['masked_positions'][:number]
  assert (np.diff(places) > 0).all() and not features['masked_positions'][number:].any()
  restored = features['encoder_input_tokens'].copy()
  found = restored[places]
  restored[places] = features['masked_target_tokens'][:number]
  np.testing.assert_array_equal(restored, row.tokens)
  changed = found != row.tokens[places]
  hidden = found == V - 1
  return number, hidden.sum(), (changed & ~hidden).sum(), (~changed).sum()


def test_masking_hides_15_percent_80_10_10():
  row = pack([*text_of(399), 1, *text_of(111), 1])
  counts = np.array([_masked_counts(f, row) for f in rows(objectives.MaskedLM(V), row, 400)])
  assert (counts[:, 0] == round(0.15 * 510)).all()
  total = counts[:, 0].sum()
  collide = 0.1 / (V - 4)  # A random token that is the original.
  for share, found in zip((0.8, 0.1 - collide, 0.1 + collide), counts[:, 1:].sum(0) / total):
    assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / total)
  assert objectives.MaskedLM(V)(row, np.random.default_rng(0), None)['masked_positions'].shape == (
      77,
  )


def test_every_token_but_ends_is_masked_equally_often():
  row = pack([*text_of(30), 1, *text_of(18), 1, 0, 0])
  counts = np.zeros(52)
  for features in rows(objectives.MaskedLM(V), row, 4000):
    counts[features['masked_positions'][features['masked_loss_weights'] > 0]] += 1
  allowed = (row.tokens > 1)
  assert not counts[~allowed].any()
  assert np.abs(counts[allowed] / 4000 - 7 / 48).max() < 5 * np.sqrt(0.146 * 0.854 / 4000)


@pytest.mark.supports('objectives', 'whole-word masking', 'span masking')
@pytest.mark.parametrize('masking', ['whole_word', 'span'])
def test_words_are_masked_whole(masking):
  starts = np.arange(V) % 3 > 0  # A third of the tokens go on with a word.
  objective = objectives.MaskedLM(V, masking=masking, word_starts=starts)
  row = pack([*text_of(140), 1, *text_of(98), 1])
  begins = starts[row.tokens] | (row.positions == 0) | (row.tokens == 1)
  words = np.cumsum(begins)
  shares = []
  for features in rows(objective, row, 200):
    chosen = np.zeros(len(words), bool)
    chosen[features['masked_positions'][features['masked_loss_weights'] > 0]] = True
    whole = np.bincount(words, chosen) / np.maximum(np.bincount(words), 1)
    assert set(whole) <= {0.0, 1.0}
    shares.append(chosen.sum() / 238)
  assert max(shares) <= 36 / 238 and np.mean(shares) > 0.14


def test_spans_have_spanberts_lengths_and_one_fate():
  lengths = masked._geometric(20_000, np.random.default_rng(0))
  weights = 0.8 ** np.arange(10)
  expected = 20_000 * weights / weights.sum()
  counts = np.bincount(lengths, minlength=11)[1:]
  assert len(counts) == 10 and (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
  assert abs(lengths.mean() - 3.8) < 0.06  # The mean that the paper states.
  objective = objectives.MaskedLM(V, masking='span', word_starts=np.ones(V, bool), rate=0.03,
                                  mask_share=0.5, random_share=0.0)
  row = pack([*text_of(1000), 1])
  for features in rows(objective, row, 50):
    places = features['masked_positions'][features['masked_loss_weights'] > 0]
    fates = features['encoder_input_tokens'][places] == V - 1
    runs = np.split(fates, np.flatnonzero(np.diff(places) > 1) + 1)
    assert sum(len(set(run)) > 1 for run in runs) <= 2  # Only where two spans happen to touch.


@settings(deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=60), st.floats(0.05, 0.9), st.data())
def test_spans_are_runs_of_one_document_within_the_budget(sizes, rate, data):
  first = data.draw(st.sets(st.integers(0, len(sizes) - 1), max_size=5)) | {0}
  budget = max(int(rate * sum(sizes)), 1)
  rng = np.random.default_rng(data.draw(st.integers(0, 99)))
  spans = masked._pick_spans(np.array(sizes), np.array(sorted(first)), budget, rng)
  total = np.array(sizes)[spans >= 0].sum()
  assert total <= budget and (total == budget or max(sizes) > 1)
  for number in range(spans.max() + 1):
    words = np.flatnonzero(spans == number)
    assert words.tolist() == list(range(words[0], words[0] + len(words))) and len(words) <= 10
    assert not first & set(words[1:])


def test_framing_marks_each_document():
  row = pack([5, 6, 1, 7, 8, 9, 1, 4, 4, 4])
  features = objectives.MaskedLM(V, framing=True, mask_share=0.0, random_share=0.0)(
      row, np.random.default_rng(0), None
  )
  cls, sep = 198, 197
  assert features['encoder_input_tokens'].tolist() == [
      cls, 5, 6, sep, cls, 7, 8, 9, sep, cls, 4, sep]
  assert features['encoder_segment_ids'].tolist() == [1] * 4 + [2] * 5 + [3] * 3
  assert features['encoder_positions'].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]


@pytest.mark.supports('objectives', 'next sentence and sentence order')
@pytest.mark.parametrize('kind', ['nsp', 'sop'])
def test_sentence_pairs_say_whether_they_follow(kind):
  objective = objectives.MaskedLM(V, next_sentence=kind, mask_share=0.0, random_share=0.0)
  row, labels, sizes = pack([*range(3, 23), 1, *range(30, 37)]), [], []
  for features in rows(objective, row, 600):
    tokens, types = features['encoder_input_tokens'], features['encoder_token_types']
    assert tokens.shape == (31,) and tokens[0] == 198
    (end, last), real = np.flatnonzero(tokens == 197), features['encoder_segment_ids'] > 0
    assert real.tolist() == [True] * (last + 1) + [False] * (30 - last)
    assert types.tolist() == [0] * (end + 1) + [1] * (last - end) + [0] * (30 - last)
    first, second = tokens[1:end].tolist(), tokens[end + 1 : last].tolist()
    label = int(features['class_labels'])
    assert (first + second == list(range(3, 23))) == (label == 0)
    if kind == 'sop' and label:
      assert second + first == list(range(3, 23))
    labels.append(label)
    sizes.append(len(first) if label == 0 else 0)
  assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / np.sqrt(600)
  assert set(sizes) - {0} == set(range(1, 20))


def test_a_word_begins_where_its_token_carries_a_space_or_lacks_its_absence():
  class Pieces:
    """A vocabulary that writes its pieces as they stand, with or without WordPiece's `##`."""

    def __init__(self, pieces, wordpiece):
      self.pieces, self.wordpiece, self.size = pieces, wordpiece, len(pieces)

    def encode(self, text):
      return np.array([self.pieces.index(text)])

    def decode(self, ids):
      text = ''.join((' ' if self.wordpiece else '') + self.pieces[id_] for id_ in ids)
      return text.replace(' ##', '').lstrip()

  spaced = Pieces(['a', ' the', 'ing', '(', '\n', '_x', ' ', '9'], wordpiece=False)
  assert masked.find_word_starts(spaced).tolist() == [0, 1, 0, 1, 1, 0, 1, 0]
  marked = Pieces(['a', 'the', '##ing', '.', '##9'], wordpiece=True)
  assert masked.find_word_starts(marked).tolist() == [1, 1, 0, 1, 0]
  found = masked.find_word_starts(ByteVocabulary())
  text = ByteVocabulary().encode('an été_2, (ab)\n')
  assert ''.join('^' if x else '.' for x in found[text]) == '..^.......^^^..^^'


@pytest.mark.parametrize('length, density, mean, expected', [
    (512, 0.15, 3.0, (568, 114)),  # arXiv:1910.10683's model; the next two are T5's own tests.
    (64, 0.2, 2.0, (70, 22)), (64, 0.2, 1.0, (63, 27))])
def test_lengths_are_t5s(length, density, mean, expected):
  source = noise.source_length(length, density, mean)
  assert (source, noise.encoded_lengths(source, density, mean)[1]) == expected
  assert noise.encoded_lengths(source, density, mean)[0] == length


@settings(deadline=None)
@given(st.integers(1, 600), st.floats(0.01, 0.6), st.floats(1, 20), st.integers(0, 99))
def test_noise_has_exactly_t5s_numbers(length, density, mean, seed):
  mask = noise.mask(length, density, mean, np.random.default_rng(seed))
  assert mask.shape == (length,) and not mask[0]
  if length == 1:
    return
  exact = np.float32(length) * np.float32(density)
  wanted = min(max(int(np.round(exact)), 1), length - 1)
  spans = max(int(np.round(np.float32(wanted) / np.float32(mean))), 1)
  found = int((np.diff(mask.astype(int)) == 1).sum())
  assert mask.sum() == wanted and mask[-1] and found == min(spans, length - wanted)


def test_the_case_of_t5s_own_test_has_4_spans_of_8_tokens():
  masks = [noise.mask(32, 0.25, 2.0, np.random.default_rng(seed)) for seed in range(200)]
  assert {(int(m.sum()), int((np.diff(m.astype(int)) == 1).sum())) for m in masks} == {(8, 4)}
  assert len({m.tobytes() for m in masks}) > 190


def test_all_masks_are_equally_likely():
  """Length 8 with 4 noise tokens in 2 spans: 3 ways for the noise times 3 for the text."""
  rng = np.random.default_rng(0)
  found = [noise.mask(8, 0.5, 2.0, rng).tobytes() for _ in range(4500)]
  counts = [found.count(mask) for mask in set(found)]
  assert len(counts) == 9 and max(abs(count - 500) for count in counts) < 5 * np.sqrt(500)


def _reassemble(inputs, targets, sentinels):
  """The text of which span corruption made these, both ending in 1."""
  spans, key = {}, None
  for token in targets[:-1]:
    if token in sentinels and token not in spans:
      key = token
      spans[key] = []
    else:
      spans[key].append(token)
  assert list(spans) == sentinels[: len(spans)]  # From the top, in order.
  assert [token for token in inputs if token in sentinels] == list(spans)
  return [t for token in inputs[:-1] for t in spans.get(token, [token])]


def _streams(features):
  encoder = features['encoder_input_tokens'][features['encoder_segment_ids'] > 0].tolist()
  decoder = features['decoder_target_tokens'][features['decoder_loss_weights'] > 0].tolist()
  return encoder, decoder


@pytest.mark.parametrize('length', [568, 100, 3, 2])
def test_span_corruption_reassembles_and_has_mean_span_3(length):
  objective = objectives.SpanCorruption(V)
  row = pack([*text_of(length - 1), 1, *[0] * (568 - length)])
  for features in rows(objective, row, 20):
    encoder, decoder = _streams(features)
    assert encoder[-1] == decoder[-1] == 1
    assert _reassemble(encoder, decoder, list(range(199, 99, -1))) == row.tokens[:length].tolist()
    assert len(features['encoder_input_tokens']) == 512 and len(decoder) <= 114
    if length == 568:
      spans = sum(token >= 100 for token in decoder)
      assert (len(encoder), len(decoder), spans) == (512, 114, 28)
      assert abs((len(decoder) - 1 - spans) / spans - 3.0) < 0.1


@pytest.mark.parametrize('mode, mask_id', [('R', 99), ('S', 98), ('X', 97)])
def test_ul2_tells_the_denoiser_and_reassembles(mode, mask_id):
  objective = objectives.UL2(V)
  assert objective.source_length(512) == 567
  row, seen = pack(text_of(567)), 0
  for features in rows(objective, row, 120, seed=1):
    encoder, decoder = _streams(features)
    assert features['encoder_input_tokens'].shape == (512,)
    assert features['decoder_target_tokens'].shape == (380,)
    if encoder[0] != mask_id:
      continue
    seen += 1
    text = _reassemble(encoder[1:], decoder, list(range(199, 99, -1)))
    assert text == row.tokens[: len(text)].tolist() and len(text) == (510 if mode == 'S' else 567)
    if mode == 'S':
      assert encoder[-2] == 199 and not set(range(100, 199)) & set(encoder)
  assert abs(seen / 120 - {'R': 2, 'S': 1, 'X': 4}[mode] / 7) < 4 * np.sqrt(0.25 / 120)


def test_ul2s_sequential_denoiser_drops_a_quarter_on_average():
  denoiser, rng = spans.Denoiser('S', noise_density=0.25), np.random.default_rng(0)
  sizes = [denoiser.mask(400, rng).sum() for _ in range(3000)]
  assert abs(np.mean(sizes) - 100) < 5 * 199 / np.sqrt(12 * 3000)
  assert min(sizes) == 1 and max(sizes) == 199


def test_crops_are_independent_and_of_one_document():
  row = pack([*range(3, 9), 1, *range(10, 51), 1])
  shares, starts = [], []
  for features in rows(objectives.Contrastive(V), row, 1000):
    for key in ('query_tokens', 'document_tokens'):
      crop = features[key][features[key] > 0]
      assert (np.diff(crop) == 1).all() and 10 <= crop[0] and crop[-1] <= 50
      shares.append(len(crop) / 41)
      starts.append(crop[0])
  shares = np.array(shares)
  assert 0.09 <= shares.min() and shares.max() <= 0.51 and abs(shares.mean() - 0.3) < 0.02
  assert abs(np.corrcoef(starts[::2], starts[1::2])[0, 1]) < 4 / np.sqrt(1000)


def test_the_same_text_twice_for_simcse():
  objective = objectives.Contrastive(V, same=True, framing=True)
  features = objective(pack([7, 8, 9, 1, 5, 1]), np.random.default_rng(0), None)
  for value in features.values():
    assert value.tolist() == [199, 7, 8, 9, 198, 0, 0, 0]


def test_special_ids_come_from_the_vocabulary_or_its_top():
  pretrained = ByteVocabulary(extra_ids=4)
  pretrained.mask_id, pretrained.bos_id = 7, 5
  bound = objectives.MaskedLM(framing=True).bind(pretrained)
  assert (bound.mask_id, bound.cls_id, bound.sep_id, bound.bos_id) == (7, None, None, 5)
  assert bound.num_extra_ids == 2 and bound.vocab_size == 263  # The four extra ids are enough.
  bound = objectives.UL2().bind(ByteVocabulary(extra_ids=100))
  assert bound.num_extra_ids == 103 and bound.vocab_size == 259 + 103
  assert objectives.CausalLM().bind(ByteVocabulary()).num_extra_ids == 0
  assert objectives.SpanCorruption(vocab_size=1000).bind(ByteVocabulary()).vocab_size == 1000
  with pytest.raises(UserError, match='vocab_size=300 .* 100 extra ids .* set it to 359'):
    objectives.SpanCorruption(vocab_size=300).bind(ByteVocabulary())
  words = objectives.MaskedLM(masking='whole_word').bind(ByteVocabulary(extra_ids=1)).word_starts
  assert words.shape == (260,)


@pytest.mark.parametrize('make, match', [
    (lambda: objectives.SpanCorruption(noise_density=1.5), 'noise_density=1.5'),
    (lambda: objectives.SpanCorruption(mean_span_length=0.5), 'mean_span_length=0.5'),
    (lambda: objectives.SpanCorruption().source_length(2048), 'num_sentinels=100 .* 114 spans'),
    (lambda: objectives.SpanCorruption().source_length(3), '3 places are too few'),
    (lambda: objectives.UL2(denoisers=()), 'sum to 0'),
    (lambda: objectives.MaskedLM(rate=0.0), 'rate=0.0'),
    (lambda: objectives.MaskedLM(mask_share=0.8, random_share=0.3), 'random_share=0.3'),
    (lambda: objectives.MaskedLM(framing=True).source_length(2), 'sequence_length=2'),
    (lambda: objectives.FillInTheMiddle(rate=2.0), 'rate=2.0'),
    (lambda: objectives.FillInTheMiddle().source_length(3), 'sequence_length=3'),
    (lambda: objectives.Contrastive(min_share=0.6), 'min_share=0.6'),
    (lambda: rows(objectives.MaskedLM(), pack([5, 6]), 1), r'call bind\(vocabulary\)'),
    (lambda: rows(objectives.MaskedLM(V, masking='span'), pack([5, 6]), 1), 'begin a word'),
])
def test_mistakes_are_refused_in_one_sentence(make, match):
  with pytest.raises(UserError, match=match):
    make()


@pytest.mark.parametrize('objective', OBJECTIVES, ids=lambda o: type(o).__name__)
@settings(deadline=None, max_examples=20)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), seed=st.integers(0, 9))
def test_documents_of_any_length_make_rows_of_one_shape(objective, lengths, seed):
  data = loader.Loader(Documents(lengths), 24, 2, seed, dataclasses.replace(objective))
  shapes = [{key: value.shape for key, value in data.batch(step).items()} for step in range(3)]
  assert shapes[0] == shapes[1] == shapes[2]
