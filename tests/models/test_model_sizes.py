"""Every file of gin/models is the model that it says, to the last parameter."""
import pathlib
import re

import pytest

from lm import config
from lm.models import scaling
from lm.models.bert import BERTConfig
from lm.models.gpt import GPTConfig
from lm.models.t5 import T5Config

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'gin' / 'models'
PUBLISHED = sorted(path.stem for path in FOLDER.glob('*.gin')
                   if not path.stem.endswith(('_cpu', '_scaled')))


def count(tmp_path, name, **macros):
  """Parameters of the model of a gin file."""
  lines = [f"include 'gin/models/{name}.gin'", 'from __gin__ import dynamic_registration',
           'from lm.models import scaling', 'scaling.num_params.model = %MODEL',
           'ATTENTION = None', "DTYPE = 'bfloat16'", "PARAM_DTYPE = 'float32'", 'PRODUCTS = None',
           *(f'{macro} = {value}' for macro, value in macros.items())]
  path = tmp_path / 'count.gin'
  path.write_text('\n'.join(lines) + '\n')
  config.parse([str(path)])
  return config.build(scaling.num_params)


@pytest.mark.supports('sizes', 'published ones of GPT-2, GPT-3, Llama 1-3', 'Mistral', 'Mixtral',
                      'Qwen 2 and 3', 'Gemma 1-3', 'BERT', 'RoBERTa', 'DistilBERT', 'ModernBERT',
                      'T5', 'mT5', 'UMT5 and Transformer-XL, to the last parameter')
@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_model_has_the_published_number_of_parameters(tmp_path, name):
  header = ' '.join(re.findall(r'^# (.*)', (FOLDER / f'{name}.gin').read_text(), re.M))
  said = re.search(r'([\d,]{6,}) parameters.*?at its vocabulary of ([\d,]+)', header)
  assert said, f'the header of {name}.gin does not say its parameters at its vocabulary'
  number, vocab_size = (int(x.rstrip(',').replace(',', '')) for x in said.groups())
  assert count(tmp_path, name, VOCAB_SIZE=vocab_size) == number


def test_there_are_the_families():
  assert {'gpt2_xl', 'gpt3_175b', 'llama3_1_405b', 'qwen3_32b', 'bert_large', 't5_11b', 'mt5_xxl',
          'transformer_xl_wt103_large'} <= set(PUBLISHED) and len(PUBLISHED) > 70


def test_a_scaled_model_has_nearly_the_parameters_asked_for(tmp_path):
  number = count(tmp_path, 'gpt_scaled', VOCAB_SIZE=32000, SEQUENCE_LENGTH=512)
  assert abs(number / 125e6 - 1) < 0.05


@pytest.mark.supports('sizes', 'scaled by depth, width or parameters')
@pytest.mark.parametrize('base', [GPTConfig(num_kv_heads=4), BERTConfig(), T5Config(d_ff=1024)],
                         ids=['gpt', 'bert', 't5'])
def test_depth_and_width_follow_from_one_another(base):
  deep, wide = scaling.scaled(base, num_layers=24), scaling.scaled(base, d_model=2 * base.d_model)
  for model in (deep, wide):
    assert model.d_model / model.num_layers == pytest.approx(base.d_model / base.num_layers, rel=.1)
    assert model.d_ff / model.d_model == pytest.approx(base.d_ff / base.d_model, rel=0.02)
    assert model.head_dim == base.head_dim
    assert model.num_heads / model.kv_heads == base.num_heads / base.kv_heads
  near = scaling.scaled(base, params=4e8)
  assert abs(scaling.num_params(near) / 4e8 - 1) < 0.1


def test_a_size_that_says_nothing_or_two_things_is_refused():
  with pytest.raises(ValueError, match='give num_layers, d_model or params'):
    scaling.scaled(GPTConfig())
  with pytest.raises(ValueError, match='give the one or the other'):
    scaling.scaled(GPTConfig(), d_model=512, params=1e8)
