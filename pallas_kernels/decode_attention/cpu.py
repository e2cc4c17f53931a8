"""Native code: XLA's moves the whole cache for its products, and reads all places of it."""
import jax
import jax.numpy as jnp

from pallas_kernels import native
from pallas_kernels.decode_attention.reference import Cache, Options


def refusal(query: jax.Array, cache: Cache) -> str | None:
  """Why this case is left to XLA, or None."""
  for name, x in (('query', query), ('the cache', cache.key)):
    if x.dtype not in (jnp.float32, jnp.bfloat16, *([jnp.int8] if x is cache.key else [])):
      return f'cpu takes no {x.dtype} of {name}'
  if not all(isinstance(size, int) for size in (*query.shape, *cache.key.shape)):
    return 'cpu takes no symbolic shape: a program that is exported holds no native code'
  return None if native.is_there() else 'cpu takes a C++ compiler, and there is none'


def decode_attention(options: Options, query, cache: Cache, lengths, bias, sinks):
  """`reference.decode_attention`, multiplied and summed in float32."""
  table = cache.page_table
  if table is None:  # rows are pages then
    table = jnp.arange(len(query), dtype=jnp.int32)[:, None]
  else:
    table = jnp.clip(table, 0, len(cache.key) - 1)
  given = lambda x: jnp.zeros(0) if x is None else x.astype(jnp.float32)
  call = jax.ffi.ffi_call('lm_decode_attention', jax.ShapeDtypeStruct(query.shape, jnp.float32))
  return call(query.astype(jnp.float32), cache.key, cache.value, lengths, table,
              given(cache.key_scale), given(cache.value_scale), given(bias), given(sinks),
              window=options.window or 0, scale=float(options.scale),
              softcap=float(options.softcap or 0)).astype(query.dtype)


@jax.custom_jvp
def put_tokens(cache: jax.Array, rows: jax.Array, places: jax.Array, tokens: jax.Array
               ) -> jax.Array:
  """The cache with these tokens in it, written where it lies; of floats of 16 bits XLA's scatter
  makes a copy, and so it does of a single token.

  Args:
    cache: [rows or pages, K, S, ...], of any dtype.
    rows, places: int32 [B, T]; a token whose place is none is left out.
    tokens: [B, T, K, ...].
  """
  call = jax.ffi.ffi_call('lm_put_tokens', jax.ShapeDtypeStruct(cache.shape, cache.dtype),
                          input_output_aliases={0: 0})
  flat = tokens.reshape(-1, *tokens.shape[2:])
  return call(cache, flat, rows.reshape(-1).astype(jnp.int32), places.reshape(-1).astype(jnp.int32))


@put_tokens.defjvp
def _put_tangents(primals, tangents):
  """Of a learnt prompt's tokens, which have a gradient: XLA's scatter's."""
  cache, rows, places, tokens = primals
  plain = lambda cache, tokens: cache.at[rows, :, places].set(tokens, mode='drop')
  moved = jax.jvp(plain, (cache, tokens), (tangents[0], tangents[3]))[1]
  return put_tokens(*primals), moved
