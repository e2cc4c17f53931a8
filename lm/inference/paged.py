"""What an engine runs on the device: programs over a pool of pages, for rows of their own lengths."""
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from lm.inference.decoder import Decoder
from lm.inference.sampling import begin, Choices, sample, SamplerState


class Rows(NamedTuple):
  """The rows of a decoding program, each an array.

  slots_B: where each keeps its sampler's state.
  table_BP: its pages, in the order of the text, and then 0.
  length_B: tokens that stand in them; token_B: the next, which a step reads.
  limit_B: tokens that may be chosen; of an idle row 0.
  step_B: tokens chosen before.
  keys_B: of the request, as data.
  ends_B: the token that ends the text; -1 for none.
  """
  slots_B: Int[Array, ' B']
  table_BP: Int[Array, 'B P']
  length_B: Int[Array, ' B']
  token_B: Int[Array, ' B']
  limit_B: Int[Array, ' B']
  step_B: Int[Array, ' B']
  keys_B: UInt32[Array, 'B X']
  ends_B: Int[Array, ' B']


class _Loop(NamedTuple):
  """Of the decoding loop, X = the most steps."""
  step: jax.Array
  token_B: jax.Array
  counts_B: jax.Array
  done_B: jax.Array
  tokens_BX: jax.Array
  log_probs_BX: jax.Array
  pool: Any
  sampler: SamplerState


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4, 5))
def decode(decoder: Decoder, max_length: int, most_steps: int, params: Any, pool: Any,
           samplers: SamplerState, rows: Rows, asked: Choices, allowed_BX: Any, steps: jax.Array,
           is_eager: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, Any, SamplerState]:
  """Chooses up to `steps` tokens for each row.

  Args:
    max_length: the model's context.
    most_steps: the bound of `steps`.
    pool: from `init_pages`.
    samplers: of all slots.
    allowed_BX: see `sample`; None for any token. Then for one step alone.
    is_eager: whether it shall stop as soon as a row is done, since another waits for its place.

  Returns:
    tokens and log-probabilities [B, most_steps], how many they are [B], and what was given away.
  """
  B = len(rows.slots_B)
  keys_B = jax.random.wrap_key_data(rows.keys_B)

  def go_on(loop):
    new = loop.done_B & (rows.limit_B > 0)
    return ~loop.done_B.all() & (loop.step < steps) & ~(is_eager & new.any())

  def one(loop):
    # A finished row writes nothing, and its position stays within the context.
    length_B = jnp.minimum(rows.length_B + loop.counts_B, max_length - 1)
    cache = dataclasses.replace(loop.pool, length_B=length_B, page_table=rows.table_BP)
    logits_B1V, cache = decoder.extend(params, loop.token_B[:, None], cache,
                                       new_B=(~loop.done_B).astype(jnp.int32))
    step_keys_B = jax.vmap(jax.random.fold_in)(keys_B, rows.step_B + loop.counts_B)
    token_B, log_prob_B, sampler = sample(logits_B1V[:, 0], step_keys_B, asked, loop.sampler,
                                          allowed_BX)
    put = lambda table, column: lax.dynamic_update_slice(table, column[:, None], (0, loop.step))
    counts_B = loop.counts_B + ~loop.done_B
    done_B = loop.done_B | (token_B == rows.ends_B) | (counts_B >= rows.limit_B)
    return _Loop(loop.step + 1, token_B, counts_B, done_B, put(loop.tokens_BX, token_B),
                 put(loop.log_probs_BX, log_prob_B),
                 dataclasses.replace(pool, layers=cache.layers), sampler)

  table_BX = jnp.zeros((B, most_steps))
  state = jax.tree.map(lambda x: x[rows.slots_B], samplers)
  loop = _Loop(jnp.int32(0), rows.token_B, jnp.zeros(B, jnp.int32), rows.limit_B == 0,
               table_BX.astype(jnp.int32), table_BX, pool, state)
  loop = lax.while_loop(go_on, one, loop)
  samplers = jax.tree.map(lambda x, new: x.at[rows.slots_B].set(new), samplers, loop.sampler)
  return loop.tokens_BX, loop.log_probs_BX, loop.counts_B, loop.pool, samplers


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read(decoder: Decoder, params: Any, pool: Any, tokens_BT: Int[Array, 'B T'],
         table_BP: Int[Array, 'B P'], length_B: Int[Array, ' B'], count_B: Int[Array, ' B']) -> Any:
  """The pool with keys and values of a chunk of each row's prompt.

  Args:
    tokens_BT: padded behind `count_B` with anything.
    length_B: tokens that stand in the pages of `table_BP` already.
  """
  cache = dataclasses.replace(pool, length_B=length_B, page_table=table_BP)
  # Logits that nobody reads are not computed.
  _, cache = decoder.extend(params, tokens_BT, cache, new_B=count_B)
  return dataclasses.replace(pool, layers=cache.layers)


@functools.partial(jax.jit, static_argnums=3)
def begin_row(asked: Choices, tokens_1T: Int[Array, '1 T'], length_1: Int[Array, ' 1'],
              num_places: int) -> SamplerState:
  """The sampler's state of a new text."""
  return begin(asked, tokens_1T, length_1, num_places)


@jax.jit
def take_row(samplers: SamplerState, slot: jax.Array) -> SamplerState:
  """The sampler's state of a slot."""
  return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, slot, 1), samplers)


@functools.partial(jax.jit, donate_argnums=0)
def put_row(samplers: SamplerState, slot: jax.Array, row: SamplerState) -> SamplerState:
  """All states, with that of one slot."""
  put = lambda x, new: lax.dynamic_update_slice_in_dim(x, new, slot, 0)
  return jax.tree.map(put, samplers, row)
