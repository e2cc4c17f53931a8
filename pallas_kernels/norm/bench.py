"""Static cycles and bytes of `norm` beside XLA's: `python -m pallas_kernels.norm.bench`."""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.norm import norm
from pallas_kernels.measure import print_table
from pallas_kernels.norm.specs import SPECS


def _run(kind, implementation, is_training, x, residual, scale, bias, gradients):
  """Value, or value and gradients."""
  call = lambda x, residual, scale, bias: norm(x, scale, bias, residual=residual, kind=kind,
                                               epsilon=1e-6, implementation=implementation)
  out, vjp = jax.vjp(call, x, residual, scale, bias)
  return (out, vjp(gradients)) if is_training else out


def case(M: int, D: int, kind: str, implementation: str, is_training: bool, has_residual: bool,
         dtype=jnp.bfloat16) -> tuple:
  """(function, arguments) of one call, and with `is_training` its gradients."""
  x, row = jax.ShapeDtypeStruct((M, D), dtype), jax.ShapeDtypeStruct((D,), jnp.float32)
  return (functools.partial(_run, kind, implementation, is_training),
          (x, x if has_residual else None, row, row if kind == 'layernorm' else None,
           (x, x) if has_residual else x))


def cases() -> dict[str, tuple]:
  """Every shape of specs.py."""
  forms = {'': (False, False), ' with gradients': (True, False),
           ' of a sum, with gradients': (True, True)}
  return {f'{model}{form} {implementation}': case(*shape, implementation, *which)
          for model, shape in SPECS.items() for form, which in forms.items()
          for implementation in ('tpu', 'reference')}


if __name__ == '__main__':
  print_table('pallas_kernels.norm.bench:cases', cases())
