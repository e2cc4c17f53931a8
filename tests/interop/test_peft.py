"""Adapters of `peft`: the same answers as its own, and files that it opens."""
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.interop import adapters as interop, certificate, mapping, plan
from lm.interop.mapping import Matrix
from lm.interop.run_weights import read_run_params, write_run_params
from lm.interop.tensors import open_tensors
from lm.models import adapters
from lm.training import checkpoint_io, state

DATA = pathlib.Path(__file__).resolve().parents[1] / 'data'
NOWHERE = pathlib.Path('no directory of sentence-transformers')
LOW_RANK = 'gpt2/lora', 'gpt2/dora', 'llama/lora', 'llama/dora', 'bert/lora', 't5/lora'


@functools.cache
def stored(name):
  return dict(np.load(DATA / f'reference_{name}.npz'))


@functools.cache
def case(name):
  """(content of adapter_config.json, tensors, logits) of peft."""
  found = {key.removeprefix(f'{name}/'): x for key, x in stored('adapters').items()
           if key.startswith(f'{name}/')}
  return json.loads(str(found['adapter_config.json'])), {
      key.removeprefix('tensors/'): x for key, x in found.items() if key.startswith('tensors/')
  }, found['logits']


@functools.cache
def planned(name):
  weights = {key.removeprefix('weights/'): x for key, x in stored(name).items()
             if key.startswith('weights/')}
  made = plan.read({key: x.shape for key, x in weights.items()}, 'float32',
                   json.loads(str(stored(name)['config.json'])), NOWHERE, 'source')
  leaves = {path: np.zeros(shape, np.float32) for path, shape in made.shapes.items()}
  for path, parts in mapping.to_ours(made.places, made.shapes, weights.__getitem__):
    for index, part in parts:
      leaves[path][index] = part
  return made, leaves


def adapter_of(name):
  """Ours of the same rank, scale and targets."""
  config, tensors, _ = case(name)
  made, _ = planned(name.partition('/')[0])
  modules = {key.removeprefix('base_model.model.').partition('.lora_')[0] for key in tensors}
  paths = {path for theirs, place in made.places.items()
           if theirs.removesuffix('.weight') in modules for path in place.paths
           if path.endswith('kernel')}
  kind = adapters.DoRA if config['use_dora'] else adapters.LoRA
  return kind(rank=config['r'], alpha=float(config['lora_alpha']), targets=tuple(sorted(paths)),
              rank_stabilized=config['use_rslora'])


def adapted(name):
  """A module with such an adapter, and its parameters of peft's numbers."""
  made, leaves = planned(name.partition('/')[0])
  _, tensors, _ = case(name)
  module = adapters.adapt(made.model.build(), adapter_of(name), ())
  shapes = checkpoint_io.flatten(state.abstract_params(module, jax.devices()[0]))
  mine = dict(leaves)
  for path, leaf in shapes.items():
    if path not in leaves:
      mine[path] = np.zeros(leaf.shape, np.float32)
      if path.endswith('lora_scale'):
        mine[path] += module.adapter.scale
  for theirs, place in made.places.items():
    key = f'base_model.model.{theirs.removesuffix(".weight")}'
    if f'{key}.lora_A.weight' not in tensors or not isinstance(place.layout, Matrix):
      continue
    ends = np.cumsum([place.layout.flat(shape)[1] for shape in place.shapes(made.shapes)])[:-1]
    parts = np.split(tensors[f'{key}.lora_B.weight'].T, ends, 1)
    norms = np.split(tensors.get(f'{key}.lora_magnitude_vector', np.zeros(0)), ends)
    for path, b, norm in zip(place.paths, parts, norms):
      at, index = path.removesuffix('kernel'), () if place.layer is None else place.layer
      mine[f'{at}lora_a'][index], mine[f'{at}lora_b'][index] = (
          tensors[f'{key}.lora_A.weight'].T, b)
      if f'{at}magnitude' in mine:
        kernel = leaves[path][index]
        mine[f'{at}magnitude'][index] = norm - np.linalg.norm(
            kernel.reshape(place.layout.flat(kernel.shape)), axis=0)
  return module, mine


def logits_of(module, leaves, name, **positions):
  """Of the inputs for which peft answered."""
  reference = stored(name.partition('/')[0])
  tokens, T = reference['tokens'], reference['tokens'].shape[1]
  features = {'tokens': tokens, 'mask': np.arange(T) < np.array([[T], [15]])}
  if 'decoder_tokens' in reference:
    features['decoder_tokens'] = reference['decoder_tokens']
  batch = certificate.batch_of(features) | positions
  if 'token_types' in reference:
    batch |= {'encoder_token_types': reference['token_types']}
  params = checkpoint_io.nest(leaves)
  outputs = jax.jit(lambda p, b: module.apply({'params': p}, b, method='outputs')[0])
  scores = outputs(params, batch)['tokens']
  found = np.einsum('bpd,vd->bpv', scores.hidden, scores.embedding)
  found = found if scores.bias is None else found + scores.bias
  mask = features['mask']
  return found, np.ones(found.shape[:2], bool) if 'decoder_tokens' in features else mask


