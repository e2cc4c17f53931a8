"""The GPU kernels of `cross_entropy`: values and gradients, interpreted, and their Triton."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpu_cases import INTERPRET
from pallas_kernels import gpu_compiler
from pallas_kernels.cross_entropy import bench, cross_entropy, gpu, token_losses
from pallas_kernels.cross_entropy.specs import SPECS
from pallas_kernels.grouped_matmul.gpu import Blocks
from test_cross_entropy_tpu import CASES, TOLERANCE, error, exact, operands

TINY = Blocks(32, 64, 16, 4, 2)  # several tiles each way, of tiny heads


@pytest.mark.supports('kernels', 'cross entropy without logits in memory, on NVIDIA GPUs')
@pytest.mark.parametrize('case', ['tails', 'all options', 'uncapped'])
def test_loss_and_gradients_are_float64s(case, monkeypatch):
  options, has_bias, T, D, V, hidden_dtype, dtype = CASES[case]
  monkeypatch.setattr(gpu, 'CHUNK_BYTES', T * 4 * 128)  # the last chunk overlaps the one before
  args = operands(T, D, V, hidden_dtype, dtype, has_bias)
  got = jax.jit(functools.partial(gpu.loss_and_gradients, options, blocks=TINY,
                                  interpret=INTERPRET),
                compiler_options={'xla_backend_optimization_level': 0})(*args)
  assert [x.dtype for x in got[:3]] == [jnp.float32, hidden_dtype, dtype]
  assert (got[3] is None) == (not has_bias)
  errors = [error(x, y) for x, y in zip(got, exact(options, *args)) if x is not None]
  assert errors[0] <= 1e-5 and np.max(errors) <= TOLERANCE[hidden_dtype], errors


def test_losses_one_by_one_and_argmaxes_are_those_of_the_blocks():
  hidden, embedding, bias, _, _ = operands(140, 16, 300)
  embedding, bias = embedding.at[200:].set(embedding[:100]), bias.at[200:].set(bias[:100])  # ties
  best = jnp.argmax(hidden @ embedding.T + bias, -1)
  targets = best.at[0, 70:].set((best[0, 70:] + 200) % 300)
  run = lambda name: token_losses(hidden, embedding, targets, bias=bias, softcap=5.0,
                                  implementation=name)
  with jax.default_matmul_precision('highest'):  # a GPU's float32 is 19 bits else
    (losses, right), (want, want_right) = run('gpu'), run('blocks')
  np.testing.assert_allclose(losses, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(right, want_right)
  assert right[0, :70].all() and not right.all()


def test_the_public_loss_takes_the_kernels_and_scales_their_gradients():
  hidden, embedding, bias, targets, weights = operands(100, 16, 70)
  loss = lambda name: jax.jit(jax.value_and_grad(lambda *head: -2.5 * cross_entropy(
      *head[:2], targets, weights, bias=head[2], implementation=name), (0, 1, 2)))
  with jax.default_matmul_precision('highest'):
    got, want = (jax.tree.leaves(loss(name)(hidden, embedding, bias)) for name in ('gpu', 'blocks'))
  assert all(error(x, np.asarray(y)) <= 1e-5 for x, y in zip(got, want, strict=True))


def lowered(name, dtype=jnp.bfloat16):
  """The kernels of a spec's loss and gradients."""
  args = bench.arguments(SPECS[name], dtype)
  return gpu_compiler.kernels(functools.partial(
      gpu.loss_and_gradients, SPECS[name].options, interpret=False), *args)


@pytest.mark.supports('kernels', 'GPU kernels lowered to Triton')
@pytest.mark.parametrize('name', SPECS)
def test_every_spec_is_lowered_to_triton_and_writes_little_at_a_time(name):
  statistics, gradient = lowered(name)
  T, _, V = SPECS[name][:3]
  chunk = gpu.chunk_of(T, V, 2, gpu.HALF)
  assert statistics.grid == (T // 128, -(-V // 256), 1)
  assert gradient.grid == (T // 128, -(-chunk // 256), 1) and 2 * T * chunk <= gpu.CHUNK_BYTES
  for kernel in (statistics, gradient):
    assert kernel.text().count('tt.dot') == 1 and kernel.text().count('scf.for') == 1


@pytest.mark.parametrize('card', sorted(gpu_compiler.CARDS))
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('name', ['Llama 3.2 1B', 'Gemma 2 2B', 'T5 base', 'BERT base'])
def test_no_kernel_keeps_registers_in_memory_or_exceeds_its_card(name, dtype, card):
  if not gpu_compiler.can_compile():
    pytest.skip("jax's CUDA plugin or ptxas is not installed")
  for kernel in lowered(name, dtype):
    report = gpu_compiler.compiled(kernel, card)
    assert not report.spilled_bytes, (kernel.name, report)
    assert report.shared_bytes <= gpu_compiler.CARDS[card][1], (kernel.name, report)


def test_what_the_kernels_refuse_is_named():
  hidden, embedding, _, targets, weights = operands(20, 16, 30)
  with pytest.raises(NotImplementedError, match='hidden is float16; the GPU kernels take bfloat16'):
    cross_entropy(hidden.astype(jnp.float16), embedding, targets, weights, implementation='gpu')
