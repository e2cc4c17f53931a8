"""A cut model says what the big one says without what was cut, and its config builds it."""
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from lm.compression import Model
from lm.compression.prune_structured import Heads, Layers, Neurons
from lm.errors import UserError
from lm.models.bert import BERTConfig
from lm.models.gpt import GPTConfig
from lm.models.heads import ClassifierConfig
from lm.models.t5 import T5Config
from lm.training import checkpoint_io, losses

B, T, V = 2, 10, 37
SIZES = dict(vocab_size=V, d_model=16, num_layers=3, num_heads=4, d_ff=24, dtype='float32',
             scan_layers=True)
CONFIGS = {
    'gpt2': GPTConfig(max_length=T, **SIZES),
    'llama': GPTConfig(max_length=T, num_kv_heads=2, norm='rmsnorm', positions='rotary',
                       activation='swiglu', use_bias=False, tie_embeddings=False, **SIZES),
    'classifier': ClassifierConfig(BERTConfig(
        max_length=T, sentence_classes=0, pooler=False, masked_lm=False, **SIZES), 3),
    't5': T5Config(activation='geglu', **SIZES), 'umt5': T5Config(bias_per_layer=True, **SIZES)}


def batch_of(name):
  rng = np.random.default_rng(0)
  tokens = lambda: jnp.asarray(rng.integers(1, V, (B, T)), jnp.int32)
  ones = jnp.ones((B, T), jnp.int32)
  encoder = {'encoder_input_tokens': tokens(), 'encoder_segment_ids': ones}
  decoder = {'decoder_input_tokens': tokens(), 'decoder_target_tokens': tokens(),
             'decoder_loss_weights': jnp.ones((B, T)), 'decoder_segment_ids': ones}
  labels = {'class_labels': jnp.arange(B)}
  return {'classifier': encoder | labels, 't5': encoder | decoder,
          'umt5': encoder | decoder}.get(name, decoder)


@functools.cache
def model_of(name):
  config = CONFIGS[name]
  params = nn.meta.unbox(config.build().init(jax.random.key(0), method='initialize')['params'])
  keys = iter(jax.random.split(jax.random.key(1), 200))
  params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), params)
  return Model(small_runs.Experiment(config), params)


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, batch):
  outputs, _ = config.build().apply({'params': params}, batch, method='outputs')
  return outputs['tokens'].logits() if 'tokens' in outputs else outputs['classes']


@functools.partial(jax.jit, static_argnums=0)
def total(module, params, batch):
  outputs, _ = module.apply({'params': params}, batch, method='outputs')
  return next(iter(losses.Prediction()(outputs, batch).values()))


def same(name, after, params):
  """That the cut model and the big one with `params` say the same."""
  batch = batch_of(name)
  found = logits(after.config, after.params, batch)
  np.testing.assert_allclose(found, logits(CONFIGS[name], params, batch), atol=1e-5)
  shapes = jax.eval_shape(lambda: nn.meta.unbox(after.config.build().init(
      jax.random.key(0), method='initialize')['params']))
  assert jax.tree.map(jnp.shape, after.params) == jax.tree.map(lambda x: x.shape, shapes)
  assert np.abs(found - logits(CONFIGS[name], model_of(name).params, batch)).max() > 1e-3


def zeroed(params, kept, rows):
  """The parameters, where inputs of kernels [L, inputs, ...] that are not kept have weight 0."""
  flat = checkpoint_io.flatten(params)
  for path, chosen in kept.items():
    x = np.array(flat[path])
    shape, x = x.shape, x.reshape(len(x), rows, -1)
    for layer, places in enumerate(chosen):
      x[layer, np.setdiff1d(np.arange(rows), places)] = 0
    flat[path] = jnp.asarray(x.reshape(shape))
  return checkpoint_io.nest(flat)


