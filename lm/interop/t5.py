"""T5 of Hugging Face as `T5Config`: 1.0, 1.1 and Flan, mT5, UMT5, whole or the encoder alone."""
from typing import Any

from lm.interop.fields import GATED, HF, PLAIN, name_of, translate
from lm.interop.mapping import Matrix, Rule
from lm.models.t5 import T5Config


def _config(hf: HF, **special: Any) -> T5Config:
  gate, _, function = hf.get('feed_forward_proj', 'relu').rpartition('-')
  if gate == 'gated' and function == 'gelu':  # T5 1.1 says so and means the tanh form
    function = 'gelu_new'
  activation = translate({'feed_forward_proj': function}, 'feed_forward_proj', '',
                         GATED if gate == 'gated' else PLAIN)
  decoder = not any(name.endswith('EncoderModel') for name in hf.get('architectures') or ())
  layers = hf.get('num_layers', 6)
  fields = dict(
      vocab_size=hf.get('vocab_size', 32128), max_length=hf.get('n_positions', 512),
      d_model=hf.get('d_model', 512), num_layers=layers,
      num_decoder_layers=(hf.get('num_decoder_layers') or layers) if decoder else None,
      num_heads=hf.get('num_heads', 8), d_head=hf.get('d_kv', 64), d_ff=hf.get('d_ff', 2048),
      activation=activation, num_buckets=hf.get('relative_attention_num_buckets', 32),
      max_distance=hf.get('relative_attention_max_distance', 128), decoder=decoder,
      norm_epsilon=hf.get('layer_norm_epsilon', 1e-6), dropout_rate=hf.get('dropout_rate', 0.1),
      attention_dropout_rate=hf.get('dropout_rate', 0.1))
  return T5Config(**fields, **special)


def t5_from(hf: HF) -> T5Config:
  """Reads the config.json of a T5.

  Version 5 of transformers writes tie_word_embeddings=True whatever the model is, and whether the
  hidden states are scaled before the head, which is so where it is tied.
  """
  return _config(hf, tie_embeddings=hf.get('scale_decoder_outputs',
                                           hf.get('tie_word_embeddings', True)))


def mt5_from(hf: HF) -> T5Config:
  """Reads the config.json of an mT5, which is never tied (version 5 says it is)."""
  return _config({'feed_forward_proj': 'gated-gelu', **hf}, tie_embeddings=False)


def umt5_from(hf: HF) -> T5Config:
  """Reads the config.json of a UMT5: each layer has its own relative bias."""
  return _config({'feed_forward_proj': 'gated-gelu', **hf}, bias_per_layer=True,
                 tie_embeddings=hf.get('tie_word_embeddings', True))


def _writer(name: str, model_type: str):
  def write(config: T5Config) -> HF:
    gate = name_of(config.activation, GATED, 'gelu_new')
    activation = f'gated-{gate}'.replace('gelu_new', 'gelu') if gate else name_of(
        config.activation, PLAIN, 'gelu_new')
    kind = 'ForConditionalGeneration' if config.decoder else 'EncoderModel'
    return {
        'architectures': [name + kind], 'model_type': model_type, 'vocab_size': config.vocab_size,
        'n_positions': config.max_length, 'd_model': config.d_model,
        'num_layers': config.num_layers,
        'num_decoder_layers': config.decoder_layers or config.num_layers,
        'num_heads': config.num_heads, 'd_kv': config.head_dim, 'd_ff': config.d_ff,
        'feed_forward_proj': activation, 'relative_attention_num_buckets': config.num_buckets,
        'relative_attention_max_distance': config.max_distance,
        'layer_norm_epsilon': config.norm_epsilon, 'dropout_rate': config.dropout_rate,
        'is_encoder_decoder': config.decoder, 'decoder_start_token_id': 0, 'pad_token_id': 0,
        'eos_token_id': 1, 'tie_word_embeddings': config.tie_embeddings}
  return write


t5_to, mt5_to, umt5_to = _writer('T5', 't5'), _writer('MT5', 'mt5'), _writer('UMT5', 'umt5')


def rules(config: T5Config) -> list[Rule]:
  """Names of `T5ForConditionalGeneration`."""
  table = [Rule('shared.weight', 'token_embedding')]
  for trunk in ('encoder', 'decoder') if config.decoder else ('encoder',):
    table += _trunk(config, trunk)
  if config.decoder and not config.tie_embeddings:
    table.append(Rule('lm_head.weight', 'output_embedding'))
  return table


def _trunk(config: T5Config, trunk: str) -> list[Rule]:
  layer = f'{trunk}.block.{{layer}}.layer'
  ours = f'{trunk}/blocks/layers'
  attentions = [('0.SelfAttention', 'attention')]
  if trunk == 'decoder':
    attentions.append(('1.EncDecAttention', 'cross_attention'))
  last = len(attentions)
  table = [Rule(f'{trunk}.final_layer_norm.weight', f'{trunk}/final_norm/scale'),
           Rule(f'{layer}.{last}.layer_norm.weight', f'{ours}/mlp_norm/scale')]
  for theirs, name in attentions:
    table.append(Rule(f'{layer}.{theirs[0]}.layer_norm.weight', f'{ours}/{name}_norm/scale'))
    table += [Rule(f'{layer}.{theirs}.{letter}.weight', f'{ours}/{name}/{part}/kernel',
                   Matrix(inputs))
              for letter, part, inputs in (('q', 'query', 1), ('k', 'key', 1), ('v', 'value', 1),
                                           ('o', 'out', 2))]
  gated = config.activation in GATED.values()
  table += [Rule(f'{layer}.{last}.DenseReluDense.{name}.weight', f'{ours}/mlp/{name}/kernel',
                 Matrix()) for name in (('wi_0', 'wi_1', 'wo') if gated else ('wi', 'wo'))]
  bias = '0.SelfAttention.relative_attention_bias.weight'
  if config.bias_per_layer:
    return table + [Rule(f'{layer}.{bias}', f'{ours}/relative_bias/embedding')]
  return table + [Rule(f'{trunk}.block.0.layer.{bias}', f'{trunk}/relative_bias/embedding')]
