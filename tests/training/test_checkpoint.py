"""Checkpoints survive what disks, kills and other meshes do to them. Faults are really made."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.errors import UserError
from lm.training import checkpoint, checkpoint_io, integrity

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


class Moments(NamedTuple):
  mu: dict
  count: jax.Array


def make_state(seed: int = 0, width: int = 16):
  rng = np.random.default_rng(seed)
  bits = rng.integers(0, 2**32, (16, 32), dtype=np.uint32)
  params = {'embed': jnp.asarray(rng.normal(size=(width, 8)), jnp.float32),
            'layers': {'wi_0': jnp.asarray(rng.normal(size=(width, 4)), jnp.bfloat16)}}
  return {'step': jnp.int32(seed), 'params': params, 'rng': jax.random.key(seed),
          'raw_rng': jax.random.PRNGKey(seed), 'bits': jnp.asarray(bits),
          'opt_state': (Moments(jax.tree.map(jnp.zeros_like, params), jnp.int32(3)), (), None)}


def abstract_of(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def raw_bytes(tree):
  return [(str(x.dtype), x.shape, np.asarray(
      jax.random.key_data(x) if checkpoint_io._is_key(x) else x).tobytes())
          for x in jax.tree.leaves(tree)]


def save_steps(directory, *steps, keep=9, losses=None):
  saver = checkpoint.Checkpointer(directory, keep)
  for i, step in enumerate(steps):
    saver.save(step, make_state(step), {'step': step},
               {'loss': losses[i]} if losses is not None else None)
  saver.close()


def largest_file(directory):
  return max((p for p in (directory / 'state').rglob('*') if p.is_file()),
             key=lambda p: p.stat().st_size)


def run_child(code: str, *arguments, devices: int = 1):
  # Not by the tests' flags: what they compile quickly changes the bits of bfloat16's NaNs.
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(REPOSITORY),
                 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'}
  return subprocess.run([sys.executable, '-c', textwrap.dedent(code), *map(str, arguments)],
                        env=environment, capture_output=True, text=True, timeout=120)


def test_round_trip_is_bit_exact_for_every_dtype_and_tree(tmp_path):
  saver = checkpoint.Checkpointer(tmp_path / 'c')
  state = make_state(7)
  assert saver.save(7, state, {'step': 7, 'epoch': 1})
  step, restored, data = saver.restore(abstract_of(state))
  assert (step, data) == (7, {'step': 7, 'epoch': 1})
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert raw_bytes(restored) == raw_bytes(state)
  np.testing.assert_array_equal(jax.random.normal(restored['rng']), jax.random.normal(state['rng']))
  saver.close()


def test_donating_the_state_right_after_save_does_not_change_what_is_saved(tmp_path):
  saver = checkpoint.Checkpointer(tmp_path)
  step = jax.jit(lambda x: x * 3 + 1, donate_argnums=0)
  x = step(jnp.ones((2048, 1024)))
  saver.save(1, {'x': x}, {})
  y = step(x)
  for _ in range(20):
    y = step(y)
  y.block_until_ready()
  # On the CPU the host copy is the buffer itself, which JAX then does not donate.
  np.testing.assert_array_equal(saver.restore({'x': abstract_of(y)})[1]['x'], 4.0)
  saver.close()


def test_empty_directory_restores_nothing(tmp_path):
  saver = checkpoint.Checkpointer(tmp_path / 'new')
  assert saver.restore(abstract_of(make_state())) is None
  assert saver.latest_step() is None and saver.steps() == []


def test_same_step_is_saved_once(tmp_path):
  saver = checkpoint.Checkpointer(tmp_path)
  assert saver.save(3, make_state(1), {})
  assert not saver.save(3, make_state(2), {})
  np.testing.assert_array_equal(saver.restore(abstract_of(make_state()))[1]['step'], 1)
  saver.close()


def test_latest_and_best_are_kept_and_nothing_else(tmp_path):
  save_steps(tmp_path, 10, 20, 30, 40, 50, keep=2, losses=[3.0, 1.0, float('nan'), 2.0, 2.5])
  assert checkpoint.list_steps(tmp_path) == [20, 40, 50]
  assert checkpoint.best_step(tmp_path) == 20
  assert sorted(p.name for p in tmp_path.iterdir()) == ['00000020', '00000040', '00000050']


SHARDED = """
  import sys, jax, numpy as np, jax.numpy as jnp
  from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
  from lm.training import checkpoint
  mode, directory = sys.argv[1:3]
  mesh = jax.make_mesh((jax.device_count(),), ('fsdp',), axis_types=(AxisType.Auto,))
  sharded, replicated = NamedSharding(mesh, P('fsdp')), NamedSharding(mesh, P())
  bits = np.random.default_rng(0).integers(0, 2**32, (64, 16), dtype=np.uint32)
  state = {'w': jax.device_put(jnp.asarray(bits).view(jnp.float32), sharded),
           'h': jax.device_put(jnp.asarray(bits).view(jnp.bfloat16), sharded),
           'keys': jax.device_put(jax.random.split(jax.random.key(1), 8), sharded),
           'step': jax.device_put(jnp.int32(5), replicated)}
  saver = checkpoint.Checkpointer(directory)
  if mode == 'save':
    saver.save(5, state, {'step': 5})
  else:
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                            state)
    _, restored, _ = saver.restore(abstract)
    for name, x in restored.items():
      y = state[name]
      assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (name, x.sharding)
      if name == 'keys':
        x, y = jax.random.key_data(x), jax.random.key_data(y)
      assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name
  saver.close()
  print('ok', jax.device_count())
