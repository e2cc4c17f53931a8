"""Products with weights of grouped scales on GPUs: values, and their kernels in Triton."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chips, gpu_compiler
from pallas_kernels.quantized_matmul import quantize, quantized_matmul
from pallas_kernels.quantized_matmul.specs import SPECS

GROUPED = [name for name, spec in SPECS.items() if spec.group_size]


def operands(M, K, N, bits, group_size, dtype):
  rng = np.random.default_rng(M + K)
  values, scales = quantize(jnp.asarray(rng.normal(size=(K, N)), jnp.float32), bits, group_size)
  return jnp.asarray(rng.normal(size=(M, K)), dtype), values, scales


@pytest.mark.supports('kernels', 'int4 and int8 weights with grouped scales, on NVIDIA GPUs')
@pytest.mark.parametrize('M, K, N, bits, group, dtype', [
    (3, 64, 64, 4, 32, 'bfloat16'), (70, 256, 64, 4, 128, 'float16'),
    (20, 96, 128, 8, 16, 'bfloat16')])
def test_products_are_float64s(M, K, N, bits, group, dtype):
  x, values, scales = operands(M, K, N, bits, group, dtype)
  y = jax.jit(functools.partial(quantized_matmul, implementation='gpu', dtype=jnp.float32))(
      x, values, scales)
  exact = lambda a: np.asarray(a.astype(jnp.float32), np.float64)
  want = exact(x) @ (exact(values) * np.repeat(exact(scales), group, 0))
  assert np.linalg.norm(y - want) <= 1e-5 * np.linalg.norm(want)


def lowered(name):
  """The kernel of a spec."""
  M, K, N, bits, group, dtype = SPECS[name]
  shape = jax.ShapeDtypeStruct
  kernel, = gpu_compiler.kernels(
      functools.partial(quantized_matmul, implementation='gpu'), shape((M, K), dtype),
      shape((K, N), f'int{bits}'), shape((K // group, N), jnp.float32))
  return kernel


@pytest.mark.supports('kernels', 'GPU kernels lowered to Triton')
@pytest.mark.parametrize('name', GROUPED)
def test_every_grouped_spec_is_lowered_to_triton_and_reads_two_weights_of_a_byte(name):
  text = lowered(name).text()
  assert text.count('tt.dot') == 1 and text.count('scf.for') == 1
  assert 'tt.join' in text  # of the halves of bytes


@pytest.mark.parametrize('card', sorted(gpu_compiler.CARDS))
@pytest.mark.parametrize('name', GROUPED)
def test_no_kernel_keeps_registers_in_memory_or_exceeds_its_card(name, card):
  if not gpu_compiler.can_compile():
    pytest.skip("jax's CUDA plugin or ptxas is not installed")
  report = gpu_compiler.compiled(lowered(name), card)
  assert not report.spilled_bytes and report.shared_bytes <= gpu_compiler.CARDS[card][1], report


@pytest.mark.parametrize('card, group, calls', [('h100', 32, 1), (None, 32, 0), ('h100', None, 0)])
def test_where_no_form_is_named_an_nvidia_gpu_has_the_kernel(monkeypatch, card, group, calls):
  monkeypatch.setattr(chips, 'card', lambda: card)
  args = operands(3, 128, 64, 4, group, 'bfloat16')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('pallas_kernels.platform.warn_once', lambda message: None)
    assert len(gpu_compiler.kernels(lambda *args: quantized_matmul(*args), *args)) == calls


@pytest.mark.parametrize('K, N, group, words', [(128, 64, None, 'one scale a column'),
                                                (96, 64, 24, 'groups of 24'),
                                                (128, 72, 32, 'multiples of 64')])
def test_what_the_kernel_does_not_take_is_refused_in_a_sentence(K, N, group, words):
  with pytest.raises(NotImplementedError, match=words):
    quantized_matmul(*operands(3, K, N, 4, group, 'bfloat16'), implementation='gpu')
