"""Muon: an orthogonal update for the blocks' matrices, AdamW for the rest, sharded alike."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training.optimizers import muon
from lm.training.optimizers import AdamW, Muon, Schedule
from lm.training.state import abstract_state


@pytest.mark.supports('optimisers', 'Muon')
@pytest.mark.parametrize('shape', [(2, 24, 40), (2, 40, 24), (1, 16, 16)])
def test_the_direction_is_nearly_orthogonal(shape):
  x = jax.random.normal(jax.random.key(0), shape)
  y = np.asarray(jax.jit(muon.orthogonalize)(x))
  for ours, given in zip(y, np.asarray(x)):
    assert np.all(np.abs(np.linalg.svd(ours, compute_uv=False) - 1) < 0.4)
    u, _, vt = np.linalg.svd(given, full_matrices=False)
    cosine = (ours * (u @ vt)).sum() / np.linalg.norm(ours) / np.linalg.norm(u @ vt)
    assert cosine > 0.97  # the polar factor, up to the singular values' spread


def test_an_update_has_the_size_of_adamw_and_spares_what_is_no_matrix(tiny_configs):
  module = tiny_configs['gpt2']().build()
  rules = Rules().on(MeshConfig().build(jax.devices()[:1]))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.02), jnp.float32),
                        abstract_state(module, optax.sgd(1.0), rules).params)
  grads = jax.tree.map(lambda x: x + 0.01, params)
  steps = {}
  for name, config in (('muon', Muon), ('adamw', AdamW)):
    optimizer = config(Schedule('constant', 0.1, 0), weight_decay=0.0, clip_norm=None).build(10)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    steps[name] = updates
  kernel = lambda tree: tree['blocks']['layers']['mlp']['wi']['kernel']
  rms = float(jnp.sqrt(jnp.square(kernel(steps['muon'])).mean()))
  assert 0.1 * 0.1 < rms < 0.1 * 0.4  # 0.2 of the learning rate
  np.testing.assert_allclose(steps['muon']['token_embedding'], steps['adamw']['token_embedding'],
                             rtol=1e-5)


def test_its_momentum_is_sharded_as_the_parameter(tiny_configs):
  rules = Rules().on(MeshConfig(data=1, fsdp=-1).build())
  state = abstract_state(tiny_configs['llama']().build(rules), Muon().build(10), rules)
  kernel = state.params['blocks']['layers']['attention']['out']['kernel']
  moments = [x for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
             if jax.tree_util.keystr(path).endswith("['attention']['out']['kernel']")]
  assert moments and all(x.sharding.spec == kernel.sharding.spec for x in moments)
  assert 'fsdp' in str(kernel.sharding.spec)


def test_kernels_outside_the_blocks_are_one_matrix_each():
  """A head's dense layer [D, D] is orthogonalised as a whole, not row by row."""
  params = {'head': {'dense': {'kernel': jnp.eye(8) + 0.1}, 'table': jnp.ones((5, 8))}}
  transform = Muon(clip_norm=None, weight_decay=0.0).build(10)
  grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
  updates, _ = transform.update(grads, transform.init(params), params)
  values = np.linalg.svd(np.asarray(updates['head']['dense']['kernel']), compute_uv=False)
  assert values.max() / values.min() < 2.5  # of a normal matrix it is some 30
