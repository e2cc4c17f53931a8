"""A child of test_pipeline.py: stages of 8 host devices, of plain stacks and of the families with 4
layers, as JSON.

Arguments name the runs: a function of `main`, or FAMILY/MESH; without any, all are run.
"""
import dataclasses
import json
import pathlib
import re
import sys
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import sharded_models as models

from lm import main as main_lib
from lm import run as run_lib
from lm.errors import UserError
from lm.inference.sampling import SamplingConfig
from lm.layers.stack import Stack
from lm.parallel import pipeline
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training.checkpoint import Checkpointer
from pallas_kernels.dropout import Draws

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
  """A root, whose gradient at x = 0 is no number, and what is drawn."""

  @nn.compact
  def __call__(self, x, rows, shared, own_rows, own, draws):
    scale = self.param('scale', nn.with_partitioning(nn.initializers.ones, (None,)), x.shape[-1:])
    y = jnp.sqrt(x * scale) + rows + shared + own_rows + own[0]
    drawn = None if draws is None else draws.each(3)
    return y, {'rows': x + own_rows, 'sum': (y * rows).sum(), 'drawn': drawn, 'none': None}


def stack(stages, turns, num_layers, rows=16, scan=True, **rules):
  """Whether a plain stack in stages is the same in turn: x, outputs and gradients."""
  config = MeshConfig(data=8 // stages, stage=stages)
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.uniform(0.1, 1, shape).astype(np.float32)
  params = {'layers': {'scale': draw(num_layers, 3)}}
  arguments = draw(rows, 3), draw(rows, 1), draw(3), draw(num_layers, rows, 3), draw(num_layers)

  def outputs(rules, params, x, rows, shared, own_rows, offsets):
    one = Stack(lambda _: Block(parent=None), num_layers, scan, 'full', 0.5, rules)
    x, found = one.apply({'params': params}, x, rows, shared, own_rows, (offsets,),
                         Draws.of(jax.random.key(3), len(x)))
    found = found if scan else jax.tree.map(lambda *x: jnp.stack(x), *found)
    return (x * rows).sum() + found['sum'].sum() + (found['rows'] * shared).sum(), (x, found)

  def run(rules):
    function = jax.value_and_grad(lambda *x: outputs(rules, *x), range(6), has_aux=True)
    (_, (x, found)), gradients = jax.jit(function)(params, *arguments)
    return jax.tree.map(np.asarray, (x, found, gradients))

  want, got = run(Rules()), run(Rules(pipeline_turns=turns, **rules).on(config.build()))
  same = jax.tree.map(lambda x, y: np.allclose(x, y, 1e-5, 1e-5), got, want)
  drawn = got[1]['drawn']
  return {'same': bool(jax.tree.all(same)), 'draws': len(np.unique(drawn)) / drawn.size}


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


class Product(nn.Module):
  """x tanh(w), with far more elements in w than in x."""

  @nn.compact
  def __call__(self, x, rows, shared, own_rows, own, draws):
    del rows, shared, own_rows, own, draws
    shape = x.shape[-1:] * 2
    return jnp.tanh(x @ self.param('w', nn.with_partitioning(nn.zeros, (None, None)), shape)), None


def memory():
  """Bytes that a device needs for gradients beyond its arguments and results, for one part of the
  rows in each stage and for eight, and those of a layer's parameters."""
  D, L, rows, needed = 64, 8, 64, {}
  params = {'layers': {'w': jnp.zeros((L, D, D))}}
  for remat in 'full', 'none':
    for microbatches in 2, 16:
      rules = Rules(pipeline_turns=2, pipeline_microbatches=microbatches).on(
          MeshConfig(data=4, stage=2).build())
      one = Stack(lambda _: Product(parent=None), L, True, remat, 0.0, rules)
      loss = lambda params, x, one=one: one.apply({'params': params}, x, None, None, None, ())[
          0].sum()
      compiled = jax.jit(jax.grad(loss)).lower(params, jnp.zeros((rows, D))).compile()
      needed[f'{remat} {microbatches}'] = compiled.memory_analysis().temp_size_in_bytes
  return needed | {'layer': 4 * D * D}


def gathers():
  """All-gathers of a step in a pipeline's ticks, and before them, where devices of a stage share
  its parameters."""
  step, abstract, features = models.lowered('gpt', models.rules_of('stage fsdp'))
  program = step.lower(abstract, features).compile().as_text()
  names = re.findall(r' all-gather(?:-start)?\(.*op_name="([^"]*/blocks/[^"]*)"', program)
  ticks = [name for name in names if 'blocks/shard_map/while' in name]
  return {'ticks': len(ticks), 'before': len(names) - len(ticks)}


def restart():
  """The loss of a second step where the first was made, and on the meshes that go on with it."""
  rules = {name: Rules().on(MeshConfig(**axes).build()) for name, axes in (
      ('stage 2', MESHES['stage 2'][0]), ('stage 4', MESHES['stage 4'][0]),
      ('fsdp 8', dict(data=1, fsdp=8)))}
  models.FAMILIES['plain'] = dataclasses.replace(  # whose loss falls in one step
      models.FAMILIES['gpt'], dropout_rate=0.0, attention_dropout_rate=0.0, layer_drop_rate=0.0)
  programs = {name: models.lowered('plain', of_mesh) for name, of_mesh in rules.items()}

  def loss(name, state):
    batch = jax.device_put(models.batch('plain'), rules[name].sharding('batch'))
    state, metrics = programs[name][0](state, batch)
    return state, float(metrics['loss'])

  losses = {}
  for first, others in ('stage 2', ('stage 4', 'fsdp 8')), ('fsdp 8', ('stage 2',)):
    state, losses[f'first of {first}'] = loss(first, models.start('plain', programs[first][1]))
    with tempfile.TemporaryDirectory() as folder:
      saver = Checkpointer(pathlib.Path(folder))
      saver.save(1, state, {})
      saver.wait()
      for other in others:
        restored = saver.restore(programs[other][1])[1]
        losses[f'{first} to {other}'] = loss(other, restored)[1]
      saver.close()
    losses[f'second of {first}'] = loss(first, state)[1]
  return losses


def commands():
  """Bits a byte and a completion of a run that was trained in stages, there and on one device."""
  with tempfile.TemporaryDirectory() as folder:
    directory = pathlib.Path(folder)
    for i in range(4):
      (directory / f'{i}.txt').write_text(' '.join(['the of and to'] * 20 * (i + 1)))
    status = main_lib.main([
        'train', *(f'--gin_file=gin/{name}.gin' for name in (
            'models/gpt_small_cpu', 'optim/adamw', 'objectives/causal_lm', 'runs/pretrain',
            'mesh/pipeline')), f"--gin.FILES='{directory}/*.txt'", f"--gin.CACHE_DIR='{directory}'",
        "--gin.vocabularies.VocabularyConfig.kind='byte'", '--gin.VOCAB_SIZE=259',
        '--gin.gpt.GPTConfig.d_model=16', '--gin.gpt.GPTConfig.num_layers=2',
        "--gin.gpt.GPTConfig.dtype='float32'", '--gin.gpt.GPTConfig.d_ff=16',
        '--gin.SEQUENCE_LENGTH=32', '--gin.BATCH_SIZE=16',
        '--gin.NUM_STEPS=2', '--gin.loop.TrainConfig.eval_batches=1', f'--run_dir={directory}/run'])
    run_dir = f'{directory}/run'
    experiment = run_lib.open_experiment((), (), run_dir)
    too_large = dataclasses.replace(experiment, mesh=MeshConfig(data=1, stage=16))
    bits = [run_lib.evaluate(each, run_dir)[each.task.name]['bits_per_byte']
            for each in (experiment, too_large)]
    sampling = SamplingConfig(temperature=0, max_new_tokens=4)
    completion, = run_lib.generate(experiment, run_dir, ['the of'], sampling)['completions']
    return {'status': status, 'bits': bits, 'tokens': len(completion['tokens'])}


def main():
  own = {function.__name__: function for function in (stacks, memory, gathers, restart, commands)}
  names = sys.argv[1:] or list(own) + [
      f'{family}/{mesh}' for family in models.FAMILIES for mesh in MESHES]
  found = {name: function() for name, function in own.items() if name in names}
  print(json.dumps(found | models.results([name for name in names if name not in own])))


if __name__ == '__main__':
  main()
