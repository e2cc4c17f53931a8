"""Products of groups of rows on GPUs: values, gradients, and their kernels in Triton."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpu_cases import INTERPRET
from pallas_kernels import chips, gpu_compiler
from pallas_kernels.grouped_matmul import gpu, grouped_matmul
from pallas_kernels.grouped_matmul.gpu import Blocks
from pallas_kernels.grouped_matmul.specs import SPECS
from test_grouped_matmul import CASES, TOLERANCE, error, exact, operands

TINY = Blocks(16, 32, 16, 4, 2)


@pytest.mark.supports('kernels', 'experts that drop no token, on NVIDIA GPUs')
@pytest.mark.parametrize('case', ['tails', 'empty groups', 'rows of no group', 'no rows',
                                  'masters'])
def test_products_and_gradients_are_float64s(case):
  x, w, sizes, dy = args = operands(*CASES[case])

  @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
  def with_gradients(x, w, sizes, dy):
    return (gpu.product(x, w, sizes, interpret=INTERPRET, blocks=TINY),
            *gpu.gradients(x, w, sizes, dy, interpret=INTERPRET, blocks=(TINY, TINY)))

  got = with_gradients(*args)
  assert [a.dtype for a in got] == [x.dtype, x.dtype, w.dtype]
  errors = [error(a, b) for a, b in zip(got, exact(*args))]
  assert all(e <= TOLERANCE[x.dtype.name] for e in errors), errors  # NaN fails


def test_the_public_product_takes_the_kernels_and_their_gradients():
  x, w, sizes, dy = operands((3, 10, 0, 7), 20, 16, 24, 'float32', 'float32')
  with_gradients = jax.jit(lambda name, *xw: jax.vjp(
      lambda x, w: grouped_matmul(x, w, sizes, implementation=name), *xw)[1](dy), static_argnums=0)
  for got, want in zip(with_gradients('gpu', x, w), with_gradients('reference', x, w)):
    np.testing.assert_allclose(got, want, atol=1e-5)


def lowered(spec, dtype=jnp.bfloat16):
  """The product's kernel, that of the gradient of x and that of w's."""
  M, K, N, G = spec
  shape = jax.ShapeDtypeStruct
  return gpu_compiler.kernels(lambda x, w, sizes, dy: (
      gpu.product(x, w, sizes, interpret=False), gpu.gradients(x, w, sizes, dy, interpret=False)),
                              shape((M, K), dtype), shape((G, K, N), dtype),
                              shape((G,), jnp.int32), shape((M, N), dtype))


@pytest.mark.supports('kernels', 'GPU kernels lowered to Triton')
@pytest.mark.parametrize('spec', SPECS)
def test_every_spec_is_lowered_to_triton(spec):
  M, K, N, G = SPECS[spec]
  for kernel, columns in zip(lowered(SPECS[spec]), (N, K), strict=False):
    assert kernel.grid == (gpu.NEIGHBOURS, M // 128 + G + 1, -(-columns // 1024))
  for kernel in lowered(SPECS[spec]):
    text = kernel.text()
    assert text.count('tt.dot') == 1 and text.count('scf.for') == 1 and 'scf.while' not in text
  assert kernel.grid == (K // 128, N // 256, G)


@pytest.mark.parametrize('card', sorted(gpu_compiler.CARDS))
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_no_kernel_keeps_registers_in_memory_or_exceeds_its_card(dtype, card):
  if not gpu_compiler.can_compile():
    pytest.skip("jax's CUDA plugin or ptxas is not installed")
  for kernel in lowered(SPECS['OLMoE 1B-7B up'], dtype):
    report = gpu_compiler.compiled(kernel, card)
    assert not report.spilled_bytes, (kernel.name, report)
    assert report.shared_bytes <= gpu_compiler.CARDS[card][1], (kernel.name, report)


@pytest.mark.parametrize('card, calls', [('h100', 1), (None, 0)])
def test_where_no_form_is_named_an_nvidia_gpu_has_the_kernel(monkeypatch, card, calls):
  monkeypatch.setattr(chips, 'card', lambda: card)
  x, w, sizes, _ = operands((3, 10, 0, 7), 20, 16, 24, 'float32', 'float32')
  assert len(gpu_compiler.kernels(lambda *args: grouped_matmul(*args), x, w, sizes)) == calls


def test_what_the_kernels_refuse_is_named():
  x, w, sizes, _ = operands((3, 7), 10, 16, 24, 'float32', 'float32')
  with pytest.raises(NotImplementedError, match='no empty array'):
    grouped_matmul(x[:0], w, sizes, implementation='gpu')
