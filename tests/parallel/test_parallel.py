"""The mesh, its rules, and: a step on 8 devices is the step on one."""
import dataclasses
import pathlib
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from lm import run
from lm.data.tasks import TextTask
from lm.errors import UserError
from lm.layers import kernels
from lm.models.transformer_xl import TransformerXLConfig
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules, constrain
from lm.training import state as state_lib
from lm.training.loop import TrainConfig
from lm.training.optimizers import AdamW

CHILD = pathlib.Path(__file__).with_name('sharded_steps.py')
SHARDED = ['data', 'fsdp', 'both', 'torus']
BORN_THERE = ['fsdp', 'both', 'torus']  # the others get the state of one device


@pytest.fixture(scope='session')
def steps(child_with_devices):
  """{run: facts of one step}, of `sharded_steps.py` on 8 host devices."""
  return types.MappingProxyType(child_with_devices(CHILD))


def test_the_child_has_8_devices(steps):
  assert steps['devices'] == 8


@pytest.mark.supports('precision and parallelism', 'data and fsdp meshes')
@pytest.mark.parametrize('name', SHARDED)
def test_loss_and_every_gradient_are_those_of_one_device(steps, name):
  assert steps[name]['loss'] == pytest.approx(steps[name]['one_loss'], rel=1e-5)
  assert steps[name]['gradient_difference'] < 2e-5 and steps[name]['same_weight']


def test_bfloat16_on_a_mesh_differs_by_its_rounding_only(steps):
  facts = steps['both_bf16']
  assert facts['loss'] == pytest.approx(facts['one_loss'], rel=1e-3)
  assert facts['gradient_difference'] < 0.03
  assert facts['loss'] != steps['both']['loss']  # else it ran in float32


def test_held_out_rows_that_do_not_divide_over_devices_or_batches_count_once(steps):
  on_mesh, on_one = steps['held_out']
  assert on_mesh == pytest.approx(on_one, rel=1e-6)


@pytest.mark.parametrize('name', BORN_THERE)
def test_parameters_are_born_the_same_bit_for_bit_on_any_mesh(steps, name):
  assert steps[name]['same_init']


@pytest.mark.parametrize('name, shards', [('fsdp', 8), ('both', 4), ('data', 1), ('torus', 8)])
def test_each_device_holds_its_part_of_parameters_and_optimiser_state(steps, name, shards):
  whole, held = steps['one']['bytes_per_device'][0], steps[name]['bytes_per_device']
  assert len(set(held)) == 1  # no device holds more than another
  # Scales of norms are not sharded, here up to a twentieth of all.
  assert whole / shards <= held[0] <= whole / shards + whole / 20


@pytest.mark.parametrize('name', ['one', *SHARDED])
def test_a_step_keeps_the_shardings_and_donates_its_state(steps, name):
  assert steps[name]['same_shardings'] and steps[name]['donated']


def mesh(**sizes):
  sizes = dataclasses.asdict(MeshConfig(data=1)) | sizes
  return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def test_of_a_gathered_heads_gradient_each_device_keeps_its_part_for_the_backward_pass():
  rules = Rules(embed=('data', 'fsdp')).on(mesh(data=4, fsdp=4))
  V, D, rows = 512, 32, (16, 8)
  shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
      ((V, D), jnp.float32), ((*rows, D), jnp.bfloat16), (rows, jnp.int32), (rows, jnp.float32))]

  def backward(embedding, hidden, targets, weights):
    loss = lambda embedding, hidden: kernels.cross_entropy(
        rules, hidden=hidden, embedding=embedding, targets=targets, loss_weights=weights)
    return jax.vjp(loss, embedding, hidden)[1]

  kept = jax.tree.leaves(jax.eval_shape(backward, *shapes))  # of all 16 devices together
  assert sum(x.size for x in kept) < 2 * V * D


def test_rules_give_the_spec_of_each_axis():
  rules = Rules().on(mesh(data=2, fsdp=4))
  rows = ('slice', 'data', 'fsdp', 'expert', 'stage')
  assert rules.spec('batch', 'length', None) == PartitionSpec(rows, 'sequence', None)
  assert rules.spec('vocab', 'embed') == PartitionSpec('tensor', 'fsdp')
  assert [rules.shards(name) for name in ('batch', 'heads', None)] == [8, 1, 1]
  assert rules.sharding('embed').shard_shape((8,)) == (2,)


@pytest.mark.parametrize('names, message', [
    (('batch', 'lenght'), "'lenght' is not a logical axis; Rules has .*length"),
    (('mesh',), "'mesh' is not a logical axis"),
    (('batch', 'embed'), "both sharded over 'fsdp'"),
    (('embed', 'embed'), "both sharded over 'fsdp'")])
def test_a_wrong_axis_is_refused(names, message):
  with pytest.raises(UserError, match=message):
    Rules().spec(*names)


def test_a_rule_for_a_mesh_axis_that_is_not_there_is_refused():
  message = "Rules.mlp='tensors' names the mesh axis 'tensors'.*data, stage, fsdp"
  with pytest.raises(UserError, match=message):
    Rules(mlp='tensors').on(mesh(data=2, fsdp=4))


def test_a_rule_that_names_a_mesh_axis_twice_is_refused():
  with pytest.raises(UserError, match=r"Rules.embed=.* names the mesh axis 'fsdp' twice"):
    Rules(embed=('fsdp', 'data', 'fsdp')).on(mesh(data=2, fsdp=4))


def test_a_parameter_that_no_rule_covers_is_named():
  class Bare(nn.Module):
    config = types.SimpleNamespace(init_carry=lambda batch_size: None, param_dtype='float32')

    @nn.compact
    def initialize(self):
      self.param('table', nn.initializers.zeros, (3, 4))

  with pytest.raises(UserError, match=r'^table has shape \(3, 4\) and no names for its axes'):
    state_lib.abstract_state(Bare(), AdamW().build(10), Rules().on(mesh()))


