"""Products of real models' feed-forward layers: decoded tokens, and a prompt."""
from typing import NamedTuple


class Spec(NamedTuple):
  """Rows M of x by weights [K, N] of `bits`, in groups of group_size rows if there are any.

  x: dtype of x.
  """
  M: int
  K: int
  N: int
  bits: int
  group_size: int | None = None
  x: str = 'bfloat16'


SPECS = {
    'Llama 3 8B up, 1 token, int8': Spec(1, 4096, 14336, 8),
    'Llama 3 8B up, 16 tokens, int8': Spec(16, 4096, 14336, 8),
    'Llama 3 8B up, 16 tokens, int4': Spec(16, 4096, 14336, 4, 128),
    'Llama 3 8B up, 16 tokens, int8 x int8': Spec(16, 4096, 14336, 8, x='int8'),
    'Llama 3 8B down, 64 tokens, int4': Spec(64, 14336, 4096, 4, 32),
    'Qwen 2.5 7B down, 16 tokens, int4': Spec(16, 18944, 3584, 4, 128),
    'Llama 3 8B up, prompt, int8': Spec(2048, 4096, 14336, 8),
    'Llama 3 8B up, prompt, int4': Spec(2048, 4096, 14336, 4, 128),
    'Llama 3 8B up, prompt, int8 x int8': Spec(2048, 4096, 14336, 8, x='int8'),
    'Qwen 2.5 7B down, prompt, int4': Spec(2048, 18944, 3584, 4, 128),
    'Llama 3 70B down, prompt, int4': Spec(2048, 28672, 8192, 4, 128),
}
