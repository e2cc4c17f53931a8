"""A child of test_probe.py: what the probe finds on meshes of 8 devices and on one, as JSON."""
import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / 'parallel'))
import sharded_models as models

from lm.data.loader import Loader
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training.probe import Probe
from lm.training.state import abstract_params

# family: mesh axes
RUNS = {'gpt': dict(data=1, sequence=2, stage=2, tensor=2), 'moe': dict(data=1, fsdp=2, expert=4),
        'transformer_xl': dict(data=8)}


class Rows:
  """The rows of a family's batch, again and again."""

  def __init__(self, family):
    self.batch = models.batch(family)

  def __len__(self):
    return models.B

  def __getitem__(self, row):
    return {name: x[row % models.B] for name, x in self.batch.items()}


def found(family, axes):
  """What the probe says of random parameters, and of those after a change."""
  devices = jax.devices()[:int(np.prod(list(axes.values())))]
  rules = dataclasses.replace(Rules(), layers='stage').on(MeshConfig(**axes).build(devices))
  module = models.FAMILIES[family].build(rules)
  params = models.start(family, abstract_params(module, rules))
  probe = Probe(module, Loader.of_rows(Rows(family), models.B))
  return probe(params), probe(jax.tree.map(lambda x: 1.5 * x, params))


def main():
  results = {}
  for family, axes in RUNS.items():
    (one, changed), (mesh, _) = found(family, dict(data=1)), found(family, axes)
    results[family] = {
        'names': sorted(one), 'same names': sorted(one) == sorted(mesh),
        'difference': max(float(np.abs(one[name] - mesh[name]).max()) for name in one),
        'moved': max(float(np.abs(one[name] - changed[name]).max()) for name in one)}
  print(json.dumps(results))


if __name__ == '__main__':
  main()
