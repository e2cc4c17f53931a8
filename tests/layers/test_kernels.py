"""Kernels on a mesh compute what one device computes, and models on TPUs have them in."""
import pathlib

import pytest
import sharded_kernels

from pallas_kernels import tpu_compiler

KERNELS = {'flash_attention_forward', 'flash_attention_backward', 'grouped_matmul',
           'grouped_matmul_weights'}


@pytest.fixture(scope='module')
def differences(child_with_devices):
  return child_with_devices(pathlib.Path(__file__).with_name('sharded_kernels.py'), devices=4)


@pytest.mark.supports('kernels', 'attention with rows and heads cut over a mesh')
@pytest.mark.parametrize('run', sharded_kernels.RUNS)
def test_attention_on_a_mesh_is_that_of_one_device(differences, run):
  assert differences[run] < 1e-5


@pytest.mark.supports('kernels', 'models on a mesh of TPUs have them by default')
def test_a_model_compiled_for_a_mesh_of_tpus_has_the_kernels(monkeypatch):
  pytest.importorskip('libtpu', reason='the tpu extra is not installed')
  monkeypatch.setenv('PYTHONPATH', str(pathlib.Path(__file__).parent), prepend=':')
  report, = tpu_compiler.reports('tpu_models:cases', ['gpt'], tpu_compiler.TOPOLOGIES['v5e']
                                 ).values()
  assert not report.refusal
  assert KERNELS <= {kernel.split('.')[0] for kernel in report.kernels}
