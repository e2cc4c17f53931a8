"""`glu`'s kernels are the reference, in one pass over memory."""
import functools

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers.mlp import activate
from pallas_kernels.glu import bench, glu, tpu
from pallas_kernels.glu.reference import ACTIVATIONS
from pallas_kernels.glu.specs import SPECS
from pallas_kernels.measure import traffic

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}


def operands(shape, dtype):
  """(gate, up) and a gradient; gates reach where the functions are flat."""
  rng = np.random.default_rng(sum(shape))
  gate, up, dy = (jnp.asarray(rng.normal(0, size, shape), dtype) for size in (4, 1, 1))
  return (gate, up), dy


def exact(activation, args, dy):
  """Value and gradients in float64."""
  with jax.enable_x64(True):
    gate, up, dy = (jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64)
                    for x in (*args, dy))
    y, vjp = jax.vjp(lambda gate, up: ACTIVATIONS[activation](gate) * up, gate, up)
    return jax.tree.map(np.asarray, (y, vjp(dy)))


@functools.partial(jax.jit, static_argnames=('activation', 'implementation'))
def value_and_gradients(args, dy, activation, implementation):
  call = functools.partial(glu, activation=activation, implementation=implementation)
  y, vjp = jax.vjp(call, *args)
  return y, vjp(dy)


def assert_close(got, want, tolerance):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    difference = np.asarray(x.astype(jnp.float32), np.float64) - y
    assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(y)  # NaN fails


@pytest.mark.supports('kernels', 'SwiGLU and GeGLU, forward and backward')
@pytest.mark.parametrize('activation', ACTIVATIONS)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_value_and_gradients_are_float64s(activation, dtype):
  args, dy = operands((2, 37, 64), dtype)
  got = value_and_gradients(args, dy, activation, 'tpu')
  assert_close(got, exact(activation, args, dy), TOLERANCE[dtype])
  assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(dtype)}


def test_a_large_shape_with_tails_on_both_sides():
  args, dy = operands((300, 1300), jnp.bfloat16)
  got = value_and_gradients(args, dy, 'geglu_exact', 'tpu')
  assert_close(got, exact('geglu_exact', args, dy), 1e-2)


@pytest.mark.parametrize('activation', ACTIVATIONS)
@pytest.mark.parametrize('implementation', ['reference', 'tpu'])
def test_values_are_those_of_the_layer(activation, implementation):
  args, _ = operands((5, 32), jnp.bfloat16)
  want = np.asarray(activate(activation, *args), np.float64)
  got = glu(*args, activation=activation, implementation=implementation)
  assert_close(got, want, 1e-3)  # a last bit of bfloat16 here or there


def test_there_are_no_races_and_nothing_beyond_the_array_is_used():
  (gate, up), dy = operands((40, 1100), jnp.float32)
  interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan')
  got = (tpu.forward('swiglu', gate, up, interpret=interpret),
         tpu.backward('swiglu', gate, up, dy, interpret=interpret))
  assert_close(got, exact('swiglu', (gate, up), dy), 1e-5)
  assert not jax._src.pallas.mosaic.interpret.interpret_pallas_call.races.races_found


@pytest.mark.parametrize('model', ['modernbert_large', 'llama3_70b'])
def test_each_array_moves_once(model):
  M, F, _ = SPECS[model]
  function, args = bench.case(*SPECS[model], 'tpu', is_training=True)
  array = 2 * M * F
  assert traffic(function, *args) == {'glu_forward': (2 * array, array),
                                      'glu_backward': (3 * array, 2 * array)}


def lowered(platform, **options):
  x = jax.ShapeDtypeStruct((32, 128), jnp.bfloat16)
  call = lambda gate, up: jnp.sum(glu(gate, up, activation='swiglu', **options) * up)
  traced = jax.jit(jax.grad(call, argnums=(0, 1))).trace(x, x)
  return traced.lower(lowering_platforms=(platform,))


def test_none_is_pallas_on_a_tpu_and_the_plain_program_on_a_cpu():
  on_tpu = lowered('tpu').as_text()
  assert 'glu_backward' in on_tpu
  costs = [lowered('cpu', **options).compile().cost_analysis()
           for options in ({}, {'implementation': 'reference'})]
  for figure in ('flops', 'bytes accessed', 'transcendentals'):
    assert costs[0].get(figure) == costs[1].get(figure)


def test_what_the_kernels_do_not_take_is_refused_and_left_to_xla():
  x = jnp.ones((2, 16), jnp.float16)
  with pytest.raises(NotImplementedError, match='float16, the kernel takes bfloat16 and float32'):
    glu(x, x, activation='swiglu', implementation='tpu')
  np.testing.assert_allclose(glu(x, x, activation='swiglu'), 1 / (1 + np.exp(-1)), rtol=1e-3)


@pytest.mark.parametrize('changes, message', [
    ({'activation': 'gelu'}, "activation='gelu' must be one of"),
    ({'up': jnp.ones((2, 15))}, r'up float32 \(2, 15\), they must be alike'),
    ({'implementation': 'gpu'}, "implementation='gpu'")])
def test_arguments_that_do_not_fit_are_one_sentence(changes, message):
  fitting = dict(gate=jnp.ones((2, 16)), up=jnp.ones((2, 16)), activation='swiglu')
  with pytest.raises(ValueError, match=message):
    glu(**{**fitting, **changes})
