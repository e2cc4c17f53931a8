"""A child of test_ring.py: attention whose length is cut over 8 host devices, as JSON."""
import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from lm.layers.kernels import attend
from lm.parallel.mesh import MeshConfig
from lm.parallel.ring import unzigzag, zigzag
from lm.parallel.rules import Rules

B, T, N, K, H = 2, 32, 4, 2, 8
RING, WIDE = dict(data=1, sequence=4, tensor=2), dict(data=2, sequence=4)
EVERYONE = dict(sequence=8, data=1)

# mesh axes, rules, whether in zig-zag order, options, arrays beside query, key and value
RUNS = {
    'zigzag': (RING, {}, True, {}, ['ids']),
    'zigzag of 8': (EVERYONE, {}, True, {}, ['ids']),
    'zigzag of 2': (dict(data=2, sequence=2, tensor=2), {}, True, {'softcap': 2.0}, []),
    'zigzag window': (WIDE, {}, True, {'window': 6}, ['ids']),
    'zigzag distance bias': (RING, {}, True, {'scale': 1.0}, ['ids', 'distance_bias']),
    'causal in natural order': (WIDE, {}, False, {'window': 11}, ['ids']),
    'prefix': (WIDE, {}, False, {}, ['ids', 'prefix']),
    'bidirectional': (RING, {}, False, {'causal': False}, ['ids']),
    'bidirectional window': (WIDE, {}, False, {'causal': False, 'window': 6}, []),
    'encoder': (RING, {}, False, {'causal': False}, ['distance_bias', 'ids']),
    'cross': (RING, {}, False, {'causal': False, 'S': 48}, []),
    'memory': (RING, {}, False, {'query_offset': 16, 'S': 48}, ['relative']),
    'all to all': (WIDE, dict(attention='all_to_all'), False, {'window': 9},
                   ['ids', 'distance_bias']),
    'all to all with a memory': (dict(data=2, sequence=2, tensor=2), dict(attention='all_to_all'),
                                 False, {'query_offset': 16, 'S': 48}, ['relative']),
    'all to all with a prefix': (WIDE, dict(attention='all_to_all'), False, {}, ['prefix']),
    'length that does not divide': (WIDE, {}, False, {'T': 30, 'S': 30}, ['ids']),
}


def inputs(names, T=T, S=T):
  """(what has a gradient, data, the cotangent)."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  arrays = {'query': draw(B, T, N, H), 'key': draw(B, S, K, H), 'value': draw(B, S, K, H)}
  data = {}
  if 'distance_bias' in names:
    arrays['distance_bias'] = draw(N, 2 * 9 + 1)
  if 'relative' in names:
    arrays |= {'relative_query': draw(B, T, N, H), 'relative_key': draw(S, N, H),
               'key': draw(B, S, N, H), 'value': draw(B, S, N, H)}
  if 'ids' in names:
    ids = np.sort(rng.integers(0, 3, (B, T))).astype(np.int32)
    data |= {'query_segment_ids': ids, 'key_segment_ids': ids}
  if 'prefix' in names:
    data['prefix'] = rng.random((B, S)) < 0.3
  return arrays, data, draw(B, T, N, H)


OF_TOKENS = ('query', 'key', 'value', 'query_segment_ids', 'key_segment_ids', 'relative_query')


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(rules, is_zigzag, options, arrays, data, g):
  """Attention and its gradients."""
  def loss(arrays):
    ordered = arrays | data
    if is_zigzag:
      ordered |= {name: zigzag(x, rules) for name, x in ordered.items() if name in OF_TOKENS}
    out = attend(rules, None, zigzag=is_zigzag, **ordered, **dict(options))
    out = unzigzag(out, rules) if is_zigzag else out
    return jnp.vdot(out, g), out

  return jax.grad(loss, has_aux=True)(arrays)


def in_bfloat16():
  """How far bfloat16 is from float32 of the same inputs: on a ring, and on one device."""
  arrays, data, g = inputs(['ids'])
  half = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)
  arrays, g = half((arrays, g))
  single = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float32), tree)
  want = run(Rules(), False, (), *single((arrays, data, g))[:1], data, single(g))
  ring = Rules().on(MeshConfig(**RING).build())
  return [difference(single(run(rules, is_zigzag, (), arrays, data, g)), want)
          for rules, is_zigzag in ((ring, True), (Rules(), False))]


def dropped_out(rules):
  """Of attention on a ring with dropout: how far its mean over many rows of one text is from
  attention without, in standard errors; and the error of a gradient against finite differences."""
  one, _, g = inputs([])
  B, rate = 256, 0.4
  arrays = {name: np.repeat(x[:1], B, 0) for name, x in one.items()}
  g = np.repeat(g[:1], B, 0)
  options = ('dropout_rate', rate),
  data = {'dropout_seeds': jax.random.bits(jax.random.key(0), (B, N))}
  gradient, out = run(rules, True, options, arrays, data, g)
  plain = run(Rules(), False, (), arrays, {}, g)[1]
  error = np.std(out, axis=0) / B**0.5
  step = {name: 1e-2 * np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
          for name, x in arrays.items()}
  dot = lambda x, y: np.vdot(np.float64(x), np.float64(y))
  moved = [dot(run(rules, True, options, {name: x + sign * step[name]
                                          for name, x in arrays.items()}, data, g)[1], g)
           for sign in (1, -1)]
  slope = sum(dot(gradient[name], step[name]) for name in step)
  seen = error > 0  # a query that sees one key has it kept, or not
  return [float((np.abs(out.mean(0) - plain[0])[seen] / error[seen]).max()),
          float(abs((moved[0] - moved[1]) / 2 - slope) / abs(slope))]


def difference(got, want):
  share = lambda x, y: float(np.abs(x - y).max() / np.abs(y).max())
  return max(jax.tree.leaves(jax.tree.map(share, got, want)))


def main():
  """Prints the largest difference from one device by the name of each run."""
  found = {'devices': jax.device_count()}
  for name, (axes, changes, is_zigzag, options, names) in RUNS.items():
    if len(sys.argv) > 1 and name not in sys.argv[1:]:
      continue
    start = time.time()
    rules = Rules(**changes).on(MeshConfig(**axes).build())
    sizes = {key: options[key] for key in 'TS' if key in options}
    options = tuple((key, x) for key, x in options.items() if key not in sizes)
    arguments = inputs(names, **sizes)
    want = run(Rules(), False, options, *arguments)
    found[name] = difference(run(rules, is_zigzag, options, *arguments), want)
    print(name, found[name], time.time() - start, file=sys.stderr)
  if 'bfloat16' in sys.argv:
    found['bfloat16'] = in_bfloat16()
  if 'dropout' in sys.argv:
    found['dropout'] = dropped_out(Rules().on(MeshConfig(**RING).build()))
  print(json.dumps(found))


if __name__ == '__main__':
  main()
