"""GPTQ: matrices in few bits, of which each rounding makes up for those before it.

Of a matrix W [K, N] and the second moments H = X^T X of its inputs, the objective is what the
rounded Q does to the layer's outputs on the calibration data, |X W - X Q|^2 = tr D^T H D, where D =
W - Q. Rows are rounded one by one, and the rows that are left move so as to undo the error of the
row just rounded, as far as they can (arXiv:2210.17323, section 3).

Not all outputs matter alike. Rows of X weigh the square of what the loss depends on their outputs,
so that tr D^T H D is what the rounding does to the loss, to second order, and not to the layer: H
is a block of Fisher's information matrix (GuidedQuant, arXiv:2505.07004, section 3.1).
"""
import dataclasses
import functools
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from lm.compression import grids, matrices, Model
from lm.compression.quantize import Format, Rounding

BLOCK = 128  # rows whose errors reach all later rows together, without groups (section 3.3, step 2)
LAYERS = ('(.*/)?layers/.*',)


@dataclasses.dataclass(frozen=True)
class GPTQ(Rounding):
  """Rounds the kernels of the layers so.

  Pruned weights stay 0: a row's zeros are part of what later rows make up for. A column that comes
  out worse than rounded to the nearest, which is rare, is rounded to the nearest.

  damping: added to the diagonal of H, as a share of its mean (section 3.3, step 3).
  by_activity: rows of larger inputs first, with scales of the groups as they were before any moved
    (the reference code's `act_order` and `static_groups`); else in order, and a group has scales of
    what it has become when it is its turn.
  search: takes the scales of least squared error, inputs weighing what their squares are, in place
    of those that reach the largest magnitude.
  by_loss: rows of X weigh so; else all weigh the same, as in GPTQ's paper. The outputs of a matrix
    are one group, whose mean each row gets.
  """
  dtype: Format = 'int4'
  group_size: Optional[int | Literal['tensor']] = 128
  targets: tuple[str, ...] = LAYERS
  damping: float = 0.01
  by_activity: bool = True
  search: bool = True
  by_loss: bool = True

  def __post_init__(self):
    super().__post_init__()
    if not self.damping > 0:
      raise ValueError(f'damping={self.damping} must be positive: without it H has no inverse '
                       'where inputs depend on each other')
    if self.group_size == 'tensor':
      raise ValueError("group_size='tensor' shares a scale among outputs, which GPTQ rounds each "
                       'by itself; take a number of inputs, or None')

  def __call__(self, model: Model, calibration: Any) -> Model:
    """Asks the calibration for the moments of the targets."""
    chosen = self.chosen(model.params)
    kind = 'curvature' if self.by_loss else 'moments'
    inputs = calibration.inputs(model, (kind,), self.targets)
    leaves, new, errors, nearest = matrices.by_path(model.params), {}, 0.0, 0.0
    for path, one in tqdm.tqdm(chosen.items(), 'GPTQ', unit=' kernels'):
      layers = zip(np.asarray(one.flat(leaves[path])), getattr(inputs[path], kind))
      values, scales, error, plain = map(np.stack, zip(*(self.solve(*layer) for layer in layers)))
      new[path] = self.kept(one, jnp.asarray(values), jnp.asarray(scales))
      errors, nearest = errors + error.sum(), nearest + plain.sum()
    params = self.with_embeddings(matrices.with_leaves(model.params, new))
    return model.after(self, params, error=float(errors), error_of_nearest=float(nearest))

  def solve(self, w_KN: np.ndarray, moments_KK: np.ndarray
            ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rounds one matrix.

    Returns:
      values [K, N], scales [N] or [P, N], and of each output [N] the objective of these and of the
      plainly rounded.
    """
    order_K = np.argsort(-np.diagonal(moments_KK), kind='stable')
    order_K = order_K if self.by_activity else np.arange(len(w_KN))
    factor_KK = inverse_factor(moments_KK[np.ix_(order_K, order_K)], self.damping)
    return jax.device_get(_solve(self, w_KN, moments_KK, order_K, factor_KK))


@functools.partial(jax.jit, static_argnums=0)
def _solve(how, w_KN, moments_KK, order_K, factor_KK):
  w_KN, (K, N) = w_KN.astype(jnp.float32), w_KN.shape
  size = how.group_size or K
  weights_K = jnp.diagonal(moments_KK)
  scales_of = functools.partial(grids.searched if how.search else lambda dtype, w, _: grids.largest(
      dtype, w), how.dtype)
  grouped = lambda x: x.reshape(K // size, size, *x.shape[1:])
  scales_PN = jax.vmap(scales_of)(grouped(w_KN), grouped(weights_K))
  values_KN, scales_KN = _rounded_in_order(
      how, w_KN[order_K], factor_KK, scales_PN[order_K // size],
      None if how.by_activity or not how.group_size else scales_of, weights_K[order_K])
  place_K = jnp.argsort(order_K)
  values_KN, scales_PN = values_KN[place_K], scales_KN[place_K][::size]
  plain_KN, plain_PN = how.round(w_KN)
  plain_KN, plain_PN = plain_KN.astype(jnp.float32), plain_PN.reshape(-1, N)
  error_N, error_of_plain_N = (
      grids.objective(w_KN - values * jnp.repeat(scales, size, axis=0), moments_KK)
      for values, scales in ((values_KN, scales_PN), (plain_KN, plain_PN)))
  is_better_N = error_N <= error_of_plain_N
  values_KN = jnp.where(is_better_N, values_KN, plain_KN).astype(how.dtype)
  scales_PN = jnp.where(is_better_N, scales_PN, plain_PN)
  return (values_KN, scales_PN if how.group_size else scales_PN[0],
          jnp.minimum(error_N, error_of_plain_N), error_of_plain_N)


def _rounded_in_order(how, w_KN, factor_KK, scales_KN, scales_of, weights_K):
  """Values, as floats, and scales of rows that are rounded one after another, in blocks.

  scales_of: finds those of a group, a block, when its turn comes; None leaves `scales_KN`.
  """
  K = len(w_KN)
  block = how.group_size if scales_of else max(n for n in range(1, BLOCK + 1) if K % n == 0)
  is_pruned_KN = w_KN == 0
  at = lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, block)

  def one_block(w_KN, start):
    rows_BN, factor_BK, scales_BN = (at(x, start) for x in (w_KN, factor_KK, scales_KN))
    if scales_of:
      scales_BN = jnp.broadcast_to(scales_of(rows_BN, at(weights_K, start)), rows_BN.shape)
    factor_BB, is_pruned_BN = at(factor_BK.T, start).T, at(is_pruned_KN, start)

    def one_row(rows_BN, i):
      values_N = grids.rounded(how.dtype, rows_BN[i][None], scales_BN[i])[0]
      values_N = jnp.where(is_pruned_BN[i], 0, values_N)
      error_N = (rows_BN[i] - values_N * scales_BN[i]) / factor_BB[i, i]
      return rows_BN - factor_BB[i][:, None] * error_N, (values_N, error_N)

    _, (values_BN, errors_BN) = jax.lax.scan(one_row, rows_BN, jnp.arange(block))
    is_later_K = jnp.arange(K) >= start + block
    w_KN -= jnp.matmul(jnp.where(is_later_K, factor_BK, 0).T, errors_BN, precision='highest')
    return w_KN, (values_BN, scales_BN)

  _, (values, scales) = jax.lax.scan(one_block, w_KN, jnp.arange(0, K, block))
  return values.reshape(w_KN.shape), scales.reshape(w_KN.shape)


def inverse_factor(moments_KK: np.ndarray, damping: float) -> np.ndarray:
  """The upper Cholesky factor of the damped inverse of H, whose row k says how the rows behind k
  make up for an error in row k (section 3.3, step 3)."""
  hessian_KK = moments_KK.astype(np.float64)
  diagonal_K = np.diagonal(hessian_KK).copy()
  mean = diagonal_K.mean() or 1.0
  hessian_KK[np.diag_indices_from(hessian_KK)] += damping * mean
  return np.linalg.cholesky(np.linalg.inv(hessian_KK)).T.astype(np.float32)
