"""Beams are those of `transformers`, and of the papers for groups and forced words."""
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.inference.beam import beam_search, BeamConfig
from lm.inference.decoder import Decoder
from lm.interop import mapping, plan
from lm.interop.tensors import open_tensors
from lm.training import checkpoint_io

HERE = pathlib.Path(__file__).resolve().parent
STORIES = HERE.parents[2] / 'shared' / 'data' / 'weights' / 'stories260K' / 'stories260K.bin'
CASES = json.loads((HERE / 'reference_beams.json').read_text())
MAX_NEW_TOKENS = 12
SHARED_BATCH = 'bigger'


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
  return Decoder(made.model.build()), params


def search(name, prompts, eos, words=None, max_new_tokens=MAX_NEW_TOKENS, **settings):
  decoder, params = model(name)
  settings.setdefault('num_return_sequences', settings.get('num_beams', 4))
  config = BeamConfig(max_new_tokens=max_new_tokens, **settings)
  return beam_search(decoder, params, [np.array(prompt) for prompt in prompts], config, 64, eos,
                     None, words)


@pytest.mark.supports('decoding', 'beam search as of transformers')
@pytest.mark.parametrize('case', CASES, ids=lambda case: '-'.join(
    [case['model'], *map(str, case['settings'].values())]))
def test_beams_and_scores_are_those_of_transformers(case):
  found = search(case['model'], case['prompts'], case['eos'], **case['settings'])
  for ours, theirs in zip(found, case['beams'], strict=True):
    assert [beam.tokens.tolist() for beam in ours] == [tokens for tokens, _ in theirs]
    np.testing.assert_allclose([beam.score for beam in ours], [score for _, score in theirs],
                               atol=1e-4, rtol=1e-5)
