"""What must hold of every encoder-decoder of T5's family, and of its encoder alone."""
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers.relative_bias import alibi, of_distances, relative_buckets, RelativeBias
from lm.models.t5 import T5Config
from pallas_kernels.dropout import Draws

S, T = 11, 7
TINY = dict(vocab_size=37, max_length=32, d_model=16, num_layers=3, num_decoder_layers=2,
            num_heads=4, d_head=6, d_ff=24, num_buckets=8, max_distance=10, dtype='float32',
            scan_layers=True)
FAMILIES = {
    't5': T5Config(**TINY),
    't5_1_1': T5Config(**TINY, activation='geglu', tie_embeddings=False),
    'umt5': T5Config(**TINY, activation='geglu', tie_embeddings=False, bias_per_layer=True)}
TWO = pytest.mark.parametrize('family', ['t5', 'umt5'])  # all that attends differently


def shapes(config):
  module = config.build()
  init = functools.partial(module.init, method='initialize')
  return nn.meta.unbox(jax.eval_shape(init, jax.random.key(0)))['params']


@functools.cache
def params_of(config):
  """Random parameters by numpy (nothing to compile), of a size at which all parts are heard."""
  rng = np.random.default_rng(0)
  draw = lambda path, x: rng.normal(path[-1].key == 'scale', 0.3, x.shape).astype(np.float32)
  return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, shapes(config)))


def tokens(length, seed):
  return jnp.asarray(np.random.default_rng(seed).integers(1, 37, (2, length)), jnp.int32)


INPUTS, OUTPUTS = tokens(S, 0), tokens(T, 1)
ONES = jnp.ones_like(OUTPUTS)


@functools.cache
def jitted(config):
  """(params, inputs, outputs, input segments, output segments, draws) -> logits."""
  module = config.build()

  def logits(params, *args, **kwargs):
    hidden = module.apply({'params': params}, *args, **kwargs)
    return module.apply({'params': params}, hidden, method='logits')

  return jax.jit(logits)


def forward(config, *args, **kwargs):
  return np.asarray(jitted(config)(params_of(config), *args, **kwargs))


def segments(*lengths, of):
  """Segments 1, 2, ... of these lengths in both rows, then padding."""
  ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  return jnp.asarray([np.pad(ids, (0, of - len(ids)))] * 2, jnp.int32)


@TWO
def test_padding_does_not_change_logits(family):
  config, real = FAMILIES[family], segments(8, of=S)
  padded = jnp.where(real, INPUTS, 0)
  got, other = (forward(config, x, OUTPUTS, real, ONES) for x in (padded, INPUTS))
  np.testing.assert_array_equal(got, other)
  np.testing.assert_allclose(got, forward(config, INPUTS[:, :8], OUTPUTS), atol=3e-5)


@TWO
@pytest.mark.supports('models', 'T5, T5 1.1, mT5 and UMT5')
def test_packed_pairs_are_as_if_alone(family):
  config = FAMILIES[family]
  packed = forward(config, INPUTS, OUTPUTS, segments(4, 5, of=S), segments(3, 3, of=T))
  for source, target in ((slice(0, 4), slice(0, 3)), (slice(4, 9), slice(3, 6))):
    move = lambda ids, part: jnp.zeros_like(ids).at[:, :part.stop - part.start].set(ids[:, part])
    alone = forward(config, move(INPUTS, source), move(OUTPUTS, target),
                    segments(source.stop - source.start, of=S), segments(3, of=T))
    np.testing.assert_allclose(packed[:, target], alone[:, :3], atol=3e-5)
  assert np.isfinite(packed).all()


def test_the_decoder_sees_no_later_token_and_the_encoder_sees_all():
  config = FAMILIES['t5']
  module, params = config.build(), params_of(config)
  inputs, outputs = jnp.arange(6)[None], jnp.arange(6, 12)[None]  # each place reads its own row

  @jax.jit
  def sensitivity(table):
    """|d hidden[t] / d row[v]| of the encoder and of the decoder, [12, V]."""
    variables = {'params': {**params, 'token_embedding': table}}
    encoded = module.apply(variables, {'encoder_input_tokens': inputs}, method='encode')
    decoded, _ = module.apply(variables, outputs, encoded, method='decode')
    return jnp.concatenate([encoded[0], decoded[0]])

  moved = jnp.abs(jax.jit(jax.jacrev(sensitivity))(params['token_embedding'])).sum((1, 3))
  moved = np.asarray(moved)
  assert (moved[:, :6] > 1e-4).all() and not moved[:6, 6:].any()
  own = moved[6:, 6:12]
  assert not np.triu(own, 1).any() and (own[np.tril_indices(6)] > 1e-4).all()


