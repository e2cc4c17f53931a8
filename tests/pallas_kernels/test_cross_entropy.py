"""`cross_entropy` in blocks is the reference, in less memory."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cross_entropy import cross_entropy, token_losses

IMPLEMENTATIONS = ['reference', 'blocks']


def operands(B, T, D, V, dtype=jnp.float32):
  rng = np.random.default_rng(T + V)
  hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
  embedding = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
  targets, weights = rng.integers(0, V, (B, T)), rng.choice([0, 0, 0.5, 1], (B, T))
  targets.flat[:2], weights.flat[:2] = [V - 1, 0][:B * T], 1  # both ends of the vocabulary count
  return hidden, embedding, jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32)


def exact(hidden, embedding, targets, weights, scale):
  """Loss and scaled gradients in float64."""
  hidden, embedding, weights = (np.asarray(x.astype(jnp.float32), np.float64)
                                for x in (hidden, embedding, weights))
  logits = hidden @ embedding.T
  logits -= logits.max(-1, keepdims=True)
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  is_target = np.arange(len(embedding)) == np.asarray(targets)[..., None]
  loss = -(weights * np.log(probs[is_target].reshape(weights.shape))).sum()
  dlogits = scale * weights[..., None] * (probs - is_target)
  return loss, dlogits @ embedding, np.einsum('btv,btd->vd', dlogits, hidden)


@functools.partial(jax.jit, static_argnames='implementation')
def loss_and_gradients(hidden, embedding, targets, weights, scale, implementation):
  total = lambda h, e: cross_entropy(h, e, targets, weights, implementation=implementation)
  loss, vjp = jax.vjp(total, hidden, embedding)
  return loss, *vjp(scale)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('B, T, V', [(2, 16, 64), (3, 13, 37), (2, 5, 11), (1, 1, 3)])
def test_loss_and_gradients_are_float64s_for_any_length_and_vocabulary(implementation, B, T, V):
  args = operands(B, T, 8, V)
  got = loss_and_gradients(*args, jnp.float32(-2.5), implementation)
  for x, y in zip(got, exact(*args, -2.5)):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_bfloat16_differs_by_its_rounding_only(implementation):
  args = operands(2, 21, 32, 51, jnp.bfloat16)
  loss, dhidden, dembedding = loss_and_gradients(*args, jnp.float32(1), implementation)
  assert (loss.dtype, dhidden.dtype, dembedding.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
  rounded = args[0], args[1].astype(jnp.bfloat16), *args[2:]
  want = exact(*rounded, 1)
  eps = float(jnp.finfo(jnp.bfloat16).eps)
  np.testing.assert_allclose(loss, want[0], rtol=1e-5)  # logits are float32 sums of exact products
  np.testing.assert_allclose(dhidden.astype(jnp.float32), want[1], atol=eps * 51**0.5)
  np.testing.assert_allclose(dembedding, want[2], atol=eps * 42**0.5)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_tokens_of_weight_zero_count_for_nothing(implementation):
  hidden, embedding, targets, _ = operands(2, 9, 8, 12)
  weights = jnp.ones((2, 9)).at[:, 4:].set(0)
  got = loss_and_gradients(hidden, embedding, targets, weights, jnp.float32(1), implementation)
  other = loss_and_gradients(hidden.at[:, 4:].add(3), embedding, targets.at[:, 4:].set(0), weights,
                             jnp.float32(1), implementation)
  for x, y in zip(got, other):
    np.testing.assert_allclose(x, y, atol=1e-6)
  assert not np.any(got[1][:, 4:])
  nothing = loss_and_gradients(hidden, embedding, targets, 0 * weights, jnp.float32(1),
                               implementation)
  assert all(not np.any(x) for x in nothing)


def test_without_a_gradient_the_loss_is_the_same():
  args = operands(2, 13, 8, 37)
  loss = jax.jit(functools.partial(cross_entropy, implementation='blocks'))(*args)
  np.testing.assert_allclose(loss, exact(*args, 1)[0], rtol=1e-6)


def test_losses_one_by_one_are_those_that_are_summed():
  hidden, embedding, targets, weights = operands(2, 13, 8, 37)
  losses = jax.jit(token_losses)(hidden, embedding, targets)
  assert losses.shape == (2, 13)
  for b, t in np.ndindex(2, 13):
    one = jnp.zeros((2, 13)).at[b, t].set(1)
    want = exact(hidden, embedding, targets, one, 1)[0]
    np.testing.assert_allclose(losses[b, t], want, rtol=1e-5)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_huge_logits_overflow_nothing(implementation):
  hidden, embedding, targets, weights = operands(1, 8, 8, 12)
  got = loss_and_gradients(hidden * 1e4, embedding, targets, weights, jnp.float32(1),
                           implementation)
  assert all(np.isfinite(x).all() for x in got)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('target', [12, -100])
def test_a_target_outside_the_vocabulary_gives_nan_even_at_weight_zero(implementation, target):
  """Loud on purpose: an `ignore_index` of other frameworks must not pass as a token."""
  hidden, embedding, targets, weights = operands(1, 8, 8, 12)
  args = hidden, embedding, targets.at[0, 3].set(target), weights.at[0, 3].set(0)
  assert np.isnan(loss_and_gradients(*args, jnp.float32(1), implementation)[0])


@pytest.fixture(scope='module')
def compiled():
  """{implementation: compiled gradient} at 512 tokens and a vocabulary of 8192."""
  shapes = [jax.ShapeDtypeStruct(*shape) for shape in (
      ((1, 512, 32), jnp.float32), ((8192, 32), jnp.float32), ((1, 512), jnp.int32),
      ((1, 512), jnp.float32), ((), jnp.float32))]
  return {name: loss_and_gradients.lower(*shapes, implementation=name).compile()
          for name in IMPLEMENTATIONS}


def test_blocks_need_less_than_a_third_of_the_references_memory(compiled):
  blocks, reference = (compiled[name].memory_analysis().temp_size_in_bytes
                       for name in ('blocks', 'reference'))
  assert reference >= 4 * 512 * 8192  # else the comparison says nothing
  assert blocks < reference / 3


@pytest.mark.supports('precision and parallelism', 'exact cross entropy without whole logits')
def test_no_array_of_blocks_is_as_large_as_the_logits(compiled):
  def largest(name):
    shapes = re.findall(r'(?:f32|bf16|pred|s32)\[([\d,]+)\]', compiled[name].as_text())
    return max(np.prod([int(n) for n in shape.split(',')]) for shape in shapes)

  assert largest('blocks') < 512 * 8192 <= largest('reference')


def test_wrong_arguments_are_named():
  hidden, embedding, targets, weights = operands(2, 9, 8, 12)
  with pytest.raises(ValueError, match=r'targets \(2, 8\)'):
    cross_entropy(hidden, embedding, targets[:, 1:], weights)
  with pytest.raises(ValueError, match="implementation='gpu'"):
    cross_entropy(hidden, embedding, targets, weights, implementation='gpu')
