"""The norms by group are those of the arrays themselves."""
import jax
import numpy as np
import pytest
from test_step import make_batch, make_state, module, OPTIMIZER, quick_keys, steps

from lm.training import norms

GROUPS = {'attention', 'mlp', 'norms', 'final_norm', 'token_embedding', 'output_embedding'}


def of(tree, group, layer=None):
  """The norm of a group, by hand."""
  layers = tree['blocks']['layers']
  parts = {'attention': layers['attention'], 'mlp': layers['mlp'],
           'norms': [layers['attention_norm'], layers['mlp_norm']]}
  leaves = jax.tree.leaves(parts.get(group, tree.get(group)))
  leaves = [x if layer is None else x[layer] for x in leaves]
  return np.sqrt(sum((np.float64(x)**2).sum() for x in leaves))


@pytest.mark.supports('watching', 'norms of gradients, updates and parameters by group and layer')
def test_norms_of_a_step_are_those_of_its_arrays(steps, make_state):
  before, batch = make_state(), make_batch(np.ones((8, 1)))
  start = jax.device_get(before.params)
  after, metrics = steps[1](before, batch)
  found, params = jax.device_get((metrics['norms'], after.params))
  assert set(found) == {f'{kind}/{group}' for group in GROUPS
                        for kind in ('grad_norm', 'param_norm', 'update_ratio')}
  updates = jax.tree.map(np.subtract, params, start)
  for group in GROUPS:
    layers = (0, 1) if group in ('attention', 'mlp', 'norms') else (None,)
    for i, layer in enumerate(layers):
      at = lambda kind: np.atleast_1d(found[f'{kind}/{group}'])[i]
      np.testing.assert_allclose(at('param_norm'), of(params, group, layer), rtol=1e-5)
      ratio = of(updates, group, layer) / of(params, group, layer)
      np.testing.assert_allclose(at('update_ratio'), ratio, rtol=1e-2)
  # AdamW's first moment is a tenth of the clipped gradient.
  grads = [x for x in jax.tree.leaves(jax.device_get(after.opt_state), is_leaf=_is_params)
           if _is_params(x)][0]
  shrink = of(grads, 'mlp', 0) / found['grad_norm/mlp'][0]
  for group in GROUPS:
    np.testing.assert_allclose(shrink * np.linalg.norm(found[f'grad_norm/{group}']),
                               of(grads, group), rtol=1e-4)
  total = np.sqrt(sum(np.square(found[f'grad_norm/{group}']).sum() for group in GROUPS))
  np.testing.assert_allclose(metrics['grad_norm'], total, rtol=1e-6)


def _is_params(x):
  return isinstance(x, dict) and 'blocks' in x


def test_a_group_is_a_part_of_a_block_or_a_module_outside():
  key = jax.tree_util.DictKey
  name = lambda path: norms.group_of(tuple(map(key, path.split('/'))))
  assert name('encoder/blocks/layers/mlp_norm/scale') == 'encoder/norms'
  assert name('trunk/blocks/layers/attention/query/kernel') == 'trunk/attention'
  assert name('decoder/relative_bias/embedding') == 'decoder/relative_bias'
  assert name('bias') == 'bias' and name('head/out/kernel') == 'head/out'


def test_parameters_that_are_zero_have_no_ratio_and_histories_are_no_parameters():
  zeros = {'bias': np.zeros(3, np.float32), 'dense': {'history': np.ones((2, 4), np.float32),
                                                      'kernel': np.ones((2, 2), np.float32)}}
  total, found = norms.by_group(zeros, zeros, zeros)
  assert found['update_ratio/bias'] == 0 and found['param_norm/dense'] == 2 and total == 2
