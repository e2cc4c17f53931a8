"""What is drawn is a function of stream, place and column alone, and looks like chance."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dropout import Draws

DRAWS = Draws.of(jax.random.key(0), 32)
ONES = jnp.ones((32, 40, 50))


@pytest.mark.supports('precision and parallelism', 'dropout that no mesh or microbatch changes')
def test_a_row_is_the_same_in_any_batch_and_a_token_at_any_index():
  whole = DRAWS.dropout(ONES, 0.3)
  part = dataclasses.replace(DRAWS, rows=DRAWS.rows[5:9])
  np.testing.assert_array_equal(part.dropout(ONES[5:9], 0.3), whole[5:9])
  order = np.random.default_rng(0).permutation(40)
  moved = dataclasses.replace(DRAWS, places=jnp.broadcast_to(jnp.asarray(order), (32, 40)))
  np.testing.assert_array_equal(moved.dropout(ONES, 0.3), whole[:, order])


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_elements_are_kept_at_the_rate_and_independently(rate):
  """Every two of rows, places, columns and streams agree as often as coins do."""
  kept = lambda draws: np.asarray(draws.dropout(ONES, rate)) > 0
  streams = np.stack([kept(DRAWS), *map(kept, DRAWS.split(3)), kept(DRAWS.fold(0).fold(1))])
  np.testing.assert_allclose(np.unique(DRAWS.dropout(ONES, rate)), [0, 1 / (1 - rate)], rtol=1e-6)
  spread = (rate * (1 - rate) / streams.size)**0.5
  assert abs(streams.mean() - (1 - rate)) < 4 * spread
  for axis in range(4):
    flat = np.moveaxis(streams, axis, 0).reshape(streams.shape[axis], -1).astype(float)
    correlations = np.corrcoef(flat)[np.triu_indices(len(flat), 1)]
    # The largest of so many normal variables of deviation 1 / sqrt(n).
    assert np.abs(correlations).max() < (2 * np.log(4 * len(correlations)) / flat.shape[1])**0.5 + (
        2 / flat.shape[1]**0.5), axis


def test_what_rows_share_is_drawn_once_and_layers_by_their_index():
  shared = DRAWS.dropout_of_all(ONES[0], 0.5)
  part = dataclasses.replace(DRAWS, rows=DRAWS.rows[:3])
  np.testing.assert_array_equal(part.dropout_of_all(ONES[0], 0.5), shared)
  assert 0.4 < (shared > 0).mean() < 0.6
  layers = np.stack([DRAWS.fold(i).kept_layers(0.25, 400) for i in range(5)])
  assert abs(layers.mean() - 0.75) < 0.04 and len(np.unique(layers, axis=0)) == 5


def test_bfloat16_stays_bfloat16_and_rate_0_changes_nothing():
  x = ONES[:, 0].astype(jnp.bfloat16)
  assert DRAWS.dropout(x, 0.1).dtype == jnp.bfloat16
  assert DRAWS.dropout(x, 0.0) is x
