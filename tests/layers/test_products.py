"""Products in 8 bits: how far they may be from exact ones, and gradients without bias."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers import products
from lm.parallel.rules import Rules
from pallas_kernels import stochastic_rounding

M, K, N = 48, 96, 64


def arrays(seed=0):
  """x [2, M / 2, K], w [K, N], and a cotangent of their product, of mixed scales."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(2, M // 2, K)) * np.exp(rng.normal(size=(K,)))
  w, g = rng.normal(size=(K, N)) / 10, rng.normal(size=(2, M // 2, N)) * 1e-5
  return tuple(map(jnp.float32, (x, w, g)))


def both_passes(kind, x, w, g, *state):
  y, vjp = jax.vjp(products.product(kind, Rules()), x, w, *state)
  return y, *vjp(g)


def steps(x, axis, kind):
  """The greatest error of each element: half a unit of int8, a 16th of itself in E4M3, an 8th in
  E5M2, and half of the smallest number of each."""
  if kind == 'int8':
    return np.broadcast_to(np.abs(x).max(axis, keepdims=True) / 127 / 2, x.shape)
  bits, limit, smallest = {'fp8': (4, 448, 2**-9), 'gradient': (3, 57344, 2**-16)}[kind]
  return np.abs(x) * 2.0**-bits + np.abs(x).max() / limit * smallest / 2


@pytest.mark.parametrize('kind', ['int8', 'fp8'])
@pytest.mark.supports('precision and parallelism', 'products in int8 and fp8')
def test_no_element_is_further_off_than_its_operands_are_rounded(kind):
  x, w, g = (np.asarray(a, np.float64) for a in arrays())
  y, dx, dw = both_passes(kind, *arrays())
  bound = lambda a, b, ea, eb: np.abs(a) @ eb + ea @ np.abs(b) + ea @ eb
  backward = 'int8' if kind == 'int8' else 'gradient'
  double = 2 if kind == 'int8' else 1  # rounded up or down, not to the nearest
  slack = 1 + 1e-4
  assert (np.abs(y - x @ w) <= slack * bound(x, w, steps(x, -1, kind), steps(w, 0, kind))).all()
  error = bound(g, w.T, double * steps(g, -1, backward), steps(w, 1, kind).T)
  assert (np.abs(dx - g @ w.T) <= slack * error).all()
  rows_x, rows_g = x.reshape(-1, K), g.reshape(-1, N)
  error = bound(rows_x.T, rows_g, steps(rows_x, 0, kind).T, double * steps(rows_g, 0, backward))
  assert (np.abs(dw - rows_x.T @ rows_g) <= slack * error).all()


def test_gradients_in_int8_have_no_bias():
  """Elements of a twentieth of a unit, always lost if rounded to the nearest, are right on the mean
  within five standard errors."""
  count, unit, share = 400, 1e-3 / 127, 0.05
  noise = 1 + 1e-3 * np.random.default_rng(1).random((count, M, N))  # rounds otherwise each time
  g = np.float32(share * unit * noise)
  g[..., 0] = 127 * unit
  w = np.zeros((K, N), np.float32)
  w[:N] = np.eye(N)  # exact in int8: dx is the rounded g
  x, w = jnp.ones((M, K)), jnp.asarray(w)
  product = products.product('int8', Rules())
  dx = jax.jit(lambda g: jax.lax.map(lambda g: jax.vjp(product, x, w)[1](g)[0], g))(g)
  small = np.asarray(dx, np.float64)[:, :, 1:N].mean((0, 1)) / unit
  spread = np.sqrt(share * (1 - share) / (count * M))
  assert np.abs(small - share * noise.mean()).max() < 5 * spread


def test_a_history_forgets_after_its_length_and_gives_the_scales():
  x, w, g = arrays()
  history = jnp.zeros((products.OPERANDS, products.HISTORY))
  largest = np.float32([np.abs(a).max() for a in (x, w, g)])
  run = jax.jit(lambda x, w, g, history: both_passes('fp8_delayed', x, w, g, history))
  history = run(100 * x, w, g, history)[-1]
  np.testing.assert_allclose(history[:, 0], largest * [100, 1, 1], rtol=1e-6)
  for _ in range(products.HISTORY - 1):
    *_, history = run(x, w, g, history)
  assert np.isclose(history[0].max(), 100 * largest[0])  # the last place still holds it
  *_, history = run(x, w, g, history)
  np.testing.assert_allclose(history, largest[:, None] * np.ones(products.HISTORY), rtol=1e-6)
  delayed, current = run(x, w, g, history), both_passes('fp8', x, w, g)
  for a, b in zip(delayed, current):  # the same scales
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)


def test_what_outgrows_its_history_is_cut_and_finite():
  x, w, g = arrays()
  history = jnp.full((products.OPERANDS, products.HISTORY), 1e-9)
  assert all(np.isfinite(a).all() for a in both_passes('fp8_delayed', x, w, g, history))


def test_random_bits_are_even_and_independent_of_their_neighbours():
  x = jnp.ones((512, 512))
  bits = np.asarray(stochastic_rounding.random_bits(x))
  assert len(np.unique(bits)) > 0.99 * bits.size
  ones = np.unpackbits(bits.view(np.uint8)).reshape(-1, 32).mean(0)
  assert np.abs(ones - 0.5).max() < 5 * 0.5 / 512
  uniform = bits / 2.0**32
  for shifted in (np.roll(uniform, 1, 0), np.roll(uniform, 1, 1)):
    assert abs(np.corrcoef(uniform.ravel(), shifted.ravel())[0, 1]) < 5 / 512
  assert (np.asarray(stochastic_rounding.random_bits(x, 1)) != bits).mean() > 0.99


def test_bfloat16_is_one_of_two_neighbours_and_right_on_the_mean():
  x = jnp.full((400, 400), 1 + 2.0**-7 * 0.3)
  rounded = np.asarray(stochastic_rounding.to_bfloat16(x, 3), np.float32)
  assert set(np.unique(rounded)) == {np.float32(1), np.float32(1 + 2.0**-7)}
  assert abs((rounded > 1).mean() - 0.3) < 5 * 0.5 / 400
  special = jnp.float32([0, -0.0, np.inf, -np.inf, np.nan, 3.0])
  kept = np.asarray(stochastic_rounding.to_bfloat16(special, 3), np.float32)
  np.testing.assert_array_equal(kept, np.asarray(special))
