"""Decoding with real models: rows of a batch, and keys that each has."""
from typing import NamedTuple


class Spec(NamedTuple):
  """B rows of `length` keys; N query heads and K key-value heads of H.

  dtype: of the cache. page: keys of a page; None is a dense cache. window: of the queries.
  tokens: queries of a row.
  """
  B: int
  N: int
  K: int
  H: int
  length: int
  dtype: str = 'bfloat16'
  page: int | None = None
  window: int | None = None
  tokens: int = 1

  @property
  def seen(self) -> int:
    """Keys of a row that a query sees."""
    return min(self.length, (self.window or self.length) + self.tokens - 1)

  @property
  def is_scaled(self) -> bool:
    """Whether keys and values are 8 bits, with scales."""
    return self.dtype in ('int8', 'float8_e4m3fn')


LLAMA2_7B, LLAMA3_8B, GEMMA_2B, GPT2 = (32, 32, 128), (32, 8, 128), (8, 1, 256), (12, 12, 64)
SPECS = {
    'llama2_7b 8 x 4k': Spec(8, *LLAMA2_7B, 4096),
    'llama2_7b 8 x 4k int8': Spec(8, *LLAMA2_7B, 4096, 'int8'),
    'llama2_7b 64 x 4k paged': Spec(64, *LLAMA2_7B, 4096, page=64),
    'llama3_8b 8 x 4k': Spec(8, *LLAMA3_8B, 4096),
    'llama3_8b 64 x 4k paged': Spec(64, *LLAMA3_8B, 4096, page=64),
    'llama3_8b 64 x 4k paged int8': Spec(64, *LLAMA3_8B, 4096, 'int8', page=128),
    'llama3_8b 8 x 32k': Spec(8, *LLAMA3_8B, 32768),
    'llama3_8b 8 x 32k int8': Spec(8, *LLAMA3_8B, 32768, 'int8'),
    'llama3_8b 64 x 32k paged': Spec(64, *LLAMA3_8B, 32768, page=64),
    'llama3_8b 8 x 4k, 4 tokens': Spec(8, *LLAMA3_8B, 4096, page=64, tokens=4),
    'llama3_8b 8 x 4k float8': Spec(8, *LLAMA3_8B, 4096, 'float8_e4m3fn'),
    'mistral_7b 8 x 32k': Spec(8, *LLAMA3_8B, 32768, window=4096),
    'mistral_7b 64 x 32k paged int8': Spec(64, *LLAMA3_8B, 32768, 'int8', page=128, window=4096),
    'gemma_2b 8 x 4k': Spec(8, *GEMMA_2B, 4096),
    'gemma_2b 64 x 32k': Spec(64, *GEMMA_2B, 32768),
    'gemma_2b 64 x 32k paged int8': Spec(64, *GEMMA_2B, 32768, 'int8', page=256),
    'gpt2 64 x 1k': Spec(64, *GPT2, 1024),
    'phi2 8 x 2k': Spec(8, 32, 32, 80, 2048),
    'phi3_mini 8 x 4k int8': Spec(8, 32, 32, 96, 4096, 'int8'),
}
