"""What must hold of every Transformer-XL: its memory, its relative positions, its softmax."""
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers.relative_attention import RelativeAttention, sinusoids
from lm.models.transformer_xl import Memory, TransformerXLConfig
from lm.parallel.rules import Rules
from lm.training.losses import Prediction
from pallas_kernels.dropout import Draws

B, V, M, T = 2, 29, 8, 5
TINY = TransformerXLConfig(vocab_size=V, max_length=T, memory_length=M, d_model=16, num_layers=3,
                           num_heads=2, d_head=6, d_ff=20, dtype='float32', scan_layers=True)
ONE = dataclasses.replace(TINY, num_layers=1)
SAME = dataclasses.replace(TINY, same_length=True, untie_biases=True)
CLUSTERS = dataclasses.replace(ONE, cutoffs=(9, 15, 22), div_val=2)


def shapes(config):
  init = functools.partial(config.build().init, method='initialize')
  return nn.meta.unbox(jax.eval_shape(init, jax.random.key(0)))['params']


@functools.cache
def params_of(config):
  """Random parameters by numpy (nothing to compile), of a size at which all parts are heard."""
  rng = np.random.default_rng(0)
  draw = lambda path, x: rng.normal(path[-1].key == 'scale', 0.4, x.shape).astype(np.float32)
  return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, shapes(config)))


def tokens(length, seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, V, (B, length)), jnp.int32)


@functools.partial(jax.jit, static_argnums=0, static_argnames='method')
def apply(config, params, *args, **kwargs):
  return config.build().apply({'params': params}, *args, **kwargs)


def in_segments(config, row_BT, length):
  """The last hidden states of a row that is read segment by segment, and the last memory."""
  hidden, memory = [], config.init_carry(B)
  for start in range(0, row_BT.shape[1], length):
    x, memory = apply(config, params_of(config), row_BT[:, start:start + length], memory)
    hidden.append(x)
  return jnp.concatenate(hidden, axis=1), memory


@pytest.mark.supports('models', 'Transformer-XL')
@pytest.mark.parametrize('length', [1, 5])
def test_a_long_memory_is_attention_over_the_concatenated_segments(length):
  config = dataclasses.replace(TINY, memory_length=20)
  row_BT = tokens(20)
  whole, _ = apply(config, params_of(config), row_BT)
  parts, memory = in_segments(config, row_BT, length)
  np.testing.assert_allclose(parts, whole, atol=2e-5)
  assert (memory.filled == 20).all()


def test_every_token_of_equal_lengths_sees_what_it_sees_in_one_row():
  """With `same_length` a memory of M is enough, in any number of layers."""
  row_BT = tokens(25)
  whole, _ = apply(SAME, params_of(SAME), row_BT)
  np.testing.assert_allclose(in_segments(SAME, row_BT, 5)[0], whole, atol=2e-5)


def test_one_layer_sees_its_segment_and_the_memory_and_nothing_before():
  row_BT = tokens(15)
  seen = apply(ONE, params_of(ONE), row_BT[:, 2:])[0][:, -T:]  # M + T = 13 tokens
  got = in_segments(ONE, row_BT, T)[0][:, -T:]
  np.testing.assert_allclose(got, seen, atol=2e-5)
  assert jnp.abs(got - apply(ONE, params_of(ONE), row_BT[:, 3:])[0][:, -T:]).max() > 1e-3


@pytest.mark.parametrize('config', [TINY, dataclasses.replace(SAME, clamp_length=3)],
                         ids=['published', 'same length'])
def test_scanned_is_unrolled(config):
  unrolled = dataclasses.replace(config, scan_layers=False)
  params, memory = params_of(config), filled_memory(config)
  got = apply(unrolled, unrolled.unstack(params), tokens(T), memory)
  want = apply(config, params, tokens(T), memory)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), got, want)


def filled_memory(config, filled=M):
  shape = config.init_carry(B).hidden.shape
  hidden = np.random.default_rng(3).normal(size=shape).astype(np.float32)
  return Memory(jnp.asarray(hidden), jnp.full((B,), filled, jnp.int32))


def test_no_gradient_reaches_the_memory_though_its_values_are_heard():
  def total(hidden, memory):
    y, after = config_apply(memory._replace(hidden=hidden))
    return (y**2).sum() + after.hidden.sum()

  config_apply = lambda memory: apply(TINY, params_of(TINY), tokens(T), memory)
  memory = filled_memory(TINY)
  gradient = jax.jit(jax.grad(total))(memory.hidden, memory)
  assert (gradient == 0).all()
  assert total(memory.hidden, memory) != total(memory.hidden * 1.1, memory)


def test_the_new_memory_has_no_gradient():
  def total(params):
    return apply(TINY, params, tokens(T), filled_memory(TINY))[1].hidden.sum()

  assert all((g == 0).all() for g in jax.tree.leaves(jax.jit(jax.grad(total))(params_of(TINY))))


