"""Writes reference_gpt2.npz and reference_llama.npz: weights and logits of Hugging Face's models.

    python tests/data/make_references.py      # needs the extra `parity`: torch and transformers

Each file holds tokens, logits and every tensor of a tiny model with random weights, in float32.
"""
import pathlib

import numpy as np

VOCAB, LENGTH = 53, 12


def tiny_models():
  """{'gpt2': model, 'llama': model}: random, in evaluation mode, one seed for all."""
  import torch
  import transformers
  torch.manual_seed(0)
  gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
      vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=2, n_head=4, initializer_range=0.3,
      bos_token_id=0, eos_token_id=1,
      attn_implementation='eager'))
  llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, rms_norm_eps=1e-5,
      initializer_range=0.3, attn_implementation='eager'))
  for model in (gpt2, llama):
    model.eval()
    for parameter in model.parameters():  # biases and scales too, which start at 0 and 1
      if parameter.ndim == 1:
        parameter.data += 0.3 * torch.randn_like(parameter)
  return {'gpt2': gpt2, 'llama': llama}


def reference(model):
  """{'tokens': [2, LENGTH], 'logits': [2, LENGTH, VOCAB], and the model's own tensor names}."""
  import torch
  tokens = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH))
  with torch.no_grad():
    logits = model(torch.tensor(tokens)).logits.numpy()
  weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
  return {'tokens': tokens.astype(np.int32), 'logits': logits, **weights}


if __name__ == '__main__':
  for name, hugging_face in tiny_models().items():
    np.savez_compressed(pathlib.Path(__file__).with_name(f'reference_{name}.npz'),
                        **reference(hugging_face))
