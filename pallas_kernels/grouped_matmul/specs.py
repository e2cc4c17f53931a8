"""Feed-forward layers of real mixtures of experts, for 8,192 tokens of a chip."""
from typing import NamedTuple


class Spec(NamedTuple):
  """M rows, of all tokens and their experts, by one of G matrices [K, N]."""
  M: int
  K: int
  N: int
  G: int


SPECS = {
    'Mixtral 8x7B up': Spec(16384, 4096, 14336, 8),
    'Mixtral 8x7B down': Spec(16384, 14336, 4096, 8),
    'OLMoE 1B-7B up': Spec(65536, 2048, 1024, 64),
    'Qwen 3 30B-A3B up': Spec(65536, 2048, 768, 128),
    'Qwen 3 30B-A3B down': Spec(65536, 768, 2048, 128),
}
