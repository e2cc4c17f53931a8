"""What every test shares: checked shapes, a compilation cache, tiny models, 8 devices.

Imported before any `lm` module, so that jaxtyping checks each annotated shape while tests run.
"""
import functools
import gc
import json
import os
import pathlib
import subprocess
import sys

import jax
import jaxtyping
import pytest
import warm_builder

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
# Compiles in a quarter of the time; what is compiled runs for milliseconds.
QUICK_COMPILE = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {QUICK_COMPILE}'.strip()

jaxtyping.install_import_hook(['lm.layers', 'lm.models', 'lm.training.losses', 'pallas_kernels'],
                              'beartype.beartype')


def pytest_configure(config):
  """Keeps compiled programs beside pytest's own cache, for this process and its children."""
  if getattr(config, 'cache', None) is None:
    return
  # Programs of children with other device counts have other keys, so all may share one folder.
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(config.cache.mkdir('jax')))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.05')
  jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
  jax.config.update('jax_persistent_cache_min_compile_time_secs',
                    float(os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS']))


@pytest.fixture(scope='session', autouse=True)
def _warm_builder():
  warm_builder.install()


@pytest.fixture(scope='session')
def stories(tmp_path_factory):
  """A run of stories260K, a real Llama."""
  from lm import main
  weights = REPOSITORY.parent / 'shared' / 'data' / 'weights' / 'stories260K'
  if not weights.exists():
    pytest.skip('stories260K is not beside the repository')
  directory = tmp_path_factory.mktemp('stories') / 'run'
  assert not main.main(['convert', f'--from={weights / "stories260K.bin"}',
                        f'--tokenizer={weights / "tok512.bin"}', f'--run_dir={directory}'])
  return directory


@pytest.fixture(scope='module', autouse=True)
def _bounded_memory():
  """Forgets what jax has traced and compiled where it has grown to gigabytes."""
  yield
  pages = pathlib.Path('/proc/self/statm')
  if pages.exists() and int(pages.read_text().split()[1]) * os.sysconf('SC_PAGESIZE') > 3 << 30:
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def strict():
  """Forbids jax's silent changes of dtype and rank: a kernel says what it means."""
  with jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise'):
    yield


def gpt2(**changes):
  """A GPT-2 of 3 layers and 16 dimensions, in float32; scanned, since that compiles fastest."""
  from lm.models.gpt import GPTConfig  # Here: this file stands before the import hook's modules.
  tiny = dict(vocab_size=37, max_length=32, d_model=16, num_layers=3, num_heads=4, d_ff=24,
              dtype='float32', init_std=0.2, scan_layers=True)
  return GPTConfig(**{**tiny, **changes})


def llama(**changes):
  """A Llama of 3 layers with grouped key-value heads, in float32."""
  style = dict(num_kv_heads=2, norm='rmsnorm', positions='rotary', activation='swiglu',
               use_bias=False, tie_embeddings=False)
  return gpt2(**{**style, **changes})


@pytest.fixture(scope='session')
def tiny_configs():
  """{'gpt2': ..., 'llama': ...}: makers of tiny configs, called with the fields to change."""
  return {'gpt2': gpt2, 'llama': llama}


@pytest.fixture(scope='session', params=['gpt2', 'llama'])
def tiny_config(request, tiny_configs):
  """Makes a tiny config of each family."""
  return tiny_configs[request.param]


def run_child(script, *args, devices=8, timeout=900):
  """Runs a Python file in a child with this many host devices; returns its last line as JSON."""
  flags = f'--xla_force_host_platform_device_count={devices} {QUICK_COMPILE}'
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags,
                 'PYTHONPATH': os.pathsep.join([str(REPOSITORY), os.environ.get('PYTHONPATH', '')])}
  child = subprocess.run([sys.executable, str(script), *map(str, args)], env=environment, text=True,
                         cwd=REPOSITORY, capture_output=True, timeout=timeout, check=False)
  assert child.returncode == 0, child.stderr[-4000:]
  return json.loads(child.stdout.strip().splitlines()[-1])


@pytest.fixture(scope='session')
def child_with_devices():
  """`run_child`: `child_with_devices(path, *args, devices=8)`."""
  return functools.partial(run_child)
