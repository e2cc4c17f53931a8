"""The architectures of Hugging Face that are read and written, by their `model_type`."""
from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any, NamedTuple

from lm.errors import UserError
from lm.interop import bert, gpt2, llama, t5
from lm.interop.fields import HF
from lm.interop.mapping import Rule, Shape
from lm.models.bert import BERTConfig
from lm.models.gpt import GPTConfig
from lm.models.t5 import T5Config

# Numbers that a model computes and old versions saved all the same.
BUFFERS = re.compile(r'(.*\.)?(position_ids|token_type_ids|attn\.(masked_)?bias|inv_freq)')
# Fields that say how a model is trained or run and not what it computes.
PRACTICAL = ('dropout_rate', 'attention_dropout_rate', 'layer_drop_rate', 'init_std', 'dtype',
             'attention_implementation', 'scan_layers', 'remat')


class Architecture(NamedTuple):
  """What there is to know of a `model_type`.

  config: the class of ours.
  config_from, config_to: between the content of config.json and ours.
  rules: names of theirs and places of ours.
  trunk: begins the names of all but heads, unless the trunk was saved alone; heads: begin the rest.
  aliases: a name that some files have besides, for the same numbers.
  optional: fields of ours that say which heads there are, where a file may or may not have them.
  """
  config: type
  config_from: Callable[[HF], Any]
  config_to: Callable[[Any], HF]
  rules: Callable[[Any], list[Rule]]
  trunk: str = ''
  heads: tuple[str, ...] = ()
  aliases: Mapping[str, str] = {}
  optional: tuple[str, ...] = ()

  def read(self, hf: HF, shapes: Mapping[str, Shape]) -> Any:
    """Our config of a config.json and the tensors beside it, by canonical names."""
    config = self.config_from(hf)
    heads = bert.heads(hf, shapes) if self.optional else {}
    return dataclasses.replace(config, **heads)

  def canonical(self, name: str) -> str:
    """The name that the rules use, of one as it stands in a file."""
    name = re.sub(r'LayerNorm\.gamma$', 'LayerNorm.weight', name)  # of TensorFlow's BERT
    name = re.sub(r'LayerNorm\.beta$', 'LayerNorm.bias', name)
    return name if name.startswith((self.trunk, *self.heads)) else self.trunk + name


def _decoder(config_from, config_to):
  return Architecture(GPTConfig, config_from, config_to, llama.rules, 'model.', ('lm_head.',),
                      {'lm_head.weight': 'model.embed_tokens.weight'})


def _t5(config_from, config_to):
  names = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight', 'lm_head.weight')
  return Architecture(T5Config, config_from, config_to, t5.rules,
                      aliases=dict.fromkeys(names, 'shared.weight'))


def _encoder(name, trunk, heads, aliases, optional):
  config_from, config_to, rules = (getattr(bert, f'{name}_{part}') for part in
                                   ('from', 'to', 'rules'))
  return Architecture(BERTConfig, config_from, config_to, rules, trunk, heads, aliases, optional)


ARCHITECTURES = {
    'gpt2': Architecture(GPTConfig, gpt2.config_from, gpt2.config_to, gpt2.rules, 'transformer.',
                         ('lm_head.',), {'lm_head.weight': 'transformer.wte.weight'}),
    'llama': _decoder(llama.llama_from, llama.llama_to),
    'mistral': _decoder(llama.mistral_from, llama.mistral_to),
    'qwen2': _decoder(llama.qwen2_from, llama.qwen2_to),
    'qwen3': _decoder(llama.qwen3_from, llama.qwen3_to),
    'gemma': _decoder(llama.gemma_from, llama.gemma_to),
    'gemma2': _decoder(llama.gemma2_from, llama.gemma2_to),
    'gemma3_text': _decoder(llama.gemma3_from, llama.gemma3_to),
    'bert': _encoder('bert', 'bert.', ('cls.',), {
        'cls.predictions.decoder.weight': 'bert.embeddings.word_embeddings.weight',
        'cls.predictions.decoder.bias': 'cls.predictions.bias'},
        ('masked_lm', 'pooler', 'sentence_classes')),
    'roberta': _encoder('roberta', 'roberta.', ('lm_head.',), {
        'lm_head.decoder.weight': 'roberta.embeddings.word_embeddings.weight',
        'lm_head.decoder.bias': 'lm_head.bias'}, ('masked_lm', 'pooler')),
    'distilbert': _encoder('distilbert', 'distilbert.', ('vocab_',), {
        'vocab_projector.weight': 'distilbert.embeddings.word_embeddings.weight'}, ('masked_lm',)),
    'modernbert': _encoder('modernbert', 'model.', ('head.', 'decoder.'), {
        'decoder.weight': 'model.embeddings.tok_embeddings.weight'}, ('masked_lm',)),
    't5': _t5(t5.t5_from, t5.t5_to),
    'mt5': _t5(t5.mt5_from, t5.mt5_to),
    'umt5': _t5(t5.umt5_from, t5.umt5_to),
}


def of(hf: HF, source: str) -> Architecture:
  """The architecture of a config.json.

  Raises:
    UserError: it names none, or one that is not known.
  """
  name = hf.get('model_type')
  if name not in ARCHITECTURES:
    raise UserError(f'{source} has model_type={name!r}, which is not read; known are '
                    f'{", ".join(ARCHITECTURES)}')
  return ARCHITECTURES[name]


def same_model(one: Any, other: Any) -> bool:
  """Whether two configs compute the same, however they are run."""
  return type(one) is type(other) and _computed(one) == _computed(other)


def _computed(config: Any) -> dict[str, Any]:
  """The fields that decide what is computed, defaults that depend on others written out."""
  fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
            if field.name not in PRACTICAL}
  for name, resolved in (('num_kv_heads', 'kv_heads'), ('d_head', 'head_dim'),
                         ('num_decoder_layers', 'decoder_layers')):
    if name in fields:
      fields[name] = getattr(config, resolved)
  if 'attention_pattern' in fields:
    fields['attention_pattern'] = (config.attention_pattern * config.num_layers)[:config.num_layers]
    fields['rope_theta_local'] = config.rope_theta_local or config.rope_theta
  if isinstance(config, GPTConfig):
    fields['attention_scale'] = round(config.attention_scale or config.head_dim**-0.5, 12)
    fields['qkv_bias'] = config.use_bias if config.qkv_bias is None else config.qkv_bias
  return fields


def choose(config: Any) -> str:
  """The `model_type` whose models compute what a config of ours says.

  Raises:
    UserError: there is none; names the fields in which the nearest one differs.
  """
  nearest = None
  for name, architecture in ARCHITECTURES.items():
    if not isinstance(config, architecture.config):
      continue
    try:
      back = architecture.config_from(architecture.config_to(config))
      back = dataclasses.replace(
          back, **{name: getattr(config, name) for name in architecture.optional})
    except (UserError, ValueError):
      continue  # it has no word for a field
    wanted, got = _computed(config), _computed(back)
    different = [field for field in wanted if wanted[field] != got[field]]
    if not different:
      return name
    if nearest is None or len(different) < len(nearest[1]):
      nearest = name, different
  kind = type(config).__name__
  if nearest is None:
    raise UserError(f'no architecture of Hugging Face is a {kind} like this one; train one of '
                    f'{", ".join(ARCHITECTURES)}')
  fields = ', '.join(f'{name}={getattr(config, name)!r}' for name in nearest[1])
  raise UserError(f'no architecture of Hugging Face computes this {kind}: the nearest is '
                  f'{nearest[0]}, which does not have {fields}')
