"""Validation shows the mean over every held-out row, once."""
import jax
import numpy as np
import pytest
from flax import linen as nn

from lm.data.loader import Loader
from lm.models.heads import EmbedderConfig
from lm.training.losses import Contrastive, Prediction
from lm.training.validation import HeldOut

LENGTH, EPOCH = 12, 7


class Rows:
  """An endless stream, whose first `EPOCH` rows are an epoch."""

  def __len__(self):
    return EPOCH

  def __getitem__(self, row):
    rng = np.random.default_rng(row)
    tokens = lambda: rng.integers(1, 37, LENGTH).astype(np.int32)
    weights = rng.choice([0, 1, 2], LENGTH).astype(np.float32)
    return {'decoder_input_tokens': tokens(), 'decoder_target_tokens': tokens(),
            'decoder_loss_weights': weights, 'decoder_span_ids': np.repeat([1, 2], LENGTH // 2)}


def parameters(module):
  return nn.meta.unbox(module.init(jax.random.key(0), method='initialize')['params'])


@pytest.fixture(scope='module')
def module(tiny_configs):
  return tiny_configs['llama'](num_layers=1).build()


def test_the_last_batch_counts_as_far_as_it_is_of_this_epoch(module):
  params = parameters(module)
  results = [HeldOut(module, Prediction(), Loader.of_rows(Rows(), size), with_unigrams=True)(params)
             for size in (EPOCH, 3, 16)]
  assert set(results[0]) == {'loss', 'accuracy', 'span_exact_match', 'unigram_entropy'}
  for other in results[1:]:
    assert other == pytest.approx(results[0], rel=1e-6)
  targets, weights = (np.stack([Rows()[row][name] for row in range(EPOCH)]) for name in (
      'decoder_target_tokens', 'decoder_loss_weights'))
  share = np.bincount(targets.ravel(), weights.ravel()) / weights.sum()
  share = share[share > 0]
  assert results[0]['unigram_entropy'] == pytest.approx(-(share * np.log(share)).sum(), rel=1e-6)


def test_batches_are_the_first_ones_where_fewer_are_asked_for(module):
  seen = []
  score = HeldOut(module, Prediction(), Loader.of_rows(Rows(), 2), max_batches=2)
  score(parameters(module), lambda: seen.append(1))
  assert score.num_batches == len(seen) == 2


def test_rows_that_are_compared_are_those_of_whole_batches(tiny_configs):
  module = EmbedderConfig(tiny_configs['llama'](num_layers=1)).build()
  count = lambda size: HeldOut(module, Contrastive(), Loader.of_rows(Rows(), size)).num_batches
  assert [count(size) for size in (3, 7, 16)] == [2, 1, 1]
