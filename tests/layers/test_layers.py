"""Each layer against its formula in float64."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers import linear
from lm.layers.attention import Attention
from lm.layers.cache import KVCache, Places
from lm.layers.mlp import MLP
from lm.layers.norms import Norm
from lm.layers.positions import rotary, rotation
from lm.layers.stack import Stack, unstack
from lm.parallel.rules import Rules

RNG = np.random.default_rng(0)


def draw(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def random_params(module, *args):
  """Random parameters of the shapes that `module` wants, without compiling its init."""
  shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *args))['params']
  return jax.tree.map(lambda x: draw(*x.shape), shapes)


@pytest.mark.supports('layers', 'LayerNorm', 'RMSNorm')
@pytest.mark.parametrize('kind', ['layernorm', 'rmsnorm'])
@pytest.mark.parametrize('offset', [0, 100])
def test_norms_are_their_formula(kind, offset):
  x, norm = draw(2, 3, 16) + offset, Norm(kind, 1e-3, use_bias=True)
  params = random_params(norm, x)
  assert ('bias' in params) == (kind == 'layernorm')
  y = np.asarray(x, np.float64)
  if kind == 'layernorm':
    y = y - y.mean(-1, keepdims=True)
  y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-3) * params['scale'] + params.get('bias', 0)
  np.testing.assert_allclose(norm.apply({'params': params}, x), y, atol=2e-4 if offset else 2e-6)


@pytest.mark.parametrize('kind', ['layernorm', 'rmsnorm'])
def test_norms_compute_in_float32_and_keep_the_dtype(kind):
  x, norm = (draw(4, 256) + 3).astype(jnp.bfloat16), Norm(kind, 1e-5)
  params = random_params(norm, x)
  y = norm.apply({'params': params}, x)
  want = norm.apply({'params': params}, x.astype(jnp.float32)).astype(jnp.bfloat16)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, want)


@pytest.mark.supports('layers', 'rotary positions')
def test_rotary_is_multiplication_by_a_complex_phase():
  x, positions = draw(2, 5, 3, 8), jnp.asarray(RNG.integers(0, 1000, (2, 5)), jnp.int32)
  pairs = np.asarray(x[..., :4] + 1j * x[..., 4:], np.complex128)
  angle = np.asarray(positions)[..., None] * 10000.0**(-np.arange(4) / 4)
  turned = pairs * np.exp(1j * angle)[:, :, None]
  got = rotary(x, rotation(positions, 8, 10000.0))
  np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=3e-4)
  halved = rotary(x.astype(jnp.bfloat16), rotation(positions, 8, 10000.0))
  assert halved.dtype == jnp.bfloat16


def test_the_gradient_of_a_bias_is_a_float32_sum():
  layer = linear.Linear((4,), (6,), ('embed', 'mlp'), 0.1, True)
  x, g = draw(64, 32, 4).astype(jnp.bfloat16), draw(64, 32, 6).astype(jnp.bfloat16)
  params = nn.meta.unbox(layer.init(jax.random.key(0), x))
  got = jax.grad(lambda params: jnp.vdot(layer.apply(params, x), g))(params)['params']['bias']
  np.testing.assert_allclose(got, np.asarray(g, np.float64).sum((0, 1)), atol=1e-3)


def test_linear_contracts_its_inputs_and_adds_its_bias():
  x = draw(2, 3, 4, 5)
  layer = linear.Linear((4, 5), (2, 6), ('heads', 'head_dim', 'mlp', 'embed'), 0.1, True)
  params = random_params(layer, x)
  want = np.einsum('btnh,nhpd->btpd', x, params['kernel']) + params['bias']
  np.testing.assert_allclose(layer.apply({'params': params}, x), want, atol=1e-5)


def test_parameters_are_float32_and_computation_is_in_the_inputs_dtype():
  x = draw(2, 4).astype(jnp.bfloat16)
  layer = linear.Linear((4,), (6,), ('embed', 'mlp'), 0.1, True)
  params = random_params(layer, x)
  y, grads = jax.value_and_grad(
      lambda p: layer.apply({'params': p}, x).astype(jnp.float32).sum())(params)
  assert layer.apply({'params': params}, x).dtype == jnp.bfloat16 and np.isfinite(y)
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype('float32')}


@pytest.mark.supports('layers', 'GELU', 'SwiGLU')
@pytest.mark.parametrize('activation', ['gelu', 'swiglu'])
def test_mlp_is_its_formula(activation):
  x, mlp = draw(2, 3, 4), MLP(4, 6, activation, True, 0.1, 0.1, Rules())
  params = random_params(mlp, x)
  dense = lambda name, x: x @ np.asarray(params[name]['kernel'], np.float64) + params[name]['bias']
  y = np.asarray(x, np.float64)
  if activation == 'swiglu':
    gate = dense('wi_0', y)
    y = gate / (1 + np.exp(-gate)) * dense('wi_1', y)
  else:
    y = dense('wi', y)
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
  np.testing.assert_allclose(mlp.apply({'params': params}, x), dense('wo', y), atol=1e-5)


def test_logits_are_float32_sums_of_bfloat16_products():
  hidden, embedding = draw(1, 3, 64).astype(jnp.bfloat16), draw(5, 64)
  got = linear.logits(hidden, embedding)
  exact = lambda x: np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32), np.float64)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, exact(hidden) @ exact(embedding).T, atol=2e-5)


def test_attention_writes_its_keys_behind_those_of_the_cache():
  x = draw(2, 3, 8)
  layer = Attention(8, 4, 2, 2, 0.1, 0.1, Rules())
  params, old = random_params(layer, x), draw(2, 2, 9, 2)
  lengths = jnp.array([0, 4])
  _, cache = layer.apply({'params': params}, x, cache=KVCache(old, -old), places=Places(lengths))
  new = np.einsum('btd,dkh->bkth', x, params['key']['kernel'])
  for row, start in enumerate((0, 4)):
    np.testing.assert_allclose(cache.key[row, :, start:start + 3], new[row], atol=1e-5)
    np.testing.assert_array_equal(cache.key[row, :, :start], old[row, :, :start])
    np.testing.assert_array_equal(cache.value[row, :, start + 3:], -old[row, :, start + 3:])


class Affine(nn.Module):
  """x -> x * scale + shared + own, and x before."""

  @nn.compact
  def __call__(self, x, rows, shared, own_rows, own, draws):
    ones = nn.with_partitioning(nn.initializers.ones, ('embed',))
    scale = self.param('scale', ones, x.shape[-1:])
    return x * scale + shared + own[0] + rows + own_rows, x


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('remat', ['none', 'full', 'dots'])
def test_a_stack_applies_its_blocks_in_order(scan, remat):
  x, rows, own_rows, own = draw(2, 4), draw(2, 1), draw(3, 2, 1), draw(3)
  stack = Stack(lambda rules: Affine(parent=None), 3, scan, remat)
  boxed = jax.eval_shape(stack.init, jax.random.key(0), x, rows, 0.5, own_rows, (own,))['params']
  assert boxed['layers']['scale'].names == ('layers', 'embed')
  params = {'layers': {'scale': draw(3, 4)}}
  want, before = x, []
  for layer in range(3):
    before.append(want)
    want = want * params['layers']['scale'][layer] + 0.5 + own[layer] + rows + own_rows[layer]
  got, outputs = stack.apply({'params': params}, x, rows, 0.5, own_rows, (own,))
  np.testing.assert_allclose(got, want, atol=1e-6)
  np.testing.assert_allclose(jnp.stack(list(outputs)), jnp.stack(before), atol=1e-6)
  if not scan:
    sliced = {'layers': [{'scale': scale} for scale in params['layers']['scale']]}
    again, _ = stack.apply({'params': sliced}, x, rows, 0.5, list(own_rows), (list(own),))
    np.testing.assert_array_equal(again, got)


class Shift(nn.Module):
  """x -> x + a random parameter."""

  @nn.compact
  def __call__(self, x, rows, shared, own_rows, own, draws):
    return x + self.param('shift', linear.normal(1.0, 'embed'), x.shape[-1:]), None


def test_each_layer_of_a_stack_has_its_own_draw():
  stack = Stack(lambda rules: Shift(parent=None), 3, True, 'none')
  boxed = jax.jit(stack.init)(jax.random.key(0), jnp.zeros((1, 4)), None, None, None, ())
  rows = nn.meta.unbox(boxed)['params']['layers']['shift']
  assert rows.shape == (3, 4) and len(np.unique(rows)) == 12


def test_unstack_is_the_inverse_of_stack():
  tree = {'a': draw(3, 2), 'b': draw(3)}
  again = jax.tree.map(lambda *leaves: jnp.stack(leaves), *unstack(tree))
  assert jax.tree.all(jax.tree.map(np.array_equal, again, tree))


def test_a_token_outside_the_vocabulary_gives_nan():
  """Loud on purpose: a clamped token would train quietly on the wrong row."""
  rows = linear.embed(draw(5, 2), jnp.array([[0, 5]]), 'float32')
  assert np.isfinite(rows[0, 0]).all() and np.isnan(rows[0, 1]).all()
