"""What must hold of a model with an adapter, and of one of which a part is frozen."""
import dataclasses
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.errors import UserError
from lm.models import adapters
from lm.models.bert import BERTConfig
from lm.models.heads import ClassifierConfig
from lm.models.t5 import T5Config
from lm.models.transformer_xl import TransformerXLConfig
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training import checkpoint_io, state as state_lib, step as step_lib, trainable
from lm.training.losses import Prediction
from lm.training.optimizers import AdamW, evaluated, Schedule

RULES = Rules().on(MeshConfig(data=1).build(jax.devices()[:1]))
OPTIMIZER = AdamW(Schedule(kind='constant', learning_rate=0.02, warmup_steps=1)).build(10)
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads))
B, T, V = 4, 10, 37
SMALL = dict(vocab_size=V, max_length=32, d_model=16, num_layers=3, num_heads=4, d_ff=24,
             dtype='float32', scan_layers=True)
BERT = BERTConfig(**SMALL, init_std=0.2)
FAMILIES = {
    'bert': BERT, 't5': T5Config(**SMALL, num_buckets=4, max_distance=8, activation='geglu'),
    'classifier': ClassifierConfig(
        dataclasses.replace(BERT, masked_lm=False, sentence_classes=0), 3, 'pooler')}
EVERYWHERE = '.*/kernel',
METHODS = types.MappingProxyType({
    'lora': adapters.LoRA(rank=2, targets=EVERYWHERE),
    'dora': adapters.DoRA(rank=2, targets=EVERYWHERE), 'adapter': adapters.Adapter(size=4),
    'prefix': adapters.PrefixTuning(length=3, init_std=0.5),
    'prompt': adapters.PromptTuning(length=3), 'bitfit': adapters.BitFit()})


@pytest.fixture(scope='module', autouse=True)
def quick_keys():
  """Keys whose bits compile in a tenth of the time of threefry's."""
  with jax.default_prng_impl('rbg'):
    yield


@pytest.fixture(scope='module')
def configs(tiny_configs):
  return {'gpt2': tiny_configs['gpt2'](), 'llama': tiny_configs['llama'](), **FAMILIES}


def batch():
  """Two packed texts a row and padding; features of every family at once."""
  rng = np.random.default_rng(0)
  tokens = lambda *shape: rng.integers(1, V, shape).astype(np.int32)
  segments = np.broadcast_to(np.repeat([1, 2, 0], [4, 5, 1]), (B, T)).astype(np.int32)
  places = np.broadcast_to([0, 1, 2, 3, 0, 1, 2, 3, 4, 0], (B, T)).astype(np.int32)
  sides = {f'{side}_{name}': x for side in ('encoder', 'decoder') for name, x in (
      ('input_tokens', tokens(B, T)), ('segment_ids', segments), ('positions', places))}
  return {**sides, 'decoder_target_tokens': tokens(B, T),
          'decoder_loss_weights': (segments > 0).astype(np.float32),
          'masked_positions': places[:, :2], 'masked_target_tokens': tokens(B, 2),
          'masked_loss_weights': np.ones((B, 2), np.float32),
          'class_labels': tokens(B) % 2, 'class_weights': np.ones(B, np.float32)}


def features(config):
  """What a family reads of `batch`."""
  names = {'GPTConfig': ('decoder_',), 'BERTConfig': ('encoder_', 'masked_'),
           'T5Config': ('encoder_', 'decoder_'), 'ClassifierConfig': ('encoder_', 'class_')}
  return {name: x for name, x in batch().items()
          if name.startswith(names[type(config).__name__])}


def adapted(config, method=None, frozen=()):
  return adapters.adapt(config.build(RULES), METHODS.get(method), frozen)


def new(module, optimizer=OPTIMIZER):
  return state_lib.init_state(module, optimizer, RULES, seed=1, batch_size=B)


def nudged(state):
  """The state with noise on all that an adapter added or trains, which begins at 0."""
  def one(path, x):
    is_new = str(path[-1].key).startswith(('lora_b', 'magnitude', 'adapter', 'prefix', 'prompt'))
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), x.size), x.shape)
    return x + 0.1 * noise if is_new else x
  return dataclasses.replace(state, params=jax.tree_util.tree_map_with_path(one, state.params))


def step(module, state, optimizer=OPTIMIZER, parts=1):
  """The state after a step, and its metrics; the given state stays."""
  copy = jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), state)
  fn = step_lib.jit_train_step(module, Prediction(), optimizer, RULES, copy, parts)
  return fn(copy, features(module.config))


