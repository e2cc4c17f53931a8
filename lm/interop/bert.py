"""Encoders of Hugging Face as `BERTConfig`: BERT, RoBERTa, DistilBERT and ModernBERT."""
from collections.abc import Mapping
import dataclasses
from typing import Any

from lm.errors import UserError
from lm.interop.fields import (GATED, HF, PLAIN, name_of, pattern_of, require, rope_from,
                               translate, types_of)
from lm.interop.mapping import Matrix, Rule, Shape, Vector
from lm.models.bert import BERTConfig

LAYER = 'blocks/layers'


def bert_from(hf: HF) -> BERTConfig:
  """Reads the config.json of a BERT."""
  require(hf, 'position_embedding_type', 'absolute')
  require(hf, 'is_decoder', False)
  if hf.get('type_vocab_size') == 0:
    raise UserError('config.json has type_vocab_size=0 and a BERT has at least 1; DistilBERT and '
                    'ModernBERT have none')
  return BERTConfig(
      vocab_size=hf.get('vocab_size', 30522), max_length=hf.get('max_position_embeddings', 512),
      d_model=hf.get('hidden_size', 768), num_layers=hf.get('num_hidden_layers', 12),
      num_heads=hf.get('num_attention_heads', 12), d_ff=hf.get('intermediate_size', 3072),
      norm_epsilon=hf.get('layer_norm_eps', 1e-12), token_types=hf.get('type_vocab_size', 2),
      activation=translate(hf, 'hidden_act', 'gelu', PLAIN),
      dropout_rate=hf.get('hidden_dropout_prob', 0.1),
      attention_dropout_rate=hf.get('attention_probs_dropout_prob', 0.1),
      init_std=hf.get('initializer_range', 0.02))


def roberta_from(hf: HF) -> BERTConfig:
  """Reads the config.json of a RoBERTa, whose positions begin behind the id of padding."""
  require(hf, 'hidden_act', 'gelu')
  offset = (1 if hf.get('pad_token_id') is None else hf['pad_token_id']) + 1
  rows = hf.get('max_position_embeddings', 512)
  config = bert_from({'vocab_size': 50265, **hf, 'max_position_embeddings': rows - offset})
  return dataclasses.replace(config, position_offset=offset, sentence_classes=0)


def distilbert_from(hf: HF) -> BERTConfig:
  """Reads the config.json of a DistilBERT, which has no token types and no pooler."""
  require(hf, 'sinusoidal_pos_embds', False)  # the numbers of such tables are saved all the same
  config = bert_from({
      'vocab_size': hf.get('vocab_size', 30522), 'hidden_size': hf.get('dim', 768),
      'num_hidden_layers': hf.get('n_layers', 6), 'num_attention_heads': hf.get('n_heads', 12),
      'intermediate_size': hf.get('hidden_dim', 3072), 'hidden_act': hf.get('activation', 'gelu'),
      'max_position_embeddings': hf.get('max_position_embeddings', 512),
      'hidden_dropout_prob': hf.get('dropout', 0.1),
      'attention_probs_dropout_prob': hf.get('attention_dropout', 0.1),
      'initializer_range': hf.get('initializer_range', 0.02)})
  return dataclasses.replace(config, token_types=0, pooler=False, sentence_classes=0)


def modernbert_from(hf: HF) -> BERTConfig:
  """Reads the config.json of a ModernBERT; all layers and norms have biases, or none."""
  bias = hf.get('norm_bias', False)
  for name in ('attention_bias', 'mlp_bias', 'classifier_bias'):
    require({name: False, **hf}, name, bias)
  require(hf, 'decoder_bias', True)
  require(hf, 'classifier_activation', 'gelu')
  layers, period = hf.get('num_hidden_layers', 22), hf.get('global_attn_every_n_layers', 3)
  types = hf.get('layer_types') or types_of('G' + 'L' * (period - 1), layers)
  pattern = pattern_of(types)
  rope = hf.get('rope_parameters') or {}
  theta, _ = rope_from({'rope_theta': hf.get('global_rope_theta'),
                        'rope_parameters': rope.get('full_attention')}, 160000.0)
  local, _ = rope_from({'rope_theta': hf.get('local_rope_theta'),
                        'rope_parameters': rope.get('sliding_attention')}, 10000.0)
  return BERTConfig(
      vocab_size=hf.get('vocab_size', 50368), max_length=hf.get('max_position_embeddings', 8192),
      d_model=hf.get('hidden_size', 768), num_layers=layers,
      num_heads=hf.get('num_attention_heads', 12), d_ff=hf.get('intermediate_size', 1152),
      norm_placement='pre', norm_epsilon=hf.get('norm_eps', 1e-5), positions='rotary',
      token_types=0, attention_pattern=pattern, rope_theta=theta, rope_theta_local=local,
      window=hf.get('local_attention', 128) // 2 + 1 if 'L' in pattern else None,
      activation=translate(hf, 'hidden_activation', 'gelu', GATED), use_bias=bias,
      pooler=False, sentence_classes=0, dropout_rate=hf.get('mlp_dropout', 0.0),
      attention_dropout_rate=hf.get('attention_dropout', 0.0),
      init_std=hf.get('initializer_range', 0.02))


