"""Which parameters train: the step has gradients of these alone, the optimiser state for these
alone, and the others are inputs of the step that come out as they went in.

A module says it by `trains(path)`; one that has no such method trains all of its parameters. A path
is as in a checkpoint, below `params`: blocks/layers/mlp/wi_0/kernel. Layers are stacked in one
leaf, so a module is asked of that path and, if it trains, of each layer's own:
blocks/layers/3/mlp/wi_0/kernel. The trainable part of a leaf that trains in some layers are these,
one behind another.
"""
from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lm.errors import UserError
from lm.training import checkpoint_io, precision
from lm.training.optimizers import averaging

Layers = tuple[bool, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Split:
  """Parameters, taken apart.

  own: the trainable ones, of a leaf that trains in some layers [trainable layers, ...].
  frozen: the others, and whole such leaves.
  layers: of such leaves, which train.
  """
  own: Any
  frozen: Any = dataclasses.field(default_factory=dict)
  layers: tuple[tuple[str, Layers], ...] = dataclasses.field(default=(),
                                                              metadata={'static': True})

  def whole(self, own: Any = None) -> Any:
    """All parameters, with `own` in place of the trainable ones."""
    own = self.own if own is None else own
    if not self.frozen:
      return own
    flat, mine = checkpoint_io.flatten(self.frozen), checkpoint_io.flatten(own)
    for path, layers in self.layers:
      mine[path] = _join(layers, mine[path], flat[path])
    return checkpoint_io.nest(flat | mine)

  def padded(self, own: Any) -> Any:
    """A tree like `own` with 0 for the frozen layers of leaves that train in some."""
    if not self.layers:
      return own
    flat = checkpoint_io.flatten(own)
    for path, layers in self.layers:
      shape = (len(layers), *flat[path].shape[1:])
      flat[path] = _join(layers, flat[path], jnp.zeros(shape, flat[path].dtype))
    return checkpoint_io.nest(flat)


def split(module: Any, params: Any) -> Split:
  """Takes parameters apart as the module says.

  Raises:
    UserError: none of them trains.
  """
  trains = getattr(module, 'trains', None)
  if trains is None:
    return Split(params)
  own, frozen, some = {}, {}, []
  for path, leaf in checkpoint_io.flatten(params).items():
    layers = _layers(trains, path, leaf)
    if all(layers):
      own[path] = leaf
    else:
      frozen[path] = leaf
    if any(layers) and not all(layers):
      some.append((path, layers))
      own[path] = _take(leaf, layers)
  if not own:
    raise UserError('no parameter trains; take patterns out of Experiment.frozen')
  return Split(checkpoint_io.nest(own), checkpoint_io.nest(frozen), tuple(some))


def count(module: Any, params: Any) -> tuple[int, int]:
  """Numbers that train, and all; shapes are enough."""
  size = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  return size(jax.eval_shape(lambda params: split(module, params).own, params)), size(params)


def check(parts: Split, opt_state: Any) -> None:
  """That an optimiser's average of the parameters, if it keeps one, has whole leaves.

  Raises:
    UserError: it has not.
  """
  if parts.layers and averaging.is_kept(opt_state):
    raise UserError(f'{parts.layers[0][0]} trains in some layers only, and the optimiser '
                    'keeps an average of the parameters; leave average_decay out, or freeze all '
                    'layers or none')


def _layers(trains: Any, path: str, leaf: Any) -> Layers:
  """Of each layer, if there are layers, whether it trains; histories of products always do."""
  before, layers, after = path.partition('layers/')
  if precision.is_history_name(path.rpartition('/')[2]):
    return (True,)
  if not trains(path):
    return (False,)
  return tuple(trains(f'{before}{layers}{i}/{after}') for i in range(len(leaf))) if layers else (
      True,)


def _runs(layers: Sequence[bool]) -> Iterator[tuple[bool, int, int]]:
  """(trains, start, stop) of neighbours that are alike."""
  start = 0
  for trains, members in itertools.groupby(layers):
    stop = start + len(list(members))
    yield trains, start, stop
    start = stop


def _take(leaf: jax.Array, layers: Layers) -> jax.Array:
  return jnp.concatenate([leaf[start:stop] for trains, start, stop in _runs(layers) if trains])


def _join(layers: Layers, own: jax.Array, frozen: jax.Array) -> jax.Array:
  """The inverse of `_take`: `frozen` has all layers."""
  parts, done = [], 0
  for trains, start, stop in _runs(layers):
    parts.append(own[done:done + stop - start] if trains else frozen[start:stop])
    done += (stop - start) * trains
  return jnp.concatenate(parts)
