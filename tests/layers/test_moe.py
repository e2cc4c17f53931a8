"""A mixture of experts against a loop over tokens and experts, in float64."""
import functools
import pathlib
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers import moe
from lm.layers.moe import MoE, MoEConfig
from lm.parallel.rules import Rules

CHILD = pathlib.Path(__file__).with_name('sharded_moe.py')
B, T, D, F, E = 3, 7, 6, 5, 4


def layer(activation='swiglu', **changes):
  config = MoEConfig(**{**dict(num_experts=E, num_selected=2, d_ff=F), **changes})
  return MoE(config, D, activation, 0.5, 0.5, Rules())


@functools.cache
def parameters(activation='swiglu'):
  shapes = jax.eval_shape(layer(activation).init, jax.random.key(0), jnp.zeros((1, 1, D)))['params']
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32),
                      nn.meta.unbox(shapes))


def inputs():
  return jnp.asarray(np.random.default_rng(2).normal(size=(B, T, D)), jnp.float32)


WEIGHTS = jnp.asarray([[1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0]],
                      jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, x, weights):
  return module.apply({'params': params}, x, weights)


def run(module, x, weights=None, params=None):
  return apply(module, params or parameters(module.activation), x, weights)


def by_hand(module, x, weights):
  """(y, load balance and z of each row) by the definitions, token by token."""
  cfg, params = module.config, jax.tree.map(lambda p: np.asarray(p, np.float64),
                                            parameters(module.activation))
  y, balance, z = np.zeros(x.shape), np.zeros(B), np.zeros(B)
  for b in range(B):
    taken, chosen, sum_of_probs = np.zeros(E, int), np.zeros(E), np.zeros(E)
    for t in np.flatnonzero(weights[b]):
      token = np.asarray(x[b, t], np.float64)
      logits = token @ params['router']['kernel']
      probs = np.exp(logits) / np.exp(logits).sum()
      best = np.argsort(-probs)[:cfg.num_selected]
      total = probs[best].sum() if cfg.normalize_weights else 1
      for e in best:
        chosen[e] += 1
        if taken[e] < cfg.capacity(T):
          taken[e] += 1
          if module.activation == 'swiglu':
            gate = token @ params['wi_0'][e]
            hidden = gate / (1 + np.exp(-gate)) * (token @ params['wi_1'][e])
          else:
            hidden = np.maximum(token @ params['wi'][e], 0)
          y[b, t] += probs[e] / total * (hidden @ params['wo'][e])
      sum_of_probs += probs
      z[b] += np.log(np.exp(logits).sum())**2
    n = max(weights[b].sum(), 1)
    balance[b] = E * (chosen / (n * cfg.num_selected) * sum_of_probs / n).sum()
    z[b] /= n
  return y, balance, z


@pytest.mark.supports('layers', 'mixtures of experts, dropless or with a capacity')
@pytest.mark.parametrize('changes', [
    {}, dict(capacity_factor=0.6), dict(num_selected=1, normalize_weights=False),
    dict(activation='relu', num_selected=3, capacity_factor=1.0)], ids=str)
def test_the_mixture_is_a_loop_over_tokens_and_their_experts(changes):
  module, x = layer(**changes), inputs()
  y, penalties = run(module, x, WEIGHTS)
  want, balance, z = by_hand(module, x, np.asarray(WEIGHTS))
  np.testing.assert_allclose(y, want, atol=2e-5)
  assert penalties['load_balance'] == (pytest.approx(0.01 * balance.sum(), rel=1e-5), 2)
  assert penalties['router_z'] == (pytest.approx(0.001 * z.sum(), rel=1e-5), 2)


def test_a_capacity_of_every_token_drops_none():
  x = inputs()
  loss = lambda module, p, x: (run(module, x, WEIGHTS, p)[0]**2).sum()
  gradient = lambda module: jax.jit(jax.grad(functools.partial(loss, module), (0, 1)))(
      parameters(), x)
  whole = gradient(layer(capacity_factor=float(E)))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-3, rtol=1e-5),
               gradient(layer()), whole)


def test_the_sorted_form_of_accelerators_is_the_form_of_the_cpu():
  rng = np.random.default_rng(3)
  kernels = [parameters()[name] for name in ('wi_0', 'wi_1', 'wo')]
  experts = jnp.asarray(rng.permuted(np.tile(np.arange(E + 1), (9, 1)), axis=1)[:, :2])  # E: none
  args = (jnp.asarray(rng.normal(size=(9, D)), jnp.float32), experts,
          jnp.where(experts < E, 0.5, 0.0), kernels)

  @functools.partial(jax.jit, static_argnums=0)
  def with_gradients(form):
    loss = lambda x, gates, kernels: (form('swiglu', x, experts, gates, kernels)**2).sum()
    return form('swiglu', *args), jax.grad(loss, (0, 1, 2))(args[0], *args[2:])

  assert (experts == E).any()
  got, want = with_gradients(moe._sorted), with_gradients(moe._all_experts)
  is_held = experts < E  # the CPU's form has no gradient for the gate of no expert, nor is it used
  np.testing.assert_allclose(jnp.where(is_held, got[1][1], 0), want[1][1], rtol=1e-4, atol=1e-3)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3),
               (got[0], got[1][0], got[1][2]), (want[0], want[1][0], want[1][2]))


def test_rows_of_one_expert_need_no_sort():
  kernels = [parameters()[name][:1] for name in ('wi_0', 'wi_1', 'wo')]
  has_come = jnp.arange(9)[:, None] < 6
  x = jnp.where(has_come, np.random.default_rng(3).normal(size=(9, D)), 0).astype(jnp.float32)

  @functools.partial(jax.jit, static_argnums=0)
  def with_gradients(form):
    run = lambda x, kernels: form('swiglu', x, jnp.where(has_come, 0, 1), has_come.astype(x.dtype),
                                  kernels)
    return run(x, kernels), jax.grad(lambda *args: (run(*args)**2).sum(), (0, 1))(x, kernels)

  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3),
               with_gradients(moe._in_order), with_gradients(moe._sorted))


