"""A step on any mesh is the step on one device, by the collectives that MESHES.md says."""
import types

import mesh_table
import pytest
from sharded_models import FAMILIES, MESHES

TOLERANCE = 1e-5  # of the largest element of each gradient: float32 sums in another order
QUICK = ['gpt/fsdp sequence tensor', 'gpt/zero1', 't5/fsdp sequence tensor',
         'moe/fsdp expert tensor', 'transformer_xl/slice']
COUNTED = mesh_table.COUNTED
TABLE = mesh_table.read()


@pytest.fixture(scope='module')
def quick(child_with_devices):
  return types.MappingProxyType(child_with_devices(mesh_table.CHILD, *QUICK))


@pytest.mark.supports('precision and parallelism', 'tensor, sequence and expert meshes', 'ZeRO-1')
@pytest.mark.parametrize('name', QUICK)
def test_loss_gradients_and_carry_are_those_of_one_device(quick, name):
  assert quick['devices'] == 8 and quick[name]['difference'] < TOLERANCE


@pytest.mark.parametrize('name', QUICK)
def test_the_collectives_are_those_of_the_table(quick, name):
  found = mesh_table.row_of(quick[name])
  assert {key: found[key] for key in COUNTED} == {key: TABLE[name][key] for key in COUNTED}


@pytest.mark.supports('precision and parallelism', 'one reduction of gradients a step')
def test_gradients_of_all_microbatches_are_summed_over_devices_once(quick):
  assert quick['transformer_xl/slice']['collectives']['reduced in loops'] == 0
  assert quick['gpt/fsdp sequence tensor']['collectives']['reduced in loops'] > 0  # counts them


def test_the_table_has_every_family_on_every_mesh_and_each_is_one_device():
  assert list(TABLE) == [f'{family}/{mesh}' for family in FAMILIES for mesh in MESHES]
  assert not {name: row for name, row in TABLE.items() if not row['difference'] < TOLERANCE}


def test_no_all_gather_makes_whole_activations_or_more_than_a_matrix():
  assert not {name: row for name, row in TABLE.items() if row['largest gathered'] > row['allowed']}


@pytest.mark.slow
def test_every_family_on_every_mesh_is_one_device(child_with_devices):
  found = child_with_devices(mesh_table.CHILD, timeout=7200)
  assert found.pop('devices') == 8 and list(found) == list(TABLE)
  assert not {name: x for name, x in found.items() if not x['difference'] < TOLERANCE}
