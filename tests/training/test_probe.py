"""What the probe says of a model is what a computation by hand says."""
import dataclasses
import json
import pathlib
import types

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers.moe import MoEConfig
from lm.models.bert import BERTConfig
from lm.models.heads import EmbedderConfig
from lm.models.t5 import T5Config
from lm.models.transformer_xl import TransformerXLConfig
from lm.training import probe

CHILD = pathlib.Path(__file__).with_name('sharded_probe.py')
B, T, V, E = 3, 10, 37, 4


def make_batch(seed=0):
  """Rows of two texts, and padding at their ends."""
  rng, place = np.random.default_rng(seed), np.arange(T)
  ends = np.array([[3], [5], [4]])
  segments = np.where(place < ends, 1, np.where(place < [[10], [8], [7]], 2, 0)).astype(np.int32)
  positions = np.where(segments == 2, place - ends, place).astype(np.int32)
  return {'decoder_input_tokens': rng.integers(1, V, (B, T)).astype(np.int32),
          'decoder_segment_ids': segments, 'decoder_positions': positions}


def make_params(config):
  params = nn.meta.unbox(config.build().init(jax.random.key(0), method='initialize')['params'])
  rng = np.random.default_rng(1)  # biases and scales that matter
  return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


def measured(config, params, batch, carry=None):
  module = config.build()
  measure = jax.jit(lambda *args: probe.measure(module, *args))
  return jax.device_get(measure(params, batch, carry))


def norm(x, p):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p['scale'] + p['bias']


def by_hand(config, params, batch):
  """Named values of each layer of a GPT-2, and the probabilities of its attention."""
  segments, place = batch['decoder_segment_ids'], np.arange(T)
  x = params['token_embedding'][batch['decoder_input_tokens']]
  x = x + params['position_embedding'][batch['decoder_positions']]
  for layer in range(config.num_layers):
    p = jax.tree.map(lambda a, i=layer: a[i], params['blocks']['layers'])
    h, a = norm(x, p['attention_norm']), p['attention']
    q, k, v = (np.einsum('btd,dnh->btnh', h, a[name]['kernel']) + a[name]['bias']
               for name in ('query', 'key', 'value'))
    scores = np.einsum('btnh,bsnh->bnts', q, k) / np.sqrt(q.shape[-1])
    scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
    sees = (segments[:, :, None] == segments[:, None]) & (place[:, None] >= place)
    if config.attention_pattern[layer % len(config.attention_pattern)] == 'L':
      sees &= place[:, None] - place < config.window
    weights = np.exp(scores) * sees[:, None]
    probs = weights / weights.sum(-1, keepdims=True)
    out = np.einsum('bnts,bsnh->btnh', probs, v)
    out = np.einsum('btnh,nhd->btd', out, a['out']['kernel']) + a['out']['bias']
    x = x + out
    values = {'attention/query': q, 'attention/attention_out': out}
    h = norm(x, p['mlp_norm'])
    if config.moe is None:
      hidden = np.maximum(h @ p['mlp']['wi']['kernel'] + p['mlp']['wi']['bias'], 0)
      x = x + hidden @ p['mlp']['wo']['kernel'] + p['mlp']['wo']['bias']
      values |= {'mlp/mlp_hidden': hidden, 'residual': x}
    else:
      values['router'] = h @ p['moe']['router']['kernel']
    yield probs, values


@pytest.mark.supports('watching', 'activations and attention entropy by layer')
@pytest.mark.parametrize('scan', [True, False])
def test_statistics_are_those_of_the_values_of_real_tokens(tiny_configs, scan):
  config = tiny_configs['gpt2'](activation='relu', attention_softcap=2.0, attention_pattern='GL',
                                window=2, num_layers=2, scan_layers=scan, remat='full',
                                attention_implementation='reference')
  params, batch = make_params(config), make_batch()
  found, _ = measured(config, params, batch)
  real = batch['decoder_segment_ids'] > 0
  for layer, (probs, values) in enumerate(by_hand(config, jax.device_get(params), batch)):
    logs = np.log(np.where(probs > 0, probs, 1))
    entropy_BTN = -(probs * logs).sum(-1).swapaxes(1, 2)
    np.testing.assert_allclose(found['entropy_of_heads/attention'][layer],
                               entropy_BTN[real].mean(0), rtol=1e-4)
    np.testing.assert_allclose(found['entropy/attention'][layer], entropy_BTN[real].mean(),
                               rtol=1e-4)
    for name, value in values.items():
      x = value[real]
      expected = {'mean': x.mean(), 'rms': np.sqrt((x**2).mean()), 'max': np.abs(x).max(),
                  'zeros': (x == 0).mean()}
      for kind, number in expected.items():
        np.testing.assert_allclose(found[f'{kind}/{name}'][layer], number, rtol=1e-4, atol=1e-5)
  assert (found['zeros/mlp/mlp_hidden'] > 0.2).all() and not found['zeros/residual'].any()


