"""What makes decoding fast on a CPU changes its results by no more than it says."""
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.inference import generate, SamplingConfig
from lm.inference.decoder import Decoder, quantize_matrices
from lm.layers import cache as caches
from lm.layers import linear
from lm.models.gpt import GPTConfig
from pallas_kernels.matmul import dot
from pallas_kernels.quantized_matmul import Quantized, quantize, quantized_matmul

TINY = GPTConfig(vocab_size=61, max_length=48, d_model=64, num_layers=2, num_heads=4, d_ff=128,
                 dtype='float32', norm='rmsnorm', positions='rotary', activation='swiglu',
                 use_bias=False, num_kv_heads=2)
RNG = np.random.default_rng(0)


def random_params(config):
  """By numpy: compiling the initialiser would cost more than all the decoding."""
  init = lambda: config.build().init(jax.random.key(0), method='initialize')['params']
  rng = np.random.default_rng(0)
  fill = lambda x: jnp.asarray(rng.normal(x.ndim == 1, 0.15, x.shape), x.dtype)
  return jax.tree.map(fill, nn.meta.unbox(jax.eval_shape(init)))


@pytest.mark.parametrize('transpose_b', [False, True])
def test_a_product_of_one_row_is_that_row_of_more(transpose_b):
  a = jnp.asarray(RNG.normal(size=(3, 4, 64)), jnp.bfloat16)
  b = jnp.asarray(RNG.normal(size=(3, 40, 64) if transpose_b else (3, 64, 40)), jnp.bfloat16)
  product = jax.jit(lambda a: dot(a, b, transpose_b=transpose_b))
  np.testing.assert_allclose(product(a[:, :1]), product(a)[:, :1], atol=1e-5)


@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize('rows', [1, 8])
def test_few_rows_by_int8_weights_are_exact_to_16_bits_of_the_rows(rows, transposed):
  x = RNG.normal(size=(rows, 300)).astype(np.float32)
  x[0] *= 100  # of which the other rows' digits must not depend
  values, scales = quantize(jnp.asarray(RNG.normal(size=(300, 70)), jnp.float32), 8)
  given = values.T if transposed else values
  got = jax.jit(quantized_matmul, static_argnames='transposed')(x, given, scales,
                                                                transposed=transposed)
  want = x.astype(np.float64) @ (np.asarray(values, np.float64) * np.asarray(scales))
  bound = (np.abs(x).max(1, keepdims=True) / 64516) * np.abs(values).sum(0) * scales
  assert (np.abs(got - want) <= 1.01 * bound + 1e-5 * np.abs(want)).all()


@pytest.mark.parametrize('kind', ['rows', 'pages'])
def test_a_bfloat16_cache_holds_what_is_written_and_keeps_the_rest(kind):
  old = caches.KVCache(*jnp.asarray(RNG.normal(size=(2, 3, 2, 8, 4)), jnp.bfloat16))
  key, value = jnp.asarray(RNG.normal(size=(2, 2, 1, 2, 4)), jnp.bfloat16)
  if kind == 'rows':
    old, rows = jax.tree.map(lambda x: x[:2], old), [0, 1]
    places = caches.Places(jnp.array([3, 5]))
  else:
    places, rows = caches.Places(jnp.array([3, 5]), page_table=jnp.array([[2], [0]])), [2, 0]
  new = jax.jit(caches.write)(old, places, key, value)
  for was, x, is_now in zip(old[:2], (key, value), new[:2]):
    want = np.array(was, np.float32)
    want[rows[0], :, 3], want[rows[1], :, 5] = np.array(x, np.float32)[:, 0]
    assert is_now.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.array(is_now, np.float32), want)


def test_rows_of_a_bfloat16_table_and_their_gradient():
  table = jnp.asarray(RNG.normal(size=(7, 5)), jnp.bfloat16)
  tokens = jnp.array([[3, 3, 1]])
  rows, gradient = jax.value_and_grad(
      lambda table: linear.embed(table, tokens, 'float32').sum())(table)
  np.testing.assert_allclose(rows, np.array(table, np.float32)[[3, 3, 1]].sum(), rtol=1e-5)
  want = np.zeros((7, 5))
  want[[3, 1]] = [[2], [1]]
  np.testing.assert_array_equal(np.array(gradient, np.float32), want)


@pytest.mark.supports('decoding', 'int8 weights')
@pytest.mark.parametrize('scanned', [False, True])
def test_int8_weights_decode_as_their_values_would(scanned):
  config = dataclasses.replace(TINY, scan_layers=scanned)
  module, params = config.build(), random_params(config)
  rounded = jax.tree.map(
      lambda leaf: restored(leaf) if isinstance(leaf, Quantized) else leaf,
      quantize_matrices(params), is_leaf=lambda x: isinstance(x, Quantized))
  kernel = params['blocks']['layers']['mlp']['wo']['kernel']
  near = rounded['blocks']['layers']['mlp']['wo']['kernel']
  step = np.abs(kernel).max(1, keepdims=True) / 127
  assert 0.1 * step.max() < np.abs(near - kernel).max() and (
      np.abs(near - kernel) <= 0.501 * step).all()
  prompts = [RNG.integers(1, 61, length) for length in (5, 9)]
  greedy = SamplingConfig(temperature=0, max_new_tokens=8)
  got = generate(Decoder(module, weights='int8'), params, prompts, greedy, 0, 48, -1)
  want = generate(module, rounded, prompts, greedy, 0, 48, -1)
  for a, b in zip(got, want):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=2e-3)


@pytest.mark.supports('decoding', 'layers in host memory')
def test_layers_in_host_memory_decode_as_on_the_device():
  config = dataclasses.replace(TINY, scan_layers=True)
  module, params = config.build(), random_params(config)
  decoder, prompts = Decoder(module, layers_on_host=True), [RNG.integers(1, 61, 7)]
  away = decoder.prepare(params)
  for x in jax.tree.leaves(away['blocks']):
    assert x.sharding.memory_kind == ('pinned_host' if x.ndim > 2 else 'device')
  assert away['token_embedding'].sharding.memory_kind == 'device'
  greedy = SamplingConfig(temperature=0, max_new_tokens=8)
  got, = generate(decoder, away, prompts, greedy, 0, 48, -1)
  want, = generate(module, params, prompts, greedy, 0, 48, -1)
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-6)


def restored(leaf):
  """values * scales in float32."""
  values, scales = leaf.values.astype(jnp.float32), leaf.scales
  if scales.shape == values.shape[:1]:  # an embedding's
    return values * scales[:, None]
  summed = values.ndim - scales.ndim  # behind the axis of layers
  return values * scales.reshape(scales.shape[0], *[1] * summed, *scales.shape[1:])