def test_the_memory_is_the_last_inputs_of_each_layer():
  memory = filled_memory(TINY, filled=3)
  after = apply(TINY, params_of(TINY), tokens(T), memory)[1]
  assert (after.filled == M).all()
  np.testing.assert_array_equal(after.hidden[:, :, :M - T], memory.hidden[:, :, T:])
  embedding = params_of(TINY)['token_embedding'][tokens(T)] * 4
  np.testing.assert_allclose(after.hidden[:, 0, M - T:], embedding, rtol=1e-6)


def test_places_that_are_not_filled_are_not_seen():
  memory = filled_memory(TINY, filled=3)
  other = memory._replace(hidden=memory.hidden.at[:, :, :M - 3].set(9.0))
  got, want = (apply(TINY, params_of(TINY), tokens(T), m)[0] for m in (other, memory))
  np.testing.assert_array_equal(got, want)
  seen = memory._replace(hidden=memory.hidden.at[:, :, M - 3].set(9.0))
  assert (apply(TINY, params_of(TINY), tokens(T), seen)[0] != want).any(-1).all()


def batch_of(length=T, **features):
  return {'decoder_input_tokens': tokens(length), 'decoder_target_tokens': tokens(length, 1),
          'decoder_loss_weights': jnp.ones((B, length)), **features}


def test_a_row_that_restarts_forgets_and_the_others_go_on():
  memory, restart = filled_memory(TINY), jnp.array([1, 0])
  run = functools.partial(apply, TINY, params_of(TINY), method='outputs')
  outputs, after = run(batch_of(decoder_restart=restart), None, memory)
  fresh = apply(TINY, params_of(TINY), tokens(T), TINY.init_carry(B))[0]
  going_on = apply(TINY, params_of(TINY), tokens(T), memory)[0]
  np.testing.assert_allclose(outputs['tokens'].hidden, jnp.stack([fresh[0], going_on[1]]),
                             atol=1e-6)
  assert after.filled.tolist() == [T, M]


def test_rows_that_do_not_go_on_are_packed_and_leave_the_memory_alone():
  segments = jnp.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]])
  batch, memory = batch_of(decoder_segment_ids=segments), filled_memory(TINY)
  run = functools.partial(apply, TINY, params_of(TINY))
  outputs, after = run(batch, None, memory, method='outputs')
  jax.tree.map(np.testing.assert_array_equal, after, memory)
  alone, _ = run(tokens(T)[:, 2:])
  np.testing.assert_allclose(outputs['tokens'].hidden[0, 2:], alone[0], atol=1e-5)
  np.testing.assert_array_equal(run(batch, method='encode'), outputs['tokens'].hidden)


@pytest.mark.parametrize('config', [ONE, dataclasses.replace(SAME, memory_length=2)],
                         ids=['published', 'same length'])
def test_a_token_depends_on_no_later_one_and_on_all_that_it_may_see(config):
  module, params = config.build(), params_of(config)
  memory = filled_memory(dataclasses.replace(config, num_layers=1), config.memory_length)
  memory = memory._replace(hidden=jnp.repeat(memory.hidden, config.num_layers, axis=1))

  def last(params_VD):
    variables = {'params': {**params, 'token_embedding': params_VD}}
    return module.apply(variables, jnp.arange(T)[None], jax.tree.map(lambda x: x[:1], memory))[0][0]

  jacobian = jax.jit(jax.jacrev(lambda e: last(e).sum(-1)))(params['token_embedding'])
  heard = jnp.abs(jacobian).max(-1)[:, :T] > 0  # [query, key]
  reach = T if not config.same_length else 1 + config.num_layers * (config.memory_length - 1)
  distance = np.arange(T)[:, None] - np.arange(T)
  np.testing.assert_array_equal(heard, (distance >= 0) & (distance < reach))


@pytest.mark.parametrize('memory_length', [0, 3])
def test_relative_attention_is_the_formula_of_the_paper(memory_length):
  D, N, H, S = 8, 2, 3, memory_length + 4
  rng, module = np.random.default_rng(5), RelativeAttention(8, 2, 3, 0.1, Rules())
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x, memory, biases = draw(B, 4, D), draw(B, memory_length, D), draw(2, N, H)
  places = sinusoids(jnp.arange(S), D)
  boxed = jax.eval_shape(module.init, jax.random.key(0), x, places, biases, memory)['params']
  params = jax.tree.map(lambda p: draw(*p.shape), nn.meta.unbox(boxed))
  got, _ = jax.jit(module.apply)({'params': params}, x, places, biases,
                                 memory if memory_length else None)
  x, memory, biases = (np.asarray(a, np.float64) for a in (x, memory, biases))

  w = {name: np.asarray(p['kernel'], np.float64) for name, p in params.items()}
  y = np.concatenate([memory, x], 1)
  frequency = 10000.0**(-np.arange(0, D, 2) / D)
  out = np.zeros((B, 4, N, H))
  for b in range(B):
    for t in range(4):
      for n in range(N):
        query, scores = x[b, t] @ w['query'][:, n], []
        for s in range(memory_length + t + 1):
          angle = (memory_length + t - s) * frequency
          place = np.concatenate([np.sin(angle), np.cos(angle)]) @ w['position'][:, n]
          key = y[b, s] @ w['key'][:, n]
          scores.append(((query + biases[0, n]) @ key + (query + biases[1, n]) @ place) / H**0.5)
        probs = np.exp(scores) / np.exp(scores).sum()
        out[b, t, n] = probs @ (y[b, :len(scores)] @ w['value'][:, n])
  np.testing.assert_allclose(got, np.einsum('btnh,nhd->btd', out, w['out']), atol=2e-5)