def test_tokens_beyond_the_capacity_get_nothing_and_depend_on_no_later_token():
  module = layer(num_selected=1, capacity_factor=1.0)  # 2 of 7 tokens an expert
  x = jnp.broadcast_to(inputs()[:, :1], (B, T, D))     # all want the same one
  y, _ = run(module, x)
  assert (y[:, :2] != 0).all() and (y[:, 2:] == 0).all()
  x = inputs()
  changed, _ = run(module, x.at[:, 4:].set(0))
  np.testing.assert_allclose(changed[:, :4], run(module, x)[0][:, :4], atol=1e-6)


def test_padding_takes_no_capacity_and_counts_in_no_penalty():
  module, x = layer(capacity_factor=0.6), inputs()
  tail = lambda value: jnp.concatenate([jnp.full((B, 2, D), value), x[:, :T - 2]], 1)
  weights = jnp.ones((B, T)).at[:, :2].set(0)
  y, penalties = run(module, tail(3.0), weights)
  alone, _ = run(module, tail(3.0))
  assert (y[:, :2] == 0).all() and not np.allclose(y[:, 2:], alone[:, 2:], atol=1e-3)
  again, same = run(module, tail(-5.0), weights)
  np.testing.assert_allclose(again, y, atol=1e-6)
  assert penalties == same


def test_even_routing_has_a_load_balance_of_1_and_one_expert_for_all_of_E():
  kernel = 20 * np.eye(D)[:, :E]
  params = {**parameters(), 'router': {'kernel': jnp.asarray(kernel, jnp.float32)}}
  module = layer(num_selected=1, balance_weight=1.0)
  even = jnp.tile(jnp.eye(D)[:E], (2, 1))[None]  # token t to expert t mod E
  total, rows = run(module, even, params=params)[1]['load_balance']
  assert total == pytest.approx(1, abs=1e-5) and rows == 1
  total, rows = run(module, jnp.tile(jnp.eye(D)[:1], (3, 8, 1)), params=params)[1]['load_balance']
  assert total == pytest.approx(3 * E, abs=1e-4) and rows == 3


@pytest.mark.parametrize('name', ['load_balance', 'router_z'])
def test_each_penalty_and_the_output_reach_the_router(name):
  module, x = layer(), inputs()
  for loss in (lambda p: run(module, x, None, p)[1][name][0],
               lambda p: run(module, x, None, p)[0].sum()):
    gradient = jax.jit(jax.grad(loss))(parameters())
    assert jnp.abs(gradient['router']['kernel']).min() > 0


def test_rows_are_penalised_on_their_own():
  module, x = layer(), inputs()
  whole = run(module, x)[1]
  parts = [run(module, x[b:b + 1])[1] for b in range(B)]
  total = jax.tree.map(lambda *values: sum(values), *parts)
  np.testing.assert_allclose(jax.tree.leaves(whole), jax.tree.leaves(total), rtol=1e-5)


def test_the_penalty_balances_a_router_that_sends_all_to_one_expert():
  module = layer(num_selected=1, balance_weight=1.0)
  x = jnp.asarray(np.random.default_rng(4).normal(size=(4, 64, D)), jnp.float32) + 1
  params = {**parameters(), 'router': {'kernel': 0.1 * parameters()['router']['kernel']
                                       .at[:, 0].add(8)}}
  loss = lambda router: run(module, x, None, {**params, 'router': router})[1]['load_balance'][0] / 4

  @jax.jit
  def train(router):
    step = lambda router, _: (jax.tree.map(lambda p, g: p - 0.3 * g, router,
                                           jax.grad(loss)(router)), None)
    return jax.lax.scan(step, router, length=100)[0]

  router = train(params['router'])
  assert loss(params['router']) > 2 and loss(router) < 1.15


def test_bfloat16_differs_by_its_rounding_and_routes_in_float32():
  module, x = layer(), inputs().astype(jnp.bfloat16)
  y, penalties = run(module, x)
  whole, same = run(module, x.astype(jnp.float32))
  assert y.dtype == jnp.bfloat16 and penalties == same
  assert jnp.abs(y - whole).max() < 0.02 * jnp.abs(whole).max()


@pytest.fixture(scope='session')
def differences(child_with_devices):
  """{mesh and capacity: largest difference to one device, of outputs and gradients}."""
  return types.MappingProxyType(child_with_devices(CHILD))


@pytest.mark.supports('precision and parallelism', 'expert meshes',
                      'dropless experts by ragged all-to-all')
@pytest.mark.parametrize('case', ['expert None', 'few None', 'expert apart None', 'fsdp 0.7',
                                  'sequence 0.7', 'sequence None', 'hidden None'])
def test_experts_on_many_devices_are_those_of_one(differences, case):
  assert differences[case] < 2e-5


@pytest.mark.parametrize('changes, message', [
    (dict(num_experts=0), 'num_experts=0 must be at least 1'),
    (dict(num_selected=9), r'num_selected=9 must be in \[1, num_experts=8\]'),
    (dict(d_ff=0), 'd_ff=0'), (dict(capacity_factor=0.0), 'capacity_factor=0.0 must be positive'),
    (dict(balance_weight=-1.0), 'balance_weight=-1.0'), (dict(z_weight=-1.0), 'z_weight=-1.0')])
def test_impossible_mixtures_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    MoEConfig(**changes)
