"""Measures a run: tokens per second, waiting for data, the machine's peak, memory."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lm.training.goodput import Goodput
from pallas_kernels.platform import cpu_has_bfloat16_units

# Dense peak in FLOP/s of one JAX device, from the vendors' data sheets: part of `device_kind`,
# bfloat16, float32 (as `jax.default_matmul_precision` at its default multiplies it: in one bfloat16
# pass on TPU, in TF32 on GPU). The first part that matches counts.
PEAK_FLOPS = (
    ('TPU v4', 275e12, 275e12),
    ('TPU v5 lite', 197e12, 197e12),
    ('TPU v5e', 197e12, 197e12),
    ('TPU v5', 459e12, 459e12),
    ('TPU v6', 918e12, 918e12),
    # A v7 chip shows itself as two devices; the sheet's 2,307e12 is the chip's.
    ('TPU7x', 1153.5e12, 1153.5e12),
    ('A100', 312e12, 156e12),
    ('H100', 989e12, 494e12),
    ('H200', 989e12, 494e12),
)


class StepTimer:
  """Rates of the steps, from the seconds that a `Goodput` counts as `step` and `data`.

  The first step compiles, so it is timed apart and stands in no rate.

  Example:
    with goodput.spent('step'):
      with goodput.spent('data'):
        batch = next(batches)
      state, metrics = train_step(state, batch)
      jax.block_until_ready(metrics)
      timer.step_done(tokens=batch_size * length)
  """

  def __init__(self, goodput: Goodput):
    self._goodput, self._began = goodput, goodput.seconds()
    self.first_step_seconds: float | None = None
    self._window = self._total = (0, 0.0, 0.0)  # tokens, seconds, of these waited for data
    self._mark = self._began

  def step_done(self, tokens: int) -> None:
    """Ends a step in which `tokens` targets were trained on."""
    now = self._goodput.seconds()
    if self.first_step_seconds is None:
      self.first_step_seconds = sum(now.values()) - sum(self._began.values())
    else:
      step, waited = (now[name] - self._mark[name] for name in ('step', 'data'))
      added = (tokens, step + waited, waited)
      self._window = tuple(a + b for a, b in zip(self._window, added))
      self._total = tuple(a + b for a, b in zip(self._total, added))
    self._mark = now

  def went_back(self) -> None:
    """Says that seconds of steps were counted as lost since the last step."""
    self._mark = self._goodput.seconds()

  def window(self) -> dict[str, float]:
    """Gives `tokens_per_second` and `data_wait_share` since the last call; {} when no step was."""
    window, self._window = self._window, (0, 0.0, 0.0)
    return _rates(*window)

  def total(self) -> dict[str, float]:
    """Gives the same of the whole process but its first step."""
    return _rates(*self._total)


def _rates(tokens: int, seconds: float, waited: float) -> dict[str, float]:
  if seconds <= 0:
    return {}
  return {'tokens_per_second': tokens / seconds, 'data_wait_share': waited / seconds}


def peak_flops(dtype: Any = jnp.bfloat16, devices: Sequence[jax.Device] | None = None) -> float:
  """Gives the FLOP/s that all devices together can reach in a dtype; the denominator of MFU.

  Args:
    dtype: bfloat16 or float32, the dtype of the matrix products.
    devices: `jax.devices()` by default.

  Returns:
    From the data sheet where the kind of device is known; else measured by a matrix product. CPU
    devices share one machine, so what is measured counts once a process.
  """
  devices = devices or jax.devices()
  for kind, bfloat16, float32 in PEAK_FLOPS:
    if kind.lower() in devices[0].device_kind.lower():
      return len(devices) * (bfloat16 if jnp.dtype(dtype) == jnp.bfloat16 else float32)
  if devices[0].platform == 'cpu':
    return _measured_flops(dtype) * len({device.process_index for device in devices})
  return _measured_flops(dtype) * len(devices)


def _measured_flops(dtype: Any) -> float:
  """Times square products for a third of a second and takes the best, in FLOP/s of one device."""
  if jax.default_backend() == 'cpu' and not cpu_has_bfloat16_units():
    dtype = jnp.float32  # XLA converts the operands: that is slower than float32 itself.
  size = 2048 if jnp.dtype(dtype) == jnp.bfloat16 else 1024
  # Two bfloat16 operands with a float32 result are the form that reaches a CPU's matrix unit.
  product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
  a = jax.device_put(jnp.ones((size, size), dtype), jax.local_devices()[0])
  product(a, a).block_until_ready()
  best, end = math.inf, time.perf_counter() + 0.3
  while time.perf_counter() < end:
    start = time.perf_counter()
    product(a, a).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


def peak_rss_bytes() -> int:
  """Gives the most memory that this process ever had resident, in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else 1024 * peak  # Linux counts in KiB.
