"""Every family computes with matrices in few bits what it computes with the floats these are."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from lm.compression import awq, matrices, smoothquant
from lm.compression.gptq import GPTQ, LAYERS
from lm.compression.quantize import quantize_matrices, RoundToNearest, with_products
from lm.inference.decoder import Decoder
from lm.layers import products
from lm.models.heads import ClassifierConfig
from lm.parallel.rules import Rules
from pallas_kernels.quantized_matmul import Quantized

RNG = np.random.default_rng(0)


def floats(params):
  return matrices.replace(params, matrices.floats)


@pytest.mark.supports('compression', 'post-training int8, int4 groups and fp8: every family')
@pytest.mark.parametrize('family, how', [
    ('gpt', RoundToNearest('int4', 8)), ('bert', RoundToNearest('int8')),
    ('t5', RoundToNearest('int4', 16)), ('transformer_xl', RoundToNearest('int4', 8)),
    ('gpt', RoundToNearest('float8_e4m3fn')), ('bert', RoundToNearest('int8', 'tensor'))])
def test_a_family_computes_what_the_floats_compute(family, how):
  model = small_runs.model(small_runs.CONFIGS[family])
  rounded, batch = how(model, None), small_runs.batch(model.config)
  kinds = {leaf.values.dtype.name for leaf in matrices.by_path(rounded.params).values()
           if matrices.is_quantized(leaf)}
  assert kinds == {how.dtype, 'int8'}
  y = small_runs.outputs(rounded.module, rounded.params, batch)
  expected = small_runs.outputs(model.module, floats(rounded.params), batch)
  np.testing.assert_allclose(y, expected, atol=2e-3 * abs(expected).max())
  assert abs(expected - small_runs.outputs(model.module, model.params, batch)).max() > 1e-4
  outputs = lambda params, batch: rounded.module.apply({'params': params}, batch,
                                                       method='outputs')[0]
  score = lambda params, batch: rounded.experiment.loss(outputs(params, batch), batch)['tokens']
  assert np.isfinite(jax.jit(score)(rounded.params, batch))  # a head in 8 bits has a loss too


def test_a_matrix_is_within_half_a_step_and_what_is_no_target_is_as_it_was():
  model = small_runs.model(small_runs.CONFIGS['gpt'])
  how = RoundToNearest('int4', 8, ('.*/(wi_0|out)/kernel',), None)
  before, after = map(matrices.by_path, (model.params, how(model, None).params))
  for path, leaf in after.items():
    if not path.endswith(('wi_0/kernel', 'out/kernel')):
      assert leaf is before[path]
      continue
    one = matrices.matrix_of(path, leaf)
    w, v = one.flat(before[path]), one.flat(matrices.floats(path, leaf))
    assert leaf.scales.shape == (2, one.K // 8, *one.outputs) and leaf.values.dtype == 'int4'
    step = np.repeat(leaf.scales.reshape(2, -1, one.N), 8, axis=1)
    assert (abs(w - v) <= step * 0.5001).all()


def test_an_embedding_is_within_half_a_step_of_each_token():
  model = small_runs.model(small_runs.CONFIGS['gpt'])
  before = model.params['token_embedding'] * jnp.linspace(0.1, 9, small_runs.V)[:, None]
  after = RoundToNearest().embedding(before)
  step = abs(before).max(1) / 127
  np.testing.assert_allclose(after.scales, step, rtol=1e-6)
  assert (abs(matrices.floats('token_embedding', after) - before) <= step[:, None] * 0.5001).all()


def test_one_scale_of_a_tensor_is_its_largest_magnitude():
  w = jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32)
  values, scales = RoundToNearest(group_size='tensor').round(w)
  np.testing.assert_allclose(scales, np.full(8, abs(w).max() / 127), rtol=1e-6)
  assert abs(values.astype(int)).max() == 127


def test_inference_rounds_as_a_run_directory_does():
  model = small_runs.model(small_runs.CONFIGS['t5'])
  one, other = quantize_matrices(model.params), RoundToNearest()(model, None).params
  assert jax.tree.structure(one) == jax.tree.structure(other)
  assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


@pytest.mark.supports('compression', 'int8 weights and activations: SmoothQuant')
def test_smoothing_changes_nothing_and_makes_rounded_activations_better():
  model = small_runs.model(small_runs.CONFIGS['gpt'])
  batch = small_runs.batch(model.config)
  y = small_runs.outputs(model.module, model.params, batch)
  smooth = smoothquant.SmoothQuant()(model, small_runs.data(batch))
  same = small_runs.outputs(smooth.module, smooth.params, batch)
  np.testing.assert_allclose(same, y, atol=1e-4 * abs(y).max())
  x = RNG.normal(size=(64, 16)).astype(np.float32)
  x[:, 3] *= 60  # the outlier of arXiv:2211.10438, figure 4
  w = jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32)
  s = smoothquant.smoothing(abs(x).max(0)[None], w[None], 0.5)[0]
  how = RoundToNearest()
  y = x @ w
  rounded = lambda x, w: products.quantized('int8', jnp.asarray(x), *how.round(w))
  error = lambda x, w: np.square(rounded(x, w) - y).mean()
  assert error(x / s, w * s[:, None]) < 0.2 * error(x, w)


def test_smoothing_is_equation_4():
  w = jnp.asarray(RNG.normal(size=(1, 4, 6)), jnp.float32)
  largest = np.array([[8.0, 0.0, 1.0, 2.0]])
  s = smoothquant.smoothing(largest, w, 0.75)
  expected = largest**0.75 / abs(np.asarray(w)).max(-1)**0.25
  np.testing.assert_allclose(s, np.where(largest > 0, expected, 1), rtol=1e-5)


def test_products_of_integers_are_those_of_rounded_rows():
  model = RoundToNearest(activations=True)(small_runs.model(small_runs.CONFIGS['bert']), None)
  head = ClassifierConfig(small_runs.CONFIGS['bert'])
  assert model.config.products == with_products(head, 'int8').trunk.products == 'int8'
  x = jnp.asarray(RNG.normal(size=(5, 16)), jnp.float32)
  values = jnp.asarray(RNG.integers(-7, 8, (16, 6)), jnp.int8)
  scales = jnp.asarray(RNG.random((2, 6)) + 0.1, jnp.float32)
  step = abs(x).max(-1, keepdims=True) / 127
  expected = (jnp.round(x / step) * step) @ matrices.expand(values, scales)
  np.testing.assert_allclose(products.quantized('int8', x, values, scales), expected, rtol=1e-4,
                             atol=1e-4)


def test_awq_does_less_to_the_outputs_than_rounding_and_less_still_with_clipping():
  config = small_runs.CONFIGS['gpt']
  model, batch = small_runs.model(config), small_runs.batch(config, rows=8)
  norm = model.params['blocks']['layers']['mlp_norm']
  norm['scale'] = norm['scale'].at[:, 3].multiply(20)
  data = small_runs.data(batch)
  done = {clip: awq.AWQ(group_size=16, clip=clip)(model, data) for clip in (False, True)}
  told = {clip: one.done[0] for clip, one in done.items()}
  assert told[True]['error'] <= told[False]['error'] < 0.7 * told[False]['error_of_nearest']
  found = GPTQ(group_size=16, by_loss=False)(model, data).done[0]
  np.testing.assert_allclose(found['error_of_nearest'], told[True]['error_of_nearest'], rtol=1e-4)
  params = done[True].params
  y = small_runs.outputs(model.module, params, batch)
  plain = RoundToNearest('int4', 16, LAYERS)(model, None).params
  exact = small_runs.outputs(model.module, model.params, batch)
  nearest = small_runs.outputs(model.module, plain, batch)
  assert np.square(y - exact).mean() < 0.8 * np.square(nearest - exact).mean()


def test_awq_clips_each_group_by_what_it_adds_to_the_outputs():
  model = small_runs.model(small_runs.CONFIGS['gpt'])
  data, how = small_runs.data(small_runs.batch(model.config, rows=8)), awq.AWQ(group_size=8)
  before, after = (matrices.by_path(of.params) for of in (model, how(model, data)))
  num_clipped = 0
  for path, one in matrices.kernels(model.params).items():
    s_LK = 1 / after[path.replace('kernel', 'input_scale')].reshape(-1, one.K)
    w_LKN = np.asarray(one.flat(before[path])) * s_LK[..., None]
    moments_LKK = data.inputs(model, ('moments',), (path,))[path].moments
    for layer, scales_PN in enumerate(after[path].scales.reshape(-1, one.K // 8, one.N)):
      best_PN, largest_PN = [], []
      for first in range(0, one.K, 8):
        at = slice(first, first + 8)
        w_GN, s_G = w_LKN[layer, at], s_LK[layer, at]
        largest_N = abs(w_GN).max(0) / 7
        shares_C = np.linspace(1, 0.5, 11)
        off_CGN = np.stack([np.clip(np.round(w_GN / (c * largest_N)), -8, 7) * c * largest_N - w_GN
                            for c in shares_C]) / np.asarray(s_G)[:, None]
        errors_CN = np.einsum('cgn,gh,chn->cn', off_CGN, moments_LKK[layer, at, at], off_CGN)
        best_PN.append(largest_N * shares_C[errors_CN.argmin(0)])
        largest_PN.append(largest_N)
      if not np.allclose(scales_PN, largest_PN, rtol=1e-4):
        num_clipped += 1
        assert np.isclose(scales_PN, best_PN, rtol=1e-4).mean() > 0.99  # ties, in float32
  assert num_clipped > 4


def test_what_is_in_few_bits_goes_on_with_texts_as_its_floats_do():
  config = small_runs.CONFIGS['transformer_xl']
  model = RoundToNearest('int4', 8)(small_runs.model(config), None)
  tokens, lengths = jnp.ones((1, 4), jnp.int32), jnp.array([4])
  decoder = Decoder(model.module)
  found = []
  for params in model.params, floats(model.params):
    params = decoder.prepare(params)
    logits, cache = decoder.start(params, tokens, lengths, 8)
    found.append(np.asarray(decoder.extend(params, tokens[:, :1], cache)[0]))
  np.testing.assert_allclose(*found, atol=2e-3 * abs(found[1]).max())
  assert any(isinstance(x, Quantized) for x in jax.tree.leaves(
      model.params, is_leaf=matrices.is_quantized))


@pytest.mark.supports('compression', 'quantisation-aware training')
@pytest.mark.parametrize('kind, how', [
    ('fake_int8', RoundToNearest(embeddings=None)),
    ('fake_int4', RoundToNearest('int4', 32, ('.*/mlp/wo/kernel',), None))])
def test_a_model_is_rounded_to_what_it_was_trained_as(kind, how):
  if kind == 'fake_int4':  # of which 32 does not divide, a column has one scale
    columns = RoundToNearest('int4', None, ('(?!.*/wo/).*',), None)
    how = (columns, how)
  config = dataclasses.replace(small_runs.CONFIGS['gpt'], products=kind)
  model, batch = small_runs.model(config), small_runs.batch(config)
  trained = small_runs.outputs(model.module, model.params, batch)
  leaves = {}
  for step in how if isinstance(how, tuple) else (how,):
    rounded = step(model, None)
    assert rounded.config.products is None
    leaves |= {path: leaf for path, leaf in matrices.by_path(rounded.params).items()
               if matrices.is_quantized(leaf)}
  assert leaves.keys() == matrices.kernels(model.params).keys()
  params = matrices.with_leaves(model.params, leaves)
  found = small_runs.outputs(rounded.module, params, batch)
  np.testing.assert_allclose(found, trained, atol=1e-3 * abs(trained).max())


def test_gradients_go_straight_through_the_rounding():
  x, w = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((5, 64), (64, 6)))
  multiply = products.product('fake_int4', Rules())
  y, vjp = jax.vjp(multiply, x, w)
  rounded = matrices.expand(*RoundToNearest('int4', 32).round(w))
  np.testing.assert_allclose(y, x @ rounded, rtol=1e-4, atol=1e-4)
  g = jnp.asarray(RNG.normal(size=y.shape), jnp.float32)
  dx, dw = vjp(g)
  np.testing.assert_allclose(dw, x.T @ g, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(dx, g @ rounded.T, rtol=1e-4, atol=1e-4)


def test_settings_without_a_meaning_are_refused():
  with pytest.raises(ValueError, match="activations=True multiplies int8 by int8, and dtype="):
    RoundToNearest('int4', 16, activations=True)
  with pytest.raises(ValueError, match='alpha=1.5 must be from 0'):
    smoothquant.SmoothQuant(1.5)
  with pytest.raises(ValueError, match='group_size=0 must be at least 1'):
    RoundToNearest(group_size=0)