@pytest.mark.supports('watching', 'load of experts')
@pytest.mark.parametrize('capacity', [None, 0.75])
def test_load_is_the_share_of_choices_and_dropped_what_had_no_room(tiny_configs, capacity):
  moe = MoEConfig(num_experts=E, num_selected=2, d_ff=8, capacity_factor=capacity)
  config = tiny_configs['gpt2'](moe=moe, num_layers=1, attention_softcap=2.0,
                                attention_implementation='reference')
  params, batch = make_params(config), make_batch()
  found, _ = measured(config, params, batch)
  (_, values), = by_hand(config, jax.device_get(params), batch)
  choices = np.argsort(-values['router'], -1)[..., :2]
  room, counts, dropped = moe.capacity(T), np.zeros(E), 0
  for row, real in zip(choices, batch['decoder_segment_ids'] > 0):
    taken = np.zeros(E, int)
    for experts in row[real]:
      for expert in experts:
        dropped += taken[expert] >= room
        counts[expert] += taken[expert] < room
        taken[expert] += 1
  share = counts / counts.sum()
  np.testing.assert_allclose(found['load/moe'], share[None], rtol=1e-5)
  np.testing.assert_allclose(found['dropped/moe'], [dropped / (counts.sum() + dropped)], atol=1e-6)
  entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
  np.testing.assert_allclose(found['load_entropy/moe'], [entropy], rtol=1e-5)
  assert (dropped > 0) == (capacity is not None)


SMALL = dict(vocab_size=V, d_model=16, num_layers=2, num_heads=4, d_ff=24, dtype='float32',
             attention_implementation='reference')
ENCODER = {'encoder_input_tokens': make_batch(2)['decoder_input_tokens'],
           'encoder_segment_ids': make_batch(2)['decoder_segment_ids']}
FAMILIES = {
    'bert': (BERTConfig(**SMALL, max_length=16), {
        **ENCODER, 'class_labels': np.zeros(B, np.int32)}, {'attention'}),
    't5': (T5Config(**SMALL), {**ENCODER, **make_batch()},
           {'encoder/attention', 'decoder/attention', 'decoder/cross_attention'}),
    'transformer_xl': (TransformerXLConfig(**SMALL, memory_length=6), {
        'decoder_input_tokens': make_batch()['decoder_input_tokens'],
        'decoder_restart': np.array([0, 1, 0], np.int32)}, {'attention'}),
}


@pytest.mark.parametrize('family', FAMILIES)
def test_scanned_and_unrolled_layers_say_the_same_and_the_carry_is_the_models(family):
  config, batch, attentions = FAMILIES[family]
  params, carry = make_params(config), config.init_carry(B)
  if carry is not None:
    carry = carry._replace(hidden=carry.hidden + 0.5, filled=carry.filled + 4)
  found, after = measured(dataclasses.replace(config, scan_layers=True), params, batch, carry)
  other, _ = measured(dataclasses.replace(config, scan_layers=False), params, batch, carry)
  assert found.keys() == other.keys()
  assert {name.partition('/')[2] for name in found if name.startswith('entropy/')} == attentions
  for name, value in found.items():
    assert value.shape[0] == 2, name
    np.testing.assert_allclose(value, other[name], rtol=1e-4, atol=1e-6, err_msg=name)
  if carry is not None:
    batch = jax.tree.map(jnp.asarray, batch)
    same = config.build().apply({'params': params}, batch, None, carry, method='outputs')[1]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), after, same)


def test_keys_of_a_memory_count_as_its_own_tokens():
  """As many as the decoder's: whose padding is whose is known by the place in the model."""
  config, batch, _ = FAMILIES['t5']
  params = make_params(config)
  one = {**batch, 'encoder_segment_ids': np.int32(np.arange(T) < 1) * np.ones((B, 1), np.int32)}
  alone = {name: x[:, :1] if name.startswith('encoder') else x for name, x in one.items()}
  (left, _), (right, _) = (measured(config, params, b) for b in (one, alone))
  for name in ('rms/decoder/cross_attention/key', 'mean/encoder/residual'):
    np.testing.assert_allclose(left[name], right[name], rtol=1e-4)


def test_a_trunk_under_a_head_is_measured_by_the_plain_form_of_attention(tiny_configs):
  config = EmbedderConfig(tiny_configs['gpt2'](num_layers=1))
  assert probe._plain(config).trunk.attention_implementation == 'reference'
  tokens = jnp.ones((B, T), jnp.int32)
  batch = {'query_tokens': tokens, 'document_tokens': 2 * tokens}
  params = nn.meta.unbox(config.build().init(jax.random.key(0), method='initialize')['params'])
  found, _ = measured(probe._plain(config), params, batch)
  assert found['entropy/trunk/attention'].shape == (1,)


def test_a_probe_that_fails_is_told_once_and_finds_nothing(tiny_configs, monkeypatch):
  said, module, batch = [], tiny_configs['gpt2'](num_layers=1).build(), make_batch()
  rows = types.SimpleNamespace(batch_size=B, batch=lambda step, rows: batch)
  look = probe.Probe(module, rows, log=said.append)
  monkeypatch.setattr(probe, '_by_layer', lambda found: {}['absent'])
  assert look(make_params(module.config)) == look(None) == {}
  assert len(said) == 1 and 'the probe failed (KeyError' in said[0]


@pytest.mark.supports('watching', 'the same on a mesh as on one device')
def test_the_probe_on_a_mesh_finds_what_it_finds_on_one_device(child_with_devices):
  for family, result in child_with_devices(CHILD).items():
    assert result['same names'] and any('entropy' in name for name in result['names'])
    assert result['difference'] < 2e-4, (family, json.dumps(result))
    assert result['moved'] > 0.1