"""


def test_state_sharded_on_8_devices_restores_bit_exactly_on_4_and_1(tmp_path):
  for mode, devices in ('save', 8), ('restore', 4), ('restore', 1):
    child = run_child(SHARDED, mode, tmp_path, devices=devices)
    assert child.stdout.strip() == f'ok {devices}', child.stderr
    assert child.stderr == '', 'Orbax is not silent'


def truncate(directory):
  path = largest_file(directory)
  os.truncate(path, path.stat().st_size // 2)
  return path.name, 'bytes instead of'


def flip_one_bit(directory):
  path = largest_file(directory)
  contents = bytearray(path.read_bytes())
  contents[len(contents) // 2] ^= 4
  path.write_bytes(contents)
  return path.name, 'digests differ'


def remove_a_file(directory):
  path = largest_file(directory)
  path.unlink()
  return path.name, 'is missing'


def remove_the_digests(directory):
  (directory / 'digests.json').unlink()
  return 'digests.json', 'incomplete'


def spoil_the_digests(directory):
  (directory / 'digests.json').write_text('{"state/x": 3')
  return 'digests.json', 'cannot be read'


def flip_the_data_position(directory):
  path = directory / 'checkpoint.json'
  path.write_text(path.read_text().replace('"data"', '"dbta"'))
  return 'checkpoint.json', 'digests differ'


@pytest.mark.parametrize('damage', [truncate, flip_one_bit, remove_a_file, remove_the_digests,
                                    spoil_the_digests, flip_the_data_position])
def test_damaged_checkpoint_is_named_set_aside_and_the_last_good_one_used(tmp_path, damage):
  save_steps(tmp_path, 100, 200)
  name, what = damage(tmp_path / '00000200')
  said = []
  saver = checkpoint.Checkpointer(tmp_path, log=said.append)
  step, state, data = saver.restore(abstract_of(make_state()))
  assert (step, data, int(state['step'])) == (100, {'step': 100}, 100)
  assert len(said) == 1 and 'step 200' in said[0] and name in said[0] and what in said[0]
  assert '\n' not in said[0]
  assert (tmp_path / 'corrupt-00000200').is_dir() and saver.steps() == [100]
  # The step is reached again: it is saved again, and a second damage finds another name.
  saver.save(200, make_state(200), {'step': 200})
  saver.wait()
  damage(tmp_path / '00000200')
  assert saver.restore(abstract_of(make_state()))[0] == 100
  assert (tmp_path / 'corrupt-00000200-2').is_dir()
  saver.close()


def test_no_good_checkpoint_left_is_an_error_until_the_user_decides(tmp_path):
  save_steps(tmp_path, 1, 2)
  for step in 1, 2:
    flip_one_bit(tmp_path / f'{step:08d}')
  for _ in range(2):  # A restart must not silently begin at step 0.
    saver = checkpoint.Checkpointer(tmp_path, log=lambda _: None)
    with pytest.raises(UserError, match=r'corrupt-00000001, corrupt-00000002 .*--run_dir') as error:
      saver.restore(abstract_of(make_state()))
    assert '\n' not in str(error.value)


def test_another_model_is_an_error_that_names_the_path_and_both_shapes(tmp_path):
  save_steps(tmp_path, 1)
  saver = checkpoint.Checkpointer(tmp_path)
  with pytest.raises(UserError, match=r'params/embed is float32\[16, 8\] .*float32\[32, 8\]'):
    saver.restore(abstract_of(make_state(width=32)))
  more = {**make_state(), 'extra': jnp.zeros(3)}
  with pytest.raises(UserError, match=r'extra is absent in .* float32\[3\] in this'):
    saver.restore(abstract_of(more))
  less = make_state()
  del less['params']['embed']
  with pytest.raises(UserError, match=r'params/embed is float32\[16, 8\] in .* absent in this'):
    saver.restore(abstract_of(less))
  assert saver.steps() == [1], 'a good checkpoint must not be set aside'


def test_params_are_restored_without_the_optimiser(tmp_path):
  save_steps(tmp_path, 1, 2, 3, losses=[2.0, 1.0, 3.0])
  step, params = checkpoint.restore_params(tmp_path)
  assert step == 3 and isinstance(params['embed'], np.ndarray)
  assert raw_bytes(params) == raw_bytes(make_state(3)['params'])
  step, params = checkpoint.restore_params(
      tmp_path, abstract_of(make_state()['params']), step='best')
  assert step == 2 and isinstance(params['embed'], jax.Array)
  assert raw_bytes(params) == raw_bytes(make_state(2)['params'])
  assert checkpoint.restore_params(tmp_path, step=1)[0] == 1
  with pytest.raises(UserError, match='step=9 has no checkpoint .*1, 2, 3'):
    checkpoint.restore_params(tmp_path, step=9)
  with pytest.raises(UserError, match='no checkpoint'):
    checkpoint.restore_params(tmp_path / 'none')


def test_params_of_a_damaged_checkpoint_are_never_used_nor_moved(tmp_path):
  save_steps(tmp_path, 1, 2)
  flip_one_bit(tmp_path / '00000002')
  said = []
  assert checkpoint.restore_params(tmp_path, log=said.append)[0] == 1
  assert len(said) == 1 and 'step 2' in said[0] and (tmp_path / '00000002').is_dir()
  with pytest.raises(UserError, match='no good checkpoint'):
    checkpoint.restore_params(tmp_path, step=2, log=said.append)


def check_after_kill(directory, steps):
  said = []
  saver = checkpoint.Checkpointer(directory, log=said.append)
  step, state, data = saver.restore(
      {'params': {'w': jax.ShapeDtypeStruct((256, 1024), jnp.float32)}})
  assert said == [] and step in steps and data == {'step': step}
  assert np.all(np.asarray(state['params']['w']) == step)
  assert not list(saver.directory.glob('*ing-*')), 'unfinished files are left'
  return step


class Killed(BaseException):
  """What no `except Exception` catches, as nothing catches a SIGKILL."""


# What a save does to the disk once the arrays stand there.
ACTS = ((os, 'replace'), (os, 'rename'), (shutil, 'rmtree'), (pathlib.Path, 'rename'),
        (integrity, 'sync_directory'), (integrity, 'write_digests'))


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_death_before_each_act_of_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path):
  def save(saver, step):
    saver.save(step, {'params': {'w': jnp.full((256, 1024), step, jnp.float32)}}, {'step': step})
    saver.wait()

  def dying(act, acts, moment):
    def counted(*arguments, **keywords):
      acts.append(act.__name__)
      if len(acts) >= moment:  # Once dead, it does nothing more.
        raise Killed
      return act(*arguments, **keywords)
    return counted

  after = []
  for moment in range(1, 30):
    directory, acts = tmp_path / str(moment), []
    saver = checkpoint.Checkpointer(directory, keep=1)
    save(saver, 1)
    with pytest.MonkeyPatch.context() as patch:
      for place, name in ACTS:
        patch.setattr(place, name, dying(getattr(place, name), acts, moment))
      try:
        save(saver, 2)
      except Killed:
        pass
    after.append(check_after_kill(directory, (1, 2)))
    if len(acts) < moment:
      break
  assert {'write_digests', 'rename', 'rmtree', 'replace'} <= set(acts) and len(after) > 6
  assert after == sorted(after) and set(after) == {1, 2}


KILLED = """
  import sys, jax.numpy as jnp
  from lm.training import checkpoint
  saver = checkpoint.Checkpointer(sys.argv[1], keep=2)
  for step in range(1, 10**6):
    saver.save(step, {'params': {'w': jnp.full((256, 1024), step, jnp.float32)}}, {'step': step})
    print(step, flush=True)
