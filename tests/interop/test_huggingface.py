"""Weights of Hugging Face's architectures: the same answers, and the way back bit for bit."""
import dataclasses
import functools
import importlib.util
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest

from lm import main
from lm.data import vocabularies
from lm.errors import UserError
from lm.interop import architectures, certificate, convert, mapping, plan
from lm.interop.run_weights import read_run_params, write_run_params
from lm.interop.tensors import open_tensors, write_safetensors
from lm.models.bert import BERTConfig
from lm.models.gpt import GPTConfig, RopeScaling
from lm.models.heads import DualEncoderConfig, EmbedderConfig
from lm.models.t5 import T5Config
from lm.training import checkpoint_io

DATA = pathlib.Path(__file__).resolve().parents[1] / 'data'
NAMES = ('gpt2', 'llama', 'mistral', 'qwen2', 'qwen3', 'gemma', 'gemma2', 'gemma3_text', 'bert',
         'roberta', 'distilbert', 'modernbert', 't5', 't5_gated', 'mt5', 'umt5')
NOWHERE = pathlib.Path('no directory of sentence-transformers')


@functools.cache
def stored(name):
  return dict(np.load(DATA / f'reference_{name}.npz'))


def weights_of(reference, dtype=np.float32):
  return {name.removeprefix('weights/'): x.astype(dtype) for name, x in reference.items()
          if name.startswith('weights/')}


def read(weights, hf, **flags):
  return plan.read({name: x.shape for name, x in weights.items()}, 'float32', hf, NOWHERE, 'source',
                   **flags)


@functools.cache
def planned(name):
  return read(weights_of(stored(name)), json.loads(str(stored(name)['config.json'])))


def params_of(made, weights):
  """The parameters as a tree, each leaf filled once and whole."""
  leaves = {}
  for path, parts in mapping.to_ours(made.places, made.shapes, weights.__getitem__):
    leaves[path] = np.full(made.shapes[path], np.nan, np.float32)
    for index, part in parts:
      assert np.isnan(leaves[path][index]).all()
      leaves[path][index] = part
  assert not any(np.isnan(leaf).any() for leaf in leaves.values())
  return checkpoint_io.nest(leaves), leaves


def scanned(config):
  return dataclasses.replace(config, scan_layers=True)


def check_against(reference, made):
  """Every logit that is not of padding within 2e-4, at logits of unit scale."""
  params, _ = params_of(made, weights_of(reference))
  tokens, T = reference['tokens'], reference['tokens'].shape[1]
  features = {'tokens': tokens, 'mask': np.arange(T) < np.array([[T], [15]])}
  mask = features['mask']
  if 'decoder_tokens' in reference:
    features['decoder_tokens'] = reference['decoder_tokens']
    mask = np.ones(reference['decoder_tokens'].shape, bool)
  batch = certificate.batch_of(features)
  if 'token_types' in reference:
    batch |= {'encoder_token_types': reference['token_types'],
              'class_labels': np.zeros(2, np.int32)}
  module = scanned(made.model).build()
  run = jax.jit(lambda p, b: module.apply({'params': p}, b, method='outputs')[0])
  # Level 0 compiles in half of the time.
  run = run.lower(params, batch).compile({'xla_backend_optimization_level': 0})
  outputs = run(params, batch)
  scores = outputs['tokens']
  logits = np.einsum('bpd,vd->bpv', scores.hidden, scores.embedding)
  logits = logits if scores.bias is None else logits + scores.bias
  logits = logits if scores.softcap is None else scores.softcap * np.tanh(logits / scores.softcap)
  assert 0.5 < reference['logits'].std() < 4
  assert np.abs(logits - reference['logits'])[mask].max() < 2e-4
  if 'next_sentence' in reference:
    assert np.abs(outputs['classes'] - reference['next_sentence']).max() < 2e-4


@pytest.mark.supports('weights of others', 'GPT-2', 'Llama', 'Mistral', 'Qwen 2', 'Qwen 3', 'Gemma',
                      'Gemma 2', 'Gemma 3', 'BERT', 'RoBERTa', 'DistilBERT', 'ModernBERT', 'T5',
                      'T5 1.1', 'mT5', 'UMT5')
