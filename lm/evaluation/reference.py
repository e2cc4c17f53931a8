"""The reference of preferences: what the parameters that a run begins with say of the answers.

It is asked once, before the first step, so that training holds one model alone. R/reference.npz has
for each split the nats [examples, 2] of the chosen and the rejected answer, float64, and what they
are of: the digest of the parameters, of the data, and the length to which conversations are cut.
"""
from collections.abc import Callable
import hashlib
import pathlib
from typing import Any

import jax
import numpy as np
import tqdm

from lm.data.loader import Loader
from lm.errors import UserError
from lm.parallel.batches import GlobalBatch
from lm.parallel.distributed import Hosts
from lm.training.preference import answer_logps

FILE = 'reference.npz'


def logps(module: Any, params: Any, prepared: Any, split: str, sequence_length: int,
          batch_size: int, hosts: Hosts = Hosts(), progress: bool = True) -> np.ndarray:
  """The nats of both answers of every example of a split, float64 [examples, 2].

  Args:
    module, params: the model.
    prepared: the examples; see `lm.data.examples.PreparedExamples`.
    sequence_length: of a row; batch_size: rows at a time.
    hosts: who compute together, all with the same arguments; each gets all of it.
  """
  rows = prepared.rows(split, sequence_length, seed=0)
  loader, where = Loader.of_rows(rows, batch_size), GlobalBatch(module.rules, batch_size)

  def score(params, batch):
    outputs, _ = module.apply({'params': params}, batch, method='outputs')
    return answer_logps(outputs, batch)

  over_mesh = {} if module.rules.mesh is None else {'out_shardings': module.rules.sharding()}
  program = hosts.same_program(jax.jit(score, **over_mesh))
  found = np.zeros((len(prepared.cache(split)), 2))
  for first in tqdm.trange(0, len(rows), batch_size, desc=f'reference, {split}', unit=' batches',
                           disable=not (progress and hosts.is_main)):
    batch = where.place(loader.batch(first // batch_size, where.own))
    answers_BP2 = np.asarray(program(params, batch), np.float64)
    for row, answers_P2 in zip(range(first, min(first + batch_size, len(rows))), answers_BP2):
      members = rows.members(row)
      found[members] = answers_P2[:len(members)]
  return found


def of_run(prepared: Any, directory: pathlib.Path, module: Any, settings: Any,
           hosts: Hosts = Hosts()) -> Callable[[int, Any], None]:
  """What fills in the references of a run's preferences, called with the step and the parameters
  from which the run goes on: at step 0 it asks these and keeps what they say, else it takes what
  was kept. Of other data it does nothing.

  Args:
    prepared: the run's data.
    directory: of the run.
    module: the model.
    settings: `sequence_length` and `batch_size` of the run.
    hosts: who compute together.
  """
  def fill(step: int, params: Any) -> None:
    of_splits = getattr(prepared, 'references', {})
    if step:
      load(prepared, directory, settings)
      return
    for split, references in of_splits.items():
      references[:] = logps(module, params, prepared, split, settings.sequence_length,
                            settings.batch_size, hosts)
    if of_splits and hosts.is_main:
      temporary = directory / f'{FILE}.part.npz'
      np.savez(temporary, **of_splits, **_key(prepared, settings), parameters=_digest(params))
      temporary.replace(directory / FILE)

  return fill


def load(prepared: Any, directory: pathlib.Path, settings: Any) -> None:
  """Fills in the references that a run has kept, if its data are preferences.

  Raises:
    UserError: it has kept none, or those of other data or rows.
  """
  of_splits, path = getattr(prepared, 'references', {}), directory / FILE
  if not of_splits:
    return
  try:
    with np.load(path) as kept:
      found = {name: kept[name] for name in kept.files}
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read ({error}), and without it nobody knows what the model '
                    'said of the answers at first; start again in another --run_dir') from error
  for name, value in _key(prepared, settings).items():
    if str(found[name]) != value:
      raise UserError(f'{path} is of {name} {found[name]} and this run has {value}; take the same, '
                      'or another --run_dir')
  for split, references in of_splits.items():
    references[:] = found[split]


def _key(prepared: Any, settings: Any) -> dict[str, str]:
  """What the references depend on beside the parameters."""
  return {'data': prepared.info['digests']['texts'],
          'sequence_length': str(settings.sequence_length)}


def _digest(params: Any) -> str:
  """Of all numbers that this host's devices hold."""
  found = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    for shard in leaf.addressable_shards:
      found.update(np.asarray(shard.data).tobytes())
  return found.hexdigest()[:16]
