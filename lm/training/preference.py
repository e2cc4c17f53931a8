"""Losses of preferences: which of two answers shall be the likelier, and by how much."""
from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lm.training import losses
from lm.training.losses import Batch, Sums


@dataclasses.dataclass(frozen=True)
class DPO(losses.Base):
  """Direct preference optimisation (arXiv:2305.18290, equation 7), in nats a pair:

      reward = beta * (log p(answer | prompt) - log p_reference(answer | prompt))
      loss   = -log sigmoid(reward of the chosen answer - reward of the rejected)

  A batch has both answers of a pair beside each other in a row, and the nats of each under the
  reference model; see `lm/data/examples/chat_forms.py`. Answers are summed over tokens, not
  averaged.

  beta: how dear it is to leave the reference.
  label_smoothing: the probability that a pair is the wrong way round (conservative DPO,
    ericmitchell.ai/cdpo.pdf, equation 3): it pays so much of the loss of the reversed pair.
  """
  beta: float = 0.1
  label_smoothing: float = 0.0

  whole_batch, passes = False, 1

  def __post_init__(self):
    super().__post_init__()
    if not self.beta > 0:
      raise ValueError(f'beta={self.beta} must be positive')
    if self.label_smoothing >= 0.5:
      raise ValueError(f'label_smoothing={self.label_smoothing} must be below 0.5, the probability '
                       'with which a pair says nothing')

  def weights(self, batch: Batch) -> Sums:
    """The number of pairs, and of rows with any."""
    weights_BP = batch['pair_weights']
    return {'preference': weights_BP.sum(),
            'penalties': (weights_BP > 0).any(-1).sum().astype(jnp.float32)}

  def __call__(self, outputs: Mapping[str, Any], batch: Batch) -> Sums:
    """The summed loss of the pairs; of one batch or of any rows of it.

    The log-likelihood of a token has no gradient of its own. So the gradient is that of a cross
    entropy whose tokens weigh what the loss of their pair gains by them, which takes the logits
    block by block like that of any other loss.
    """
    answers_BP2 = answer_logps(outputs, batch)
    loss, gains_BP2 = jax.value_and_grad(lambda x: self._pair_losses(x, batch).sum())(answers_BP2)
    gains_BK = -gains_BP2.reshape(len(gains_BP2), -1)
    gains_BT = jnp.take_along_axis(gains_BK, _answer_of_token(batch), axis=1)
    targets_BT, weights_BT = batch['decoder_target_tokens'], batch['decoder_loss_weights']
    slope = sum(scores.cross_entropy(targets, weights_BT * takes_part * gains_BT)
                for scores, targets, takes_part in outputs['tokens'].split(targets_BT))
    sums = {'preference': loss + slope - jax.lax.stop_gradient(slope)}
    if outputs.get('penalties'):
      sums['penalties'] = sum(total for total, _ in outputs['penalties'].values())
    return sums

  def _rewards(self, answers_BP2, batch):
    reference_BP2 = jnp.stack(
        [batch['reference_chosen_logps'], batch['reference_rejected_logps']], -1)
    return self.beta * (answers_BP2 - reference_BP2)

  def _pair_losses(self, answers_BP2, batch):
    rewards_BP2 = self._rewards(answers_BP2, batch)
    margins_BP = rewards_BP2[..., 0] - rewards_BP2[..., 1]
    losses_BP = (-(1 - self.label_smoothing) * jax.nn.log_sigmoid(margins_BP)
                 - self.label_smoothing * jax.nn.log_sigmoid(-margins_BP))
    return losses_BP * batch['pair_weights']

  def of_rows(self, batch: Batch, counts_B: Bool[Array, ' B']) -> Batch:
    """The batch, where only these rows have weight in `metrics`."""
    names = 'pair_weights', 'decoder_loss_weights'
    return batch | {name: jnp.where(counts_B[:, None], batch[name], 0) for name in names}

  def metrics(self, outputs: Mapping[str, Any], batch: Batch) -> dict[str, tuple]:
    """The loss; `accuracy`, how many chosen answers have the higher reward; the mean rewards, and
    by how much the chosen one's is higher."""
    answers_BP2, weights_BP = answer_logps(outputs, batch), batch['pair_weights']
    rewards_BP2, count = self._rewards(answers_BP2, batch), weights_BP.sum()
    chosen_BP, rejected_BP = rewards_BP2[..., 0], rewards_BP2[..., 1]
    mean = lambda x: ((x * weights_BP).sum(), count)
    return {'loss': (self._pair_losses(answers_BP2, batch).sum(), count),
            'accuracy': mean(chosen_BP > rejected_BP), 'margin': mean(chosen_BP - rejected_BP),
            'chosen_reward': mean(chosen_BP), 'rejected_reward': mean(rejected_BP)}


def answer_logps(outputs: Mapping[str, Any], batch: Batch) -> Float[Array, 'B P 2']:
  """Nats of the chosen and the rejected answer of each pair, without gradients; 0 where there is no
  pair."""
  losses_BT, _ = losses.token_nats(jax.tree.map(jax.lax.stop_gradient, outputs['tokens']),
                                   batch['decoder_target_tokens'])
  B, P = batch['pair_weights'].shape
  # Padding has weight 0, wherever it is added.
  place_BT = _answer_of_token(batch)
  sums_BK = jnp.zeros((B, 2 * P), jnp.float32).at[jnp.arange(B)[:, None], place_BT].add(
      -losses_BT * batch['decoder_loss_weights'])
  return sums_BK.reshape(B, P, 2)


def _answer_of_token(batch):
  """Which of the 2 P answers of its row each token [B, T] belongs to."""
  return jnp.clip(batch['decoder_segment_ids'] - 1, 0, 2 * batch['pair_weights'].shape[1] - 1)
