"""Contrastive search: the likely token whose hidden state is least like those before it.

Reference: Su et al. 2022, arXiv:2202.06417, section 4.2.
"""
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from lm.inference.decoder import Decoder
from lm.inference.generate import Completion
from lm.inference.prompts import batches, BOS_ID, LARGEST_BATCH, why_stopped


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
  """Takes the candidate v with the largest (1 - alpha) p(v) - alpha max_j cos(h_v, h_j).

  top_k: candidates, the most probable tokens; 1 is greedy search.
  alpha: weight of the degeneration penalty, the largest cosine of the candidate's last hidden state
    with those of all tokens before it, prompt included; 0 is greedy search.
  """
  top_k: int = 4
  alpha: float = 0.6
  max_new_tokens: int = 128

  def __post_init__(self):
    for name in ('top_k', 'max_new_tokens'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
    if not 0 <= self.alpha <= 1:
      raise ValueError(f'alpha={self.alpha} must be in [0, 1]; try 0.6')


def contrastive_search(decoder: Decoder, params: Any, prompts: Sequence[np.ndarray],
                       config: ContrastiveConfig, max_length: int, eos_id: int,
                       bos_id: int | None = BOS_ID) -> list[Completion]:
  """Completes each prompt; takes what `generate` takes, and no seed: nothing is drawn.

  Raises:
    UserError: a prompt that does not fit.
  """
  prompts = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
  params = decoder.prepare(params)
  completions: list[Completion | None] = [None] * len(prompts)
  limits = [config.max_new_tokens] * len(prompts)
  for batch in batches(decoder, prompts, limits, max_length, eos_id, bos_id,
                       max(1, LARGEST_BATCH // config.top_k)):
    results = jax.device_get(_decode(
        decoder, config.top_k, batch.num_places, batch.num_new, params, batch.inputs_BT,
        batch.lengths_B, batch.limits_B, config.alpha, eos_id))
    for i, tokens, log_probs, count in zip(batch.members, *results):
      tokens = tokens[:count]
      completions[i] = Completion(tokens, log_probs[:count],
                                  why_stopped(tokens, eos_id, config.max_new_tokens))
  return completions


class _State(NamedTuple):
  """Of the decoding loop; S places of a text, P of new tokens, M candidates, X = B * M.

  logits_BV: of the next token.
  unit_BSD: hidden states of the text so far, of length 1.
  cache: of X rows, those of a text alike.
  """
  step: jax.Array
  logits_BV: jax.Array
  unit_BSD: jax.Array
  length_B: jax.Array
  counts_B: jax.Array
  done_B: jax.Array
  tokens_BP: jax.Array
  log_probs_BP: jax.Array
  cache: Any


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _decode(decoder, top_k, num_places, num_new, params, inputs_BT, lengths_B, limits_B, alpha,
            eos_id):
  """Returns tokens and log-probabilities [B, P], and counts [B]."""
  B, M = len(inputs_BT), top_k
  hidden_BTD, cache = decoder.read(params, inputs_BT, lengths_B, num_places)
  last_B1D = jnp.take_along_axis(hidden_BTD, cache.length_B[:, None, None] - 1, axis=1)

  def decode(state):
    log_probs_BV = jax.nn.log_softmax(state.logits_BV)
    log_probs_BM, tokens_BM = lax.top_k(log_probs_BV, M)
    # What has ended writes over the first place, as in `generate`.
    cache = decoder.rewind(state.cache, jnp.repeat(jnp.where(state.done_B, 0, state.length_B), M))
    hidden_X1D, cache = decoder.hidden(params, tokens_BM.reshape(-1, 1), cache)
    hidden_BMD = hidden_X1D.reshape(B, M, -1)
    unit_BMD = _unit(hidden_BMD)
    cosines_BMS = jnp.einsum('bmd,bsd->bms', unit_BMD, state.unit_BSD)
    stands_BS = jnp.arange(state.unit_BSD.shape[1]) < state.length_B[:, None]
    penalty_BM = jnp.where(stands_BS[:, None], cosines_BMS, -1).max(axis=-1)
    choice_B = jnp.argmax((1 - alpha) * jnp.exp(log_probs_BM) - alpha * penalty_BM, axis=1)

    chosen = lambda x: x[jnp.arange(B), choice_B]
    put = lambda table, column: lax.dynamic_update_slice(table, column[:, None], (0, state.step))
    counts_B = state.counts_B + ~state.done_B
    done_B = state.done_B | (chosen(tokens_BM) == eos_id) | (counts_B >= limits_B)
    # Behind the last place nothing is written, and nobody reads.
    unit_BSD = state.unit_BSD.at[jnp.arange(B), state.length_B].set(chosen(unit_BMD), mode='drop')
    return _State(
        state.step + 1, decoder.logits(params, chosen(hidden_BMD)[:, None])[:, 0], unit_BSD,
        state.length_B + 1, counts_B, done_B, put(state.tokens_BP, chosen(tokens_BM)),
        put(state.log_probs_BP, chosen(log_probs_BM)),
        decoder.take(cache, jnp.repeat(jnp.arange(B) * M + choice_B, M)))

  unit_BSD = jnp.pad(_unit(hidden_BTD), ((0, 0), (0, num_places - hidden_BTD.shape[1]), (0, 0)))
  table_BP = jnp.zeros((B, num_new))
  state = _State(jnp.int32(0), decoder.logits(params, last_B1D)[:, 0], unit_BSD, cache.length_B,
                 jnp.zeros(B, jnp.int32), limits_B == 0, table_BP.astype(jnp.int32), table_BP,
                 decoder.take(cache, jnp.repeat(jnp.arange(B), M)))
  state = lax.while_loop(lambda state: ~state.done_B.all(), decode, state)
  return state.tokens_BP, state.log_probs_BP, state.counts_B


def _unit(hidden_BTD):
  """Of length 1, float32."""
  hidden_BTD = hidden_BTD.astype(jnp.float32)
  return hidden_BTD / jnp.linalg.norm(hidden_BTD, axis=-1, keepdims=True)