def logits(module, params):
  given = jax.tree.map(jnp.asarray, features(module.config))
  outputs = module.apply({'params': params}, given, method='outputs')[0]
  return outputs['classes'] if 'classes' in outputs else outputs['tokens'].logits()


@pytest.mark.parametrize('family, method', [
    ('gpt2', 'dora'), ('llama', 'adapter'), ('bert', 'adapter'), ('t5', 'dora'),
    ('classifier', 'lora')])
def test_training_starts_at_the_model_bit_for_bit(configs, family, method):
  config = configs[family]
  with_adapter, plain = adapted(config, method), config.build(RULES)
  args = new(with_adapter).params, new(plain).params
  one, other = (jax.jit(logits, static_argnums=0)(*pair)
                for pair in zip((with_adapter, plain), args))
  np.testing.assert_array_equal(one, other)


@pytest.mark.supports('fine-tuning', 'LoRA', 'DoRA', 'adapters', 'prefix tuning', 'prompt tuning',
                      'BitFit')
@pytest.mark.parametrize('family, method', [
    ('llama', 'dora'), ('t5', 'adapter'), ('t5', 'prefix'), ('gpt2', 'prompt'),
    ('classifier', 'bitfit')])
def test_a_step_moves_what_trains_and_keeps_the_rest_bit_for_bit(configs, family, method):
  module = adapted(configs[family], method)
  before = nudged(new(module))
  after, metrics = step(module, before)
  old, now = (trainable.split(module, jax.device_get(s.params)) for s in (before, after))
  jax.tree.map(np.testing.assert_array_equal, now.frozen, old.frozen)
  assert all(not np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (old.own, now.own))))
  assert trainable.count(module, before.params)[0] == sum(map(np.size, jax.tree.leaves(now.own)))
  is_head = lambda path: path.startswith('head/')
  assert any(map(is_head, checkpoint_io.flatten(now.own))) == (family == 'classifier')
  moments = sum(x.size for x in jax.tree.leaves(after.opt_state) if x.ndim)
  assert moments == 2 * trainable.count(module, before.params)[0]
  assert np.isfinite(metrics['loss']) and metrics['grad_norm'] > 0


@pytest.mark.parametrize('family, method, frozen', [
    ('llama', 'dora', ()), ('gpt2', None, ('blocks/layers/[02]/.*',)),
    ('t5', None, ('token_embedding', 'encoder/.*'))])
