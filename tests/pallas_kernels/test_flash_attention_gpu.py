"""The GPU's flash attention is float64's attention and gradient, visits only what is seen, and is
lowered to Triton at every shape."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_cases import Call, check, random, results
from pallas_kernels import chips, gpu_compiler
from pallas_kernels.flash_attention import flash_attention, gpu
from pallas_kernels.flash_attention.gpu import Blocks
from pallas_kernels.flash_attention.reference import Masking, Options, Terms, visible
from pallas_kernels.flash_attention.specs import SPECS
import test_attention_positions as by_distance

TINY = Blocks(16, 32, 4, 2)
IDS = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (2, 50)), axis=1), jnp.int32)
# name: (B, T, S, N, K, H), dtype, options, masking, the bias's shape
CASES = {
    'both sides, fewer keys': (
        (1, 70, 50, 2, 1, 80), jnp.float32, {'causal': False, 'window': 12, 'query_offset': -3},
        Masking(), None),
    'packed prefix, sinks': (
        (2, 50, 50, 1, 1, 32), jnp.float16, {'chunk': 40, 'dropout_rate': 0.3},
        Masking(None, IDS, IDS, jnp.arange(50) < jnp.array([[9], [40]]),
                jnp.array([[5], [7]], jnp.uint32)), None),
    'cached, bias, capped': (
        (2, 20, 64, 4, 2, 16), jnp.float32, {'softcap': 2.0, 'scale': 0.4, 'window': 33},
        Masking(jnp.array([0, 41])), (2, 4, 20, 64)),
    'causal, shared bias': ((2, 48, 40, 2, 1, 64), jnp.bfloat16, {}, Masking(), (1, 2, 48, 40)),
}


@pytest.mark.supports('kernels', 'flash attention on NVIDIA GPUs, with all of its options',
                      'float16 attention on GPUs')
@pytest.mark.parametrize('case', CASES)
def test_the_kernel_is_float64s_attention_and_gradient(case):
  (B, T, S, N, K, H), dtype, named, masking, bias_shape = CASES[case]
  options = Options(**{'causal': True, 'window': None, 'scale': H**-0.5, 'softcap': None} | named)
  query, key, value, g = (random(i, *shape).astype(dtype) for i, shape in enumerate(
      ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))))
  terms = Terms(None if bias_shape is None else random(4, *bias_shape),
                random(6, N) if options.chunk else None)
  dlse = random(5, B, K, N // K, T)
  call = Call(options, query, key, value, terms, masking, g, dlse, TINY)
  check(call, results(gpu, call))


def test_the_public_function_differentiates_through_the_kernel():
  query, key, value, g = (random(i, 1, 20, 2, 8) for i in range(4))

  @functools.partial(jax.jit, static_argnums=0,
                     compiler_options={'xla_backend_optimization_level': 0})
  def gradients(implementation, *qkv):
    with jax.default_matmul_precision('highest'):  # a GPU's float32 is 19 bits else
      return jax.vjp(functools.partial(flash_attention, implementation=implementation), *qkv)[1](g)

  for got, want in zip(gradients('gpu', query, key, value), gradients('reference', query, key,
                                                                      value)):
    np.testing.assert_allclose(got, want, atol=1e-5)


# (B, T, S, N, K, H), dtype, reach, options
DISTANCES = {
    'packed, groups, offsets': ((2, 50, 50, 2, 1, 24), jnp.float32, 7, {
        'causal': False, 'ids': IDS, 'scale': 0.2, 'query_offset': jnp.array([3, 60])}),
    'window': ((1, 90, 70, 2, 2, 64), jnp.bfloat16, 20, {'window': 40, 'query_offset': 5}),
}


@pytest.mark.supports('kernels', 'bias by distance on NVIDIA GPUs, with its gradient')
@pytest.mark.parametrize('case', DISTANCES)
def test_scores_by_distance_are_float64s_and_so_are_their_gradients(case):
  shape, dtype, reach, options = DISTANCES[case]
  arrays, g = by_distance.operands(*shape, dtype, reach)
  want, ids = by_distance.float64(arrays, g, **options), options.get('ids')
  attend = functools.partial(flash_attention, implementation='gpu', query_segment_ids=ids,
                             key_segment_ids=ids, **{'scale': 1.0} | {
                                 name: x for name, x in options.items() if name != 'ids'})

  @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
  def out_and_gradients(arrays, g):
    out, vjp = jax.vjp(lambda arrays: attend(**arrays), arrays)
    return out, vjp(g)[0]

  out, gradients = out_and_gradients(arrays, g)
  got = [out, *(gradients[name] for name in arrays)]
  errors = [np.linalg.norm(by_distance.exact(x) - y) / np.linalg.norm(y)
            for x, y in zip(got, want, strict=True)]
  assert np.max(errors) <= by_distance.TOLERANCE[dtype], errors


STARTS = jnp.arange(50) < jnp.array([[9], [40]])
SEEN = {
    'causal': (Options(True, None, 1.0, None), Masking()),
    'window': (Options(True, 20, 1.0, None), Masking()),
    'both sides': (Options(False, 20, 1.0, None), Masking()),
    'chunks': (Options(True, None, 1.0, None, 14, -5), Masking()),
    'all': (Options(False, None, 1.0, None), Masking()),
    'offset': (Options(True, 9, 1.0, None), Masking(jnp.array([0, 30]))),
    'prefix': (Options(True, None, 1.0, None), Masking(prefix=STARTS)),
    'packed': (Options(True, None, 1.0, None), Masking(None, IDS, IDS)),
}


@pytest.mark.supports('kernels', 'blocks that the mask empties are never visited')
@pytest.mark.parametrize('case', SEEN)
def test_tiles_that_the_mask_empties_are_never_visited(case):
  options, masking = SEEN[case]
  T, S = 50, 50
  mask = visible(options, T, S, masking)
  mask = np.ones((1, T, S), bool) if mask is None else np.asarray(mask)
  rows, keys = -(-T // 16), -(-S // 8)
  padded = np.zeros((mask.shape[0], rows * 16, keys * 8), bool)
  padded[:, :T, :S] = mask
  seen = padded.reshape(-1, rows, 16, keys, 8).any((2, 4))
  visited = gpu.visited(gpu.Tiles(options, T, S, 8, 16, 8), masking)
  np.testing.assert_array_equal(visited, seen)
  for axis in (1, 2):
    first, end = (np.asarray(x)[..., None] for x in gpu.bounds(visited, axis).values())
    place = np.arange(visited.shape[axis])
    np.testing.assert_array_equal(np.moveaxis(visited, axis, 2), (place >= first) & (place < end))


def lowered(spec, name, dtype=jnp.bfloat16, card='h100', reach=None):
  """The kernels of a pass at the shapes of a spec; `reach` is of a bias by distance."""
  B, T, N, K, H = spec[:5]
  options, shape = Options(spec.causal, spec.window, H**-0.5, None), jax.ShapeDtypeStruct
  query, key = shape((B, T, N, H), dtype), shape((B, T, K, H), dtype)
  table = None if reach is None else shape((N, 2 * reach + 1), jnp.float32)
  args = query, key, key, Terms(distance_bias=table)
  if name == 'forward':
    return gpu_compiler.kernels(lambda *args: gpu.forward(options, *args, Masking(), card=card),
                                *args)
  return gpu_compiler.kernels(lambda q, k, v, terms, lse: gpu.backward(
      options, q, k, v, terms, Masking(), q, lse, q, lse, card=card), *args,
                              shape((B, K, N // K, T), jnp.float32))


@pytest.mark.supports('kernels', 'GPU kernels lowered to Triton')
@pytest.mark.parametrize('spec', SPECS)
def test_every_spec_is_lowered_to_triton(spec):
  B, T, N, K, _ = SPECS[spec][:5]
  forward, = lowered(SPECS[spec], 'forward')
  of_queries, of_keys = lowered(SPECS[spec], 'backward')
  for kernel, dots in (forward, 2), (of_queries, 3), (of_keys, 4):
    text = kernel.text()
    assert kernel.grid[0] >= T // 128 and kernel.grid[1:] == (N, B)
    assert text.count('tt.dot') == dots and text.count('scf.for') == 1 and 'scf.while' not in text


def test_the_gradient_of_a_bias_by_distance_is_one_kernel_more_and_no_array_by_query_and_key():
  *_, kernel = lowered(SPECS['t5_base'], 'backward', reach=128)
  assert kernel.grid == (15, 12, 8)  # diagonals of 8 x 8 tiles
  assert kernel.text().count('tt.dot') == 2 and kernel.text().count('scf.for') == 1
  x, table = jnp.ones((1, 512, 1, 64), jnp.bfloat16), jnp.ones((1, 257))
  loss = lambda table: flash_attention(x, x, x, distance_bias=table, implementation='gpu').sum()
  text = jax.jit(jax.grad(loss)).trace(table).lower(lowering_platforms=('cuda',)).as_text()
  assert '64x64xf32' in text and '512x512' not in text


@pytest.mark.parametrize('masking, computes', [(Masking(), False), (Masking(None, IDS, IDS), True)])
def test_bounds_that_lengths_tell_are_constants_of_the_program(masking, computes):
  x = jax.ShapeDtypeStruct((2, 50, 2, 64), jnp.bfloat16)
  attend = lambda x: gpu.forward(Options(True, 9, 1.0, None), x, x, x, Terms(), masking)
  program = jax.jit(attend).trace(x).lower(lowering_platforms=('cuda',)).as_text()
  assert ('stablehlo.reduce' in program) == computes


@pytest.mark.parametrize('card', sorted(gpu_compiler.CARDS))
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize('spec, reach', [('gpt3_xl', None), ('llama2_7b', None),
                                         ('gemma_2b', None), ('t5_base', 128), ('llama3_8b', 128)])
def test_no_kernel_keeps_registers_in_memory_or_exceeds_its_card(spec, reach, dtype, card):
  if not gpu_compiler.can_compile():
    pytest.skip("jax's CUDA plugin or ptxas is not installed")
  passes = (lowered(SPECS[spec], name, dtype, card, reach) for name in ('forward', 'backward'))
  for kernel in itertools.chain(*passes):
    report = gpu_compiler.compiled(kernel, card)
    # Timed on an H100, eight registers in memory cost less than smaller tiles.
    assert report.spilled_bytes <= (32 if card == 'h100' else 0), (kernel.name, report)
    assert report.shared_bytes <= gpu_compiler.CARDS[card][1], (kernel.name, report)


@pytest.mark.parametrize('card, calls', [('h100', 1), (None, 0)])
def test_where_no_form_is_named_an_nvidia_gpu_has_the_kernel(monkeypatch, card, calls):
  monkeypatch.setattr(chips, 'card', lambda: card)
  x = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
  attend = lambda *qkv: flash_attention(*qkv)  # jit must not remember another card's program
  assert len(gpu_compiler.kernels(attend, x, x, x)) == calls
  wide = jax.ShapeDtypeStruct((1, 64, 2, 512), jnp.bfloat16)
  if card:
    with pytest.warns(UserWarning, match='left to XLA: heads of 512'):
      assert not gpu_compiler.kernels(attend, wide, wide, wide)


@pytest.mark.parametrize('shape, dtype, words', [
    ((1, 8, 2, 64), jnp.float64, 'float64'), ((1, 8, 2, 512), jnp.float32, '512 are wider'),
    ((1, 0, 1, 128), jnp.bfloat16, 'must have elements')])
def test_what_the_kernel_does_not_take_is_refused_in_a_sentence(shape, dtype, words):
  with jax.enable_x64(True), pytest.raises(NotImplementedError, match=words):
    x = jax.ShapeDtypeStruct(shape, dtype)
    jax.eval_shape(functools.partial(flash_attention, implementation='gpu'), x, x, x)
