"""On-policy distillation: the student writes, and the teacher judges what it wrote (GKD,
arXiv:2306.13649, algorithm 1)."""
from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Optional

import jax
import numpy as np

from lm.errors import UserError
from lm.inference.generate import generate
from lm.inference.sampling import SamplingConfig
from lm.models.gpt import GPTConfig
from lm.models.t5 import T5Config
from lm.parallel.distributed import Hosts
from lm.parallel.rules import Rules


@dataclasses.dataclass(frozen=True)
class OnPolicy:
  """How often the student writes the answers of a batch, and how.

  share: of the steps, lambda of the paper; the others take the answers of the data.
  temperature: at which it samples.
  max_new_tokens: the longest answer; None writes to the end of the row.
  seed: of which steps these are, and of what is sampled.
  """
  share: float = 0.5
  temperature: float = 1.0
  max_new_tokens: Optional[int] = None
  seed: int = 0

  def __post_init__(self):
    if not 0 < self.share <= 1:
      raise ValueError(f'share={self.share} must be above 0 and at most 1')

  def is_due(self, step: int) -> bool:
    """Whether the student writes at this step: a function of the seed and the step."""
    return np.random.default_rng((self.seed, step)).random() < self.share

  def open(self, loss: Any, student: Any, rules: Rules, hosts: Hosts, vocabulary: Any
           ) -> Callable[[int, Any, Mapping[str, jax.Array]], dict[str, Any]]:
    """From a step, the student's parameters and a batch to the batch with answers of the student's
    own.

    Raises:
      UserError: it is no model that writes, labels count, or there is more than one device.
    """
    if not isinstance(student, (GPTConfig, T5Config)):
      raise UserError(f'a {type(student).__name__} writes nothing; bind distill.Teacher.on_policy '
                      'of a GPT or a T5')
    if loss.label_weight:
      raise UserError(f'label_weight={loss.label_weight} would teach the student its own answers; '
                      'bind LABEL_WEIGHT=0.0 with distill.Teacher.on_policy')
    if hosts.count > 1 or rules.is_cut:
      raise UserError('on one device alone the student writes while it trains; take '
                      'distill.Teacher.on_policy=None on this mesh')
    module = student.build(Rules())

    def write(step, params, batch):
      rows = {name: np.array(x) for name, x in batch.items()}
      if max(x.max() for name, x in rows.items() if name.endswith('segment_ids')) > 1:
        raise UserError('the student writes one answer a row, and rows hold several examples; bind '
                        'PACKED=False')
      alone = jax.device_put(params, jax.local_devices()[0])
      return {**batch, **self._written(module, alone, rows, step, student, vocabulary)}
    return write

  def _written(self, module, params, rows, step, student, vocabulary):
    T = rows['decoder_target_tokens'].shape[1]
    starts = (rows['decoder_loss_weights'] > 0).argmax(1)
    is_asked = (rows['decoder_loss_weights'] > 0).any(1)
    has_encoder = isinstance(student, T5Config)
    if has_encoder:  # `generate` puts the end of the text behind it itself
      lengths = (rows['encoder_segment_ids'] > 0).sum(1)
      prompts = [row[:length - 1] for row, length in zip(rows['encoder_input_tokens'], lengths)]
    else:
      prompts = [row[:start + 1] for row, start in zip(rows['decoder_input_tokens'], starts)]
    limits = [SamplingConfig(max_new_tokens=min(int(T - start), self.max_new_tokens or T),
                             temperature=self.temperature, top_p=1.0) for start in starts]
    seeds = [int(np.random.SeedSequence((self.seed, step, row)).generate_state(1)[0])
             for row in range(len(prompts))]
    done = generate(module, params, prompts, limits, seeds,
                    student.max_length, vocabulary.eos_id, None)
    names = ('decoder_input_tokens', 'decoder_target_tokens', 'decoder_loss_weights',
             'decoder_segment_ids', 'decoder_positions')
    new = {name: rows[name] for name in names if name in rows}
    for row, completion in enumerate(done):
      if is_asked[row]:
        _put(new, row, int(starts[row]), completion.tokens)
    return {name: jax.numpy.asarray(x) for name, x in new.items()}


def _put(rows: dict[str, np.ndarray], row: int, start: int, tokens: np.ndarray) -> None:
  """Puts an answer from place `start` of the targets on, in the place of the one that is there."""
  stop = start + len(tokens)
  targets, inputs = rows['decoder_target_tokens'][row], rows['decoder_input_tokens'][row]
  targets[start:], targets[start:stop] = 0, tokens
  inputs[start + 1:], inputs[start + 1:stop] = 0, tokens[:-1]
  weights = rows['decoder_loss_weights'][row]
  weights[start:], weights[start:stop] = 0, 1
  segments = rows['decoder_segment_ids'][row]
  segments[start:], segments[start:stop] = 0, 1
  if 'decoder_positions' in rows:
    rows['decoder_positions'][row] = np.where(segments > 0, np.arange(len(segments)), 0)
