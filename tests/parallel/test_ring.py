"""Attention over a length that is cut over devices is attention on one."""
import pathlib
import types

import jax.numpy as jnp
import numpy as np
import pytest

from lm.errors import UserError
from lm.layers import kernels
from lm.parallel import ring
from lm.parallel.rules import Rules

CHILD = pathlib.Path(__file__).with_name('sharded_lengths.py')
QUICK = ['zigzag distance bias', 'zigzag window', 'memory', 'encoder', 'all to all']
SLOW = ['zigzag', 'zigzag of 8', 'zigzag of 2', 'causal in natural order', 'prefix',
        'bidirectional', 'bidirectional window', 'cross', 'all to all with a memory',
        'all to all with a prefix', 'length that does not divide']


@pytest.fixture(scope='module')
def quick(child_with_devices):
  return types.MappingProxyType(child_with_devices(CHILD, *QUICK, 'bfloat16', 'dropout'))


@pytest.fixture(scope='module')
def slow(child_with_devices):
  return types.MappingProxyType(child_with_devices(CHILD, *SLOW))


@pytest.mark.supports('precision and parallelism', 'ring attention in zig-zag order',
                      'all-to-all attention')
@pytest.mark.parametrize('name', QUICK)
def test_attention_and_its_gradients_are_those_of_one_device(quick, name):
  assert quick['devices'] == 8 and quick[name] < 2e-6


def test_bfloat16_on_a_ring_is_as_near_to_float32_as_on_one_device(quick):
  ring_error, error = quick['bfloat16']
  assert ring_error < 1.2 * error < 0.02


def test_dropout_on_a_ring_keeps_the_mean_and_drops_the_same_in_the_gradient(quick):
  mean_error, gradient_error = quick['dropout']
  assert mean_error < 5 and gradient_error < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize('name', SLOW)
def test_every_kind_of_attention_is_that_of_one_device(slow, name):
  assert slow[name] < 2e-6


@pytest.mark.parametrize('size', [2, 3, 4, 8])
def test_zigzag_gives_each_device_as_many_visible_pairs(size):
  owners = [ring._owner(chunk, size) for chunk in range(2 * size)]
  keys_seen = np.arange(2 * size) + 0.5  # chunks at or before each chunk, its own counted half
  assert np.bincount(owners).tolist() == [2] * size
  assert np.ptp(np.bincount(owners, keys_seen)) == 0


def test_an_all_to_all_of_heads_that_do_not_divide_is_refused():
  query = jnp.zeros((1, 4, 3, 2))
  with pytest.raises(UserError, match="3 query heads of a device over 2 devices of mesh axis seq"):
    kernels._all_to_all(('sequence',), 2, None, query=query, key=query, value=query)


def test_one_device_needs_no_order():
  assert not ring.is_zigzag(Rules(), 32)