@pytest.mark.parametrize('name', NAMES)
def test_logits_are_those_that_hugging_face_stored(name):
  check_against(stored(name), planned(name))


@pytest.mark.parametrize('name', NAMES)
def test_logits_are_those_of_hugging_face_live(name):
  pytest.importorskip('transformers')
  pytest.importorskip('torch')
  spec = importlib.util.spec_from_file_location('make_references', DATA / 'make_references.py')
  make_references = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(make_references)
  reference = make_references.reference(name)
  check_against(reference, read(weights_of(reference), json.loads(str(reference['config.json']))))


@pytest.mark.supports('weights of others', 'back bit for bit, also bfloat16 and float16')
@pytest.mark.parametrize('name', NAMES)
def test_tensors_come_back_bit_for_bit(name):
  reference, made = stored(name), planned(name)
  assert set(made.places) == set(weights_of(reference))
  for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
    weights = weights_of(reference, dtype)
    _, leaves = params_of(made, weights)
    leaf = lambda path, layer: leaves[path] if layer is None else leaves[path][layer]
    for tensor, array in weights.items():
      back = made.array(tensor, leaf, dtype)
      assert back.dtype == dtype and back.shape == array.shape == made.shape(tensor)
      assert back.tobytes() == array.tobytes(), tensor


@pytest.mark.parametrize('name', NAMES)
def test_a_config_is_written_as_it_was_read(name):
  model = planned(name).model
  made = plan.write(model)
  again = read({key: np.zeros(made.shape(key), np.int8) for key in made.places}, made.hf)
  assert plan.same(again.model, model)
  # T5 1.1 and mT5 are one and the same but for their names.
  assert made.hf['model_type'] in (name, 't5')


def test_scanned_and_unrolled_models_read_the_same():
  reference, made = stored('gpt2'), planned('gpt2')
  params, _ = params_of(made, weights_of(reference))
  unrolled = dataclasses.replace(made.model, scan_layers=False)
  assert plan.abstract(unrolled) == plan.abstract(scanned(made.model))
  features = {'tokens': reference['tokens'], 'mask': np.ones((2, 24), bool)}
  one, other = (certificate.our_answers(config, params, features)
                for config in (unrolled, scanned(made.model)))
  np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize('damage, message', [
    (lambda w: w.pop('model.layers.1.mlp.up_proj.weight'),
     r'source: model.layers.1.mlp.up_proj.weight is missing, of shape \[24, 16\]'),
    (lambda w: w.update({'model.norm.weight': np.zeros(17)}),
     r'source: model.norm.weight has shape \[17\] and config.json asks for \[16\]'),
    (lambda w: w.update({'model.layers.0.self_attn.q_norm.weight': np.zeros(4)}),
     r'q_norm.weight of shape \[4\] has no place in this architecture'),
    (lambda w: w.update({'embed_tokens.weight': w['model.embed_tokens.weight']}),
     'model.embed_tokens.weight and embed_tokens.weight are two names of one tensor'),
    (lambda w: w.pop('lm_head.weight'), r'lm_head.weight is missing, of shape \[53, 16\]')])
def test_damaged_weights_are_refused_naming_tensor_and_shapes(damage, message):
  weights, hf = weights_of(stored('llama')), json.loads(str(stored('llama')['config.json']))
  damage(weights)
  with pytest.raises(UserError, match=message):
    read(weights, hf)


def test_a_config_of_another_family_is_refused():
  llama, qwen = (json.loads(str(stored(name)['config.json'])) for name in ('llama', 'qwen3'))
  with pytest.raises(UserError, match="model_type='mamba', which is not read; known are gpt2, ll"):
    read(weights_of(stored('llama')), {**llama, 'model_type': 'mamba'})
  with pytest.raises(UserError, match='source: model.layers.0.self_attn'):
    read(weights_of(stored('llama')), qwen)


