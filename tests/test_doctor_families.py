"""The doctor finds every family healthy under its own objective, on two devices."""
import json
import sys

import pytest

from lm import doctor
from lm.data import objectives
from lm.layers.moe import MoEConfig
from lm.models.bert import BERTConfig
from lm.models.gpt import GPTConfig
from lm.models.heads import DualEncoderConfig, EmbedderConfig
from lm.models.t5 import T5Config
from lm.models.transformer_xl import TransformerXLConfig
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training.losses import Contrastive, Prediction
from lm.training.optimizers import AdamW

TINY = dict(vocab_size=64, max_length=16, d_model=16, num_layers=2, num_heads=2, d_ff=24,
            scan_layers=True)
ENCODER = dict(TINY, pooler=False, sentence_classes=0)
ALL = ('accumulated == one big batch', 'sharded == single device',
       'cached decoding == full forward', 'memory == concatenated segments')

# config, objective, loss, what it has nothing of
FAMILIES = {
    'experts': (GPTConfig(**TINY, moe=MoEConfig(4, 2, 24), norm='rmsnorm', positions='rotary',
                          activation='swiglu', use_bias=False, attention_pattern='LG', window=5),
                objectives.PrefixLM(64), Prediction(z_loss=1e-3), {'memory'}),
    'bert': (BERTConfig(**ENCODER, norm_placement='pre', positions='rotary', use_bias=False,
                        activation='geglu_exact', attention_pattern='GL', window=4),
             objectives.MaskedLM(64), Prediction(), {'memory', 'cached'}),
    't5': (T5Config(**TINY), objectives.SpanCorruption(64, num_sentinels=8),
           Prediction(label_smoothing=0.1), {'memory'}),
    'transformer_xl': (TransformerXLConfig(**TINY, memory_length=16),
                       objectives.CausalLM(64, contiguous=True), Prediction(), set()),
    'dual_encoder': (DualEncoderConfig(EmbedderConfig(BERTConfig(**ENCODER, masked_lm=False)),
                                       temperature=0.1),
                     objectives.Contrastive(64), Contrastive(), {'memory', 'cached'}),
}


@pytest.mark.supports('models', 'invariants of every family under its objective')
@pytest.mark.parametrize('family', FAMILIES)
def test_every_family_is_healthy(child_with_devices, family):
  results = child_with_devices(__file__, family, devices=2)
  skipped = {name.split()[0] for name, result in results.items() if result['holds'] is None}
  assert len(results) == len(ALL) and skipped == FAMILIES[family][-1], results
  assert all(result['holds'] is not False for result in results.values()), results


def main():
  """Run in a child with two devices: prints what the doctor finds of a family."""
  config, objective, loss, _ = FAMILIES[sys.argv[1]]
  mesh = MeshConfig(data=1, fsdp=-1).build()
  print(json.dumps(doctor.check(config, AdamW().build(4), mesh, Rules(), 16, 4, only=ALL,
                                objective=objective, loss=loss)))


if __name__ == '__main__':
  main()
