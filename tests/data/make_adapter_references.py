"""Writes reference_adapters.npz: what `peft` answers with random adapters on the tiny models of
make_references.py.

    python tests/data/make_adapter_references.py     # needs torch, transformers and peft

Of each case NAME/METHOD it holds adapter_config.json and every tensor as `save_pretrained` leaves
them, and the logits of the inputs of `make_references.inputs`.
"""
import json
import pathlib
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ALL_OF_GPT2 = ['c_attn', 'attn.c_proj', 'c_fc', 'mlp.c_proj']
CAUSAL = {'task_type': 'CAUSAL_LM'}

# name/method: (class of the config, arguments)
CASES = {
    'gpt2/lora': ('LoraConfig', dict(r=2, lora_alpha=6, target_modules=ALL_OF_GPT2,
                                     fan_in_fan_out=True, **CAUSAL)),
    'gpt2/dora': ('LoraConfig', dict(r=2, lora_alpha=6, target_modules=ALL_OF_GPT2, use_dora=True,
                                     fan_in_fan_out=True, **CAUSAL)),
    'llama/lora': ('LoraConfig', dict(r=4, lora_alpha=6, target_modules=['q_proj', 'v_proj'],
                                      use_rslora=True, **CAUSAL)),
    'llama/dora': ('LoraConfig', dict(r=2, lora_alpha=3, target_modules='all-linear', use_dora=True,
                                      **CAUSAL)),
    'bert/lora': ('LoraConfig', dict(r=3, lora_alpha=6, target_modules=['query', 'value'])),
    't5/lora': ('LoraConfig', dict(r=2, lora_alpha=4, target_modules=['q', 'v', 'wi', 'wo'],
                                   task_type='SEQ_2_SEQ_LM')),
    'gpt2/prefix': ('PrefixTuningConfig', dict(num_virtual_tokens=5, **CAUSAL)),
    'gpt2/prompt': ('PromptTuningConfig', dict(num_virtual_tokens=5, **CAUSAL)),
    'llama/prompt': ('PromptTuningConfig', dict(num_virtual_tokens=5, **CAUSAL)),
}


def case(name, method):
  """{'adapter_config.json': text, 'tensors/...': float32, 'logits': [2, T, VOCAB]}."""
  import peft
  from safetensors.numpy import load_file
  import torch
  sys.path.insert(0, str(HERE))
  import make_references
  make_references.tiny_model.cache_clear()
  base = make_references.tiny_model(name)
  stored = np.load(HERE / f'reference_{name}.npz')
  for key, x in base.state_dict().items():
    if f'weights/{key}' in stored:
      assert np.array_equal(stored[f'weights/{key}'], x.half().numpy()), key
  torch.manual_seed(1)
  kind, arguments = CASES[f'{name}/{method}']
  model = peft.get_peft_model(base, getattr(peft, kind)(**arguments)).eval()
  for key, parameter in model.named_parameters():
    if parameter.requires_grad:
      noise = 0.3 * torch.randn_like(parameter)
      parameter.data = (parameter.data + noise if 'magnitude' in key else noise).half().float()
  with tempfile.TemporaryDirectory() as directory:
    model.save_pretrained(directory)
    tensors = load_file(pathlib.Path(directory) / 'adapter_model.safetensors')
    config = json.loads((pathlib.Path(directory) / 'adapter_config.json').read_text())
  logits = make_references.outputs(model, **make_references.inputs(name))['logits']
  length = make_references.LENGTH if name != 't5' else make_references.DECODER_LENGTH
  return {'adapter_config.json': np.array(json.dumps(config)), 'logits': logits[:, -length:],
          **{f'tensors/{key}': x for key, x in sorted(tensors.items())}}


if __name__ == '__main__':
  np.savez_compressed(HERE / 'reference_adapters.npz', **{
      f'{key}/{part}': x for key in CASES for part, x in case(*key.split('/')).items()})
