"""Several models, or one with several prompts, that write one text together.

`Guided` is a decoder as `Decoder` is: what decodes with the one (`generate`, beam search) decodes
with the other. Its logits are weighted sums of its members' log-probabilities of the next token:

  contrastive decoding   log p(expert) - log p(amateur), of plausible tokens
  classifier-free        log p(no prompt) + scale (log p(prompt) - log p(no prompt))
  DExperts               log p(base) + alpha (log p(expert) - log p(anti-expert))

Log-probabilities of a completion are those of the members together. Control codes (CTRL,
arXiv:1909.05858) need nothing of this: they are tokens or words at the beginning of a prompt.
"""
import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.inference.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Member:
  """One voice.

  model: which of the decoders speaks.
  weight: of its log-probabilities.
  prompt: what it reads: the 'same' as the first member, the prompt's 'last' token alone, or these
    tokens in the prompt's place.
  temperature: its logits are divided by it before.
  """
  model: int = 0
  weight: float = 1.0
  prompt: Literal['same', 'last'] | tuple[int, ...] = 'same'
  temperature: float = 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Of each model a cache, in which its members' rows stand one member behind another; `length_B`
  is the first member's."""
  length_B: jax.Array
  caches: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Guided:
  """A decoder made of others; parameters are a tuple, of each model.

  Members of one model are rows of one batch: its weights are read once.

  Attributes:
    decoders: the models, of one vocabulary.
    members: who votes; the first reads the prompt.
    plausibility: tokens that the first member thinks less than so many times as probable as its
      most probable one are no choice (arXiv:2210.15097, section 3.2); 0 leaves all.
  """
  decoders: tuple[Decoder, ...]
  members: tuple[Member, ...]
  plausibility: float = 0.0

  def __post_init__(self):
    sizes = {decoder.module.config.vocab_size for decoder in self.decoders}
    if len(sizes) > 1:
      raise ValueError(f'models with vocabularies of {sorted(sizes)} tokens cannot write one text; '
                       'take models of one vocabulary')
    if len({decoder.has_encoder for decoder in self.decoders}) > 1:
      raise ValueError('models with and without an encoder read different prompts; take models of '
                       'one kind')
    models = {member.model for member in self.members}
    if models != set(range(len(self.decoders))):
      raise ValueError(f'members speak for models {sorted(models)} of {len(self.decoders)}; each '
                       'model needs a member, and each member a model')
    if self.members[0].prompt != 'same' or self.members[0].model:
      raise ValueError(f'the first member {self.members[0]} must read the prompt, by model 0')
    if not 0 <= self.plausibility <= 1:
      raise ValueError(f'plausibility={self.plausibility} must be in [0, 1]; 0 leaves all tokens')
    if any(member.temperature <= 0 for member in self.members):
      raise ValueError('temperature of a member must be more than 0')

  @property
  def module(self) -> nn.Module:
    return self.decoders[0].module

  @property
  def has_encoder(self) -> bool:
    return self.decoders[0].has_encoder

  def prepare(self, params: Any) -> Any:
    """See `Decoder`."""
    return tuple(decoder.prepare(of) for decoder, of in zip(self.decoders, params, strict=True))

  def first(self, num_rows: int) -> tuple[Int[Array, 'B 1'], Int[Array, ' B']]:
    """See `Decoder`."""
    return self.decoders[0].first(num_rows)

  def start(self, params: Any, inputs_BT: Int[Array, 'B T'], lengths_B: Int[Array, ' B'],
            num_places: int) -> tuple[Float[Array, 'B V'], Cache]:
    """See `Decoder`."""
    votes, caches, B = {}, [], len(inputs_BT)
    for model, decoder in enumerate(self.decoders):
      prompts = [self._prompt(i, inputs_BT, lengths_B) for i in self._of(model)]
      T = max(tokens_BT.shape[1] for tokens_BT, _ in prompts)
      tokens_XT = jnp.concatenate([jnp.pad(tokens_BT, ((0, 0), (0, T - tokens_BT.shape[1])))
                                   for tokens_BT, _ in prompts])
      lengths_X = jnp.concatenate([lengths_B for _, lengths_B in prompts])
      logits_XV, cache = decoder.start(params[model], tokens_XT, lengths_X,
                                       num_places + T - inputs_BT.shape[1])
      votes |= zip(self._of(model), jnp.split(logits_XV, len(prompts)))
      caches.append(cache)
    return self._combine(votes), Cache(caches[0].length_B[:B], tuple(caches))

  def extend(self, params: Any, tokens_BT: Int[Array, 'B T'], cache: Cache
             ) -> tuple[Float[Array, 'B T V'], Cache]:
    """See `Decoder`."""
    votes, caches = {}, []
    for model, decoder in enumerate(self.decoders):
      members = self._of(model)
      logits_XTV, of_model = decoder.extend(params[model], jnp.tile(tokens_BT, (len(members), 1)),
                                            cache.caches[model])
      votes |= zip(members, jnp.split(logits_XTV, len(members)))
      caches.append(of_model)
    return self._combine(votes), Cache(cache.length_B + tokens_BT.shape[1], tuple(caches))

  def take(self, cache: Cache, rows_R: Int[Array, ' R']) -> Cache:
    """See `Decoder`."""
    B = len(cache.length_B)
    rows = lambda of: [rows_R + B * i for i in range(len(of.length_B) // B)]
    caches = [decoder.take(of, jnp.concatenate(rows(of)))
              for decoder, of in zip(self.decoders, cache.caches)]
    return Cache(cache.length_B[rows_R], tuple(caches))

  def rewind(self, cache: Cache, length_B: Int[Array, ' B']) -> Cache:
    """See `Decoder`; each member forgets as many tokens as the first."""
    B, less_B = len(length_B), cache.length_B - length_B
    caches = [decoder.rewind(of, jnp.maximum(
        of.length_B - jnp.tile(less_B, len(of.length_B) // B), 0))
              for decoder, of in zip(self.decoders, cache.caches)]
    return Cache(length_B, tuple(caches))

  def _of(self, model):
    """Places of the members of a model."""
    return [i for i, member in enumerate(self.members) if member.model == model]

  def _prompt(self, i, inputs_BT, lengths_B):
    """What member i reads."""
    prompt, B = self.members[i].prompt, len(inputs_BT)
    if prompt == 'same':
      return inputs_BT, lengths_B
    if prompt == 'last':
      last_B1 = jnp.take_along_axis(inputs_BT, lengths_B[:, None] - 1, axis=1)
      return last_B1, jnp.ones_like(lengths_B)
    tokens_BT = jnp.broadcast_to(jnp.asarray(prompt, jnp.int32), (B, len(prompt)))
    return tokens_BT, jnp.full_like(lengths_B, len(prompt))

  def _combine(self, votes):
    """The weighted sum of log-probabilities [..., V]."""
    logs = [jax.nn.log_softmax(votes[i] / member.temperature)
            for i, member in enumerate(self.members)]
    total = sum(member.weight * log for member, log in zip(self.members, logs))
    if not self.plausibility:
      return total
    least = logs[0].max(axis=-1, keepdims=True) + math.log(self.plausibility)
    return jnp.where(logs[0] >= least, total, -jnp.inf)


def contrastive_decoding(expert: Decoder, amateur: Decoder, plausibility: float = 0.1,
                         amateur_temperature: float = 1.0) -> Guided:
  """What a large model likes and a small one does not (Li et al. 2022, arXiv:2210.15097, section
  3); the paper searches with 5 beams. Parameters: (expert's, amateur's)."""
  return Guided((expert, amateur),
                (Member(0, 1.0), Member(1, -1.0, temperature=amateur_temperature)), plausibility)


def classifier_free(decoder: Decoder, scale: float = 1.5,
                    negative: tuple[int, ...] | None = None) -> Guided:
  """Holds a text to its prompt (Sanchez et al. 2023, arXiv:2306.17806, section 2.2).

  Args:
    decoder: the model, whose parameters go into a tuple of one.
    scale: gamma; 1 changes nothing, more follows the prompt more.
    negative: what to keep away from, all its tokens, with what stands before a prompt; None is the
      prompt's last token alone.
  """
  away = 'last' if negative is None else tuple(negative)
  return Guided((decoder,), (Member(0, scale), Member(0, 1 - scale, away)))


def experts(base: Decoder, expert: Decoder, anti_expert: Decoder, alpha: float = 2.0,
            plausibility: float = 0.0) -> Guided:
  """Steers a model by two small ones, tuned to what is wanted and to what is not (DExperts, Liu et
  al. 2021, arXiv:2105.03023, section 2). Parameters: (base, expert, anti-expert)."""
  return Guided((base, expert, anti_expert),
                (Member(0, 1.0), Member(1, alpha), Member(2, -alpha)), plausibility)