def test_distances_beyond_the_clamp_count_as_it():
  near = dataclasses.replace(ONE, clamp_length=M + T - 1)
  far = dataclasses.replace(ONE, clamp_length=M + T - 2)
  run = lambda config: apply(config, params_of(ONE), tokens(T), filled_memory(ONE))[0]
  np.testing.assert_array_equal(run(near), run(ONE))
  changed = (run(far) != run(ONE)).any(-1)
  assert not changed[:, :-1].any() and changed[:, -1].all()


@pytest.mark.supports('layers', 'adaptive embeddings and softmax')
@pytest.mark.parametrize('div_val', [1, 2])
def test_the_adaptive_softmax_is_exact(div_val):
  config = dataclasses.replace(CLUSTERS, div_val=div_val)
  params = params_of(config)
  batch = batch_of(length=16)
  batch['decoder_target_tokens'] = jnp.resize(jnp.arange(V), (B, 16))
  outputs, _ = apply(config, params, batch, method='outputs')
  hidden, _ = apply(config, params, batch['decoder_input_tokens'])
  log_probs = np.asarray(apply(config, params, hidden, method='logits'), np.float64)
  np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, rtol=1e-5)
  # p(w) = p(cluster) p(w | cluster), of the second cluster by hand
  p, h = params['adaptive'], np.asarray(hidden, np.float64)
  first = np.concatenate([p['embedding_0'], p['cluster_embedding']]).astype(np.float64)
  inner = h if div_val == 1 else h @ p['out_projection']
  head = inner @ first.T + p['bias'][:12]
  own = (h if div_val == 1 else h @ p['projection_1'].T) @ p['embedding_1'].T + p['bias'][12:18]
  norm = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
  np.testing.assert_allclose(log_probs[..., 9:15], norm(head)[..., 9, None] + norm(own), atol=1e-4)

  want = -np.take_along_axis(log_probs, batch['decoder_target_tokens'][..., None], -1)
  loss = Prediction()
  total, metrics = jax.jit(lambda *args: (loss(*args), loss.metrics(*args)))(outputs, batch)
  np.testing.assert_allclose([total['tokens'], metrics['loss'][0]], want.sum(), rtol=1e-5)


def test_adaptive_inputs_are_projected_rows_of_their_cluster():
  params, every = params_of(CLUSTERS), np.arange(V, dtype=np.int32)[None]
  p = params['adaptive']
  rows = np.concatenate([p[f'embedding_{i}'] @ p[f'projection_{i}'] for i in range(4)])
  config = dataclasses.replace(CLUSTERS, memory_length=V)
  _, memory = apply(config, params, every, jax.tree.map(lambda x: x[:1], config.init_carry(B)))
  np.testing.assert_allclose(memory.hidden[0, 0], rows * 4, atol=1e-5)


@pytest.mark.parametrize('drops', [{'dropout_rate': 0.3, 'layer_drop_rate': 0.2},
                                   {'attention_dropout_rate': 0.3}])
def test_dropout_and_its_absence(drops):
  config = dataclasses.replace(TINY, **drops)
  run = lambda config, draws: apply(config, params_of(TINY), tokens(T), draws=draws)[0]
  one, other = (Draws.of(jax.random.key(seed), len(tokens(T))) for seed in (1, 2))
  np.testing.assert_array_equal(run(config, None), run(TINY, one))
  assert (run(config, one) != run(config, other)).any()


@pytest.mark.parametrize('changes, message', [
    (dict(memory_length=0), 'memory_length=0 must be at least 1'),
    (dict(d_model=15, d_head=5), 'd_model=15 is odd'),
    (dict(d_head=None, num_heads=3), 'd_model=16 is not divisible by num_heads=3'),
    (dict(cutoffs=(9, 9)), 'cutoffs=.* must rise'), (dict(cutoffs=(V,)), 'vocab_size=29'),
    (dict(div_val=2), 'set cutoffs'), (dict(cutoffs=(3, 9), div_val=5), 'does not divide'),
    (dict(dropout_rate=1.0), 'dropout_rate=1.0')])
def test_impossible_configs_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **changes)


def test_impossible_calls_are_refused():
  module, variables = TINY.build(), {'params': params_of(TINY)}
  with pytest.raises(ValueError, match='leave them out'):
    module.apply(variables, tokens(T), TINY.init_carry(B), tokens(T))
  longer = dataclasses.replace(TINY, memory_length=9).init_carry(B)
  with pytest.raises(ValueError, match='the memory has 9 places and memory_length=8'):
    module.apply(variables, tokens(T), longer)
  with pytest.raises(ValueError, match='take `scores`'):
    CLUSTERS.build().apply({'params': params_of(CLUSTERS)}, method='head')