def encoded(config, variables, of_inputs=None):
  batch = {'encoder_input_tokens': INPUTS, 'encoder_segment_ids': of_inputs}
  return jax.jit(lambda batch: config.build().apply(variables, batch, method='encode'))(batch)


@pytest.mark.parametrize('family, scanned', [('t5', False), ('umt5', True)])
@pytest.mark.supports('decoding', 'encoder-decoders')
def test_cached_decoding_is_the_full_forward_pass(family, scanned):
  # The full pass is scanned: this also shows that unrolled layers are the same.
  config = dataclasses.replace(FAMILIES[family], scan_layers=scanned)
  module, variables = config.build(), {'params': config.unstack(params_of(config))}
  of_inputs = jnp.asarray(np.arange(S) < [[S], [5]], jnp.int32)  # of ragged lengths
  want = forward(FAMILIES[family], INPUTS, OUTPUTS, of_inputs, ONES)

  @jax.jit
  def decode(ids, cache, memory=None, of_inputs=None):
    hidden, cache = module.apply(variables, ids, memory, of_inputs, cache=cache, method='decode')
    return module.apply(variables, hidden, method='logits'), cache

  part, cache = decode(OUTPUTS[:, :3], config.init_cache(2, T + 2),
                       encoded(config, variables, of_inputs), of_inputs)
  parts = [part]
  for t in range(3, T):
    part, cache = decode(OUTPUTS[:, t:t + 1], cache)
    parts.append(part)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), want, atol=5e-5)
  assert list(cache.length_B) == [T, T]
  # Rows of different lengths go on as if alone.
  part, _ = decode(jnp.stack([OUTPUTS[0, 3:4], OUTPUTS[1, 6:7]]),
                   dataclasses.replace(cache, length_B=jnp.array([3, 6], jnp.int32)))
  np.testing.assert_allclose(part[:, 0], [want[0, 3], want[1, 6]], atol=5e-5)


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(config, params):
  score = lambda p: (config.build().apply({'params': p}, INPUTS, OUTPUTS)**2).sum()
  return jax.value_and_grad(score)(params)


def test_rematerialising_changes_no_gradient_and_every_parameter_has_one():
  config = FAMILIES['t5']
  params = params_of(config)
  want = value_and_grad(config, params)
  assert all((np.abs(x).max((-1, -2)) > 0).all() if x.ndim > 1 else x.any()
             for x in jax.tree.leaves(want[1]))
  changed = dataclasses.replace(config, remat='full')
  for x, y in zip(*map(jax.tree.leaves, (value_and_grad(changed, params), want))):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())


def test_each_layer_has_its_own_bias_in_umt5():
  config = FAMILIES['umt5']
  run = lambda params: jitted(config)(params, INPUTS, OUTPUTS, segments(S, of=S), ONES)
  params = params_of(config)
  want = run(params)
  for trunk, depth in (('encoder', 3), ('decoder', 2)):
    leaf = lambda tree: tree[trunk]['blocks']['layers']['relative_bias']
    assert leaf(params)['embedding'].shape == (depth, 8, 4)
    for layer in range(depth):
      changed = jax.tree.map(lambda x: x, params)
      leaf(changed)['embedding'] = leaf(params)['embedding'].at[layer, 1].add(1.0)
      assert np.abs(run(changed) - want).max() > 1e-3


def test_the_initial_scale_is_mesh_tensorflows():
  config = dataclasses.replace(FAMILIES['umt5'], vocab_size=512, d_model=64, d_head=16, d_ff=128)
  init = jax.jit(functools.partial(config.build().init, method='initialize'))
  params = nn.meta.unbox(init(jax.random.key(0, impl='rbg')))['params']
  cross = params['decoder']['blocks']['layers']['cross_attention']
  mlp, bias = (params['encoder']['blocks']['layers'][name] for name in ('mlp', 'relative_bias'))
  for x, std in ((params['token_embedding'], 1), (params['output_embedding'], 64**-0.5),
                 (cross['query']['kernel'], (64 * 16)**-0.5), (cross['key']['kernel'], 64**-0.5),
                 (cross['out']['kernel'], (4 * 16)**-0.5), (mlp['wi_0']['kernel'], 64**-0.5),
                 (mlp['wo']['kernel'], 128**-0.5), (bias['embedding'], 64**-0.5)):
    assert np.std(x) == pytest.approx(std, rel=0.2 if x.size < 1000 else 0.05)


