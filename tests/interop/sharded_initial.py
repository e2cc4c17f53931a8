"""A child of test_initial.py: initial parameters on meshes of 8 host devices, as JSON."""
import hashlib
import json
import pathlib
import sys

import numpy as np
import test_initial as cases

from lm.interop import initial, run_weights

MESHES = {'one': {'data': 1}, 'fsdp': {'data': 1, 'fsdp': 8}, 'tensor': {'data': 2, 'tensor': 4},
          'stages': {'data': 4, 'fsdp': 1, 'stage': 2}}


def main(folder):
  cases.write(folder / 'source', cases.FOUR)
  read, largest = run_weights.RunLeaf.read, []

  def watched(leaf, index=None):
    found = read(leaf, index)
    largest.append((found.size, int(np.prod(leaf.shape)), leaf.path))
    return found

  run_weights.RunLeaf.read = watched
  facts = {}
  for name, mesh in MESHES.items():
    largest.clear()
    weights = initial.Weights(str(folder / 'source'), ('trunk/blocks/layers/1/.*',))
    params = cases.begin(folder / name, weights, cases.CLASSIFIER_OF_FOUR, mesh)[0]
    bits = b''.join(np.asarray(x).tobytes() for x in params.values())
    kernels = [size / whole for size, whole, path in largest if path.endswith('wi/kernel')]
    facts[name] = {'digest': hashlib.sha256(bits).hexdigest(), 'share': max(kernels),
                   'devices': len(params['trunk/token_embedding'].sharding.device_set)}
  print(json.dumps(facts))


main(pathlib.Path(sys.argv[1]))
