"""A child of test_decode_attention.py: rows and heads cut over 4 devices beside one, as JSON."""
import json

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from pallas_kernels.decode_attention import decode_attention, quantize


def main():
  rng = np.random.default_rng(0)
  query, key, value = (jnp.asarray(rng.normal(size=shape), jnp.float32)
                       for shape in ((4, 1, 8, 64), (4, 4, 256, 64), (4, 4, 256, 64)))
  (key, key_scale), (value, value_scale) = quantize(key), quantize(value)
  args = query, key, value, jnp.array([1, 256, 130, 77]), key_scale, value_scale
  mesh = jax.make_mesh((2, 2), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def attend(query, key, value, lengths, key_scale, value_scale):
    return decode_attention(query, key, value, lengths, key_scale=key_scale,
                            value_scale=value_scale, implementation='tpu')

  queries, cache = P('data', None, 'tensor'), P('data', 'tensor')
  cut = jax.shard_map(attend, mesh=mesh, out_specs=queries, check_vma=False,
                      in_specs=(queries, cache, cache, P('data'), cache, cache))
  whole, out = (np.asarray(jax.jit(run)(*args)) for run in (attend, cut))
  print(json.dumps({'devices': jax.device_count(),
                    'error': float(np.linalg.norm(out - whole) / np.linalg.norm(whole))}))


if __name__ == '__main__':
  main()
