"""What a parameter's path says of it: its group, its depth, and the matrices that it holds."""
from collections.abc import Sequence
import dataclasses
import math
import re
from typing import Any, Optional

import jax
import jax.numpy as jnp
import optax

from lm.errors import UserError

# Leaves that hold a matrix of each expert without a 'kernel' of their own.
_EXPERTS = 'wi', 'wi_0', 'wi_1', 'wo'


@dataclasses.dataclass(frozen=True)
class Group:
  """The parameters whose whole path a regular expression matches, and how they differ.

  A path is as in a checkpoint, below `params`: blocks/layers/mlp/wi_0/kernel. '.*' matches all.

  rate: times the learning rate; 0 freezes them.
  decay: times the weight decay.
  """
  pattern: str
  rate: float = 1.0
  decay: float = 1.0

  def __post_init__(self):
    try:
      re.compile(self.pattern)
    except re.error as error:
      raise ValueError(f'pattern={self.pattern!r} is no regular expression: {error}; '
                       "write '.*' for any characters") from error
    for name in ('rate', 'decay'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)} must not be negative')


# Matrices and embeddings decay; biases, scales of norms, and whatever has one axis a layer do not.
GROUPS = Group('(.*/)?(bias|scale)', decay=0.0), Group('.*')


def names_of(path: tuple) -> tuple[str, ...]:
  """The dict keys of a path: of a leaf of an optimiser's state, its parameter's come last."""
  return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def group_of(groups: Sequence[Group], path: tuple) -> Group:
  """The first group that matches.

  Raises:
    UserError: none does.
  """
  return first_match(groups, '/'.join(names_of(path)))


def first_match(groups: Sequence[Group], name: str) -> Group:
  """`group_of` a path that is written out."""
  for group in groups:
    if re.fullmatch(group.pattern, name):
      return group
  raise UserError(f'no group covers the parameter {name}; the patterns are '
                  f"{', '.join(repr(group.pattern) for group in groups) or 'none'}; end them with "
                  "Group('.*') for all others")


def depth_factor(layer_decay: float, num_layers: int, path: tuple, ndim: int) -> Any:
  """Of the learning rate, by depth (ELECTRA, arXiv:2003.10555, appendix A).

  The head has 1, layer l of L (counted from 0) layer_decay**(L - l), an array [L, 1, ...] where
  layers are stacked, and embeddings layer_decay**(num_layers + 1).
  """
  names = names_of(path)
  if 'layers' in names:
    factors = layer_decay ** (num_layers - jnp.arange(num_layers, dtype=jnp.float32))
    return factors.reshape(-1, *[1] * (ndim - 1))
  is_head = names[-1] in ('output_embedding', 'cluster_embedding')
  is_input = not is_head and any('embedding' in name for name in names)
  return layer_decay ** (num_layers + 1) if is_input else 1.0


def is_matrix(params: Any) -> Any:
  """True for the kernels of blocks and heads, [layers, inputs..., outputs...] or without layers;
  embeddings and the rest are AdamW's, where an optimiser is for matrices alone."""
  def of(path, _):
    names = names_of(path)
    return names[-1] == 'kernel'
  return jax.tree_util.tree_map_with_path(of, params)


def axes_of(path: tuple, ndim: int) -> tuple[int, int]:
  """How many leading axes count matrices (layers, experts), and how many of the others are inputs.

  The rest are outputs. Attention's `out` contracts heads and head_dim; a table has a row an input;
  biases and scales have outputs alone.
  """
  names = names_of(path)
  stacked = int('layers' in names) + int('moe' in names and names[-1] in _EXPERTS)
  if names[-1] == 'kernel':
    return stacked, 2 if names[-2:-1] == ('out',) else 1
  return stacked, int(names[-1] not in ('bias', 'scale') and ndim - stacked > 1)


def as_matrices(path: tuple, x: jax.Array) -> jax.Array:
  """A parameter as [L, M, N]: L matrices of M inputs and N outputs; a vector has M = 1."""
  stacked, inputs = axes_of(path, x.ndim)
  size = lambda axes: math.prod(axes)
  return x.reshape(size(x.shape[:stacked]), size(x.shape[stacked:stacked + inputs]),
                   size(x.shape[stacked + inputs:]))


def per_matrix(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Applies a transformation to each matrix by itself, where layers are stacked in one array.

  Norms and factors of a parameter are then those of a layer, as its author meant.
  """
  def view(path, x):
    x_LMN = as_matrices(path, x)
    return x_LMN[:, 0] if axes_of(path, x.ndim)[1] == 0 else x_LMN

  def init(params):
    one = lambda path, p: jax.vmap(inner.init)(view(path, p))
    return jax.tree_util.tree_map_with_path(one, params)

  def update(updates, state, params):
    paths, treedef = jax.tree_util.tree_flatten_with_path(updates)
    rows = zip(paths, treedef.flatten_up_to(state), jax.tree.leaves(params))
    done = [jax.vmap(inner.update)(view(path, u), s, view(path, p)) for (path, u), s, p in rows]
    return (treedef.unflatten([new.reshape(u.shape) for (_, u), (new, _) in zip(paths, done)]),
            treedef.unflatten([s for _, s in done]))

  return optax.GradientTransformation(init, update)


def clip_units(threshold: float, least: float = 1e-3) -> optax.GradientTransformation:
  """Adaptive gradient clipping (arXiv:2102.06171, section 4.1).

  The gradient of a unit is shortened to `threshold` times the norm of the unit's weights, which
  counts as `least` at least. A unit is an output of a kernel, a row of a table, a whole vector.
  """
  def one(path, g, p):
    is_table = axes_of(path, g.ndim)[1] == 1 and names_of(path)[-1] not in ('kernel', *_EXPERTS)
    is_vector = axes_of(path, g.ndim)[1] == 0
    axis = -1 if is_table or is_vector else -2
    norm = lambda x: jnp.linalg.norm(as_matrices(path, x), axis=axis, keepdims=True)
    most = threshold * jnp.maximum(norm(p), least)
    shrink = jnp.minimum(1.0, most / jnp.maximum(norm(g), 1e-6))
    return (as_matrices(path, g) * shrink).reshape(g.shape)

  return optax.stateless(
      lambda updates, params: jax.tree_util.tree_map_with_path(one, updates, params))


def add_decay(weight_decay: float, groups: Sequence[Group], width_factor: Optional[float]
              ) -> optax.GradientTransformation:
  """width_factor (of the blocks' kernels, None is 1) times the update, plus the decay."""
  def one(path, u, p, matrix):
    decay = weight_decay * group_of(groups, path).decay
    u = u * width_factor if width_factor is not None and matrix else u
    return u + decay * p if decay else u

  def init(params):  # says at once which parameter no group covers
    jax.tree_util.tree_map_with_path(lambda path, _: group_of(groups, path), params)
    return optax.EmptyState()

  return optax.GradientTransformation(init, lambda updates, state, params: (
      jax.tree_util.tree_map_with_path(one, updates, params, is_matrix(updates)), state))


def scale_by_place(groups: Sequence[Group], layer_decay: float) -> optax.GradientTransformation:
  """Times the rate of its group and of its depth."""
  def update(updates, params):
    stacked = [x.shape[0] for path, x in jax.tree_util.tree_leaves_with_path(params)
               if 'layers' in names_of(path)]
    deepest = max(stacked, default=0)

    def one(path, u):
      layers = u.shape[0] if 'layers' in names_of(path) else deepest
      return u * group_of(groups, path).rate * depth_factor(layer_decay, layers, path, u.ndim)

    return jax.tree_util.tree_map_with_path(one, updates)

  return optax.stateless(update)
