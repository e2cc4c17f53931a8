"""Which parameters are matrices, and how they lie: kernels of linear layers, and embeddings.

A path is as `lm.training.checkpoint_io.flatten` names it: blocks/layers/attention/query/kernel. K:
inputs of a matrix, N: outputs, L: layers, which are stacked in one leaf.
"""
from collections.abc import Callable, Mapping, Sequence
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.errors import UserError
from lm.training import checkpoint_io
from pallas_kernels.quantized_matmul import Quantized

KERNEL, INPUT_SCALE = 'kernel', 'input_scale'  # the latter [*stack, K], what inputs are times
EMBEDDINGS = 'token_embedding', 'output_embedding'  # [V, D], a row a token


class Matrix(NamedTuple):
  """A leaf [*stack, *inputs, *outputs] of which a product sums over the inputs.

  stack: (L,) where it is of all layers, else ().
  """
  path: str
  stack: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  @property
  def K(self) -> int:
    return math.prod(self.inputs)

  @property
  def N(self) -> int:
    return math.prod(self.outputs)

  def flat(self, leaf: jax.Array) -> jax.Array:
    """The leaf as [L, K, N]; L is 1 without a stack."""
    return leaf.reshape(-1, self.K, self.N)

  def shaped(self, w_LKN: jax.Array) -> jax.Array:
    """The leaf that `flat` was made of."""
    return w_LKN.reshape(*self.stack, *self.inputs, *self.outputs)


def is_quantized(leaf: Any) -> bool:
  """Whether a parameter is kept in few bits."""
  return isinstance(leaf, Quantized)


def name_of(path: tuple) -> str:
  """The path of a leaf, as a checkpoint names it."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def matrix_of(path: str, leaf: Any) -> Matrix | None:
  """How a kernel lies; None where the leaf is none."""
  *parents, name = path.split('/')
  shape = leaf.values.shape if is_quantized(leaf) else leaf.shape
  if name != KERNEL:
    return None
  after = parents[parents.index('layers') + 1] if 'layers' in parents[:-1] else ''
  is_stacked = 'layers' in parents and not after.isdigit()  # else layers are a list, one by one
  stack, shape = shape[:is_stacked], shape[is_stacked:]
  # Attention's heads and their dimensions go out of it together.
  num_inputs = len(shape) - 1 if parents[-1] == 'out' else 1
  return Matrix(path, stack, shape[:num_inputs], shape[num_inputs:])


def is_embedding(path: str) -> bool:
  """Whether a leaf [V, D] has a row a token."""
  return path.rpartition('/')[2] in EMBEDDINGS


def floats(path: str, leaf: Any) -> Any:
  """The numbers that a `Quantized` leaf stands for, float32; another leaf as it is."""
  if not is_quantized(leaf):
    return leaf
  if is_embedding(path):
    return leaf.values.astype('float32') * leaf.scales[:, None]
  one = matrix_of(path, leaf)
  values_LKN = one.flat(leaf.values)
  scales = leaf.scales.reshape(len(values_LKN), -1, one.N)
  return one.shaped(np.stack([expand(*layer) for layer in zip(values_LKN, scales)]))


def expand(values_KN: Any, scales: Any) -> Any:
  """values * scales, float32, of scales [N], or [P, N] of groups."""
  (K, N), scales_PN = values_KN.shape, scales.reshape(-1, values_KN.shape[1])
  grouped = values_KN.astype('float32').reshape(len(scales_PN), -1, N)
  return (grouped * scales_PN[:, None]).reshape(K, N)


def unscaled(path: str, leaf: jax.Array, input_scale: jax.Array) -> jax.Array:
  """The kernel whose product is the same without an `input_scale` [*stack, K] before it."""
  one = matrix_of(path, leaf)
  return one.shaped(one.flat(leaf) * input_scale.reshape(-1, one.K, 1))


def kernels(params: Any) -> dict[str, Matrix]:
  """The kernels of all linear layers, by path; experts have none of their own."""
  found = [matrix_of(path, leaf) for path, leaf in by_path(params).items()]
  return {one.path: one for one in found if one is not None}


def matching(params: Any, targets: Sequence[str]) -> dict[str, Matrix]:
  """The kernels whose whole path is of one of these patterns, by path.

  Raises:
    UserError: a pattern matches none.
  """
  found = kernels(params)
  for target in targets:
    if not any(re.fullmatch(target, path) for path in found):
      raise UserError(f'targets={targets}: {target!r} matches no kernel; the model has '
                      f'{", ".join(found)}')
  return {path: one for path, one in found.items()
          if any(re.fullmatch(target, path) for target in targets)}


def replace(params: Any, change: Callable[[str, Any], Any]) -> Any:
  """The parameters with `change(path, leaf)` in place of each leaf."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: change(name_of(path), leaf), params,
                                          is_leaf=is_quantized)


def by_path(params: Any) -> dict[str, Any]:
  """Every leaf by its path; those in few bits are one each."""
  return {name_of(path): leaf for path, leaf in
          jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)}


def with_leaves(params: Any, leaves: Mapping[str, Any]) -> Any:
  """The parameters with other leaves at these paths, or new ones."""
  return checkpoint_io.nest({**by_path(params), **leaves})


def require_floats(params: Any) -> None:
  """Refuses what no step can change any more.

  Raises:
    UserError: a matrix is in few bits.
  """
  for path, leaf in by_path(params).items():
    if is_quantized(leaf):
      raise UserError(f'{path} of this run is {leaf.values.dtype} already, and is not '
                      'rounded twice; compress the run that it was made of, which its '
                      'compression.json names')
