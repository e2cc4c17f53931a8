"""Static cycles and bytes of `glu` beside XLA's: `python -m pallas_kernels.glu.bench`."""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.glu import glu
from pallas_kernels.glu.specs import SPECS
from pallas_kernels.measure import print_table


def _run(activation, implementation, is_training, gate, up, dy):
  """Value, or value and gradients."""
  call = functools.partial(glu, activation=activation, implementation=implementation)
  y, vjp = jax.vjp(call, gate, up)
  return (y, vjp(dy)) if is_training else y


def case(M: int, F: int, activation: str, implementation: str, is_training: bool,
         dtype=jnp.bfloat16) -> tuple:
  """(function, arguments) of one call, and with `is_training` its gradients."""
  x = jax.ShapeDtypeStruct((M, F), dtype)
  return functools.partial(_run, activation, implementation, is_training), (x, x, x)


def cases() -> dict[str, tuple]:
  """Every shape of specs.py."""
  return {f'{model}{" with gradients" * is_training} {implementation}':
          case(*shape, implementation, is_training) for model, shape in SPECS.items()
          for is_training in (False, True) for implementation in ('tpu', 'reference')}


if __name__ == '__main__':
  print_table('pallas_kernels.glu.bench:cases', cases())
