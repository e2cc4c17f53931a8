"""Shapes of real models' attention, a chip's share."""
from typing import NamedTuple


class Spec(NamedTuple):
  """Queries and keys [batch, length, heads, head_dim]; `window` as `flash_attention`'s."""
  batch: int
  length: int
  heads: int
  kv_heads: int
  head_dim: int
  causal: bool = True
  window: int | None = None


SPECS = {
    'gpt3_xl': Spec(8, 1024, 12, 12, 64),
    'llama2_7b': Spec(1, 4096, 8, 8, 128),
    'llama3_8b': Spec(1, 8192, 8, 2, 128),
    'mistral_7b': Spec(1, 8192, 8, 2, 128, window=4096),
    'gemma_2b': Spec(1, 4096, 8, 1, 256),
    'phi_2': Spec(1, 2048, 8, 8, 80),
    'bert_base': Spec(32, 128, 12, 12, 64, causal=False),
    't5_base': Spec(8, 512, 12, 12, 64, causal=False),
    'vit_large': Spec(8, 1024, 12, 12, 64, causal=False),
    'long_encoder': Spec(1, 4096, 8, 8, 128, causal=False),
}