"""


@pytest.mark.parametrize('delay', [0.0, 0.02])
def test_kill_9_during_a_save_leaves_a_good_checkpoint(tmp_path, delay):
  environment = {**os.environ, 'PYTHONPATH': str(REPOSITORY), 'JAX_PLATFORMS': 'cpu'}
  child = subprocess.Popen([sys.executable, '-c', textwrap.dedent(KILLED), tmp_path],
                           env=environment, stdout=subprocess.PIPE, text=True)
  for _ in range(3):
    assert child.stdout.readline(), 'the child died by itself'
  time.sleep(delay)
  child.send_signal(signal.SIGKILL)
  child.communicate()
  check_after_kill(tmp_path, range(2, 1000))


FULL_DISK = """
  import resource, sys, jax.numpy as jnp
  from lm.errors import UserError
  from lm.training import checkpoint
  how, directory = sys.argv[1:3]
  saver = checkpoint.Checkpointer(directory)
  saver.save(1, {'params': {'w': jnp.ones((64, 64))}}, {'step': 1})
  saver.wait()
  if how == 'limit':
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
  for act in saver.wait, lambda: saver.save(3, {'params': {'w': jnp.ones((64, 64))}}, {}):
    try:
      saver.save(2, {'params': {'w': jnp.ones((1024, 1024))}}, {'step': 2})
      act()
      print('no error')
    except UserError as error:
      print(error)
  saver.save(4, {'params': {'w': jnp.ones((64, 64))}}, {'step': 4})  # There is room for this one.
  saver.close()
  print(saver.steps(), checkpoint.restore_params(directory, step=1)[1]['w'].sum())
