"""A child of test_likelihood.py: likelihoods on meshes of 8 host devices and on one, as JSON."""
import json

import jax
import numpy as np

from lm.evaluation import likelihood
from lm.models.gpt import GPTConfig
from lm.models.t5 import T5Config
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training.state import abstract_params

SMALL = dict(vocab_size=48, max_length=32, d_model=16, num_layers=2, num_heads=8, d_ff=32,
             dtype='float32', scan_layers=True)
MODELS = {'gpt': GPTConfig(**SMALL, norm='rmsnorm', positions='rotary', num_kv_heads=2),
          't5': T5Config(**SMALL)}
MESHES = {'gpt': [dict(data=8), dict(data=2, sequence=2, tensor=2)],
          't5': [dict(data=1, fsdp=4, tensor=2)]}


def requests():
  """Pairs of continuations of one context; 9 texts, so that the rows do not divide over 8."""
  rng = np.random.default_rng(0)
  for length in rng.integers(4, 20, 9):
    context = rng.integers(1, 48, length)
    yield from ((context, rng.integers(1, 48, 6)) for _ in range(2))


def scores(config, rules):
  """Of random parameters, the same on every mesh."""
  module, rng = config.build(rules), np.random.default_rng(1)
  params = jax.tree.map(lambda x: jax.device_put(
      rng.normal(0, 0.3, x.shape).astype(x.dtype), x.sharding), abstract_params(module, rules))
  return np.array([one.log_likelihood for one in likelihood.score(
      module, params, list(requests()), batch_size=4, progress=False)])


def main():
  """[[model, mesh, the largest difference], ...]."""
  found = []
  for name, config in MODELS.items():
    one = scores(config, Rules().on(MeshConfig().build(jax.devices()[:1])))
    for axes in MESHES[name]:
      sharded = scores(config, Rules().on(MeshConfig(**axes).build()))
      found.append([name, axes, float(np.abs(sharded - one).max())])
  print(json.dumps(found))


if __name__ == '__main__':
  main()