def test_constrain_checks_names_even_without_a_mesh():
  x = jnp.zeros((2, 3))
  assert constrain(x, Rules(), 'batch', 'length') is x
  with pytest.raises(UserError, match='not a logical axis'):
    constrain(x, Rules(), 'batch', 'legnth')
  with pytest.raises(ValueError, match='2 axes but 1 names'):
    constrain(x, Rules(), 'batch')


DEVICES = jax.devices() * 8  # `build` refuses before it looks at the devices themselves


@pytest.mark.parametrize('sizes, fix', [
    (dict(fsdp=7), '^mesh axis fsdp=7 does not divide the 8 devices; the nearest that does is 4 or '
                   '8$'),
    (dict(data=16), 'axis data=16 does not divide the 8 devices; the nearest that does is 8$'),
    (dict(data=2, fsdp=3), 'fsdp=3 does not divide the 4 devices, of 8, that the axes before it '
                           'leave; the nearest that does is 2 or 4$'),
    (dict(data=4), 'axis data=4 leaves 4 of 8 devices without work; set it to 8, or to -1'),
    (dict(data=1, sequence=2, tensor=2), 'sequence=2 leaves 4 of 8 .*; set it to 4, or to -1')])
def test_a_mesh_that_does_not_fit_is_refused_with_a_number_that_does(sizes, fix):
  with pytest.raises(UserError, match=fix):
    MeshConfig(**sizes).build(DEVICES)


class Chip:
  """A device of a slice."""
  platform, device_kind, process_index = 'gpu', 'chip', 0

  def __init__(self, number, slice_index):
    self.id, self.slice_index = number, slice_index


def test_only_the_slice_axis_crosses_slices():
  chips = [Chip(i, i % 2) for i in range(8)]  # neighbours in the list are in different slices
  with pytest.raises(UserError, match='slice=1 and the devices are in 2 slices.* set it to 2'):
    MeshConfig(fsdp=4).build(chips)
  grid = MeshConfig(slice=2, data=2, tensor=2).build(chips).devices.reshape(2, 4)
  assert [{chip.slice_index for chip in row} for row in grid] == [{0}, {1}]


@pytest.mark.parametrize('sizes, message', [
    (dict(data=-1, fsdp=-1), 'more than one -1'), (dict(fsdp=0), 'fsdp=0 must be at least 1'),
    (dict(data=-2), 'data=-2 must be at least 1')])
def test_sizes_that_cannot_be_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    MeshConfig(**sizes)


def test_abstract_state_computes_nothing_whatever_the_size(tiny_configs):
  config = tiny_configs['llama'](d_model=8192, num_layers=80, num_heads=64, d_ff=28672,
                                 vocab_size=2**17)
  rules = Rules().on(mesh(data=2, fsdp=64))
  before = len(jax.live_arrays())
  state = state_lib.abstract_state(config.build(rules), AdamW().build(10), rules)
  leaves = jax.tree.leaves(state)
  assert len(jax.live_arrays()) <= before + 2  # a key, perhaps; not 70 billion parameters
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
  whole = sum(x.size * x.dtype.itemsize for x in leaves)
  held = sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
  assert whole > 8e11 and held == pytest.approx(whole / 64, rel=0.01)


def test_zero_1_cuts_the_state_of_the_optimiser_and_no_parameter(tiny_configs):
  rules = Rules(embed=None, opt_embed='fsdp').on(mesh(fsdp=8))
  module = tiny_configs['llama'](d_model=64).build(rules)
  state = state_lib.abstract_state(module, AdamW().build(10), rules)
  held = lambda x: int(np.prod(x.sharding.shard_shape(x.shape)))
  assert all(held(x) == x.size for x in jax.tree.leaves(state.params))
  moments = jax.tree.leaves(state.opt_state)
  whole = sum(x.size for x in moments)
  assert whole / 8 <= sum(map(held, moments)) < whole / 8 + whole / 50  # norms are whole


def test_a_parameter_that_does_not_divide_over_the_mesh_is_named(tiny_configs):
  rules = Rules().on(mesh(data=1, fsdp=3))
  message = r'has shape .*, and 16 does not divide over the 3 devices of mesh axis fsdp'
  with pytest.raises(UserError, match=message):
    state_lib.abstract_state(tiny_configs['gpt2']().build(rules), AdamW().build(10), rules)


@pytest.mark.parametrize('lengths, sentence', [
    (dict(sequence_length=30), 'sequence_length=30 does not divide over the 4 devices of mesh axis '
                               'sequence; the nearest that does is 28 or 32'),
    (dict(sequence_length=2), 'over the 4 devices .* the nearest that does is 4$'),
    (dict(sequence_length=8, memory_length=13), '^memory_length=13 does not divide over the 4')])
def test_a_length_that_does_not_divide_over_its_devices_is_refused(lengths, sentence):
  model = TransformerXLConfig(vocab_size=2**17, max_length=32,
                              memory_length=lengths.get('memory_length', 16))
  train = TrainConfig(sequence_length=lengths['sequence_length'])
  experiment = run.Experiment(TextTask(), model, AdamW(), train)
  with pytest.raises(UserError, match=sentence):
    experiment.rules_on(mesh(sequence=4))
  with_room = dataclasses.replace(experiment, train=TrainConfig(sequence_length=32))
  if 'memory_length' not in lengths:
    assert with_room.rules_on(mesh(sequence=4)).shards('length') == 4


def test_rules_are_a_value():
  assert Rules() == Rules() and hash(Rules()) == hash(dataclasses.replace(Rules()))
