"""Which implementation serves which platform, decided when a program is lowered, not when it is
traced."""
import functools
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


def by_platform(cpu: Callable, default: Callable, *args):
  """Calls `cpu(*args)` in a program lowered for a CPU and `default(*args)` in any other.

  The choice is made at lowering, so a program compiled ahead of time for a TPU on a CPU machine
  gets the TPU's form.
  """
  return jax.lax.platform_dependent(*args, cpu=cpu, default=default)
