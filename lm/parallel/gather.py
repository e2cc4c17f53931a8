"""Parameters that devices shard with the batch (ZeRO-3, arXiv:1910.02054): gathered to be used, and
their gradients scattered.

Left alone, the compiler gathers a parameter as often as it is used, and sums the whole gradient on
every device before it keeps a part.
"""
from collections.abc import Callable
import functools

import jax

from lm.parallel.rules import Rules, axes_of, constrain


def is_gathered(rules: Rules, names: tuple[str | None, ...]) -> bool:
  """Whether an axis of such an array is sharded over devices that have different rows."""
  if rules.mesh is None:
    return False
  rows = {axis for axis in axes_of(rules.batch) if rules.mesh.shape[axis] > 1}
  return any(rows & set(axes_of(axes)) for axes in rules.spec(*names))


def gather(w: jax.Array, rules: Rules, names: tuple[str | None, ...]) -> jax.Array:
  """The array of these logical axes, whole but for the mesh axes that do not shard the batch."""
  rows = set(axes_of(rules.batch))
  return _place(constrain(w, rules, *names), rules, names, lambda axes: (
      axis for axis in axes if axis not in rows))


def scatter(gradient: jax.Array, rules: Rules, names: tuple[str | None, ...]) -> jax.Array:
  """The gradient in the sharding of its parameter, summed over one mesh axis after another.

  A mesh axis is one direction of the network: over several at once, TPUs sum the whole gradient on
  every chip (an all-reduce), over one each chip gets its part alone (a reduce-scatter).
  """
  longest = max(len(axes_of(axes)) for axes in rules.spec(*names))
  for count in range(1, longest + 1):
    gradient = _place(gradient, rules, names, lambda axes, count=count: axes[:count])
  return gradient


def _place(x, rules, names, choose):
  spec = (tuple(choose(axes_of(axes))) for axes in rules.spec(*names))
  sharding = jax.sharding.NamedSharding(rules.mesh, jax.sharding.PartitionSpec(*spec))
  return jax.lax.with_sharding_constraint(x, sharding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def product(function: Callable, rules: Rules, names: tuple[str | None, ...], x: jax.Array,
            w: jax.Array, *more: jax.Array) -> jax.Array:
  """`function(x, w, *more)` of a parameter w, gathered in the dtype of x in both passes and never
  kept.

  The gradient of w keeps the dtype of w, as it does in `function`.
  """
  return function(x, gather(w.astype(x.dtype), rules, names), *more)


def _forward(function, rules, names, x, w, *more):
  return product(function, rules, names, x, w, *more), (x, w, *more)


def _backward(function, rules, names, residuals, g):
  x, w, *more = residuals
  # Back in the dtype of w, so that its gradient is; the compiler drops both casts.
  whole = gather(w.astype(x.dtype), rules, names).astype(w.dtype)
  dx, dw, *others = jax.vjp(function, x, whole, *more)[1](g)
  return dx, scatter(dw, rules, names), *others


product.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def all_gather(rules: Rules, names: tuple[str | None, ...], dtype: jax.typing.DTypeLike,
               w: jax.Array) -> jax.Array:
  """`gather` inside `jax.shard_map(..., check_vma=False)`, where the part of each device comes in:
  it is moved in `dtype`, and its gradient is scattered in its own."""
  part = w.astype(dtype)
  for i, axes in _gathered_axes(rules, names):
    part = jax.lax.all_gather(part, axes, axis=i, tiled=True)
  return part.astype(w.dtype)


def _gathered_axes(rules, names):
  rows = axes_of(rules.batch)
  for i, axes in enumerate(rules.spec(*names)):
    axes = tuple(axis for axis in axes_of(axes) if axis in rows and rules.mesh.shape[axis] > 1)
    if axes:
      yield i, axes


def _scatter_gathered(rules, names, dtype, _, gradient):
  del dtype
  for i, axes in _gathered_axes(rules, names):
    for axis in axes:
      gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=i, tiled=True)
  return (gradient,)


all_gather.defvjp(lambda *args: (all_gather(*args), None), _scatter_gathered)
