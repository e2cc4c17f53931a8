"""A mixture of experts in place of a feed-forward layer."""
import dataclasses
import functools
import math
from typing import Optional

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lm.layers.linear import Linear, normal
from lm.layers.mlp import Activation, activate, is_gated
from lm.parallel.exchange import ragged_all_to_all
from lm.parallel.rules import Rules, axes_of, constrain, shard_map
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.matmul import matmul
from pallas_kernels.platform import by_platform

Penalties = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """How tokens find their experts. Sizes default to those of Mixtral 8x7B (arXiv:2401.04088).

  num_experts: E.  num_selected: experts that each token goes to.  d_ff: F, of one expert.
  capacity_factor: None computes every token (dropless). Else an expert takes at most
    ceil(capacity_factor * num_selected * T / E) tokens of a row of T, the first ones, so that
    no token depends on a later one (GShard, arXiv:2006.16668, algorithm 1, gives way to all first
    choices before any second). Tokens beyond that pass on by the residual alone (Switch,
    arXiv:2101.03961, section 2.2).
  normalize_weights: the weights of a token's experts sum to 1 (Mixtral, section 2.1); else they are
    their probabilities among all experts (Switch, equation 2).
  balance_weight: of the load balance loss (Switch, equation 4).
  z_weight: of the router's z-loss (ST-MoE, arXiv:2202.08906, equation 5).
  """
  num_experts: int = 8
  num_selected: int = 2
  d_ff: int = 14336
  capacity_factor: Optional[float] = None
  normalize_weights: bool = True
  balance_weight: float = 0.01
  z_weight: float = 0.001

  def __post_init__(self):
    for name in ('num_experts', 'd_ff'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
    if not 1 <= self.num_selected <= self.num_experts:
      raise ValueError(f'num_selected={self.num_selected} must be in [1, num_experts='
                       f'{self.num_experts}]: a token goes to that many different experts')
    if self.capacity_factor is not None and self.capacity_factor <= 0:
      raise ValueError(f'capacity_factor={self.capacity_factor} must be positive, or None to drop '
                       'no token')
    for name in ('balance_weight', 'z_weight'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 0')

  def capacity(self, length: int) -> int:
    """Tokens of a row of `length` that an expert takes at most."""
    if self.capacity_factor is None:
      return length
    mean = self.num_selected * length / self.num_experts
    return min(length, math.ceil(self.capacity_factor * mean))


class MoE(nn.Module):
  """y = sum of gate_e * expert_e(x) over the `num_selected` experts of the largest probability.

  An expert is an `MLP` without biases; probabilities are softmax(x router), in float32. On a mesh
  each device computes tokens for its own experts, and the parts are summed.

  std, out_std: standard deviations of the initial weights in and out.
  """
  config: MoEConfig
  d_model: int
  activation: Activation
  std: float
  out_std: float
  rules: Rules

  @nn.compact
  def __call__(self, x_BTD: Float[Array, 'B T D'],
               token_weights_BT: Float[Array, 'B T'] | None = None
               ) -> tuple[Float[Array, 'B T D'], Penalties]:
    """Routes and computes.

    Args:
      token_weights_BT: tokens of weight 0 are padding: they go to no expert, take no capacity and
        do not count. None counts all.

    Returns:
      [B, T, D], 0 for tokens that no expert took; and `load_balance` and `router_z`, each as the
      float32 sum over rows of the row's mean, times its coefficient, and the number of rows with
      any token. Each row is on its own, so microbatches and meshes agree with one batch. The load
      balance of a row is E * sum_e share_e * probability_e, of the assignments and the mean
      probability: 1 where both are even, up to E where one expert has everything.
    """
    cfg = self.config
    counts_BT = jnp.ones(x_BTD.shape[:2], bool) if token_weights_BT is None else (
        token_weights_BT > 0)
    router = Linear((self.d_model,), (cfg.num_experts,), ('embed', None), self.std, name='router')
    # bfloat16 routers diverge (Switch, section 2.4).
    # Each device routes its part of the length: for the router's gradient, x is gathered otherwise.
    x_router = constrain(x_BTD, self.rules, 'batch', 'act_length', 'act_embed').astype(jnp.float32)
    logits = constrain(router(x_router), self.rules, 'batch', 'act_length', None)
    logits = checkpoint_name(logits, 'mlp_in')
    gates, experts = jax.lax.top_k(jax.nn.softmax(logits), cfg.num_selected)
    gates = gates / gates.sum(-1, keepdims=True) if cfg.normalize_weights else gates

    is_chosen = (experts[..., None] == jnp.arange(cfg.num_experts)).any(-2) & counts_BT[..., None]
    places = jnp.take_along_axis(jnp.cumsum(is_chosen, 1) - 1, experts, -1)  # in its expert's queue
    kept = counts_BT[..., None] & (places < cfg.capacity(x_BTD.shape[1]))
    experts = checkpoint_name(jnp.where(kept, experts, cfg.num_experts), 'experts')

    y_BTD = self._on_mesh(x_BTD, experts, places, gates, self._kernels())
    return y_BTD, self._penalties(logits, is_chosen, counts_BT)

  def _kernels(self) -> list[jax.Array]:
    """[E, D, F] once or, of a gated unit, twice, and [E, F, D]."""
    E, D, F = self.config.num_experts, self.d_model, self.config.d_ff
    names = ('wi_0', 'wi_1') if is_gated(self.activation) else ('wi',)
    kernels = [self.param(name, normal(self.std, 'expert', 'embed', 'mlp'), (E, D, F))
               for name in names]
    return [*kernels, self.param('wo', normal(self.out_std, 'expert', 'mlp', 'embed'), (E, F, D))]

  def _on_mesh(self, x_BTD, experts, places, gates, kernels):
    """Calls `_mixture` on each device's experts and the tokens that may go to them.

    Where devices hold different experts and have different rows, tokens go to their experts and
    back. With a capacity, whose queues are of whole rows, or no more devices than a token has
    experts, they gather all tokens, and each gets the sums of its own: that moves no more then.
    """
    rules, is_dropless = self.rules, self.config.capacity_factor is None
    mixture = functools.partial(_mixture, self.activation, is_dropless,
                                self.config.capacity(x_BTD.shape[1]))
    mesh = rules.mesh
    rules.spec('batch', 'mlp')  # refuses a mesh axis that shards both
    if mesh is None or mesh.size == 1:
      return mixture(0, x_BTD, experts, places, gates, *kernels)
    held, hidden, rows, length = (
        tuple(axis for axis in axes_of(axes) if mesh.shape[axis] > 1)
        for axes in (rules.expert, rules.mlp, rules.batch, rules.length))
    if x_BTD.shape[0] % rules.shards('batch'):
      rows = ()  # such as the one row with which a model is initialised
    if x_BTD.shape[1] % rules.shards('length') or not is_dropless:
      length = ()  # the queue of an expert is of the whole row
    gathered = tuple(axis for axis in held if axis in rows)
    summed = hidden + tuple(axis for axis in held if axis not in rows)
    exchanges = (gathered == held and is_dropless
                 and rules.shards('expert') > self.config.num_selected)

    def part(tokens, kernels):
      first = jax.lax.axis_index(held) * kernels[0].shape[0] if held else 0
      if exchanges:
        x_BTD, experts, _, gates = tokens
        y_BTD = _exchanged(self.activation, held, rules.shards('expert'), x_BTD, experts, gates,
                           kernels)
        return jax.lax.psum(y_BTD, summed) if summed else y_BTD
      if gathered:
        tokens = jax.tree.map(lambda x: jax.lax.all_gather(x, gathered, tiled=True), tokens)
      y_BTD = mixture(first, *tokens, *kernels)
      y_BTD = jax.lax.psum(y_BTD, summed) if summed else y_BTD
      return jax.lax.psum_scatter(y_BTD, gathered, tiled=True) if gathered else y_BTD

    tokens, into, back = (PartitionSpec(rows, length), PartitionSpec(held, None, hidden),
                          PartitionSpec(held, hidden, None))
    specs = (tokens,) * 4, [into] * (len(kernels) - 1) + [back]
    part = shard_map(part, rules, tokens, *specs)
    return part((x_BTD, experts, places, gates), kernels)

  def _penalties(self, logits, is_chosen, counts_BT) -> Penalties:
    cfg = self.config
    tokens_B = counts_BT.sum(-1)
    mean = lambda x: (x * counts_BT[..., None]).sum(1) / jnp.maximum(tokens_B, 1)[:, None]
    share, probability = mean(is_chosen) / cfg.num_selected, mean(jax.nn.softmax(logits))
    balance_B = cfg.num_experts * (share * probability).sum(-1)
    z_B = mean(jnp.square(jax.nn.logsumexp(logits, -1, keepdims=True)))[:, 0]
    rows = (tokens_B > 0).sum().astype(jnp.float32)
    return {'load_balance': (cfg.balance_weight * balance_B.sum(), rows),
            'router_z': (cfg.z_weight * z_B.sum(), rows)}


def _mixture(activation, is_dropless, capacity, first, x_BTD, experts, places, gates, *kernels):
  """The sum over the experts `first` .. `first` + E - 1, whose kernels these are.

  experts: int [B, T, P]: of each token, one that no device has where it was dropped.
  places: int [B, T, P], counted from 0 in the row's queue for that expert.  gates: [B, T, P].
  """
  E = kernels[0].shape[0]
  mine = (experts >= first) & (experts < first + E)
  experts, gates = jnp.where(mine, experts - first, E), jnp.where(mine, gates, 0)
  if not is_dropless:
    return _queued(activation, capacity, x_BTD, experts, places, gates, kernels)
  flat = lambda x: x.reshape(-1, x.shape[-1])
  return _of_experts(activation, flat(x_BTD), flat(experts), flat(gates), kernels,
                     _sorted).reshape(x_BTD.shape)


def _exchanged(activation, axes, num_devices, x_BTD, experts, gates, kernels):
  """The sum over the experts of all devices of these axes, which have different tokens.

  The choices of all tokens, sorted by expert, go to the devices that have these by a ragged
  all-to-all, and what comes of them goes back by another. None is dropped: each device has room for
  all that can come.
  """
  (*_, D), P, E = x_BTD.shape, experts.shape[-1], kernels[0].shape[0]
  here, M = jax.lax.axis_index(axes), math.prod(x_BTD.shape[:-1])
  most = M * min(P, E)  # choices of one device that can go to another
  order, inverse, counts = _sort(experts, num_devices * E)
  x = _spread(P, x_BTD.reshape(M, D), order, inverse)
  x = jnp.where((jnp.arange(M * P) < counts.sum())[:, None], x, 0)
  everyone = jax.lax.all_gather(counts, axes).reshape(num_devices, num_devices, E)
  sizes, own = everyone.sum(-1), everyone[:, here]  # [from, to], [from, expert]
  x = ragged_all_to_all(x, sizes, num_devices * most, most, axes)
  # From each device its choices of this one's first expert, then of the second: which is each row?
  expert = jnp.repeat(jnp.tile(jnp.arange(E), num_devices), own.ravel(), total_repeat_length=len(x))
  has_come = (jnp.arange(len(x)) < own.sum())[:, None]
  x, expert = jnp.where(has_come, x, 0), jnp.where(has_come, expert[:, None], E)
  y = _of_experts(activation, x, expert, has_come.astype(gates.dtype), kernels,
                  _in_order if E == 1 else _sorted)
  y = ragged_all_to_all(jnp.where(has_come, y, 0), sizes.T, M * P, most, axes)
  y_MD = _combine(y, counts.sum(), gates.reshape(M, P), order, inverse)
  return y_MD.astype(x_BTD.dtype).reshape(x_BTD.shape)


def _of_experts(activation, x_MD, experts, gates, kernels, grouped):
  """[M, D]: the sum of each row's experts [M, P] times their gates; `grouped` is `_sorted` or,
  where they are so already, `_in_order`."""
  # XLA:CPU computes ragged_dot for all experts too, and takes 4 to 6 times as long for it.
  return by_platform(functools.partial(_all_experts, activation),
                     functools.partial(grouped, activation), x_MD, experts, gates,
                     kernels)


def _expert(activation, product, x, kernels, last=None):
  """Feeds x forward by `product`, and by `last` where the last one differs."""
  up = (checkpoint_name(product(x, w), 'mlp_in') for w in kernels[:-1])
  return checkpoint_name((last or product)(activate(activation, *up), kernels[-1]), 'mlp_out')


def _all_experts(activation, x_MD, experts, gates, kernels):
  """Every expert of every token, most of them times 0."""
  E = kernels[0].shape[0]
  y = _expert(activation, jax.vmap(matmul, (None, 0)), x_MD, kernels, jax.vmap(matmul))
  gates = jnp.where(experts[..., None] == jnp.arange(E), gates[..., None], 0).sum(1)
  return jnp.einsum('emd,me->md', y, gates, preferred_element_type=jnp.float32).astype(x_MD.dtype)


def _sorted(activation, x_MD, experts, gates, kernels):
  """Tokens in the order of their experts, so that each kernel meets one range of rows."""
  order, inverse, sizes = _sort(experts, kernels[0].shape[0])
  product = lambda x, w: grouped_matmul(x, w, sizes)
  x = _spread(experts.shape[1], x_MD, order, inverse)
  x = jnp.where((jnp.arange(len(order)) < sizes.sum())[:, None], x, 0)  # the last have no expert
  y = _expert(activation, product, x, kernels)
  return _combine(y, sizes.sum(), gates, order, inverse).astype(x_MD.dtype)


def _in_order(activation, x_MD, experts, gates, kernels):
  """`_sorted` of one expert, whose rows have a gate of 1 and stand before those of none."""
  del experts
  sizes = (gates > 0).sum(0, dtype=jnp.int32)
  return _expert(activation, lambda x, w: grouped_matmul(x, w, sizes), x_MD, kernels)


def _sort(experts, num_experts):
  """The order of choices [M, P] by expert, its inverse, and the choices of each expert."""
  order = jnp.argsort(experts.reshape(-1))
  sizes = (experts.reshape(-1, 1) == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)
  return order, jnp.argsort(order), sizes


def _combine(y, count, gates, order, inverse):
  """What came of sorted choices, of which `count` have an expert, times their gates [M, P], summed
  for each token: float32."""
  y = jnp.where((jnp.arange(len(y)) < count)[:, None], y, 0)
  y_MPD = _spread(1, y, inverse, order).reshape(*gates.shape, -1)
  return jnp.einsum('mpd,mp->md', y_MPD, gates, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(copies, x, order, inverse):
  """Row i of the result is row order[i] // copies of x; order is a permutation. Its gradient is a
  gather too, where autodiff would scatter row by row."""
  del inverse
  return x[order // copies]


def _spread_backward(copies, residuals, g):
  order, inverse = residuals
  no_gradient = (np.zeros(x.shape, jax.dtypes.float0) for x in (order, inverse))
  return g[inverse].reshape(-1, copies, g.shape[-1]).sum(1), *no_gradient


_spread.defvjp(lambda copies, x, order, inverse: (_spread(copies, x, order, inverse),
                                                  (order, inverse)), _spread_backward)


def _queued(activation, capacity, x_BTD, experts, places, gates, kernels):
  """A batch of `capacity` tokens of each row for each expert: shapes do not depend on the data."""
  (B, T, D), E = x_BTD.shape, kernels[0].shape[0]
  slots = jnp.where(experts < E, experts * capacity + places, E * capacity)
  row = jnp.arange(B)[:, None, None]
  tokens = jnp.full((B, E * capacity), T).at[row, slots].set(jnp.arange(T)[:, None], mode='drop')
  x = x_BTD.at[row[..., 0], tokens].get(mode='fill', fill_value=0)
  product = jax.vmap(matmul)
  x = x.reshape(B, E, capacity, D).swapaxes(0, 1).reshape(E, B * capacity, D)
  y = _expert(activation, product, x, kernels)
  y = y.reshape(E, B, capacity, D).swapaxes(0, 1).reshape(B, E * capacity, D)
  y = y.at[row, slots].get(mode='fill', fill_value=0) * gates[..., None]
  return y.sum(2).astype(x_BTD.dtype)
