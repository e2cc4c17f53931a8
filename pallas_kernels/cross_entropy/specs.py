"""Heads of real models, at the tokens of a training step on one chip."""
from typing import NamedTuple

from pallas_kernels.cross_entropy.reference import Options


class Spec(NamedTuple):
  """tokens [T], d_model D and vocab_size V of a head, and what its loss is called with."""
  tokens: int
  d_model: int
  vocab_size: int
  options: Options = Options()
  has_bias: bool = False


SPECS = {
    '128k': Spec(8192, 2048, 131072),
    'GPT-2 124M': Spec(8192, 768, 50257),
    'Llama 3.2 1B': Spec(8192, 2048, 128256),
    'Llama 3 8B': Spec(4096, 4096, 128256),
    'Gemma 2 2B': Spec(4096, 2304, 256000, Options(softcap=30.0)),
    'T5 base': Spec(8192, 768, 32128, Options(z_loss=1e-4, label_smoothing=0.1)),
    'BERT base': Spec(1280, 768, 30522, has_bias=True),  # 20 masked places of 64 rows
}
