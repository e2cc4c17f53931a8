"""Every implementation of `matmul` is the product in float64, rounded once."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import platform
from pallas_kernels.matmul import matmul

pytestmark = pytest.mark.usefixtures('strict')

HAS_UNITS = platform.cpu_has_bfloat16_units()
NEEDS_UNIT = pytest.mark.skipif(not HAS_UNITS, reason='no matrix unit')
CASES = [(None, jnp.bfloat16), ('reference', jnp.float32), ('reference', jnp.bfloat16),
         pytest.param('cpu', jnp.bfloat16, marks=NEEDS_UNIT)]
# The last three are cut into parts: rows, the contraction, the contraction of the gradient.
SHAPES = [((31,), 1), ((2, 3, 129), 65), ((40, 256), 48), ((1100, 24), 2000), ((3, 4200), 40),
          ((4500, 8), 6)]


def tolerance(dtype, length):
  """Absolute error of a sum of `length` products of unit normals, the largest of some ten thousand.

  bfloat16: one rounding of the sum. float32: one of each partial sum, which grows as the root of
  its terms. Added one after another, as AVX-512 does, their errors have a standard deviation of
  eps / 12**0.5 * (length**2 / 2)**0.5 = 0.2 eps length, of which five are allowed.
  """
  eps = float(jnp.finfo(dtype).eps)
  if dtype == jnp.bfloat16:
    return 3 * eps * length**0.5
  return eps * max(24 * length**0.5, length)


def exact(x):
  return np.asarray(x.astype(jnp.float32), np.float64)


def operands(x_shape, columns, dtype, master=jnp.float32):
  rng = np.random.default_rng(sum(x_shape) + columns)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return normal(*x_shape).astype(dtype), normal(x_shape[-1], columns).astype(dtype).astype(master)


@pytest.mark.supports('precision and parallelism', 'bfloat16 products with float32 sums')
@pytest.mark.parametrize('x_shape, columns', SHAPES)
@pytest.mark.parametrize('implementation, dtype', CASES)
def test_product_and_gradients_are_float64s(implementation, dtype, x_shape, columns):
  x, w = operands(x_shape, columns, dtype)
  g = operands((*x_shape[:-1], columns), 1, dtype)[0]

  @jax.jit
  def product_and_gradients(x, w):
    y, vjp = jax.vjp(lambda x, w: matmul(x, w, implementation=implementation), x, w)
    return y, *vjp(g)

  y, dx, dw = product_and_gradients(x, w)
  assert y.shape == g.shape and (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, jnp.float32)
  rows_x, rows_g = exact(x).reshape(-1, x_shape[-1]), exact(g).reshape(-1, columns)
  assert np.abs(exact(y) - exact(x) @ exact(w)).max() <= tolerance(dtype, x_shape[-1])
  assert np.abs(exact(dx) - exact(g) @ exact(w).T).max() <= tolerance(dtype, columns)
  # float32's tolerance whatever the dtype: the masters' gradient is never rounded to bfloat16.
  assert np.abs(exact(dw) - rows_x.T @ rows_g).max() <= tolerance(jnp.float32, len(rows_x))


@pytest.mark.parametrize('implementation, dtype', CASES)
@pytest.mark.parametrize('master', [jnp.bfloat16, jnp.float32])
def test_gradient_of_w_has_the_dtype_of_w(implementation, dtype, master):
  x, w = operands((6, 8), 4, dtype, master)
  dw = jax.grad(lambda w: matmul(x, w, implementation=implementation).astype(jnp.float32).sum())(w)
  assert dw.dtype == master


@pytest.mark.parametrize('implementation, dtype', CASES)
def test_vmap_and_a_gradient_through_scan_agree_with_a_loop(implementation, dtype):
  x, w = operands((3, 4, 16), 16, dtype)
  product = lambda x, w: matmul(x, w, implementation=implementation)
  np.testing.assert_array_equal(exact(jax.jit(jax.vmap(product, (0, None)))(x, w)),
                                exact(jnp.stack([product(row, w) for row in x])))

  def looped(w, scan):
    step = lambda carry, _: (product(carry, w) * jnp.array(0.2, dtype), None)
    out = jax.lax.scan(step, x, length=3)[0] if scan else step(step(step(x, 0)[0], 0)[0], 0)[0]
    return out.astype(jnp.float32).sum()

  gradient = jax.jit(jax.grad(looped), static_argnums=1)
  scanned, unrolled = (exact(gradient(w, scan)) for scan in (True, False))
  np.testing.assert_allclose(scanned, unrolled, rtol=1e-4, atol=1e-4 * np.abs(unrolled).max())


def test_no_rows_give_no_rows():
  assert matmul(jnp.zeros((0, 5), jnp.bfloat16), jnp.zeros((5, 3))).shape == (0, 3)


def test_wrong_arguments_are_named():
  x, w = operands((6, 8), 4, jnp.float32)
  with pytest.raises(ValueError, match='x has 8 columns but w has 4 rows'):
    matmul(x, w.T)
  with pytest.raises(NotImplementedError, match='x is float32'):
    matmul(x, w, implementation='cpu')
  with pytest.raises(ValueError, match="implementation='gpu'"):
    matmul(x, w, implementation='gpu')


@NEEDS_UNIT
def test_a_program_lowered_for_another_platform_takes_the_plain_form():
  x, w = operands((6, 8), 4, jnp.bfloat16)
  traced = jax.jit(matmul).trace(x, w)
  text = lambda platform: traced.lower(lowering_platforms=(platform,)).as_text()
  assert 'LayoutConstraint' in text('cpu') and 'LayoutConstraint' not in text('tpu')
