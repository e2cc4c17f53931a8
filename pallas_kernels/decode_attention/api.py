"""Attention of the newest tokens over a cache of keys and values."""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import chips, platform
from pallas_kernels.decode_attention import cpu, gpu, reference, tpu
from pallas_kernels.decode_attention.reference import Cache, Options

QUANTIZED = jnp.int8, jnp.float8_e4m3fn
_KERNELS = {'tpu': (tpu, 'tpu'), 'gpu': (gpu, 'cuda')}  # and what they are compiled on


def quantize(x: jax.Array, dtype: jax.typing.DTypeLike = jnp.int8) -> tuple[jax.Array, jax.Array]:
  """Rounds keys or values to 8 bits, symmetric about 0: x ~ values * scale, a scale a vector.

  The largest magnitude of a vector becomes the largest that `dtype` holds, so an int8 is off by at
  most scale / 2, and a float8_e4m3fn by at most a 16th of itself, or scale / 1024 if that is more.

  Args:
    x: [..., H], floating.
    dtype: int8 or float8_e4m3fn.

  Returns:
    values [..., H] in `dtype` and scales, float32 [...].

  Raises:
    ValueError: another dtype.
  """
  if jnp.dtype(dtype) not in QUANTIZED:
    raise ValueError(f'dtype={jnp.dtype(dtype).name} must be int8 or float8_e4m3fn')
  return reference.quantize(x, dtype)


def decode_attention(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array, *,
                     window: int | None = None, scale: float | None = None,
                     softcap: float | None = None, bias: jax.Array | None = None,
                     sinks: jax.Array | None = None, page_table: jax.Array | None = None,
                     key_scale: jax.Array | None = None, value_scale: jax.Array | None = None,
                     implementation: str | None = None) -> jax.Array:
  """Attends from the last T tokens of each row to its cache, which holds them too:
  out[t] = sum_s p[t, s] value[s] / (sum_s p[t, s] + exp(sink)), with p[t, s] = exp(scores[t, s])
  and scores[t, s] = softcap * tanh(scale * query[t] . key[s] / softcap) + bias[t, s].

  Query t stands at place lengths - T + t and sees that key and those before it, within `window`;
  one that sees none, in a row of length 0, gives zeros. T is 1 in plain decoding, and more where
  several drafted tokens are checked at once (arXiv:2211.17192). Each group of N / K query heads
  shares one key-value head (arXiv:2305.13245). Scores and softmax are float32. The kernels read
  each key and value that a query sees once, and little else of the cache. The gradient, in either
  mode, is the reference's.

  A paged cache (vLLM, arXiv:2309.06180, section 4) is a pool of pages of tokens that rows share:
  key s of row b is pool[page_table[b, s // page], :, s % page]. Pages that hold no token of a row
  are not read.

  Args:
    query: [B, T, N, H], bfloat16 or float32 ('gpu': float16 too).
    key: [B, K, S, H], heads first, so that no token moves the cache; or the pool [pages, K, page,
      H]. The dtype of `query`, or int8 or float8_e4m3fn with scales. K divides N.
    value: like `key`.
    lengths: int32 [B], the keys of each row that stand, those of `query` among them.
    window: keys that a query sees at most, its own included (Mistral, arXiv:2310.06825, section
      2); None is all.
    scale: None is 1 / sqrt(H).
    softcap: bends the scaled scores into (-softcap, softcap) (Gemma 2, arXiv:2408.00118, section
      2). None leaves them.
    bias: [1 or B, N, T, S], S counting all pages of a row.
    sinks: [N], a score of no key's that only takes weight (GPT-OSS, arXiv:2508.10925, section 2);
      None is none.
    page_table: int32 [B, pages of a row]; entries behind the last page that stands may be any.
    key_scale: float32 [B, K, S] or [pages, K, page], what a 1 of an 8-bit `key` stands for, as
      `quantize` gives it.
    value_scale: of `value`.
    implementation: None, 'reference' (XLA), 'cpu' (native), 'tpu' or 'gpu' (Pallas; interpreted
      on any other platform; under several devices call it in `jax.shard_map`). None is native on a
      CPU, Pallas on a TPU, and on an NVIDIA GPU where one is in use, if it takes the case, and else
      XLA.

  Returns:
    [B, T, N, H] in the dtype of `query`.

  Raises:
    ValueError: shapes or dtypes that do not fit, or a window or softcap that is not positive.
    NotImplementedError: the kernel that is named does not take this case.
  """
  cache = Cache(key, value, key_scale, value_scale, page_table)
  _check(query, cache, lengths, bias, sinks)
  if window is not None and window < 1:
    raise ValueError(f'window={window} must be at least 1 (its own place alone), or None for all')
  if softcap is not None and softcap <= 0:
    raise ValueError(f'softcap={softcap} must be positive, or None for uncapped scores')
  if implementation not in (None, 'reference', 'cpu', *_KERNELS):
    raise ValueError(f"implementation={implementation!r} must be None, 'reference', 'cpu', 'tpu' "
                     "or 'gpu'")
  options = Options(window, query.shape[-1]**-0.5 if scale is None else scale, softcap)
  return _attend(options, implementation, query, cache, lengths, bias, sinks)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend(options, implementation, query, cache, lengths, bias, sinks):
  args = query, cache, lengths, bias, sinks
  plain = functools.partial(reference.decode_attention, options)
  if implementation == 'reference':
    return plain(*args)
  native, refusal = functools.partial(cpu.decode_attention, options), cpu.refusal(query, cache)
  if implementation == 'cpu':
    if refusal:
      raise NotImplementedError(refusal)
    return native(*args)
  on_cpu = plain if refusal else native
  name = implementation or ('tpu' if chips.card() is None else 'gpu')
  module, compiled_on = _KERNELS[name]
  refusal = module.refusal(query, cache, bias)
  if refusal and implementation:
    raise NotImplementedError(refusal)
  if refusal:
    if name == 'gpu' or jax.default_backend() == 'tpu':
      platform.warn_once(f'decode_attention is left to XLA: {refusal}')
    return platform.by_platform(on_cpu, plain, *args)
  kernel = functools.partial(module.decode_attention, options)
  if implementation:
    return platform.interpreted(kernel, *args, compiled_on=compiled_on)
  return platform.by_platform(on_cpu, plain, *args, **{compiled_on: kernel})


