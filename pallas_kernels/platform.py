"""Which implementation serves which platform, decided when a program is lowered, not when it is
traced."""
import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp


@functools.cache
def cpu_has_bfloat16_units() -> bool:
  """True when this CPU multiplies bfloat16 in hardware (AMX or AVX-512 BF16)."""
  try:
    with open('/proc/cpuinfo') as f:
      flags = next((line for line in f if line.startswith('flags')), '').split()
  except OSError:
    return False
  return 'amx_bf16' in flags or 'avx512_bf16' in flags


def by_platform(cpu: Callable, default: Callable, *args, tpu: Callable | None = None,
                cuda: Callable | None = None):
  """Calls `cpu(*args)` in a program lowered for a CPU, `tpu(*args)` or `cuda(*args)`, where there
  is one, for a TPU or an NVIDIA GPU, and `default(*args)` for any other platform.

  The choice is made at lowering, so a program compiled ahead of time for a TPU on a CPU machine
  gets the TPU's form. Where the mesh in use is one of TPUs it is made at once: tracing the other
  forms takes most of the time of tracing a train step.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None and device.platform == 'tpu':
    return (tpu or default)(*args)
  forms = {'cpu': cpu, 'default': default, 'tpu': tpu, 'cuda': cuda}
  return jax.lax.platform_dependent(
      *args, **{name: form for name, form in forms.items() if form is not None})


def move(function: Callable, *arrays):
  """Calls `function`, which only moves elements of arrays of one dtype (gathers, scatters).

  In a program for a CPU it gets the bits of floats narrower than 32 bits as integers: XLA:CPU
  would convert all of an array to float32 and back to change a row of it. Has no gradient there.
  """
  dtype = arrays[0].dtype
  if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize >= 4:
    return function(*arrays)
  integer = jnp.dtype(f'uint{8 * dtype.itemsize}')

  def bits(*arrays):
    moved = function(*(jax.lax.bitcast_convert_type(x, integer) for x in arrays))
    return jax.lax.bitcast_convert_type(moved, dtype)

  return by_platform(bits, function, *arrays)


def interpreted(kernel: Callable, *args, compiled_on: str = 'tpu'):
  """Calls a Pallas kernel of a 'tpu', or of 'cuda': compiled on that platform, and interpreted on
  all others."""
  interpret = functools.partial(kernel, interpret=True)
  return by_platform(interpret, interpret, *args,
                     **{compiled_on: functools.partial(kernel, interpret=False)})


@functools.cache
def warn_once(message: str):
  """Warns of what a program does instead of what was asked, the first time that it is said."""
  warnings.warn(message, stacklevel=3)
