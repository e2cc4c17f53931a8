"""Decoding on GPUs: float64's attention of what stands, by parts of the keys, in Triton."""
import functools

import jax
import jax.numpy as jnp
import pytest

from gpu_cases import INTERPRET
from pallas_kernels import chips, gpu_compiler
from pallas_kernels.decode_attention import bench, decode_attention, gpu
from pallas_kernels.decode_attention.gpu import Blocks
from pallas_kernels.decode_attention.reference import Cache, Options
from pallas_kernels.decode_attention.specs import SPECS
from test_decode_attention import CASES, TOLERANCE, call, error, random

# beside those that the TPU takes: its lengths are no blocks, its pages of any length
MORE = {
    'bias, any length': ((3, 2, 4, 2, 8, 40, (1, 8, 40)), {
        'window': 30, 'softcap': 1.5, 'scale': 0.9, 'bias': random(5, 1, 4, 2, 40)}),
    'pages of 5, float16': ((2, 1, 34, 1, 16, 60, (33, 60), jnp.float16), {
        'page': 5, 'sinks': random(8, 34)}),
}


@functools.partial(jax.jit, static_argnums=(0, 1),
                   compiler_options={'xla_backend_optimization_level': 0})
def run(options, blocks, query, lengths, bias, sinks, cache):
  return gpu.decode_attention(options, query, cache, lengths, bias, sinks, interpret=INTERPRET,
                              blocks=blocks)


@pytest.mark.supports('kernels', 'decoding over a cache, dense or paged, on NVIDIA GPUs')
@pytest.mark.parametrize('case, parts', [
    ('groups', 1), ('heads of 256, none stands', 3), ('drafts, sinks', 3), ('int8 in float32', 3),
    ('float8', 1), *((case, 3) for case in MORE)])
def test_the_kernel_is_float64s_attention_of_what_stands(case, parts):
  shape, named = (CASES | MORE)[case]
  arrays, named, want = call(*shape, **named)
  query, lengths = arrays.pop('query'), arrays.pop('lengths')
  options = Options(named.get('window'), named.get('scale') or query.shape[-1]**-0.5,
                    named.get('softcap'))
  out = run(options, Blocks(16, 32, parts), query, lengths, named.get('bias'),
            named.get('sinks'), Cache(**arrays))
  assert out.dtype == query.dtype
  assert error(out, want) <= TOLERANCE.get(out.dtype.type, 1e-2)


def lowered(name, card='h100'):
  """The kernel of a spec, and how its call is cut."""
  spec = SPECS[name]
  options, args = Options(spec.window, 1.0, None), bench.arguments(spec)
  kernel, = gpu_compiler.kernels(lambda *args: gpu.decode_attention(
      options, *args, None, None, card=card), *args)
  return kernel, gpu.blocks_of(options, *args[:2], card)


@pytest.mark.supports('kernels', 'GPU kernels lowered to Triton')
@pytest.mark.parametrize('name', SPECS)
def test_every_spec_is_lowered_to_triton_and_fills_the_card(name):
  kernel, blocks = lowered(name)
  text, spec = kernel.text(), SPECS[name]
  assert text.count('tt.dot') == 2 and text.count('scf.for') == 1 and 'scf.while' not in text
  assert kernel.grid == (blocks.parts, spec.K, spec.B)
  assert blocks.parts * spec.K * spec.B > gpu.MULTIPROCESSORS['h100']
  assert blocks.parts * gpu.LONGEST_PART >= spec.seen


@pytest.mark.parametrize('card', sorted(gpu_compiler.CARDS))
@pytest.mark.parametrize('name', ['llama3_8b 8 x 4k', 'llama3_8b 64 x 4k paged int8',
                                  'llama3_8b 8 x 4k float8', 'gemma_2b 64 x 32k', 'gpt2 64 x 1k'])
def test_no_kernel_keeps_registers_in_memory_or_exceeds_its_card(name, card):
  if not gpu_compiler.can_compile():
    pytest.skip("jax's CUDA plugin or ptxas is not installed")
  report = gpu_compiler.compiled(lowered(name, card)[0], card)
  assert not report.spilled_bytes and report.shared_bytes <= gpu_compiler.CARDS[card][1] // 2


@pytest.mark.parametrize('card, calls', [('h100', 1), (None, 0)])
def test_where_no_form_is_named_an_nvidia_gpu_has_the_kernel(monkeypatch, card, calls):
  monkeypatch.setattr(chips, 'card', lambda: card)
  shape = jax.ShapeDtypeStruct
  query, key = shape((2, 1, 4, 64), jnp.bfloat16), shape((2, 2, 256, 64), jnp.bfloat16)
  attend = lambda *args: decode_attention(*args)  # jit must not remember another card's program
  args = query, key, key, shape((2,), jnp.int32)
  assert len(gpu_compiler.kernels(attend, *args)) == calls


def test_what_the_kernel_refuses_is_named():
  shape = jax.ShapeDtypeStruct
  query, key = shape((2, 1, 4, 320), jnp.bfloat16), shape((2, 2, 16, 320), jnp.bfloat16)
  with pytest.raises(NotImplementedError, match='heads of at most 256'):
    jax.eval_shape(functools.partial(decode_attention, implementation='gpu'), query, key, key,
                   shape((2,), jnp.int32))
  query, key = shape((2, 1, 4, 128), jnp.bfloat16), shape((2**13, 3, 2**10, 128), jnp.int8)
  assert 'addresses by signed 32 bits' in gpu.refusal(query, Cache(key, key))
