"""Every optimiser over 8 devices takes the steps of one, and shards its state as the parameters."""
import pathlib

import pytest

CHILD = pathlib.Path(__file__).with_name('sharded_optimizers.py')
CASES = ['SGD', 'AdamW', 'Adagrad', 'RMSprop', 'Adafactor', 'Lion', 'LAMB', 'Muon', 'Sophia',
         'SOAP', 'ScheduleFree', 'average', 'units', 'AdamW in 8 bits', 'SOAP in 8 bits']
# Products in bfloat16, and sums that round to another code, differ by more than float32 does.
ROUNDED = {'Muon': 0.02, 'AdamW in 8 bits': 0.01, 'SOAP in 8 bits': 0.01}


@pytest.fixture(scope='module')
def facts(child_with_devices):
  """{case: facts}, of `sharded_optimizers.py` on 8 host devices."""
  return child_with_devices(CHILD)


@pytest.mark.supports('optimisers', 'state sharded as the parameters, preconditioners by blocks')
@pytest.mark.parametrize('case', CASES)
def test_a_mesh_takes_the_steps_of_one_device(facts, case):
  assert facts['devices'] == 8
  assert facts[case]['difference'] < ROUNDED.get(case, 1e-4)


@pytest.mark.parametrize('case', [case for case in CASES if case != 'Adafactor'])
def test_each_device_holds_its_part_of_the_state(facts, case):
  # 8 devices; scales of norms are whole on each, and so are, here, those of blocks of 8-bit codes:
  # 64 numbers are one block, which 4 devices do not divide.
  assert facts[case]['share'] < (0.16 if '8 bits' in case else 0.15)
