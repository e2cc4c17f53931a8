"""Which implementation serves which platform, decided when a program is lowered, not when it is
traced."""
import functools
import warnings
from collections.abc import Callable

import jax


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
