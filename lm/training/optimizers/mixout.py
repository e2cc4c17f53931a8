"""Mixout: each step computes with a random share of the parameters as they were before training."""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.training.optimizers.paths import names_of
from pallas_kernels.dropout import Draws, keeps, of_keys, of_places, of_seeds

STREAM = 0x3170  # of random numbers, beside those of dropout


@functools.partial(jax.tree_util.register_dataclass, data_fields=['initial'],
                   meta_fields=['rate'])
@dataclasses.dataclass(frozen=True)
class Mixout:
  """rate: of the numbers that are put back.  initial: those parameters, as they were."""
  rate: float
  initial: Any


def mixout(rate: float) -> optax.GradientTransformation:
  """Keeps the first parameters for `mix`, and leaves gradients as they are.

  They are those of kernels but for a head's, which has nothing to go back to (arXiv:1909.11299,
  section 5: dropout is for that).
  """
  def init(params):
    initial = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
      if _is_mixed(names_of(path)):
        *parents, last = names_of(path)
        node = functools.reduce(lambda node, name: node.setdefault(name, {}), parents, initial)
        node[last] = jnp.copy(x)
    return Mixout(rate, initial)

  return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


def _is_mixed(names):
  return names[-1] == 'kernel' and names[0] != 'head'


def find(opt_state: Any) -> Mixout | None:
  """What an optimiser with mixout keeps; None of one without."""
  is_ours = lambda x: isinstance(x, Mixout)
  return next(filter(is_ours, jax.tree.leaves(opt_state, is_leaf=is_ours)), None)


def mix(kept: Mixout, params: Any, rng: jax.Array) -> Any:
  """Parameters w with a share `rate` put back to u, in expectation w (arXiv:1909.11299, equation 1
  of section 3): (mask w + (1 - mask) u - rate u) / (1 - rate), the mask 0 with probability
  `rate`."""
  def one(mask, w, u):
    wide = jnp.float32
    mixed = jnp.where(mask, w.astype(wide), u.astype(wide)) - kept.rate * u.astype(wide)
    return (mixed / (1 - kept.rate)).astype(w.dtype)

  return _each(kept, rng, one, params)


def unmix(kept: Mixout, grads: Any, rng: jax.Array) -> Any:
  """From the gradient of what `mix` gave with the same key to that of the parameters."""
  one = lambda mask, g, _: jnp.where(mask, g / (1 - kept.rate), 0).astype(g.dtype)
  return _each(kept, rng, one, grads)


def _each(kept, rng, function, tree):
  """function(mask, x, initial) of every leaf that is mixed."""
  draws = Draws(jax.random.bits(jax.random.fold_in(rng, STREAM), (1,)))
  initial = {names_of(path): (i, x) for i, (path, x) in enumerate(
      jax.tree_util.tree_leaves_with_path(kept.initial))}

  def one(path, x):
    if names_of(path) not in initial:
      return x
    i, before = initial[names_of(path)]
    return function(_mask(kept.rate, of_seeds(draws.fold(i).rows)[0], x.shape), x, before)

  return jax.tree_util.tree_map_with_path(one, tree)


def _mask(rate, seed, shape):
  """False with probability `rate`: a function of the seed and of the place of each number."""
  *rows, columns = shape
  place = jnp.zeros(rows, jnp.int32)
  for axis, size in enumerate(rows):
    place = place * size + jax.lax.broadcasted_iota(jnp.int32, rows, axis)
  return keeps(rate, of_places(place)[..., None] ^ of_keys(jnp.arange(columns)) ^ seed)
