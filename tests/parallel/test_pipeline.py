"""Layers in stages: the same numbers as one after another, and what does not divide is refused."""
import pathlib
import types

import pytest

CHILD = pathlib.Path(__file__).with_name('staged_models.py')
TOLERANCE = 1e-5  # as in test_meshes.py
QUICK = 'gpt/stage 4', 'transformer_xl/circular'

# As in test_meshes.py, of 4 layers: what goes to neighbours, to all stages, and is summed once.
# Nine of the gathers are of the layers' norms, a number each.
_COUNTED = 'collective-permute', 'all-gather', 'all-reduce', 'all-to-all', 'largest gathered'
GOLDEN = {
    'gpt/stage 4': (6, 13, 6, 0, 64),
    'transformer_xl/circular': (66, 11, 6, 2, 64),
}


@pytest.fixture(scope='module')
def quick(child_with_devices):
  return types.MappingProxyType(child_with_devices(
      CHILD, 'stacks', 'memory', 'gathers', 'restart', 'commands', *QUICK))


@pytest.mark.supports('precision and parallelism', 'pipeline stages, GPipe and circular')
@pytest.mark.parametrize('name', QUICK)
def test_loss_gradients_and_carry_are_those_of_one_device(quick, name):
  assert quick['devices'] == 8 and quick[name]['difference'] < TOLERANCE


@pytest.mark.parametrize('name', GOLDEN)
def test_stages_send_to_neighbours_and_gather_no_parameter(quick, name):
  found, golden = quick[name]['collectives'], dict(zip(_COUNTED, GOLDEN[name]))
  assert {key: found.get(key, 0) for key in golden} == golden
  assert found['largest gathered'] < 4 * 16 * 2 * 2  # elements of the smallest kernel of 4 layers


@pytest.mark.parametrize('remat', ['full', 'none'])
def test_no_tick_keeps_the_parameters_of_its_layers(quick, remat):
  found = quick['memory']
  assert found[f'{remat} 16'] - found[f'{remat} 2'] < found['layer']


def test_parameters_that_a_stage_shares_are_gathered_once_a_step(quick):
  assert quick['gathers']['ticks'] == 0 < quick['gathers']['before']


@pytest.mark.parametrize('name', ['gpipe', 'turns divide', 'stages divide', 'neither divides',
                                  'unrolled'])
def test_a_stack_in_stages_is_the_stack_in_turn(quick, name):
  """Values, outputs and gradients, also where a bubble on zeros would make them NaN; and no two
  rows or layers draw the same."""
  assert quick['stacks'][name] == {'same': True, 'draws': 1.0}


def test_the_bubble_is_counted(quick):
  assert quick['stacks']['ticks'] == 8 * 2 + 4 - 1
  assert quick['stacks']['bubble'] == pytest.approx(3 / 19)


@pytest.mark.parametrize('name, sentence', [
    ('layers', 'mesh axis stage=4 does not divide 6 layers; the nearest that does is 3 or 6'),
    ('turns', 'mesh axis stage=2 does not divide 4 layers in Rules.pipeline_turns=3; take turns '
              'that divide 4'),
    ('rows', '12 rows do not divide over mesh axis stage=4 and the 2 devices of a stage that share '
             'the batch; the nearest that do are 8 or 16'),
    ('microbatches', 'Rules.pipeline_microbatches=5 is not a multiple of mesh axis stage=2 that '
                     'divides the 12 rows of a device; the nearest that is is 4 or 6')])
def test_what_does_not_divide_is_refused_with_the_nearest_that_does(quick, name, sentence):
  assert quick['stacks'][name] == sentence


@pytest.mark.parametrize('first, other', [('stage 2', 'fsdp 8'), ('stage 2', 'stage 4'),
                                          ('fsdp 8', 'stage 2')])
def test_a_run_goes_on_with_other_stages_and_without_any(quick, first, other):
  losses = quick['restart']
  assert losses[f'second of {first}'] < losses[f'first of {first}']
  assert losses[f'{first} to {other}'] == pytest.approx(losses[f'second of {first}'], rel=1e-6)


def test_what_was_trained_in_stages_is_evaluated_there_and_elsewhere_and_generates(quick):
  found = quick['commands']
  there, on_one_device = found['bits']
  assert found['status'] == 0 and there == pytest.approx(on_one_device, rel=1e-5)
  assert 0 < found['tokens'] <= 4


@pytest.mark.slow
def test_every_family_in_stages_is_one_device(child_with_devices):
  found = child_with_devices(CHILD, timeout=3600)
  shares = {name: x['difference'] for name, x in found.items() if '/' in name}
  assert found['devices'] == 8 and len(shares) == 55
  assert not {name: share for name, share in shares.items() if not share < TOLERANCE}
