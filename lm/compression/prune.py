"""Weights that become 0, one by one: by magnitude, by Wanda, by SparseGPT; any of them, or N of M.

A 0 of a kernel is the whole mask: `lm train` keeps it with gin/compression/keep_zeros.gin, and a
checkpoint that is half zeros is kept as such (`lm/training/sparsity.py` prunes while a run trains).
"""
import dataclasses
import functools
import re
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from lm.compression import matrices, Model
from lm.compression.gptq import inverse_factor
from lm.compression.matrices import Matrix
from lm.errors import UserError
from lm.training import sparsity as schedules

Pattern = Optional[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Pruning:
  """What the methods share.

  sparsity: the share of zeros in each target, or in all of them.
  pattern: (N, M): of M consecutive inputs of an output N stay, in place of `sparsity`; (2, 4) is
    what the sparse products of NVIDIA's GPUs take.
  targets: patterns of whole paths of kernels; embeddings, heads, biases and norms stay whole.
  """
  sparsity: float = 0.5
  pattern: Pattern = None
  targets: tuple[str, ...] = schedules.KERNELS

  def __post_init__(self):
    if not 0 < self.sparsity < 1:
      raise ValueError(f'sparsity={self.sparsity} must be between 0 and 1')
    if self.pattern is not None and not 0 < self.pattern[0] < self.pattern[1]:
      raise ValueError(f'pattern={self.pattern} must be (N, M), N of M inputs, as (2, 4)')

  def chosen(self, params: Any) -> dict[str, Matrix]:
    """The kernels that are pruned, by path.

    Raises:
      UserError: a pattern matches none, M does not divide, or they are in few bits.
    """
    matrices.require_floats(params)
    found = matrices.matching(params, self.targets)
    for path, one in found.items():
      if self.pattern is not None and one.K % self.pattern[1]:
        raise UserError(f'pattern={self.pattern} does not divide the {one.K} inputs of {path}; '
                        'leave that kernel out of `targets`')
    return found

  def after(self, model: Model, pruned: dict[str, jax.Array]) -> Model:
    """The model with these kernels in the place of its own."""
    params = matrices.replace(model.params, lambda path, leaf: pruned.get(path, leaf))
    zeros = sum(int((x == 0).sum()) for x in pruned.values())
    return model.after(self, params, kernels=len(pruned),
                       zeros=zeros / sum(x.size for x in pruned.values()))


@dataclasses.dataclass(frozen=True)
class Magnitude(Pruning):
  """The weights of the smallest magnitude (Han et al., arXiv:1506.02626).

  scope: 'global' compares the weights of all targets, 'local' those of each matrix alone.
  """
  scope: Literal['global', 'local'] = 'local'

  def __call__(self, model: Model, calibration: Any) -> Model:
    """Asks nothing of the calibration."""
    del calibration
    chosen, flat = self.chosen(model.params), matrices.by_path(model.params)
    sizes = {path: jnp.abs(flat[path]) for path in chosen}
    if self.pattern is not None:
      of_layer = lambda x_KN: smallest_inputs(x_KN, self.sparsity, self.pattern)
      pruned = {path: one.shaped(jax.vmap(of_layer)(one.flat(sizes[path])))
                for path, one in chosen.items()}
    else:
      pruned = schedules.smallest(sizes, self.sparsity, self.scope)
    return self.after(model, {path: jnp.where(pruned[path], 0, flat[path]) for path in chosen})


@dataclasses.dataclass(frozen=True)
class Wanda(Pruning):
  """The weights that move an output least: |w| times the norm of their input, compared among the
  inputs of each output (arXiv:2306.11695, section 3).

  Departs from the paper: all layers are judged by the inputs of the dense model.
  """

  def __call__(self, model: Model, calibration: Any) -> Model:
    """Asks the calibration for the norms of inputs."""
    chosen, flat = self.chosen(model.params), matrices.by_path(model.params)
    seen = calibration.inputs(model, ('squares',), tuple(map(re.escape, chosen)))

    def of(w_KN, squares_K):
      scores = jnp.abs(w_KN) * jnp.sqrt(squares_K)[:, None]
      return jnp.where(smallest_inputs(scores, self.sparsity, self.pattern), 0, w_KN)

    return self.after(model, {path: one.shaped(jax.vmap(of)(
        one.flat(flat[path]), jnp.asarray(seen[path].squares))) for path, one in chosen.items()})


@dataclasses.dataclass(frozen=True)
class SparseGPT(Pruning):
  """Weights whose loss the others of their output can make good best, and those others moved so
  that they do (arXiv:2301.00774, algorithm 1).

  Departs from the paper: all layers are judged by the inputs of the dense model.

  block: inputs whose weights are chosen together, by what they would cost then.
  damping: added to the diagonal of the Hessian, as a share of its mean.
  """
  block: int = 128
  damping: float = 0.01

  def __post_init__(self):
    super().__post_init__()
    if self.block < 1 or self.pattern and self.block % self.pattern[1]:
      raise ValueError(f'block={self.block} must be a multiple of the M of pattern={self.pattern}')
    if not self.damping > 0:
      raise ValueError(f'damping={self.damping} must be positive: inputs that are always 0 have no '
                       'inverse')

  def __call__(self, model: Model, calibration: Any) -> Model:
    """Asks the calibration for second moments of the inputs, kernel by kernel."""
    chosen, flat, pruned = self.chosen(model.params), matrices.by_path(model.params), {}
    seen = calibration.inputs(model, ('moments',), tuple(map(re.escape, chosen)))
    for path, one in chosen.items():
      rows = [self.solve(w_KN, seen[path].moments[i])
              for i, w_KN in enumerate(one.flat(flat[path]))]
      pruned[path] = one.shaped(jnp.stack(rows))
    return self.after(model, pruned)

  def solve(self, w_KN: Float[Array, 'K N'], moments_KK: np.ndarray) -> Float[Array, 'K N']:
    """A sparse matrix whose outputs, of inputs of these second moments, are near those of w."""
    dtype, K = w_KN.dtype, len(w_KN)
    factor_KK = jnp.asarray(inverse_factor(moments_KK, self.damping), jnp.float32)
    w_KN = w_KN.astype(jnp.float32)
    for start in range(0, K, self.block):
      stop = min(start + self.block, K)
      one, errors = _eliminate(w_KN[start:stop], factor_KK[start:stop, start:stop], self.sparsity,
                               self.pattern)
      rest = w_KN[stop:] - jnp.matmul(factor_KK[start:stop, stop:].T, errors, precision='highest')
      w_KN = jnp.concatenate([w_KN[:start], one, rest])
    return w_KN.astype(dtype)


@functools.partial(jax.jit, static_argnames=('sparsity', 'pattern'))
def _eliminate(w, factor, sparsity, pattern):
  """A block of inputs, pruned, and the errors that the later ones make good."""
  K, group = len(w), pattern[1] if pattern else len(w)
  diagonal = jnp.diagonal(factor)[:, None]

  def choose(w, first):
    """Which of the inputs of a group are pruned, at the weights that the others have now."""
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, first, group)
    costs = jnp.square(part(w) / part(diagonal))
    if pattern:
      return smallest_inputs(costs, sparsity, pattern)
    return schedules.smallest({'w': costs}, sparsity, 'global')['w']

  def settle(i, carry):
    w, errors, pruned = carry
    chosen = lambda: jax.lax.dynamic_update_slice_in_dim(pruned, choose(w, i), i, 0)
    pruned = jax.lax.cond(i % group == 0, chosen, lambda: pruned)
    error = jnp.where(pruned[i], w[i], 0) / factor[i, i]
    return w - factor[i][:, None] * error, errors.at[i].set(error), pruned

  w, errors, pruned = jax.lax.fori_loop(0, K, settle, (w, jnp.zeros_like(w),
                                                       jnp.zeros(w.shape, bool)))
  return jnp.where(pruned, 0, w), errors


def smallest_inputs(scores_KN: Float[Array, 'K N'], sparsity: float, pattern: Pattern
                    ) -> Bool[Array, 'K N']:
  """Which weights have the smallest scores among the inputs of their output: a share of them, or
  all but N of every M."""
  if pattern is None:
    return schedules.smallest({'layers': scores_KN.T}, sparsity, 'local')['layers'].T
  kept, size = pattern
  grouped = scores_KN.reshape(-1, size, scores_KN.shape[1])
  # Of two alike the first is the smaller. Sorting would take a CPU a hundred times as long.
  is_before = np.tri(size, k=-1, dtype=bool)[:, :, None]  # [i, j]: j before i
  mine, other = grouped[:, :, None], grouped[:, None]
  ranks = ((other < mine) | ((other == mine) & is_before)).sum(2)
  return (ranks < size - kept).reshape(scores_KN.shape)