@pytest.mark.parametrize('tied, scaled, ratio', [(True, None, 1 / 4), (True, False, 1),
                                                 (False, None, 1), (False, True, 1 / 4)])
def test_hidden_states_are_scaled_before_a_tied_head(tied, scaled, ratio):
  config = dataclasses.replace(FAMILIES['t5'], tie_embeddings=tied, scale_outputs=scaled)
  variables = {'params': params_of(config)}
  hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, T, 16)), jnp.float32)
  head = variables['params']['token_embedding' if tied else 'output_embedding']
  logits = config.build().apply(variables, hidden, method='logits')
  np.testing.assert_allclose(logits, ratio * hidden @ head.T, atol=1e-5)  # d_model is 16


def test_outputs_score_what_logits_do():
  config = FAMILIES['t5']
  batch = {'encoder_input_tokens': INPUTS, 'encoder_segment_ids': segments(S, of=S),
           'decoder_input_tokens': OUTPUTS, 'decoder_segment_ids': ONES}
  outputs = lambda batch: config.build().apply({'params': params_of(config)}, batch,
                                               method='outputs')[0]['tokens']
  scores = jax.jit(outputs)(batch)
  assert scores.bias is None and scores.softcap is None
  want = forward(config, INPUTS, OUTPUTS, segments(S, of=S), ONES)
  np.testing.assert_allclose(scores.hidden @ scores.embedding.T, want, atol=1e-4)


@pytest.mark.parametrize('drops', [{'dropout_rate': 0.3, 'layer_drop_rate': 0.5},
                                   {'attention_dropout_rate': 0.3}])