@_attend.defjvp
def _attend_tangents(options, implementation, primals, tangents):
  """Of a learnt prompt's tokens, whose keys and values the layers make as those of a cache."""
  plain = functools.partial(reference.decode_attention, options)
  return _attend(options, implementation, *primals), jax.jvp(plain, primals, tangents)[1]


def _check(query, cache, lengths, bias, sinks):
  key, table = cache.key, cache.page_table
  if key.ndim != 4 or cache.value.shape != key.shape or query.shape[-1] != key.shape[-1] or (
      table is None and key.shape[0] != query.shape[0]):
    raise ValueError(f'query {query.shape}, key {key.shape} and value {cache.value.shape} must be '
                     '[B, T, N, H] and twice [B, K, S, H], or [pages, K, page, H] with page_table')
  (B, T, N, _), K, S = query.shape, key.shape[1], cache.capacity
  if N % K:
    raise ValueError(f'{N} query heads do not divide into {K} key-value heads')
  if cache.value.dtype != key.dtype:
    raise ValueError(f'key is {key.dtype} and value {cache.value.dtype}, they must be the same')
  for name, array, shapes in (
      ('lengths', lengths, [(B,)]), ('bias', bias, [(B, N, T, S), (1, N, T, S)]),
      ('sinks', sinks, [(N,)]), ('page_table', table, [(B, S // key.shape[2])]),
      ('key_scale', cache.key_scale, [key.shape[:3]]),
      ('value_scale', cache.value_scale, [key.shape[:3]])):
    if array is not None and array.shape not in shapes:
      raise ValueError(f'{name} has shape {array.shape}, it must be '
                       f'{" or ".join(map(str, shapes))} for query {query.shape} and key '
                       f'{key.shape}')
  is_scaled = [x is not None for x in (cache.key_scale, cache.value_scale)]
  if is_scaled != [key.dtype in QUANTIZED] * 2:
    raise ValueError(f'key is {key.dtype}: int8 and float8_e4m3fn need key_scale and value_scale, '
                     'other dtypes take none')
