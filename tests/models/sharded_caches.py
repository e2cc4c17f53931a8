"""Run by `test_caches_on_meshes.py` in a child with 8 devices: how far decoding with a cache on a
mesh is from the full forward pass without one."""
import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from conftest import gpt2, llama  # noqa: E402
from models.test_caches import init, tokens, XL  # noqa: E402
from lm.inference.decoder import Decoder  # noqa: E402
from lm.layers.moe import MoEConfig  # noqa: E402
from lm.models.cache import CacheOptions  # noqa: E402
from lm.models.t5 import T5Config  # noqa: E402
from lm.parallel.mesh import MeshConfig  # noqa: E402
from lm.parallel.rules import Rules  # noqa: E402

B, PROMPT, STEPS, DRAFT = 4, 9, 2, 3
T = PROMPT + STEPS + DRAFT
MESHES = {'data': dict(data=4, tensor=2), 'fsdp': dict(data=1, fsdp=4, tensor=2),
          'tensor': dict(data=2, tensor=4)}
T5 = T5Config(vocab_size=37, max_length=32, d_model=16, num_layers=2, num_heads=4, d_head=4,
              d_ff=24, dtype='float32')
ROLLING = CacheOptions(rolling=True)
# family: config, options of its cache; each on one mesh at least, the first on all.
CASES = {
    'rotary, grouped': (llama(), None, 'data fsdp tensor'),
    'learned, unrolled': (gpt2(scan_layers=False), None, 'tensor'),
    'alibi': (gpt2(positions='alibi', num_kv_heads=2), None, 'data'),
    'local and global, rolling': (llama(
        attention_pattern='LG', window=4, qk_norm=True, attention_softcap=5.0, scan_layers=False,
        max_length=64), ROLLING, 'fsdp'),
    'experts': (llama(moe=MoEConfig(4, 2, 24)), None, 'data'),
    'sinks': (llama(), CacheOptions(window=50, num_sinks=2), 'tensor'),
    't5': (T5, None, 'data tensor'),
    'transformer_xl': (dataclasses.replace(XL, memory_length=40), None, 'data tensor'),
}


def full(config, params, inputs, ids):
  """Logits of the whole text, on one device, without a cache."""
  module = config.build()
  if hasattr(module, 'decode'):
    starts = jnp.pad(ids, ((0, 0), (1, 0)))[:, :T]
    hidden = module.apply({'params': params}, inputs, starts)
  else:
    hidden, _ = module.apply({'params': params}, ids)
  return module.apply({'params': params}, hidden, method='logits')


def decoded(config, options, rules, params, inputs, ids):
  """Logits of the prompt's last token, of tokens one by one, and of a draft; by a `Decoder`."""
  decoder = Decoder(config.build(rules), cache=options)
  encodes = decoder.has_encoder
  first = 0 if encodes else PROMPT - 1
  prompts = inputs if encodes else jnp.pad(ids[:, :PROMPT], ((0, 0), (0, 3)), constant_values=5)
  lengths = jnp.full(B, prompts.shape[1] if encodes else PROMPT, jnp.int32)

  @jax.jit
  def run(params, prompts, ids):
    params = decoder.prepare(params)
    logits, cache = decoder.start(params, prompts, lengths, 32 if options is None else 400)
    parts, place = [logits[:, None]], first + (0 if encodes else 1)
    for size in (*[1] * STEPS, DRAFT):
      logits, cache = decoder.extend(params, ids[:, place:place + size], cache)
      parts.append(logits)
      place += size
    return jnp.concatenate(parts, 1), cache

  logits, cache = run(params, prompts, ids)
  if hasattr(cache, 'shardings'):  # it stays where it is put
    for x, sharding in zip(jax.tree.leaves(cache.layers),
                           jax.tree.leaves(cache.shardings(rules).layers)):
      assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)
  kept = [x for x in jax.tree.leaves(cache.layers) if x.ndim > 3]
  cut = {name for x in kept for axes in x.sharding.spec for name in (
      axes if isinstance(axes, tuple) else (axes,))}
  return first, logits, sorted(map(str, cut - {None}))


def main():
  """Prints {case on mesh: [largest difference, axes that cut the cache]}."""
  found = {}
  for case, (config, options, meshes) in CASES.items():
    params, ids = init(config), jnp.asarray(tokens(config, B, T))
    inputs = jnp.asarray(tokens(config, B, 8))
    want = jax.jit(functools.partial(full, config))(params, inputs, ids)
    for name in meshes.split():
      mesh = MeshConfig(**MESHES[name]).build()
      with jax.set_mesh(mesh):
        first, got, cut = decoded(config, options, Rules().on(mesh), params, inputs, ids)
      want_here = want[:, first:first + got.shape[1]]
      found[f'{case} on {name}'] = float(np.abs(np.asarray(got) - want_here).max()), cut
  print(json.dumps(found))


if __name__ == '__main__':
  main()
