"""The TPU's flash attention visits only what is seen; test_attention_space.py has its results."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flash_attention_cases import random
from pallas_kernels.flash_attention import flash_attention, tpu_blocks
from pallas_kernels.flash_attention.reference import Masking, Options, visible


def test_the_public_function_differentiates_through_the_kernel_also_its_log_sum_exp():
  query, key, value, g = (random(i, 1, 130, 2, 64) for i in range(4))
  dlse, sinks = random(4, 1, 2, 130), random(5, 2)

  @functools.partial(jax.jit, static_argnums=0,
                     compiler_options={'xla_backend_optimization_level': 0})
  def gradients(implementation, *args):
    def attend(query, key, value, sinks):
      return flash_attention(query, key, value, sinks=sinks, return_lse=True,
                             implementation=implementation)

    (out, lse), vjp = jax.vjp(attend, *args)
    return out, lse, *vjp((g, dlse))

  args = query, key, value, sinks
  for got, want in zip(gradients('tpu', *args), gradients('reference', *args), strict=True):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-5)


OPTIONS = [Options(True, None, 1.0, None), Options(True, 70, 1.0, None),
           Options(False, 70, 1.0, None), Options(False, None, 1.0, None),
           Options(True, 1, 1.0, None), Options(True, None, 1.0, None, chunk=150),
           Options(False, 70, 1.0, None, chunk=100, query_offset=-90),
           Options(True, None, 1.0, None, query_offset=200),
           Options(True, 90, 1.0, None, query_offset=-400)]


@pytest.mark.supports('kernels', 'blocks that the mask empties are never visited',
                      'attention in chunks', 'static query offsets')
@pytest.mark.parametrize('lengths', [(512, 512), (300, 700), (700, 300)])
@pytest.mark.parametrize('options', OPTIONS)
def test_blocks_that_the_mask_empties_are_never_visited(options, lengths):
  mask = visible(options, *lengths, Masking())
  mask = np.ones(lengths, bool) if mask is None else np.asarray(mask[0])
  seen = {(q, k) for q in range(-(-lengths[0] // 64)) for k in range(-(-lengths[1] // 128))
          if mask[q * 64:(q + 1) * 64, k * 128:(k + 1) * 128].any()}
  visited = tpu_blocks.visited_blocks(options, *lengths, 64, 128)
  assert len(visited) == len(set(visited)) and set(visited) == seen


@pytest.mark.parametrize('by_key', [False, True])
def test_every_result_is_written_and_sums_begin_once(by_key):
  layout = tpu_blocks.Layout(Options(True, 10, 1.0, None), 700, 300, 128, 1, 128, 128, 1, 1, 1)
  queries, keys, first_q, first_k = np.asarray(tpu_blocks.visits(layout, Masking(), by_key))
  assert set(queries) == set(range(6)) and (not by_key or set(keys) == set(range(3)))
  assert first_q.sum() == 6 and first_k.sum() == len(set(keys))
  order = keys if by_key else queries
  assert (np.diff(order) >= 0).all()


@pytest.mark.parametrize('shape, dtype, words', [
    ((1, 8, 2, 64), jnp.float16, 'float16'), ((1, 8, 2, 512), jnp.float32, '512 are wider'),
    ((1, 2**17, 1, 128), jnp.bfloat16, '131072')])
def test_what_the_kernel_does_not_take_is_refused_in_a_sentence(shape, dtype, words):
  x = jax.ShapeDtypeStruct(shape, dtype)
  with pytest.raises(NotImplementedError, match=words):
    jax.eval_shape(functools.partial(flash_attention, implementation='tpu'), x, x, x)
