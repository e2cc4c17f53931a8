"""What dropout takes of the attention is random in every way that it should be."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dropout
from pallas_kernels.flash_attention import flash_attention

RATE = 0.1


def dropped(seeds, queries=256, keys=256, rate=RATE):
  """float64 [seeds, queries, keys], 1 where a probability is dropped."""
  factors = dropout.factors(rate, jnp.asarray(seeds, jnp.uint32)[None], jnp.arange(queries)[None],
                            jnp.arange(keys))[0]
  return np.asarray(factors == 0, np.float64)


def correlations(x):
  """Of all pairs of columns, in standard deviations of those of independent columns."""
  x = x - x.mean(0)
  x /= np.linalg.norm(x, axis=0)
  return (x.T @ x)[np.triu_indices(x.shape[1], 1)] * len(x)**0.5


@pytest.mark.parametrize('rate', [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_the_rate_and_the_expectation_stays(rate):
  seeds = jax.random.bits(jax.random.key(0), (2, 3))
  factors = np.asarray(dropout.factors(rate, seeds, jnp.arange(512)[None], jnp.arange(700)))
  assert factors.shape == (2, 3, 512, 700)
  np.testing.assert_allclose(np.unique(factors), [0, 1 / (1 - rate)], rtol=1e-6)
  deviation = (rate * (1 - rate) / factors.size)**0.5
  assert abs((factors == 0).mean() - rate) < 4 * deviation
  for axis in range(4):  # no row, head, query or key has more than its share
    shares = (factors == 0).mean(tuple(i for i in range(4) if i != axis))
    assert abs(shares - rate).max() < 5 * deviation * len(shares)**0.5


@pytest.mark.supports('kernels', 'dropout of attention probabilities')
@pytest.mark.parametrize('of', ['queries', 'keys', 'random seeds', 'seeds 0, 1, 2',
                                'seeds of high bits'])
def test_what_is_dropped_is_independent(of):
  seeds = {'random seeds': np.random.default_rng(0).integers(0, 2**32, 256),
           'seeds 0, 1, 2': np.arange(256), 'seeds of high bits': np.arange(256) << 24}
  if of in seeds:
    columns = dropped(seeds[of], 128, 128).reshape(256, -1).T
  else:
    mask = dropped([5], 2048, 2048)[0]
    columns = mask[:, :512] if of == 'keys' else mask[:512].T
  found = correlations(columns)
  assert abs(found.std() - 1) < 0.02 and abs(found).max() < 6.5


@pytest.mark.parametrize('lag', [1, 2, 128])
def test_neighbours_of_either_axis_are_dropped_independently(lag):
  mask = dropped([1], 2048, 2048)[0]
  for one, other in ((mask[lag:], mask[:-lag]), (mask[:, lag:], mask[:, :-lag]),
                     (mask[lag:, lag:], mask[:-lag, :-lag]),
                     (mask[lag:, :-lag], mask[:-lag, lag:])):
    assert abs((one * other).mean() - RATE**2) < 4 * RATE / one.size**0.5


def test_the_probabilities_that_are_kept_are_those_of_no_dropout():
  """Values of one-hot keys show the probabilities."""
  S, rate = 40, 0.4
  query, key = (jnp.asarray(np.random.default_rng(i).normal(size=(1, S, 2, S)), jnp.float32)
                for i in range(2))
  value = jnp.broadcast_to(jnp.eye(S)[:, None], key.shape)
  seeds = jax.random.bits(jax.random.key(3), (1, 2))
  attend = lambda **kwargs: np.asarray(flash_attention(query, key, value, causal=False, **kwargs))
  probs, kept = attend(), attend(dropout_rate=rate, dropout_seeds=seeds)
  zero = kept == 0
  np.testing.assert_allclose(kept[~zero], probs[~zero] / (1 - rate), rtol=1e-5)
  np.testing.assert_array_equal(
      zero.swapaxes(1, 2), dropout.factors(rate, seeds, jnp.arange(S)[None], jnp.arange(S)) == 0)


def test_wrong_arguments_of_dropout_are_named():
  x = jnp.ones((1, 4, 2, 8))
  with pytest.raises(ValueError, match='dropout_rate=0.1 needs dropout_seeds'):
    flash_attention(x, x, x, dropout_rate=0.1)
  with pytest.raises(ValueError, match=r'dropout_rate=1.0 must be in \[0, 1\)'):
    flash_attention(x, x, x, dropout_rate=1.0, dropout_seeds=jnp.ones((1, 2), jnp.uint32))
  with pytest.raises(ValueError, match='dropout_seeds are int32, they must be uint32'):
    flash_attention(x, x, x, dropout_rate=0.1, dropout_seeds=jnp.ones((1, 2), int))
  with pytest.raises(ValueError, match=r'dropout_seeds has shape \(1, 4\), it must be \(1, 2\)'):
    flash_attention(x, x, x, dropout_rate=0.1, dropout_seeds=jnp.ones((1, 4), jnp.uint32))
