"""Products with matrices as they lie, and tokens put into a cache, are numpy's."""
import os
import subprocess
import sys

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.decode_attention import put_tokens
from pallas_kernels.quantized_matmul import quantize
from pallas_kernels.streamed_matmul import Streamed, streamed_matmul, streamed_rows

needs_compiler = pytest.mark.skipif(not native.is_there(), reason='needs a C++ compiler')
TOLERANCE = {'float32': 1e-6, 'bfloat16': 1e-6, 'int8': 1e-6}  # of sums in float32


def random(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def matrix(dtype, N, K):
  """A streamed one, and what it stands for in float64."""
  w_NK = jnp.asarray(random(1, N, K))
  if dtype != 'int8':
    w_NK = w_NK.astype(dtype)
    return Streamed(w_NK), np.asarray(w_NK, np.float64)
  values_KN, scales_N = quantize(w_NK.T, 8)
  values_NK = np.asarray(values_KN).T.copy()
  return Streamed(jnp.asarray(values_NK), scales_N), values_NK * np.asarray(scales_N)[:, None]


@needs_compiler
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_rows_are_those_of_the_matrix_and_one_that_is_not_there_is_nan(dtype):
  w, exact = matrix(dtype, 7, 33)
  rows = jnp.array([[3, 0, 6], [6, 6, 2]])
  got = jax.jit(lambda w, rows: streamed_rows(w, rows, jnp.float32))(w, rows)
  np.testing.assert_allclose(got, exact[np.asarray(rows)], rtol=1e-6)
  if dtype != 'int8':
    assert np.isnan(streamed_rows(w, jnp.array([7]), dtype)).all()


@needs_compiler
@pytest.mark.supports('kernels', 'products of few rows in C++')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
@settings(max_examples=25, deadline=None)
@given(M=st.integers(0, 19), K=st.integers(1, 150), N=st.integers(1, 70),
       x_dtype=st.sampled_from(['float32', 'bfloat16']))
def test_the_native_product_is_numpys(dtype, M, K, N, x_dtype):
  w, want_NK = matrix(dtype, N, K)
  x_MK = jnp.asarray(random(0, M, K)).astype(x_dtype)
  y_MN = streamed_matmul(x_MK, w, dtype=jnp.float32, implementation='cpu')
  want_MN = np.asarray(x_MK, np.float64) @ want_NK.T
  size_MN = np.abs(np.asarray(x_MK, np.float64)) @ np.abs(want_NK).T
  assert y_MN.shape == (M, N) and y_MN.dtype == jnp.float32
  assert (np.abs(y_MN - want_MN) <= TOLERANCE[dtype] * size_MN).all()


@needs_compiler
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_threads_share_a_large_one(dtype):
  """Large enough for several threads, and again: none takes a part twice or leaves one."""
  w, want_NK = matrix(dtype, 4099, 333)
  x_MK = jnp.asarray(random(0, 5, 333))
  call = jax.jit(lambda x, w: streamed_matmul(x, w, dtype=jnp.float32, implementation='cpu'))
  for _ in range(20):
    np.testing.assert_allclose(call(x_MK, w), np.asarray(x_MK) @ want_NK.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('rows', [1, 7, 200])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_any_number_of_rows_by_the_form_that_is_chosen(dtype, rows):
  w, want_NK = matrix(dtype, 40, 64)
  x = jnp.asarray(random(0, rows, 1, 64)).astype('bfloat16' if dtype == 'bfloat16' else 'float32')
  y = jax.jit(streamed_matmul)(x, w)
  want = np.asarray(x, np.float64) @ want_NK.T
  assert y.shape == (rows, 1, 40) and y.dtype == x.dtype
  assert np.linalg.norm(np.asarray(y, np.float64) - want) <= (
      4e-3 if dtype == 'bfloat16' else 1e-4) * np.linalg.norm(want)


def test_what_does_not_fit_is_named():
  w, _ = matrix('float32', 4, 8)
  with pytest.raises(ValueError, match=r'x \(2, 7\) and w \(4, 8\) must be'):
    streamed_matmul(jnp.zeros((2, 7)), w)
  with pytest.raises(ValueError, match="implementation='tpu' must be None, 'reference' or 'cpu'"):
    streamed_matmul(jnp.zeros((2, 8)), w, implementation='tpu')


@needs_compiler
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_tokens_stand_where_they_are_put_and_nothing_else_moves(dtype):
  cache = jnp.asarray(10 * random(0, 3, 2, 5, 4)).astype(dtype)
  tokens = jnp.asarray(10 * random(1, 3, 2, 2, 4)).astype(dtype)
  rows = np.array([[0, 0], [2, 3], [1, -1]], np.int32)
  places = np.array([[4, 0], [2, 1], [5, 1]], np.int32)
  want = np.array(cache)
  for (b, t), row in np.ndenumerate(rows):
    if 0 <= row < 3 and 0 <= places[b, t] < 5:
      want[row, :, places[b, t]] = tokens[b, t]
  before = np.array(cache)
  np.testing.assert_array_equal(jax.jit(put_tokens)(cache, rows, places, tokens), want)
  np.testing.assert_array_equal(cache, before)  # not given away, so not written over
  scales = jnp.asarray(random(2, 3, 2, 5))
  moved = jax.jit(put_tokens)(scales, rows, places, jnp.ones((3, 2, 2)))
  assert (np.asarray(moved != scales).sum(), float(moved[2, 1, 2])) == (6, 1.0)


@pytest.mark.parametrize('compiler', ['no_such_compiler', 'false'])
def test_without_a_compiler_decoding_goes_on(compiler, tmp_path):
  """In a process of its own, whose cache of libraries is empty: said once, and XLA's form."""
  code = ('import jax.numpy as jnp, numpy as np\n'
          'from pallas_kernels.streamed_matmul import Streamed, streamed_matmul\n'
          'for _ in range(2): y = streamed_matmul(jnp.ones((1, 8)), Streamed(jnp.ones((4, 8))))\n'
          'print(np.asarray(y).tolist())')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                        env=os.environ | {'CXX': compiler, 'XDG_CACHE_HOME': str(tmp_path)})
  assert done.stdout.strip() == '[[8.0, 8.0, 8.0, 8.0]]'
  assert done.stderr.count('decoding on this CPU may take twice its time') == 1
  assert not list(tmp_path.rglob('*.so'))