"""


def check_full_disk(child, reason):
  assert child.returncode == 0 and child.stderr == '', child.stderr
  first, second, last = child.stdout.splitlines()
  for line in first, second:
    assert 'step 2' in line and reason in line and 'step 1 is intact' in line, line
  assert last == '[1, 4] 4096.0'


def test_file_too_large_is_one_sentence_and_earlier_checkpoints_stay(tmp_path):
  check_full_disk(run_child(FULL_DISK, 'limit', tmp_path), 'File too large')


@pytest.fixture
def small_disk(tmp_path):
  disk = tmp_path / 'disk'
  disk.mkdir()
  mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', disk],
                           capture_output=True, text=True) if os.geteuid() == 0 else None
  if mounted is None or mounted.returncode:
    pytest.skip('a small disk needs root and the right to mount')
  yield disk
  subprocess.run(['umount', '-l', disk], check=True)


def test_full_disk_is_one_sentence_and_earlier_checkpoints_stay(small_disk):
  check_full_disk(run_child(FULL_DISK, 'disk', small_disk / 'c'), 'No space left on device')


def test_read_only_disk_is_one_sentence(small_disk):
  subprocess.run(['mount', '-o', 'remount,ro', small_disk], check=True)
  with pytest.raises(UserError, match='Read-only file system.*--run_dir'):
    checkpoint.Checkpointer(small_disk / 'c')
  with pytest.raises(UserError, match='Read-only file system.*--run_dir'):
    checkpoint.Checkpointer(small_disk)


def test_directory_below_a_file_and_keep_of_zero_are_refused(tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(UserError, match='Not a directory.*--run_dir'):
    checkpoint.Checkpointer(tmp_path / 'file' / 'checkpoints')
  with pytest.raises(UserError, match='keep=0'):
    checkpoint.Checkpointer(tmp_path, keep=0)


def test_importing_the_module_and_listing_steps_do_not_import_orbax(tmp_path):
  save_steps(tmp_path, 4, losses=[1.0])
  child = run_child("""
    import json, sys
    from lm.training import checkpoint
    saver = checkpoint.Checkpointer(sys.argv[1])
    print(json.dumps([saver.steps(), checkpoint.best_step(sys.argv[1]),
                      sorted(m for m in ('orbax', 'tensorstore', 'tensorflow')
                             if m in sys.modules)]))
  """, tmp_path)
  assert json.loads(child.stdout) == [[4], 4, []], child.stderr