def test_buffers_and_repeated_tensors_of_old_files_are_known():
  reference = stored('gpt2')
  weights = {name.removeprefix('transformer.'): x for name, x in weights_of(reference).items()}
  weights |= {'h.0.attn.bias': np.ones((1, 1, 32, 32)), 'h.0.attn.masked_bias': np.zeros(()),
              'lm_head.weight': weights['wte.weight']}
  made = read(weights, json.loads(str(reference['config.json'])))
  assert set(made.kept) == {'h.0.attn.bias', 'h.0.attn.masked_bias'}
  assert made.aliases == {'lm_head.weight': 'wte.weight'}
  alone = {name: x for name, x in weights.items() if name != 'wte.weight'}
  assert 'lm_head.weight' in read(alone, made.hf).places


def test_a_trunk_without_heads_gets_none():
  reference = stored('bert')
  hf = {**json.loads(str(reference['config.json'])), 'architectures': ['BertModel']}
  trunk = {name: x for name, x in weights_of(reference).items() if name.startswith('bert.')}
  model = read(trunk, hf).model
  assert model.pooler and not model.masked_lm and not model.sentence_classes
  without = {name: x for name, x in trunk.items() if 'pooler' not in name}
  assert not read(without, hf).model.pooler
  with pytest.raises(UserError, match='cls.predictions.* is missing'):  # it was promised
    read(trunk, {**hf, 'architectures': ['BertForMaskedLM']})


@pytest.mark.parametrize('changes', [
    {'rope_theta': 5e5, 'rope_scaling': {'type': 'linear', 'factor': 2.0}, 'rope_parameters': None},
    {'rope_parameters': {'rope_theta': 5e5, 'rope_type': 'linear', 'factor': 2.0}}])
def test_rotary_positions_are_read_in_both_spellings(changes):
  hf = {**json.loads(str(stored('mistral')['config.json'])), **changes}
  config = architectures.ARCHITECTURES['mistral'].config_from(hf)
  assert (config.rope_theta, config.rope_scaling) == (5e5, RopeScaling('linear', 2.0))


@pytest.mark.parametrize('name, changes, message', [
    ('llama', {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4}}, "rope_type='yarn'"),
    ('llama', {'mlp_bias': False}, 'mlp_bias=False'),
    ('llama', {'hidden_act': 'relu2'}, "hidden_act='relu2'"),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx=True'),
    ('gemma3_text', {'use_bidirectional_attention': True}, 'use_bidirectional_attention=True'),
    ('qwen2', {'layer_types': ['chunked_attention'] * 3}, "layer_types='chunked_attention'"),
    ('bert', {'position_embedding_type': 'relative_key'}, "='relative_key'"),
    ('modernbert', {'norm_bias': True}, 'attention_bias=False')])
def test_what_ours_does_not_compute_is_refused_by_its_name(name, changes, message):
  hf = {**json.loads(str(stored(name)['config.json'])), **changes}
  with pytest.raises(UserError, match=message):
    read(weights_of(stored(name)), hf)


@pytest.mark.parametrize('model, model_type', [
    (GPTConfig(d_model=32, num_layers=2, num_heads=2, d_ff=64), 'gpt2'),
    (GPTConfig(d_model=32, num_layers=2, num_heads=2, d_ff=64, norm='rmsnorm', positions='rotary',
               activation='swiglu', use_bias=False), 'llama'),
    (BERTConfig(d_model=32, num_layers=2, num_heads=2, d_ff=64, sentence_classes=0), 'bert'),
    (T5Config(d_model=32, num_layers=2, num_heads=2, d_ff=64), 't5'),
    (DualEncoderConfig(EmbedderConfig(BERTConfig(d_model=32, num_layers=1, num_heads=2,
                                                 token_types=0, pooler=False, masked_lm=False,
                                                 sentence_classes=0))), 'distilbert')],
    ids=lambda value: value if isinstance(value, str) else '')
def test_models_that_were_trained_here_have_an_architecture(model, model_type):
  assert plan.write(model).hf['model_type'] == model_type