def heads(hf: HF, shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """The fields that say which heads a file has: those that stand there or config.json promises."""
  promised = ' '.join(hf.get('architectures') or ())
  classes = shapes.get('cls.seq_relationship.weight', (2 * ('ForPreTraining' in promised),))[0]
  masked_lm = any(name.startswith(('cls.predictions.', 'lm_head.', 'vocab_', 'head.'))
                  for name in shapes)
  return {'masked_lm': masked_lm or 'ForMaskedLM' in promised or 'ForPreTraining' in promised,
          'pooler': bool(classes) or any('.pooler.' in name for name in shapes),
          'sentence_classes': classes}


def _kind(name: str, config: BERTConfig) -> str:
  head = 'ForPreTraining' if config.sentence_classes else 'ForMaskedLM'
  return name + (head if config.masked_lm else 'Model')


def bert_to(config: BERTConfig) -> HF:
  """Writes the config.json of a BERT."""
  return {
      'architectures': [_kind('Bert', config)], 'model_type': 'bert',
      'vocab_size': config.vocab_size, 'max_position_embeddings': config.max_length,
      'hidden_size': config.d_model, 'num_hidden_layers': config.num_layers,
      'num_attention_heads': config.num_heads, 'intermediate_size': config.d_ff,
      'layer_norm_eps': config.norm_epsilon, 'type_vocab_size': config.token_types,
      'hidden_act': name_of(config.activation, PLAIN), 'initializer_range': config.init_std,
      'hidden_dropout_prob': config.dropout_rate,
      'attention_probs_dropout_prob': config.attention_dropout_rate, 'tie_word_embeddings': True,
      'pad_token_id': 0}


def roberta_to(config: BERTConfig) -> HF:
  """Writes the config.json of a RoBERTa."""
  return {**bert_to(config), 'architectures': [_kind('Roberta', config)], 'model_type': 'roberta',
          'pad_token_id': config.position_offset - 1,
          'max_position_embeddings': config.max_length + config.position_offset}


def distilbert_to(config: BERTConfig) -> HF:
  """Writes the config.json of a DistilBERT."""
  return {
      'architectures': [_kind('DistilBert', config)], 'model_type': 'distilbert',
      'vocab_size': config.vocab_size, 'max_position_embeddings': config.max_length,
      'dim': config.d_model, 'n_layers': config.num_layers, 'n_heads': config.num_heads,
      'hidden_dim': config.d_ff, 'activation': name_of(config.activation, PLAIN),
      'initializer_range': config.init_std, 'dropout': config.dropout_rate,
      'attention_dropout': config.attention_dropout_rate,
      'tie_word_embeddings': True, 'pad_token_id': 0}


def modernbert_to(config: BERTConfig) -> HF:
  """Writes the config.json of a ModernBERT."""
  local = config.rope_theta_local or config.rope_theta
  return {
      'architectures': [_kind('ModernBert', config)], 'model_type': 'modernbert',
      'vocab_size': config.vocab_size, 'max_position_embeddings': config.max_length,
      'hidden_size': config.d_model, 'num_hidden_layers': config.num_layers,
      'num_attention_heads': config.num_heads, 'intermediate_size': config.d_ff,
      'norm_eps': config.norm_epsilon, 'norm_bias': config.use_bias,
      'attention_bias': config.use_bias, 'mlp_bias': config.use_bias,
      'classifier_bias': config.use_bias, 'decoder_bias': True,
      'layer_types': types_of(config.attention_pattern, config.num_layers),
      'local_attention': 2 * (config.window - 1) if config.window else 128,
      'global_rope_theta': config.rope_theta, 'local_rope_theta': local,
      'hidden_activation': name_of(config.activation, GATED),
      'initializer_range': config.init_std, 'mlp_dropout': config.dropout_rate,
      'attention_dropout': config.attention_dropout_rate,
      'tie_word_embeddings': True, 'pad_token_id': 0}


def _linear(theirs: str, ours: str, inputs: int = 1, bias: bool = True) -> list[Rule]:
  rules = [Rule(f'{theirs}.weight', f'{ours}/kernel', Matrix(inputs))]
  return rules + ([Rule(f'{theirs}.bias', f'{ours}/bias', Vector())] if bias else [])


def _norm(theirs: str, ours: str, bias: bool = True, layer: int | None = None) -> list[Rule]:
  rules = [Rule(f'{theirs}.weight', f'{ours}/scale', layer=layer)]
  return rules + ([Rule(f'{theirs}.bias', f'{ours}/bias', layer=layer)] if bias else [])


def bert_rules(config: BERTConfig, trunk: str = 'bert.') -> list[Rule]:
  """Names of `BertForPreTraining`."""
  embeddings, layer = f'{trunk}embeddings', f'{trunk}encoder.layer.{{layer}}'
  rules = [Rule(f'{embeddings}.word_embeddings.weight', 'token_embedding'),
           Rule(f'{embeddings}.position_embeddings.weight', 'position_embedding'),
           Rule(f'{embeddings}.token_type_embeddings.weight', 'token_type_embedding'),
           *_norm(f'{embeddings}.LayerNorm', 'embedding_norm'),
           *_norm(f'{layer}.attention.output.LayerNorm', f'{LAYER}/attention_norm'),
           *_norm(f'{layer}.output.LayerNorm', f'{LAYER}/mlp_norm'),
           *_linear(f'{layer}.attention.output.dense', f'{LAYER}/attention/out', 2),
           *_linear(f'{layer}.intermediate.dense', f'{LAYER}/mlp/wi'),
           *_linear(f'{layer}.output.dense', f'{LAYER}/mlp/wo')]
  for name in ('query', 'key', 'value'):
    rules += _linear(f'{layer}.attention.self.{name}', f'{LAYER}/attention/{name}')
  if config.pooler:
    rules += _linear(f'{trunk}pooler.dense', 'pooler/dense')
  if config.sentence_classes:
    rules += _linear('cls.seq_relationship', 'sentence_head/dense')
  if config.masked_lm and trunk == 'bert.':
    rules += [*_linear('cls.predictions.transform.dense', 'masked_lm/dense'),
              *_norm('cls.predictions.transform.LayerNorm', 'masked_lm/norm'),
              Rule('cls.predictions.bias', 'masked_lm/bias')]
  return rules


def roberta_rules(config: BERTConfig) -> list[Rule]:
  """Names of `RobertaForMaskedLM`."""
  rules = bert_rules(config, 'roberta.')
  if config.masked_lm:
    rules += [*_linear('lm_head.dense', 'masked_lm/dense'),
              *_norm('lm_head.layer_norm', 'masked_lm/norm'),
              Rule('lm_head.bias', 'masked_lm/bias')]
  return rules


def distilbert_rules(config: BERTConfig) -> list[Rule]:
  """Names of `DistilBertForMaskedLM`."""
  embeddings, layer = 'distilbert.embeddings', 'distilbert.transformer.layer.{layer}'
  rules = [Rule(f'{embeddings}.word_embeddings.weight', 'token_embedding'),
           Rule(f'{embeddings}.position_embeddings.weight', 'position_embedding'),
           *_norm(f'{embeddings}.LayerNorm', 'embedding_norm'),
           *_norm(f'{layer}.sa_layer_norm', f'{LAYER}/attention_norm'),
           *_norm(f'{layer}.output_layer_norm', f'{LAYER}/mlp_norm'),
           *_linear(f'{layer}.attention.out_lin', f'{LAYER}/attention/out', 2),
           *_linear(f'{layer}.ffn.lin1', f'{LAYER}/mlp/wi'),
           *_linear(f'{layer}.ffn.lin2', f'{LAYER}/mlp/wo')]
  for name in ('query', 'key', 'value'):
    rules += _linear(f'{layer}.attention.{name[0]}_lin', f'{LAYER}/attention/{name}')
  if config.masked_lm:
    rules += [*_linear('vocab_transform', 'masked_lm/dense'),
              *_norm('vocab_layer_norm', 'masked_lm/norm'),
              Rule('vocab_projector.bias', 'masked_lm/bias')]
  return rules


def modernbert_rules(config: BERTConfig) -> list[Rule]:
  """Names of `ModernBertForMaskedLM`.

  Its norm before a layer's attention is ours behind the layer before; the last is the final norm.
  """
  bias, layer, norm = config.use_bias, 'model.layers.{layer}', f'{LAYER}/output_norm'
  fused = lambda folder, names, leaf: tuple(f'{LAYER}/{folder}/{name}/{leaf}' for name in names)
  rules = [Rule('model.embeddings.tok_embeddings.weight', 'token_embedding'),
           *_norm('model.embeddings.norm', 'embedding_norm', bias),
           *_norm(f'{layer}.mlp_norm', f'{LAYER}/mlp_norm', bias),
           *_linear(f'{layer}.attn.Wo', f'{LAYER}/attention/out', 2, bias),
           *_linear(f'{layer}.mlp.Wo', f'{LAYER}/mlp/wo', 1, bias),
           *_norm('model.final_norm', norm, bias, config.num_layers - 1)]
  for number in range(1, config.num_layers):
    rules += _norm(f'model.layers.{number}.attn_norm', norm, bias, number - 1)
  for theirs, folder, names in (('attn.Wqkv', 'attention', ('query', 'key', 'value')),
                                ('mlp.Wi', 'mlp', ('wi_0', 'wi_1'))):
    rules.append(Rule(f'{layer}.{theirs}.weight', fused(folder, names, 'kernel'), Matrix()))
    if bias:
      rules.append(Rule(f'{layer}.{theirs}.bias', fused(folder, names, 'bias'), Vector()))
  if config.masked_lm:
    rules += [*_linear('head.dense', 'masked_lm/dense', 1, bias),
              *_norm('head.norm', 'masked_lm/norm', bias), Rule('decoder.bias', 'masked_lm/bias')]
  return rules
