"""A compiled program in a file: the start of a run need not wait for the compiler.

One line of JSON, what the program is and who compiled it; behind it the executable. Loading one may
run what it holds: load only files that you trust.
"""
import json
import pathlib
import pickle
from typing import Any

import jax
from jax.experimental import serialize_executable

from lm.parallel.distributed import PACKAGES, digest, program_facts

COMPILERS = [f'the version of {name}' for name in PACKAGES if name in ('jax', 'jaxlib', 'libtpu')]


def facts(lowered: jax.stages.Lowered, devices: Any) -> dict[str, Any]:
  """What must be the same where an executable is made and where it runs."""
  versions = program_facts()
  return {**{name: versions[name] for name in COMPILERS},
          'the kind of device': devices[0].device_kind, 'the number of devices': len(devices),
          'the digest of the program': digest(lowered.as_text())}


def save(path: pathlib.Path, lowered: jax.stages.Lowered, compiled: jax.stages.Compiled,
         devices: Any):
  """Writes the executable of a program for these devices."""
  payload, _, _ = serialize_executable.serialize(compiled)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(json.dumps(facts(lowered, devices)).encode() + b'\n' + payload)


def load(path: pathlib.Path, lowered: jax.stages.Lowered, devices: Any
         ) -> tuple[jax.stages.Compiled | None, str]:
  """The executable in a file, or None and in a sentence why it is not this program's."""
  head, _, payload = path.read_bytes().partition(b'\n')
  try:
    made = json.loads(head)
  except ValueError:
    return None, f'--compiled={path} is no file of `lm compile --save`'
  for name, here in facts(lowered, devices).items():
    if made.get(name) != here:
      return None, f'{name} is {made.get(name)} in --compiled={path} and {here} here'
  try:
    return serialize_executable.deserialize_and_load(
        payload, lowered.in_tree, lowered.out_tree, execution_devices=list(devices)), ''
  except (jax.errors.JaxRuntimeError, pickle.UnpicklingError, ValueError, EOFError) as error:
    return None, f'--compiled={path} does not load ({str(error).splitlines()[0]})'