def test_a_model_that_no_architecture_computes_is_refused_naming_the_fields():
  odd = GPTConfig(norm='rmsnorm', positions='rotary', activation='swiglu', use_bias=False,
                  logits_softcap=30.0)
  with pytest.raises(UserError, match='nearest is llama, which does not have logits_softcap=30.0'):
    plan.write(odd)


def test_a_certificate_sees_a_changed_weight():
  reference, made = stored('qwen3'), planned('qwen3')
  params, _ = params_of(made, weights_of(reference))
  config = scanned(made.model)
  mask = np.ones((2, 24), bool)
  features = {'tokens': reference['tokens'], 'mask': mask}
  ours = certificate.our_answers(config, params, features)
  whole = certificate.compare(ours, ours, mask)
  assert whole == {'max_absolute_difference': 0, 'max_relative_difference': 0, 'top1_agreement': 1}
  sample = certificate._sample(ours, mask)
  assert certificate.compare_sample(ours, sample, mask)['top1_agreement'] == 1
  params['final_norm']['scale'] = params['final_norm']['scale'] * np.linspace(0, 2, 16)
  changed = certificate.our_answers(config, params, features)
  for compared in (certificate.compare(changed, ours, mask),
                   certificate.compare_sample(changed, sample, mask)):
    assert compared['max_absolute_difference'] > 0.1 and compared['top1_agreement'] < 1


def make_directory(directory, name, dtype=np.float32, words=50, **extra):
  """Writes the stored model as Hugging Face does, with a tokenizer of so many words."""
  from tokenizers import Tokenizer, models, pre_tokenizers
  weights = {**weights_of(stored(name), dtype), **extra}
  vocabulary = {'<unk>': 0, '<s>': 1, '</s>': 2, **{f'w{i}': i for i in range(3, words)}}
  tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  write_safetensors(directory, [(key, x.shape, x.dtype, lambda x=x: x)
                                for key, x in weights.items()])
  (directory / 'config.json').write_text(str(stored(name)['config.json']))
  (directory / 'tokenizer.json').write_text(tokenizer.to_str())
  (directory / 'tokenizer_config.json').write_text(json.dumps(
      {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '</s>', 'unk_token': '<unk>'}))
  return directory


def files(directory):
  return {str(file.relative_to(directory)): file.read_bytes()
          for file in directory.rglob('*') if file.is_file() and file.name != certificate.FILE}


def lm(capsys, *arguments):
  status = main.main(list(map(str, arguments)))
  return status, ' '.join(capsys.readouterr())


@pytest.mark.supports('weights of others', 'lm convert: to a run and back to the same files',
                      'a certificate of parity')
def test_a_directory_becomes_a_run_that_generates_and_gives_back_every_file(tmp_path, capsys):
  embedding = weights_of(stored('gpt2'), ml_dtypes.bfloat16)['transformer.wte.weight']
  source = make_directory(tmp_path / 'source', 'gpt2', ml_dtypes.bfloat16, **{
      'lm_head.weight': embedding,
      'transformer.h.0.attn.bias': np.ones((1, 1, 4, 4), np.uint8)})
  run = tmp_path / 'run'
  status, said = lm(capsys, 'convert', '--from', source, '--run_dir', run)
  assert not status and 'each given back bit for bit' in said
  status, said = lm(capsys, 'generate', '--run_dir', run, '--prompt', 'w5 w7', '--max_new_tokens',
                    3, '--temperature', 0, '--gin.gpt.GPTConfig.scan_layers=True')
  assert not status and said.startswith('w5 w7')
  status, _ = lm(capsys, 'convert', '--run_dir', run, '--to', tmp_path / 'back')
  assert not status and files(tmp_path / 'back') == files(source)
  here, there = (json.loads((place / 'parity.json').read_text()) for place in
                 (run, tmp_path / 'back'))
  assert here['round_trip'] == there['round_trip'] and not here['round_trip']['different']
  assert here['versions']['jax'] == jax.__version__
  status, said = lm(capsys, 'convert', '--from', source, '--run_dir', run)
  assert status == 2 and 'not an empty directory' in said