@pytest.mark.supports('fine-tuning', 'LoRA and DoRA as in peft')
@pytest.mark.parametrize('name', LOW_RANK)
def test_logits_are_those_of_peft(name):
  found, mask = logits_of(*adapted(name), name)
  wanted = case(name)[2]
  assert 0.5 < wanted.std() < 8
  assert np.abs(found - wanted)[mask].max() < 1e-5 * np.abs(wanted).max() + 5e-6


def save(leaves, directory):
  tree = checkpoint_io.nest({path: jax.ShapeDtypeStruct(x.shape, jnp.float32)
                             for path, x in leaves.items()})
  write_run_params(directory, tree, [(path, [((), x)]) for path, x in leaves.items()])
  return directory


@pytest.mark.parametrize('name', LOW_RANK)
def test_merged_kernels_answer_as_the_adapter_did(name, tmp_path):
  module, leaves = adapted(name)
  merged = {path: leaf.read() for path, leaf in interop.merge(
      read_run_params(save(leaves, tmp_path / 'run'))).items()}
  assert set(merged) == set(planned(name.partition('/')[0])[1])
  before, mask = logits_of(module, leaves, name)
  after, _ = logits_of(module.module, merged, name)
  assert np.abs(before - after)[mask].max() <= 1e-5 * max(1, np.abs(before).max())


@pytest.mark.parametrize('name', LOW_RANK)
def test_what_is_written_for_peft_is_what_came_from_it(name, tmp_path):
  config, tensors, _ = case(name)
  _, leaves = adapted(name)
  made, _ = planned(name.partition('/')[0])
  interop.write_peft(save(leaves, tmp_path / 'run'), made.model, tmp_path / 'peft')
  found = open_tensors(tmp_path / 'peft' / 'adapter_model.safetensors')
  assert set(found) == set(tensors)
  written = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
  scale = config['lora_alpha'] / config['r']**(0.5 if config['use_rslora'] else 1)
  for key, wanted in tensors.items():
    got = found[key].read()
    if key.endswith('lora_A.weight'):
      module = key.removeprefix('base_model.model.').removesuffix('.lora_A.weight')
      rank = written['rank_pattern'].get(module, written['r'])
      alpha = written['alpha_pattern'].get(module, written['lora_alpha'])
      assert rank == len(got) and module in written['target_modules']
      b = key.replace('lora_A', 'lora_B')
      np.testing.assert_allclose(found[b].read() @ got * (alpha / rank),
                                 tensors[b] @ wanted * scale, rtol=1e-5, atol=1e-6)
    elif key.endswith('vector'):
      np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
  assert written['use_dora'] == config['use_dora']


def learned(name):
  """A module with the prefix or prompt of a case, and its parameters of peft's numbers."""
  family, _, method = name.partition('/')
  made, leaves = planned(family)
  numbers = case(name)[1]['prompt_embeddings']
  P = len(numbers)
  if method == 'prompt':
    adapter = adapters.PromptTuning(length=P)
    ids = np.linspace(0, made.model.vocab_size - 1, P).astype(int)
    return adapters.adapt(made.model.build(), adapter, ()), leaves | {
        'prompt': numbers - leaves['token_embedding'][ids]}
  layers, heads = made.model.num_layers, made.model.kv_heads
  pairs = numbers.reshape(P, layers, 2, heads, -1).transpose(2, 1, 0, 3, 4)
  adapter = adapters.PrefixTuning(length=P)
  return adapters.adapt(made.model.build(), adapter, ()), leaves | {
      f'blocks/layers/attention/prefix_{part}': x for part, x in zip(('key', 'value'), pairs)}


@pytest.mark.supports('fine-tuning', 'prefix and prompt tuning as in peft')
@pytest.mark.parametrize('name', ['gpt2/prefix', 'gpt2/prompt', 'llama/prompt'])
def test_learnt_keys_and_tokens_answer_as_in_peft(name):
  module, leaves = learned(name)
  shapes = checkpoint_io.flatten(state.abstract_params(module, jax.devices()[0]))
  assert {path: x.shape for path, x in shapes.items()} == {p: x.shape for p, x in leaves.items()}
  first = 5 if name.endswith('prefix') else 0  # peft's prefix takes places of the context
  tokens = stored(name.partition('/')[0])['tokens']
  places = np.broadcast_to(np.arange(first, first + tokens.shape[1], dtype=np.int32), tokens.shape)
  found, mask = logits_of(module, leaves, name, decoder_positions=places)
  wanted = case(name)[2]
  assert np.abs(found - wanted)[mask].max() < 1e-5 * np.abs(wanted).max() + 5e-6
