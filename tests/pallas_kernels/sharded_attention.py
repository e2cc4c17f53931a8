"""A child of test_attention_space.py: attention with rows and heads cut over 4 devices beside one
device's, as JSON."""
import functools
import json

import jax
from jax.sharding import PartitionSpec as P
import numpy as np

from flash_attention_cases import packed, random
from pallas_kernels.flash_attention import flash_attention

B, T, N, K, H = 2, 100, 4, 2, 64


def main():
  mesh = jax.make_mesh((2, 2), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  tokens, rows = P('data', None, 'tensor'), P('data')
  query, key, value, g = (random(i, B, T, heads, H) for i, heads in enumerate((N, K, K, N)))
  sinks, ids = random(4, N), packed(5, B, T)
  seeds = jax.random.bits(jax.random.key(6), (B, N))

  def attend(query, key, value, sinks, seeds, ids):
    return flash_attention(query, key, value, chunk=60, sinks=sinks, dropout_rate=0.3,
                           dropout_seeds=seeds, query_segment_ids=ids, key_segment_ids=ids,
                           implementation='tpu')

  @functools.partial(jax.jit, static_argnums=0)
  def run(function, *args):
    out, vjp = jax.vjp(lambda *args: function(*args, seeds, ids), *args)
    return out, *vjp(g)

  cut = jax.shard_map(attend, mesh=mesh, check_vma=False, out_specs=tokens,
                      in_specs=(tokens, tokens, tokens, P('tensor'), P('data', 'tensor'), rows))
  got, want = (run(function, query, key, value, sinks) for function in (cut, attend))
  errors = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(got, want)]
  print(json.dumps({'devices': jax.device_count(), 'errors': list(map(float, errors))}))


if __name__ == '__main__':
  main()
