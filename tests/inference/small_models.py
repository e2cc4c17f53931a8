"""Small models with weights of others, as decoders."""
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.inference.decoder import Decoder
from lm.interop import mapping, plan
from lm.interop.tensors import open_tensors
from lm.training import checkpoint_io

HERE = pathlib.Path(__file__).resolve().parent
STORIES = HERE.parents[2] / 'shared' / 'data' / 'weights' / 'stories260K' / 'stories260K.bin'


def params_of(made, weights):
  leaves = {}
  for path, parts in mapping.to_ours(made.places, made.shapes, weights):
    leaves[path] = np.empty(made.shapes[path], np.float32)
    for index, part in parts:
      leaves[path][index] = part
  return jax.tree.map(jnp.asarray, checkpoint_io.nest(leaves))


@functools.cache
def model(name):
  """(decoder, parameters) of a model of the references."""
  if name == 'stories260K':
    if not STORIES.exists():
      pytest.skip(f'{STORIES.name} is not beside the repository')
    tensors = open_tensors(STORIES)
    made = plan.read({key: x.shape for key, x in tensors.items()}, 'float32', tensors.config,
                     STORIES.parent, 'source')
    params = params_of(made, lambda key: tensors[key].read())
  else:
    stored = dict(np.load(HERE.parent / 'data' / f'reference_{name}.npz'))
    weights = {key.removeprefix('weights/'): x.astype(np.float32) for key, x in stored.items()
               if key.startswith('weights/')}
    made = plan.read({key: x.shape for key, x in weights.items()}, 'float32',
                     json.loads(str(stored['config.json'])), STORIES.parent, 'source')
    params = params_of(made, weights.__getitem__)
  return Decoder(dataclasses.replace(made.model, scan_layers=True).build()), params
