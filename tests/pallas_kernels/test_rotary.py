"""`rotary`'s kernel is the reference, in place."""

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers import positions
from pallas_kernels.measure import traffic
from pallas_kernels.rotary import bench, rotary, tpu
from pallas_kernels.rotary.specs import SPECS

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}


def operands(B, T, N, K, H, dtype, rows_of_angles=None):
  """(query, key) and their gradients, and (sin, cos) of angles far beyond a turn."""
  rng = np.random.default_rng(T + H)
  draw = lambda heads: jnp.asarray(rng.normal(size=(B, T, heads, H)), dtype)
  angles = jnp.asarray(rng.uniform(0, 100, (rows_of_angles or B, T, H // 2)), jnp.float32)
  return (draw(N), draw(K)), (draw(N), draw(K)), (jnp.sin(angles), jnp.cos(angles))


def exact(x, sin, cos):
  """Pairs as complex numbers, turned, in float64."""
  x, sin, cos = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, sin, cos))
  half = x.shape[-1] // 2
  turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)[:, :, None]
  return np.concatenate([turned.real, turned.imag], -1)


def assert_close(got, want, tolerance):
  for x, y in zip(got, want, strict=True):
    difference = np.asarray(x.astype(jnp.float32), np.float64) - y
    assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(y)  # NaN fails


@pytest.mark.supports('kernels', 'rotary positions in place, forward and backward')
@pytest.mark.parametrize('dtype, B, T, N, K, H, rows_of_angles', [
    (jnp.float32, 2, 37, 3, 1, 64, 2), (jnp.bfloat16, 2, 20, 2, 1, 128, 1),
    (jnp.bfloat16, 2, 5, 2, 1, 256, 2), (jnp.float32, 1, 1, 6, 2, 32, 1)])
def test_heads_are_turned_and_gradients_turned_back(dtype, B, T, N, K, H, rows_of_angles):
  args, gradients, (sin, cos) = operands(B, T, N, K, H, dtype, rows_of_angles)

  @jax.jit
  def run(args, gradients, sin, cos):
    out, vjp = jax.vjp(lambda *args: rotary(*args, implementation='tpu'), *args, sin, cos)
    return *out, *vjp(gradients)

  *got, dsin, dcos = run(args, gradients, sin, cos)
  want = [exact(x, sin, cos) for x in args] + [exact(x, -sin, cos) for x in gradients]
  assert_close(got, want, TOLERANCE[dtype])
  assert {x.dtype for x in got} == {jnp.dtype(dtype)} and not dsin.any() and not dcos.any()


def test_a_large_shape_with_a_tail():
  args, _, (sin, cos) = operands(1, 1030, 4, 1, 128, jnp.bfloat16)
  got = rotary(*args, sin, cos, implementation='tpu')
  assert_close(got, [exact(x, sin, cos) for x in args], 1e-2)


@pytest.mark.parametrize('implementation', ['reference', 'tpu'])
def test_values_are_those_of_the_layer(implementation):
  args, _, _ = operands(2, 9, 2, 1, 64, jnp.bfloat16)
  by = positions.rotation(jnp.arange(18).reshape(2, 9), 64, 10000.0)
  want = [np.asarray(positions.rotary(x, by), np.float64) for x in args]
  assert_close(rotary(*args, by.sin, by.cos, implementation=implementation), want, 1e-3)


def test_there_are_no_races():
  args, _, (sin, cos) = operands(2, 48, 2, 1, 64, jnp.float32)
  flat = [x.reshape(2, 48, -1) for x in args]
  interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan')
  got = tpu.rotate(1, 64, *flat, sin, cos, interpret=interpret)
  want = [exact(x, sin, cos).reshape(2, 48, -1) for x in args]
  assert_close(got, want, 1e-5)
  assert not jax._src.pallas.mosaic.interpret.interpret_pallas_call.races.races_found


@pytest.mark.parametrize('rows_of_angles', [1, 2])
def test_each_array_moves_once(rows_of_angles):
  B, T, N, K, H = SPECS['llama3_2_1b']
  function, (query, key, _, _) = bench.case(*SPECS['llama3_2_1b'], 'tpu')
  angles = jax.ShapeDtypeStruct((rows_of_angles, T, H // 2), jnp.float32)
  heads, both = 2 * B * T * (N + K) * H, 2 * rows_of_angles * T * H // 2 * 4
  assert traffic(function, query, key, angles, angles) == {'rotary': (heads + both, heads)}


def test_a_program_that_gives_its_arrays_away_is_rotated_in_place():
  flat = [jax.ShapeDtypeStruct((2, 16, width), jnp.float32) for width in (128, 256)]
  angles = jax.ShapeDtypeStruct((2, 16, 32), jnp.float32)
  rotate = lambda *args: tpu.rotate(1, 64, *args, interpret=False)
  (call,) = jax.make_jaxpr(rotate)(*flat, angles, angles).eqns
  assert call.params['input_output_aliases'] == ((0, 0), (1, 1))


def lowered(platform, **options):
  x, angles = jnp.ones((2, 16, 2, 64), jnp.bfloat16), jnp.ones((2, 16, 32))
  call = lambda q, k: sum(jnp.sum(y * q) for y in rotary(q, k, angles, angles, **options))
  return jax.jit(jax.grad(call, argnums=(0, 1))).trace(x, x).lower(lowering_platforms=(platform,))


def test_none_is_pallas_on_a_tpu_and_the_plain_program_on_a_cpu():
  assert lowered('tpu').as_text().count('kernel_name = "rotary"') == 2
  costs = [lowered('cpu', **options).compile().cost_analysis()
           for options in ({}, {'implementation': 'reference'})]
  for figure in ('flops', 'bytes accessed'):
    assert costs[0][figure] <= costs[1][figure]


def test_what_the_kernel_does_not_take_is_refused_and_left_to_xla():
  args, _, angles = operands(1, 3, 2, 1, 80, jnp.float32)
  with pytest.raises(NotImplementedError, match='H=80 must divide 128 or be a multiple of 256'):
    rotary(*args, *angles, implementation='tpu')
  assert_close(rotary(*args, *angles), [exact(x, *angles) for x in args], 1e-5)


@pytest.mark.parametrize('changes, message', [
    ({'key': jnp.ones((1, 3, 2, 32))}, 'H even'), ({'sin': jnp.ones((1, 3, 64))}, 'sin is float32'),
    ({'cos': jnp.ones((1, 3, 32), jnp.bfloat16)}, 'cos is bfloat16'),
    ({'implementation': 'gpu'}, "implementation='gpu'")])
def test_arguments_that_do_not_fit_are_one_sentence(changes, message):
  x, angles = jnp.ones((1, 3, 2, 64)), jnp.ones((1, 3, 32))
  with pytest.raises(ValueError, match=message):
    rotary(**{**dict(query=x, key=x, sin=angles, cos=angles), **changes})