def test_dropout_and_layer_drop_are_functions_of_their_key_and_off_without_one(drops):
  plain = FAMILIES['t5']
  config = dataclasses.replace(plain, **drops)
  args = INPUTS, OUTPUTS, segments(S, of=S), ONES
  draws = lambda seed: Draws.of(jax.random.key(seed), len(INPUTS))
  one, same, other = (forward(config, *args, draws=draws(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert np.abs(one - other).max() > 0.1
  off, want = (jitted(c).lower(params_of(plain), *args).as_text() for c in (config, plain))
  assert off == want  # the same program


@pytest.mark.supports('models', "T5's encoder alone")
def test_an_encoder_alone_is_that_of_the_whole_and_has_no_more_parameters():
  config = dataclasses.replace(FAMILIES['t5_1_1'], decoder=False, num_decoder_layers=None)
  assert set(shapes(config)) == {'token_embedding', 'encoder'}
  whole = params_of(FAMILIES['t5_1_1'])
  variables = {'params': {name: whole[name] for name in shapes(config)}}
  want = encoded(FAMILIES['t5_1_1'], {'params': whole})
  np.testing.assert_allclose(encoded(config, variables), want, atol=1e-6)
  with pytest.raises(ValueError, match='decoder=False leaves an encoder, which scores no tokens'):
    config.build().apply(variables, {}, method='outputs')


def paper_bucket(distance, num_buckets, max_distance, bidirectional):
  """Section 2.1 in integers: the last range k that begins at exact (max / exact)^(k / ranges)."""
  half = num_buckets // 2 if bidirectional else num_buckets
  later = half if bidirectional and distance > 0 else 0
  away = abs(distance) if bidirectional else max(-distance, 0)
  exact = half // 2
  if away < exact:
    return later + away
  ranges = half - exact
  begun = [k for k in range(ranges) if away**ranges * exact**k >= exact**ranges * max_distance**k]
  return later + exact + begun[-1]


@pytest.mark.parametrize('sizes', [(32, 128), (8, 10), (16, 20)])
@pytest.mark.parametrize('bidirectional', [True, False])
def test_buckets_are_those_of_the_papers_formula(sizes, bidirectional):
  distance = np.arange(-300, 301)
  got = relative_buckets(distance, *sizes, bidirectional)
  assert got.tolist() == [paper_bucket(int(x), *sizes, bidirectional) for x in distance]
  never = {sizes[0] // 2} if bidirectional else set()  # a later key at distance 0
  assert set(got) == set(range(sizes[0])) - never


def test_buckets_are_t5s():
  known = {0: 0, -1: 1, -7: 7, -8: 8, -11: 8, -12: 9, -16: 10, -23: 11, -32: 12, -46: 13, -64: 14,
           -91: 15, -1000: 15, 1: 17, 7: 23, 8: 24, 16: 26, 90: 30, 91: 31}
  assert relative_buckets(np.array(list(known)), 32, 128, True).tolist() == list(known.values())
  causal = {5: 0, 0: 0, -15: 15, -16: 16, -20: 17, -113: 31, -112: 30}
  assert relative_buckets(np.array(list(causal)), 32, 128, False).tolist() == list(causal.values())


def test_the_bias_is_looked_up_by_distance():
  table = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
  places = jnp.array([0, 7, 12], jnp.int32)

  @jax.jit
  def of_places(table):
    distance_bias = RelativeBias(3, 8, 10, True, 1.0).apply({'params': {'embedding': table}})
    return distance_bias, of_distances(distance_bias, (places[:, None] - jnp.arange(14))[:, None])

  distance_bias, moved = of_places(table)
  distance = np.arange(14) - np.arange(14)[:, None]
  want = np.asarray(table)[relative_buckets(distance, 8, 10, True)].transpose(2, 0, 1)
  np.testing.assert_array_equal(distance_bias[:, np.clip(distance, -10, 10) + 10], want)
  np.testing.assert_array_equal(moved[:, :, 0], want[:, places].swapaxes(0, 1))


@pytest.mark.parametrize('num_heads', [8, 12])
def test_alibi_falls_with_the_distance_by_the_papers_slopes(num_heads):
  bias = np.asarray(alibi(num_heads, 5))
  slopes = [2.0**-i for i in range(1, 9)] + [2.0**-(i / 2) for i in (1, 3, 5, 7)]
  np.testing.assert_allclose(bias[:, 4], -np.array(slopes[:num_heads]), rtol=1e-6)
  np.testing.assert_allclose(bias, bias[:, 4:5] * abs(np.arange(-5, 6)), rtol=1e-6)


def test_flops_a_token_are_those_of_both_sides_for_each_token_of_the_input():
  config = FAMILIES['t5_1_1']
  layers = {name: [leaf.size for path, leaf in
                   jax.tree_util.tree_leaves_with_path(shapes(config)[name]['blocks'])
                   if path[-1].key == 'kernel' and not any(
                       getattr(key, 'key', '') == 'cross_attention' for key in path)]
            for name in ('encoder', 'decoder')}
  crossed, scores = 2 * 2 * 16 * 24, 12 * 24  # layers x matrices x d_model x N H; 12 N H
  matrices = (sum(layers['encoder']) * 100 + sum(layers['decoder']) * 40 + 37 * 16 * 40
              + crossed * 40 + crossed * 100)
  pairs = 3 * 100 * 100 + 2 * (40 * 40 + 40 * 100)
  assert config.flops_per_token(100, 40) == (6 * matrices + scores * pairs) // 100
  assert config.flops_per_token(512) == config.flops_per_token(512, 114)  # span corruption's


@pytest.mark.parametrize('changes, message', [
    ({'d_model': 770, 'num_heads': 12}, 'd_model=770 is not divisible by num_heads=12; set d_head'),
    ({'num_buckets': 7}, 'num_buckets=7 must be even and at least 4'),
    ({'max_distance': 16}, 'max_distance=16 must be more than num_buckets / 2 = 16'),
    ({'decoder': False, 'num_decoder_layers': 2}, 'num_decoder_layers=2 and decoder=False'),
    ({'num_decoder_layers': 0}, 'num_decoder_layers=0 must be at least 1'),
    ({'layer_drop_rate': 1.0}, r'layer_drop_rate=1.0 must be in \[0, 1\)')])
def test_a_config_that_cannot_be_is_refused_in_one_sentence(changes, message):
  with pytest.raises(ValueError, match=message):
    T5Config(**changes)


@pytest.mark.parametrize('call, message', [
    (dict(), 'the decoder has no memory; give what `encode` returns'),
    (dict(cache=True), 'the decoder has no memory'),
    (dict(cache=True, segment_ids=OUTPUTS), 'with a cache each row is one output')])
def test_a_call_of_the_decoder_that_cannot_be_is_refused(call, message):
  config = FAMILIES['t5']
  call = {**call, 'cache': config.init_cache(2, T)} if 'cache' in call else call
  with pytest.raises(ValueError, match=message):
    config.build().apply({'params': params_of(config)}, OUTPUTS, **call, method='decode')
