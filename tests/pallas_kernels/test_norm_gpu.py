"""The GPU's norm kernels are float64's norms and gradients, and are lowered to Triton."""
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import chips, gpu_compiler
from pallas_kernels.norm import gpu, norm
from pallas_kernels.norm.reference import Options
from pallas_kernels.norm.specs import SPECS
from test_norm import TOLERANCE, assert_close, exact, operands, values_and_gradients


@pytest.mark.supports('kernels', 'RMSNorm and LayerNorm with residual, on NVIDIA GPUs')
@pytest.mark.parametrize('kind, shape, dtype, rest', [
    ('layernorm', (3, 7, 300), jnp.float32, True), ('rmsnorm', (21, 40), jnp.bfloat16, True),
    ('rmsnorm', (5, 64), jnp.float32, False)])
def test_values_and_gradients_are_float64s(kind, shape, dtype, rest, monkeypatch):
  monkeypatch.setattr(gpu, 'ELEMENTS', 512)
  monkeypatch.setattr(gpu, 'PROGRAMS', 2)
  args, gradients = operands(shape, dtype, rest, rest)
  got = values_and_gradients(args, gradients, kind, 'gpu')
  assert_close(got, exact(kind, args, gradients), TOLERANCE[dtype])


def lowered(name):
  """Both kernels of a spec."""
  M, D, kind = SPECS[name]
  x, scale = jax.ShapeDtypeStruct((M, D), jnp.bfloat16), jax.ShapeDtypeStruct((D,), jnp.float32)
  options = Options(kind, 1e-5)
  return gpu_compiler.kernels(lambda x, scale: (
      gpu.forward(options, x, x, scale, scale, interpret=False),
      gpu.backward(options, True, x, scale, x, x, interpret=False)), x, scale)


@pytest.mark.supports('kernels', 'GPU kernels lowered to Triton')
@pytest.mark.parametrize('name', SPECS)
def test_every_spec_is_lowered_to_triton_and_reads_each_array_once(name):
  forward, backward = lowered(name)
  # A masked store is lowered beside a load that nothing reads.
  assert forward.text().count('tt.load') - forward.text().count('tt.store') == 4
  assert backward.grid[0] <= gpu.PROGRAMS and backward.text().count('scf.for') == 1


@pytest.mark.parametrize('card', sorted(gpu_compiler.CARDS))
@pytest.mark.parametrize('name', ['gpt2', 'llama3_70b'])
def test_no_kernel_keeps_registers_in_memory(name, card):
  if not gpu_compiler.can_compile():
    pytest.skip("jax's CUDA plugin or ptxas is not installed")
  for kernel in lowered(name):
    assert not gpu_compiler.compiled(kernel, card).spilled_bytes, kernel.name


@pytest.mark.parametrize('card, calls', [('h100', 1), (None, 0)])
def test_where_no_form_is_named_an_nvidia_gpu_has_the_kernel(monkeypatch, card, calls):
  monkeypatch.setattr(chips, 'card', lambda: card)
  x, scale = jnp.ones((4, 8)), jnp.ones(8)
  call = lambda x: norm(x, scale, kind='rmsnorm', epsilon=1e-6)
  assert len(gpu_compiler.kernels(call, x)) == calls
