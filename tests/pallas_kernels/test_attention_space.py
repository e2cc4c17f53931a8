"""Attention of every shape, dtype and option is float64's, with all gradients."""
from hypothesis import HealthCheck, given, settings
import pytest

from flash_attention_cases import calls, check, results
from pallas_kernels.flash_attention import cpu, reference, tpu
from pallas_kernels.flash_attention.block_sizes import Blocks

SMALL = Blocks(128, 128, 2)


def drawn(examples):
  return settings(max_examples=examples, derandomize=True, deadline=None, database=None,
                  suppress_health_check=list(HealthCheck))


@pytest.mark.supports('kernels', 'flash attention on TPU', 'its log-sum-exp', 'causal',
                      'bidirectional', 'sliding window', 'prefix', 'segment ids', 'query offset',
                      'grouped queries', 'soft cap', 'bias and its gradient', 'attention sinks',
                      'attention in chunks', 'dropout of attention probabilities',
                      'head dims 32 to 256', 'any length')
@drawn(8)
@given(calls((1, 140, 300), (32, 64, 80, 96, 128, 256), (SMALL, Blocks(128, 256, 4), None)))
def test_the_tpus_kernel_is_float64s_attention_and_gradient(call):
  check(call, results(tpu, call))


@pytest.mark.parametrize('module', [reference, cpu])
@drawn(8)
@given(calls((1, 33, 260), (8, 80, 96)))
def test_attention_by_xla_is_float64s_attention_and_gradient(module, call):
  check(call, results(module, call))