@pytest.mark.supports('compression', 'heads that go, and arrays with them')
@pytest.mark.parametrize('name', ['llama', 'classifier', 't5', 'umt5'])
def test_heads_go_as_if_what_they_put_out_were_zero(name):
  model = model_of(name)
  after = Heads(num_heads=2)(model, small_runs.data(batch_of(name)))
  kept, groups = after.done[-1]['kept'], 2 if name == 'llama' else 4
  assert len(kept) == (3 if 't5' in name else 1)
  same(name, after, zeroed(model.params, kept, groups))
  if name == 't5':  # one bias for all layers, so the same heads
    of_layers = kept['encoder/blocks/layers/attention/out/kernel']
    assert of_layers == of_layers[:1] * 3
  trunk = getattr(after.config, 'trunk', after.config)
  assert (trunk.num_heads, trunk.head_dim, trunk.kv_heads) == (2, 4, 1 if name == 'llama' else 2)


@pytest.mark.supports('compression', 'neurons that go')
@pytest.mark.parametrize('name', ['gpt2', 't5'])
def test_neurons_go_as_if_they_were_zero(name):
  model = model_of(name)
  after = Neurons(d_ff=10)(model, small_runs.data(batch_of(name)))
  same(name, after, zeroed(model.params, after.done[-1]['kept'], 24))


def test_what_adds_least_goes():
  model = model_of('gpt2')
  params = checkpoint_io.nest(checkpoint_io.flatten(model.params))
  wo = np.array(params['blocks']['layers']['mlp']['wo']['kernel'])
  out = np.array(params['blocks']['layers']['attention']['out']['kernel'])
  wo[:, ::2] *= 1e-3
  out[0, 1:3] *= 1e-3
  params['blocks']['layers']['mlp']['wo']['kernel'] = jnp.asarray(wo)
  params['blocks']['layers']['attention']['out']['kernel'] = jnp.asarray(out)
  model = dataclasses.replace(model, params=params)
  kept, = Neurons(d_ff=12)(model, small_runs.data(batch_of('gpt2'))).done[-1]['kept'].values()
  assert kept == [list(range(1, 24, 2))] * 3
  kept, = Heads(num_heads=2)(model, small_runs.data(batch_of('gpt2'))).done[-1]['kept'].values()
  assert kept[0] == [0, 3]


@pytest.mark.supports('compression', 'layers that go')
@pytest.mark.parametrize('name, step, lost', [
    ('classifier', Layers(num_layers=2), 'trunk/'),
    ('t5', Layers(num_decoder_layers=2), 'decoder/')])
def test_layers_go_without_which_the_loss_is_least(name, step, lost):
  model, batch = model_of(name), batch_of(name)
  after = step(model, small_runs.data(batch_of(name)))
  kept = after.done[-1]['kept']['decoder/' if name == 't5' else '']

  def without(layers):
    return checkpoint_io.nest({
        path: x[np.array(layers)] if path.startswith(f'{lost}blocks/layers/') else x
        for path, x in checkpoint_io.flatten(model.params).items()})
  jax.tree.map(np.testing.assert_array_equal, after.params, without(kept))

  def loss_of(layers):
    return float(total(after.module, without(layers), batch))

  losses_ = [loss_of([j for j in range(3) if j != i]) for i in range(3)]
  assert kept == [j for j in range(3) if j != int(np.argmin(losses_))]
  field = 'decoder_layers' if name == 't5' else 'num_layers'
  assert getattr(after.config, field) == len(kept)


def test_a_pattern_of_local_layers_goes_with_them():
  config = dataclasses.replace(CONFIGS['gpt2'], attention_pattern='GLL', window=3)
  model = Model(small_runs.Experiment(config), model_of('gpt2').params)
  after = Layers(num_layers=2)(model, small_runs.data(batch_of('gpt2')))
  assert after.config.attention_pattern == ''.join('GLL'[i] for i in after.done[-1]['kept'][''])


def test_what_cannot_be_cut_is_refused():
  model, seen = model_of('llama'), small_runs.data(batch_of('llama'))
  with pytest.raises(UserError, match='num_heads=3 of Heads must be .* in groups of 2'):
    Heads(num_heads=3)(model, seen)
  with pytest.raises(UserError, match='d_ff=24 of Neurons must be fewer than the 24'):
    Neurons(d_ff=24)(model, seen)
  with pytest.raises(UserError, match='leave none out; bind num_layers'):
    Layers()(model, seen)
  alibi = dataclasses.replace(CONFIGS['gpt2'], positions='alibi')
  with pytest.raises(UserError, match="positions='alibi' gives each head a slope"):
    Heads(num_heads=2)(Model(small_runs.Experiment(alibi), model.params), seen)
