"""A compiled program in a file is loaded where it is the same program, and nowhere else."""
import jax
import jax.numpy as jnp
import pytest

from lm.parallel import executable

X = jnp.arange(8.0)


def lowered(factor):
  return jax.jit(lambda x: factor * x + 1).lower(X)


@pytest.fixture
def path(tmp_path):
  """A file with the program that doubles and adds 1."""
  path = tmp_path / 'new' / 'program'
  program = lowered(2)
  executable.save(path, program, program.compile(), jax.devices()[:1])
  return path


def test_the_same_program_runs_from_the_file(path):
  program, why_not = executable.load(path, lowered(2), jax.devices()[:1])
  assert why_not == '' and (program(X) == 2 * X + 1).all()


def test_another_program_version_or_file_is_named(path):
  load = lambda factor=2: executable.load(path, lowered(factor), jax.devices()[:1])
  assert load(3)[0] is None and 'the digest of the program' in load(3)[1]
  good = path.read_bytes()
  path.write_bytes(good.replace(f'"{jax.__version__}"'.encode(), b'"0.1"', 1))
  assert load()[0] is None and 'the version of jax is 0.1' in load()[1]
  path.write_bytes(good[:-len(good) // 2])
  assert load()[0] is None and 'does not load' in load()[1]
  path.write_bytes(b'\x00\xff not this')
  assert load()[0] is None and 'no file of `lm compile --save`' in load()[1]