def test_gradients_of_what_trains_are_those_of_the_whole_model(configs, family, method, frozen):
  module = adapted(configs[family], method, frozen)
  everything = adapters.Adapted(module.module, dataclasses.replace(
      module.adapter, trainable=('.*',)) if method else None, ())
  found = step(module, nudged(new(module, KEEP_GRADIENT)), KEEP_GRADIENT)[0].opt_state
  whole = step(everything, nudged(new(everything, KEEP_GRADIENT)), KEEP_GRADIENT)[0].opt_state
  wanted = checkpoint_io.flatten(trainable.split(module, whole).own)
  assert 0 < len(wanted) < len(jax.tree.leaves(whole)) or frozen
  for path, x in checkpoint_io.flatten(found).items():
    np.testing.assert_allclose(x, wanted[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize('method', ['dora', 'adapter', 'prefix', 'prompt'])
def test_gradients_do_not_depend_on_how_layers_run_or_a_batch_is_cut(configs, method):
  found = []
  for changes, parts in (({}, 1), ({'scan_layers': False, 'remat': 'full'}, 2)):
    module = adapted(dataclasses.replace(configs['llama'], **changes), method)
    found.append(step(module, nudged(new(module, KEEP_GRADIENT)), KEEP_GRADIENT, parts)[0])
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
               *(state.opt_state for state in found))


@pytest.mark.parametrize('method', ['dora', 'adapter', 'prefix', 'prompt'])
def test_packed_texts_answer_as_each_alone(configs, method):
  module = adapted(configs['llama'], method)
  params, tokens = nudged(new(module)).params, jnp.asarray(batch()['decoder_input_tokens'])

  @jax.jit
  def both(params):
    parts = tokens[:, :4], tokens[:, 4:9]
    alone = [module.apply({'params': params}, part)[0] for part in parts]
    return logits(module, params), [module.apply({'params': params}, x, method='logits')
                                    for x in alone]

  whole, (first, second) = both(params)
  np.testing.assert_allclose(whole[:, :4], first, rtol=1e-4, atol=2e-5)
  np.testing.assert_allclose(whole[:, 4:9], second, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('method, scan', [('dora', True), ('prefix', False), ('prompt', True),
                                          ('prompt', False)])
def test_cached_decoding_is_the_full_forward(configs, method, scan):
  config = dataclasses.replace(configs['llama'], scan_layers=scan)
  module = adapted(config, method)
  apply = jax.jit(lambda params, *args: module.apply({'params': params}, *args))
  params = nudged(new(module)).params
  tokens = jnp.asarray(batch()['decoder_input_tokens'])
  full, _ = apply(params, tokens)
  hidden, cache = apply(params, tokens[:, :7], None, None, config.init_cache(B, T))
  np.testing.assert_allclose(hidden, full[:, :7], rtol=1e-4, atol=1e-5)
  for t in range(7, T):
    hidden, cache = apply(params, tokens[:, t:t + 1], None, None, cache)
    np.testing.assert_allclose(hidden[:, 0], full[:, t], rtol=1e-4, atol=1e-5)


@pytest.mark.supports('fine-tuning', 'frozen parameters and layers')
def test_frozen_layers_keep_their_bits_and_have_no_moments(configs):
  module = adapted(configs['gpt2'], frozen=('.*_embedding', 'blocks/layers/[01]/.*'))
  before = new(module)
  after, metrics = step(module, before)
  for path, x in checkpoint_io.flatten(jax.device_get(after.params)).items():
    same = x == checkpoint_io.flatten(jax.device_get(before.params))[path]
    if path.startswith('blocks'):
      assert same[:2].all() and not same[2].all(), path
    else:
      assert same.all() == ('embedding' in path), path
  moments = checkpoint_io.flatten(after.opt_state)
  assert {len(x) for path, x in moments.items() if 'layers' in path} == {1}
  norms = jax.device_get(metrics['norms'])
  assert (norms['grad_norm/mlp'] > 0).tolist() == [False, False, True]


def test_frozen_beats_the_adapter_and_single_layers_of_it(configs):
  module = adapted(configs['gpt2'], 'lora', ('.*/mlp/.*', 'blocks/layers/0/.*'))
  own = checkpoint_io.flatten(trainable.split(module, new(module).params).own)
  assert not any('mlp' in path for path in own)
  assert own['blocks/layers/attention/query/lora_b'].shape[0] == 2
  assert module.trains('blocks/layers/1/attention/query/lora_b')
  assert not module.trains('blocks/layers/0/attention/query/lora_b')
  assert not module.trains('blocks/layers/attention/query/lora_scale')


def test_an_average_is_of_what_trains(configs):
  optimizer = AdamW(Schedule(learning_rate=0.02, warmup_steps=1), weight_decay=0.0,
                    average_decay=0.5).build(10)
  module = adapted(configs['gpt2'], 'lora')  # whose lora_a has no gradient as long as lora_b is 0
  after, _ = step(module, new(module, optimizer), optimizer)
  found, params = (checkpoint_io.flatten(x) for x in (
      evaluated(after.opt_state, after.params), after.params))
  assert found.keys() == params.keys()
  assert {path for path in found if not np.array_equal(found[path], params[path])} == {
      path for path in params if path.endswith('lora_b')}
  with pytest.raises(UserError, match='average_decay'):
    new(adapted(configs['gpt2'], frozen=('blocks/layers/0/.*',)), optimizer)


@pytest.mark.parametrize('make, message', [
    (lambda c: adapted(c['gpt2'], frozen=('block/.*',)), "'block/.*' matches no parameter"),
    (lambda c: adapted(c['gpt2'], frozen=('.*',)), 'no parameter trains'),
    (lambda c: adapters.adapt(c['gpt2'].build(RULES), adapters.LoRA(targets=('.*/querry/.*',)), ()),
     "'.*/querry/.*' matches no kernel; the model has blocks/layers/attention/key/kernel"),
    (lambda c: adapted(c['bert'], 'prompt'), 'PromptTuning goes with decoders'),
    (lambda c: adapted(TransformerXLConfig(**SMALL, memory_length=8), 'prefix'), 'Transformer-XL')])
def test_what_cannot_be_is_refused(configs, make, message):
  with pytest.raises(UserError, match=message.replace('*', r'\*').replace('.', r'\.')):
    new(make(configs))


@pytest.mark.parametrize('make, message', [
    (lambda: adapters.LoRA(rank=0), 'rank=0 must be greater than 0'),
    (lambda: adapters.LoRA(targets=('(',)), 'is no regular expression')])
def test_bad_fields_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_gradients_on_eight_devices_are_those_of_one(child_with_devices):
  found = child_with_devices(pathlib.Path(__file__).with_name('sharded_adapters.py'))
  assert {name: x['leaves'] for name, x in found.items()} == {
      'dora': 21, 'prefix': 2, 'adapter in stages': 8, 'frozen layer': 12}
  assert max(x['difference'] for x in found.values()) < 1e-5