def nothing(*_):
  """Writes no config.gin."""


def test_a_directory_of_sentence_transformers_keeps_its_pooling(tmp_path):
  source = make_directory(tmp_path / 'source', 'bert')
  (source / '1_Pooling').mkdir()
  pooling = {'word_embedding_dimension': 16, 'pooling_mode_cls_token': True,
             'pooling_mode_mean_tokens': False}
  (source / '1_Pooling' / 'config.json').write_text(json.dumps(pooling))
  kinds = [('', 'Transformer'), ('1_Pooling', 'Pooling')]
  (source / 'modules.json').write_text(json.dumps(
      [{'path': path, 'type': f'sentence_transformers.models.{kind}'} for path, kind in kinds]))
  models = []
  convert.import_run(source, tmp_path / 'run', lambda _, model, __: models.append(model))
  model, = models
  assert (model.query.pooling, model.query.normalize) == ('cls', False)
  convert.export_run(tmp_path / 'run', model, tmp_path / 'back')
  assert files(tmp_path / 'back') == files(source)
  (source / '1_Pooling' / 'config.json').write_text(json.dumps({'pooling_mode_max_tokens': True}))
  with pytest.raises(UserError, match='pools by pooling_mode_max_tokens; read is one of'):
    convert.import_run(source, tmp_path / 'other', nothing)


@pytest.mark.parametrize('model', [
    GPTConfig(262, 16, 8, 2, 2, d_ff=12), T5Config(262, 16, 8, 2, num_heads=2, d_ff=12),
    DualEncoderConfig(EmbedderConfig(BERTConfig(262, 16, 8, 2, 2, d_ff=12, masked_lm=False,
                                                sentence_classes=0)))],
    ids=['gpt2', 't5', 'sentence-transformers'])
def test_a_run_trained_here_is_written_and_read_again(model, tmp_path):
  abstract, rng = plan.abstract(model), np.random.default_rng(0)
  leaves = {path: rng.normal(size=leaf.shape).astype(np.float32)
            for path, leaf in checkpoint_io.flatten(abstract).items()}
  write_run_params(tmp_path / 'run', abstract, [(path, [((), x)]) for path, x in leaves.items()])
  vocabularies.ByteVocabulary().save(tmp_path / 'run' / 'vocabulary')
  convert.export_run(tmp_path / 'run', model, tmp_path / 'hf')
  models = []
  convert.import_run(tmp_path / 'hf', tmp_path / 'again', lambda _, x, __: models.append(x))
  assert plan.same(models[0], model)
  again = read_run_params(tmp_path / 'again')
  for path, x in leaves.items():
    np.testing.assert_array_equal(again[path].read(), x)


def test_an_interrupted_conversion_leaves_no_directory(tmp_path, monkeypatch):
  source = make_directory(tmp_path / 'source', 'llama')

  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(certificate, 'compare_tensors', interrupt)
  with pytest.raises(KeyboardInterrupt):
    convert.import_run(source, tmp_path / 'run', nothing)
  assert not (tmp_path / 'run').exists()


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(tmp_path):
  source = make_directory(tmp_path / 'source', 'llama', words=54)
  with pytest.raises(UserError, match='has 54 ids and the embedding of the tokens 53 rows'):
    convert.import_run(source, tmp_path / 'run', nothing)


def test_a_head_that_differs_from_a_tied_embedding_is_its_own_or_refused(tmp_path):
  head = np.arange(53 * 16, dtype=np.float32).reshape(53, 16)
  source = make_directory(tmp_path / 'qwen2', 'qwen2', **{'lm_head.weight': head})
  made = convert._read(open_tensors(source), 'source')
  assert made.own_head and not made.model.tie_embeddings
  source = make_directory(tmp_path / 't5', 't5', **{'lm_head.weight': head})
  with pytest.raises(UserError, match='lm_head.weight and shared.weight differ'):
    convert._read(open_tensors(source), 'source')
