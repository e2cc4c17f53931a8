"""GPTQ is the paper's algorithm, and no worse than rounding."""
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from lm.compression import gptq, grids, matrices
from lm.compression.quantize import RoundToNearest
from lm.errors import UserError

RNG = np.random.default_rng(0)
K, N = 32, 24
X = (RNG.normal(size=(300, K)) @ RNG.normal(size=(K, K)) * 0.3 + RNG.normal(size=(300, K)) * 0.2)
W = RNG.normal(size=(K, N)).astype(np.float32)
MOMENTS = (X.T @ X).astype(np.float32)


def paper(w_KN, moments_KK, scales_KN, order, damping):
  """arXiv:2210.17323, equations 2 and 3, a row at a time: the inverse of what is left of H is found
  by eliminating the row that was rounded."""
  w, q = w_KN.astype(np.float64), np.zeros_like(w_KN, np.float64)
  h = moments_KK.astype(np.float64)
  inverse = np.linalg.inv(h + damping * np.diag(h).mean() * np.eye(len(h)))
  for k in order:
    q[k] = np.clip(np.round(w[k] / scales_KN[k]), -8, 7)
    error = w[k] - q[k] * scales_KN[k]
    w -= np.outer(inverse[:, k] / inverse[k, k], error)
    inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    inverse[k, k] = 1  # gone: no later row looks at it
  return q


def loss(values, scales):
  return float(np.square(X @ (W - np.asarray(matrices.expand(values, scales)))).sum())


@pytest.mark.supports('compression', 'int4 in groups: round to nearest, GPTQ, AWQ')
@pytest.mark.parametrize('by_activity', [False, True])
def test_it_is_the_papers_algorithm(by_activity):
  how = gptq.GPTQ(group_size=None, by_activity=by_activity, search=False)
  values, scales, error_N, plain_N = how.solve(W, MOMENTS)
  order = np.argsort(-np.diag(MOMENTS), kind='stable') if by_activity else range(K)
  scales_N = abs(W).max(0) / 7
  expected = paper(W, MOMENTS, np.tile(scales_N, (K, 1)), order, 0.01)
  chosen = error_N < plain_N  # the other columns are rounded to the nearest
  assert chosen.mean() > 0.8
  np.testing.assert_array_equal(values.astype(np.int32)[:, chosen], expected[:, chosen])
  np.testing.assert_allclose(scales, scales_N, rtol=1e-6)
  np.testing.assert_allclose(error_N.sum(), loss(values, scales), rtol=1e-3)


@pytest.mark.parametrize('how', [
    gptq.GPTQ(group_size=8), gptq.GPTQ(group_size=16, by_activity=False),
    gptq.GPTQ(group_size=None, search=False),
    gptq.GPTQ(dtype='float8_e4m3fn', group_size=None)])
def test_no_output_is_worse_than_rounded_to_the_nearest(how):
  values, scales, error_N, plain_N = how.solve(W, MOMENTS)
  nearest = RoundToNearest(how.dtype, how.group_size).round(jnp.asarray(W))
  assert (error_N <= plain_N).all() and error_N.sum() < 0.75 * plain_N.sum()
  np.testing.assert_allclose(loss(*nearest), plain_N.sum(), rtol=1e-3)
  np.testing.assert_allclose(loss(values, scales), error_N.sum(), rtol=1e-3)


def test_pruned_weights_stay_pruned_and_inputs_that_never_come_do_no_harm():
  w = W * (RNG.random(W.shape) < 0.5)
  moments = MOMENTS.copy()
  moments[3], moments[:, 3] = 0, 0
  values, scales, error_N, plain_N = gptq.GPTQ(group_size=16).solve(w, moments)
  assert not values.astype(np.int32)[w == 0].any() and error_N.sum() < 0.75 * plain_N.sum()
  assert np.isfinite(scales).all()


def test_searched_scales_have_less_error_than_those_of_the_largest():
  weights_K = np.diag(MOMENTS)
  w = jnp.asarray(W)

  def error(scales):
    return (jnp.square(grids.rounded('int4', w, scales) * scales - w) * weights_K[:, None]).sum(0)

  searched, largest = map(error, (grids.searched('int4', w, weights_K), grids.largest('int4', w)))
  assert (searched <= largest).all() and searched.sum() < 0.9 * largest.sum()
  extreme_N = W[abs(W).argmax(0), np.arange(N)]
  tried = [share * scales for share in np.linspace(0.5, 1, 26)
           for scales in (abs(extreme_N) / 7, extreme_N / -8)]
  best = np.min([(np.square(np.clip(np.round(W / scales), -8, 7) * scales - W)
                  * weights_K[:, None]).sum(0) for scales in tried], axis=0)
  np.testing.assert_allclose(searched, best, rtol=1e-4)


@pytest.mark.parametrize('by_loss, statistic', [(True, 'curvature'), (False, 'moments')])
def test_tokens_weigh_what_the_loss_depends_on_them_or_all_the_same(by_loss, statistic):
  model = small_runs.model(small_runs.CONFIGS['gpt'])
  data = small_runs.data(small_runs.batch(model.config, rows=4))
  after = gptq.GPTQ(group_size=8, by_loss=by_loss)(model, data)
  before, leaves = matrices.by_path(model.params), matrices.by_path(after.params)
  inputs = data.inputs(model, (statistic,))
  error = 0
  for path, one in matrices.kernels(model.params).items():
    off_LKN = one.flat(before[path] - matrices.floats(path, leaves[path]))
    moments_LKK = getattr(inputs[path], statistic)
    error += np.einsum('lkn,lkj,ljn', off_LKN, moments_LKK, off_LKN)
  np.testing.assert_allclose(after.done[-1]['error'], error, rtol=1e-3)
  assert error < 0.75 * after.done[-1]['error_of_nearest']


@pytest.mark.parametrize('how, sentence', [
    (gptq.GPTQ(group_size=12), 'group_size=12 does not divide the 16 inputs of '
     'blocks/layers/attention/.*; take one that does, such as 16'),
    (gptq.GPTQ(targets=('.*/keys/kernel',)), "'.*/keys/kernel' matches no kernel; the model has")])
def test_what_cannot_be_rounded_is_named(how, sentence):
  with pytest.raises(UserError, match=sentence):
    how(small_runs.model(small_runs.CONFIGS['gpt']), None)


def test_a_model_in_few_bits_is_not_rounded_again():
  model = RoundToNearest()(small_runs.model(small_runs.CONFIGS['gpt']), None)
  with pytest.raises(UserError, match='is int8 already, and is not rounded twice; compress'):
    gptq.GPTQ(group_size=16)(model, None)


def test_settings_without_a_meaning_are_refused():
  with pytest.raises(ValueError, match='damping=0 must be positive'):
    gptq.GPTQ(damping=0)
  with pytest.raises(ValueError, match="group_size='tensor' shares a scale"):
    gptq.GPTQ(group_size='tensor')
