"""What linear layers are said to be given is what they are given."""
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from lm.compression import calibration, Model
from lm.layers.linear import Linear


class Two(nn.Module):
  """y = relu(x a) b, and a layer that no loss sees."""
  config = small_runs.types.SimpleNamespace(init_carry=lambda rows: None)

  @nn.compact
  def __call__(self, batch, draws=None, carry=None):
    linear = lambda n, m, name: Linear((n,), (m,), (None, None), 0.5, name=name)
    hidden = jax.nn.relu(linear(3, 5, 'a')(jnp.asarray(batch['x'])))
    linear(5, 2, 'unseen')(hidden)
    return linear(5, 4, 'b')(hidden), carry

  def outputs(self, batch, draws=None, carry=None):
    return self(batch, draws, carry)


def test_statistics_are_those_of_the_inputs_that_count():
  rng = np.random.default_rng(0)
  batches = [{'x': rng.normal(size=(2, 6, 3)).astype(np.float32),
              'w': (rng.uniform(-1, 1, (2, 6, 4)) * (rng.random((2, 6, 1)) < 0.7)
                    ).astype(np.float32)} for _ in range(3)]
  params = Two().init(jax.random.key(0), batches[0])['params']
  params = nn.meta.unbox(params)
  loss = lambda y, batch: {'sum': (y * batch['w']).sum()}
  experiment = small_runs.types.SimpleNamespace(
      model=Two.config, loss=small_runs.types.SimpleNamespace(plain=loss),
      build_model=lambda rules: Two())
  names = 'magnitudes', 'squares', 'largest', 'moments', 'curvature'
  found = small_runs.data(*batches).inputs(Model(experiment, params), names)
  x, g = (np.concatenate([b[name][b['w'].any(-1)] for b in batches]) for name in 'xw')
  hidden = np.maximum(x @ np.asarray(params['a']['kernel']), 0)
  g_hidden = g @ np.asarray(params['b']['kernel']).T * (hidden > 0)
  counts = hidden.any(-1)  # no output of a dead row reaches the loss
  for path, rows, slopes in ('a/kernel', x[counts], g_hidden[counts]), ('b/kernel', hidden, g):
    assert found[path].count == len(rows)
    np.testing.assert_allclose(found[path].moments[0], rows.T @ rows, rtol=1e-5)
    weighed = rows * np.square(slopes).mean(-1, keepdims=True)
    np.testing.assert_allclose(found[path].curvature[0], weighed.T @ rows, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[path].squares[0], (rows**2).sum(0), rtol=1e-5)
    np.testing.assert_allclose(found[path].magnitudes[0], abs(rows).sum(0), rtol=1e-5)
    np.testing.assert_allclose(found[path].largest[0], abs(rows).max(0), rtol=1e-6)
  assert found['unseen/kernel'].count == 0 and not found['unseen/kernel'].moments.any()


def seen(config, scanned):
  model = small_runs.model(dataclasses.replace(config, scan_layers=scanned))
  batch = small_runs.batch(config)
  return small_runs.data(batch, batch).inputs(model, ('squares', 'moments'))


@pytest.mark.supports('compression', 'calibration on a task: every family')
@pytest.mark.parametrize('family', small_runs.CONFIGS)
def test_every_layer_of_every_family_is_seen(family):
  found = seen(small_runs.CONFIGS[family], True)
  assert len(found) >= 6
  for path, one in found.items():
    assert (one.count > 0).all(), path
    np.testing.assert_allclose(np.einsum('lkk->lk', one.moments), one.squares, rtol=1e-4)


def test_scanned_layers_see_what_unrolled_ones_do():
  config = small_runs.CONFIGS['gpt']
  found, unrolled = seen(config, True), seen(config, False)
  assert found.keys() == unrolled.keys()
  for path, one in found.items():
    if not path.endswith('query/kernel'):  # a first token sees itself, whatever its query
      np.testing.assert_array_equal(one.count, unrolled[path].count)
      np.testing.assert_allclose(one.moments, unrolled[path].moments, rtol=1e-4,
                                 atol=1e-5 * one.moments.max())


def test_padding_has_no_part_and_probes_change_nothing():
  config = small_runs.CONFIGS['gpt']
  model, batch = small_runs.model(config), small_runs.batch(config)
  longer = {name: np.pad(x, ((0, 0), (0, 4)), constant_values=0) for name, x in batch.items()}
  ask = lambda batch: small_runs.data(batch).inputs(model, ('moments',), ('.*/(wo|query)/kernel',))
  found, padded = ask(batch), ask(longer)
  assert set(found) == {'blocks/layers/attention/query/kernel', 'blocks/layers/mlp/wo/kernel'}
  for path, one in found.items():
    np.testing.assert_array_equal(one.count, padded[path].count)
    np.testing.assert_allclose(one.moments, padded[path].moments, rtol=1e-4, atol=1e-5)
  seen = {'seen': {'count': jnp.zeros((2,))}}
  mlp = model.params['blocks']['layers']['mlp']
  probed = jax.tree.map(lambda x: x, model.params)
  probed['blocks']['layers']['mlp'] = {**mlp, 'wo': {**mlp['wo'], **seen}}
  np.testing.assert_array_equal(small_runs.outputs(model.module, model.params, batch),
                                small_runs.outputs(model.module, probed, batch))


def test_data_out_of_range_are_refused():
  with pytest.raises(ValueError, match='num_rows=0 must be at least 1'):
    calibration.Data(num_rows=0)
