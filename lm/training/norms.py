"""How large gradients, parameters and updates are, by group of parameters and by layer."""
from typing import Any

import jax
import jax.numpy as jnp

from lm.training.optimizers.paths import names_of
from lm.training.precision import is_history

_LEAVES = 'kernel', 'bias', 'scale', 'embedding'


def group_of(path: tuple) -> str:
  """The group that a parameter's path puts it in: the part of a block, whose norms are one group,
  or outside of blocks its module.

  Example: blocks/layers/mlp/wi_0/kernel is of 'mlp', encoder/blocks/layers/mlp_norm/scale of
  'encoder/norms', final_norm/scale of 'final_norm', token_embedding of 'token_embedding'.
  """
  names = list(names_of(path))
  if 'layers' in names:
    place = names.index('layers')
    part = names[place + 1]
    names = [name for name in names[:place] if name != 'blocks']
    names.append('norms' if part.endswith('norm') else part)
  elif len(names) > 1 and names[-1] in _LEAVES:
    names.pop()
  return '/'.join(names)


def squares(tree: Any) -> dict[str, jax.Array]:
  """The sum of squares of each group of a tree like the parameters, float32: [L] of groups in
  blocks, whose leaves are stacked by layer, else []."""
  sums: dict[str, jax.Array] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if is_history(path):
      continue
    axes = tuple(range(int('layers' in names_of(path)), leaf.ndim))
    group = group_of(path)
    sums[group] = sums.get(group, 0) + jnp.square(leaf.astype(jnp.float32)).sum(axes)
  return sums


def by_group(grads: Any, params: Any, updates: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The norm of the whole gradient, and of each group, [L] or [] each:

  'grad_norm/GROUP', before clipping; 'param_norm/GROUP'; and 'update_ratio/GROUP', the norm of the
  update over that of the parameters behind it (as RMS over RMS: the same count), 0 where these are
  all 0.
  """
  grads, params, updates = map(squares, (grads, params, updates))
  total = sum((x.sum() for x in grads.values()), jnp.float32(0))
  found = {f'grad_norm/{group}': jnp.sqrt(x) for group, x in grads.items()}
  found |= {f'param_norm/{group}': jnp.sqrt(x) for group, x in params.items()}
  found |= {f'update_ratio/{group}': jnp.sqrt(x / jnp.where(params[group] > 0, params[group], 1))
            * (params[group] > 0) for group, x in updates.items()}
  return jnp.sqrt(total), found
