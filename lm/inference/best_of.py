"""The best of several samples of a prompt."""
from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import numpy as np

from lm.inference.generate import Completion, generate
from lm.inference.prompts import BOS_ID
from lm.inference.sampling import SamplingConfig

Scorer = Callable[[np.ndarray, Completion], float]


@dataclasses.dataclass(frozen=True)
class BestOfConfig:
  """num_samples: of each prompt, of which `num_return_sequences` are given back."""
  num_samples: int = 4
  num_return_sequences: int = 1

  def __post_init__(self):
    if not 1 <= self.num_return_sequences <= self.num_samples:
      raise ValueError(f'num_return_sequences={self.num_return_sequences} must be from 1 to '
                       f'num_samples={self.num_samples}')


def mean_log_prob(prompt: np.ndarray, completion: Completion) -> float:
  """Nats a token of a completion, its end included: long ones are not worse for being long."""
  del prompt
  return float(np.mean(completion.log_probs, dtype=np.float64))


def best_of(module: Any, params: Any, prompts: Sequence[np.ndarray],
            sampling: SamplingConfig | Sequence[SamplingConfig], config: BestOfConfig,
            seed: int | Sequence[int], max_length: int, eos_id: int, bos_id: int | None = BOS_ID,
            scorer: Scorer = mean_log_prob) -> list[list[Completion]]:
  """The best completions of each prompt, best first.

  Sample i of a prompt is what `generate` gives under the seed `seed + i`, so more samples are the
  same ones and others.

  Args:
    module, params, prompts, sampling, max_length, eos_id, bos_id: as `generate` takes them.
    scorer: of a prompt and a completion; the largest is best, of equals that of the lower seed.
  """
  num = config.num_samples
  seeds = [seed] * len(prompts) if isinstance(seed, (int, np.integer)) else seed
  if not isinstance(sampling, SamplingConfig):
    sampling = [one for one in sampling for _ in range(num)]
  samples = generate(module, params, [prompt for prompt in prompts for _ in range(num)], sampling,
                     [first + i for first in seeds for i in range(num)], max_length, eos_id, bos_id)
  of = [samples[start:start + num] for start in range(0, len(samples), num)]
  rank = lambda prompt, found: sorted(found, key=lambda one: -scorer(np.asarray(prompt), one))
  return [rank(prompt, found)[:config.num_return_sequences] for prompt, found in zip(prompts, of)]
