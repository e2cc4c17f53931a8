"""A child of test_pipeline.py: stages of 8 host devices, of plain stacks and of the families with 4
layers, as JSON.

Arguments name the runs: 'stacks', 'restart', or FAMILY/MESH; without any, all are run.
"""
import dataclasses
import json
import pathlib
import sys
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import sharded_models as models

from lm.errors import UserError
from lm.layers.stack import Stack
from lm.parallel import pipeline
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training.checkpoint import Checkpointer

CIRCULAR = {'pipeline_turns': 2}
MESHES = {  # name: axes, changes of the rules
    'stage 2': (dict(data=4, stage=2), {}),
    'stage 4': (dict(data=2, stage=4), {}),
    'circular': (dict(data=4, stage=2), CIRCULAR),
    'few microbatches': (dict(data=2, stage=2, fsdp=2), {'pipeline_microbatches': 2}),
    'across slices': (dict(slice=2, data=4), {'layers': 'slice'}),
    'stage fsdp': (dict(data=1, stage=2, fsdp=4), {}),
    'stage expert': (dict(data=1, stage=2, expert=4), {}),
    'stage sequence': (dict(data=1, stage=2, sequence=4), {}),
    'stage tensor': (dict(data=1, stage=2, tensor=4), {}),
    'stage fsdp tensor': (dict(data=1, stage=2, fsdp=2, tensor=2), {}),
    'circular fsdp sequence': (dict(data=1, stage=2, fsdp=2, sequence=2), CIRCULAR),
}
models.MESHES = MESHES
models.FAMILIES = {name: dataclasses.replace(config, num_layers=4)
                   for name, config in models.FAMILIES.items()}


class Block(nn.Module):
  """A root, whose gradient at x = 0 is no number, and noise."""

  @nn.compact
  def __call__(self, x, rows, shared, own_rows, own):
    scale = self.param('scale', nn.with_partitioning(nn.initializers.ones, (None,)), x.shape[-1:])
    key, offset = own
    noise = jax.random.uniform(key, x.shape)
    y = jnp.sqrt(x * scale) + rows + shared + own_rows + offset
    return y, {'rows': x + own_rows, 'sum': (y * rows).sum(), 'noise': noise, 'none': None}


def stack(stages, turns, num_layers, rows=16, scan=True, **rules):
  """Whether a plain stack in stages is the same in turn: x, outputs and gradients."""
  config = MeshConfig(data=8 // stages, stage=stages)
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.uniform(0.1, 1, shape).astype(np.float32)
  params = {'layers': {'scale': draw(num_layers, 3)}}
  arguments = draw(rows, 3), draw(rows, 1), draw(3), draw(num_layers, rows, 3), draw(num_layers)
  keys = jax.random.split(jax.random.key(1), num_layers)

  def outputs(rules, params, x, rows, shared, own_rows, offsets):
    one = Stack(lambda _: Block(parent=None), num_layers, scan, 'full', 0.5, rules)
    x, found = one.apply({'params': params}, x, rows, shared, own_rows, (keys, offsets),
                         jax.random.key(3))
    found = found if scan else jax.tree.map(lambda *x: jnp.stack(x), *found)
    noise = found.pop('noise')
    return ((x * rows).sum() + found['sum'].sum() + (found['rows'] * shared).sum()), (
        x, found, noise)

  def run(rules):
    function = jax.value_and_grad(lambda *x: outputs(rules, *x), range(6), has_aux=True)
    (_, (x, found, noise)), gradients = jax.jit(function)(params, *arguments)
    return jax.tree.map(np.asarray, ((x, found, gradients), noise))

  want, _ = run(Rules())
  got, noise = run(Rules(pipeline_turns=turns, **rules).on(config.build()))
  same = jax.tree.map(lambda x, y: np.allclose(x, y, 1e-5, 1e-5), got, want)
  return {'same': bool(jax.tree.all(same)), 'draws': len(np.unique(noise)) / noise.size}


def stacks():
  runs = {'gpipe': (4, 1, 8), 'turns divide': (2, 2, 8), 'stages divide': (4, 2, 8),
          'neither divides': (2, 3, 12), 'unrolled': (2, 1, 4)}
  found = {name: stack(*sizes, scan=name != 'unrolled') for name, sizes in runs.items()}
  refused = {'layers': lambda: stack(4, 1, 6), 'turns': lambda: stack(2, 3, 4),
             'rows': lambda: stack(4, 1, 4, rows=12),
             'microbatches': lambda: stack(2, 1, 4, rows=48, pipeline_microbatches=5)}
  for name, function in refused.items():
    try:
      found[name] = function()
    except UserError as error:
      found[name] = str(error)
  rules = Rules(pipeline_microbatches=8, pipeline_turns=2).on(MeshConfig(stage=4).build())
  plan = pipeline.schedule(rules, 16)
  return found | {'ticks': plan.ticks, 'bubble': plan.bubble}


def restart():
  """The losses of two steps in stages, and of the second one on another mesh."""
  losses = []
  with tempfile.TemporaryDirectory() as folder:
    for axes in MESHES['stage 2'][0], dict(data=1, fsdp=8):
      rules = Rules().on(MeshConfig(**axes).build())
      step, abstract, _ = models.lowered('gpt', rules)
      batch = jax.device_put(models.batch('gpt'), rules.sharding('batch'))
      saver = Checkpointer(pathlib.Path(folder))
      if losses:
        state = saver.restore(abstract)[1]
      else:
        state, metrics = step(models.start('gpt', abstract), batch)
        losses.append(float(metrics['loss']))
        saver.save(1, state, {})
        saver.wait()
      losses.append(float(step(state, batch)[1]['loss']))
      saver.close()
  return losses


def main():
  names = sys.argv[1:] or ['stacks', 'restart'] + [
      f'{family}/{mesh}' for family in models.FAMILIES for mesh in MESHES]
  own = {'stacks': stacks, 'restart': restart}
  found = {name: function() for name, function in own.items() if name in names}
  print(json.dumps(found | models.results([name for name in names if name not in own])))


if __name__ == '__main__':
  main()
