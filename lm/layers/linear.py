"""Products with parameters: every weight matrix of a model goes through here."""
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.layers import adapted, products
from lm.layers.observed import observed
from lm.layers.products import Products
from lm.parallel import gather
from lm.parallel.rules import Rules, axes_of, per_device
from pallas_kernels import platform
from pallas_kernels.dropout import Draws
from pallas_kernels.matmul import dot
from pallas_kernels.quantized_matmul import Quantized, quantized_matmul
from pallas_kernels.streamed_matmul import Streamed, streamed_matmul, streamed_rows

Table = Float[Array, 'V D'] | Quantized | Streamed  # an embedding


def normal(std: float, *axes: str | None):
  """Normal initialiser of the given standard deviation, whose axes have these logical names."""
  return nn.with_partitioning(nn.initializers.normal(std), axes)


class Linear(nn.Module):
  """y = x w + b over the last `len(inputs)` axes of x; float32 parameters, computed in x's dtype.

  inputs: sizes of the contracted axes, `outputs`: of those that replace them.
  axes: logical names of `inputs` and `outputs`.
  rules: where devices share the parameters, they gather and scatter them as these say.
  products: what the product is computed in, where that is not x's dtype.
  """
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  axes: tuple[str | None, ...]
  std: float
  use_bias: bool = False
  rules: Rules = Rules()
  products: Products = None

  @nn.compact
  def __call__(self, x: Float[Array, '...']) -> Float[Array, '...']:
    """[..., *inputs] -> [..., *outputs]."""
    leaves = self.variables.get('params', {})  # also an adapter's, or of `lm compress`
    kernel = leaves.get('kernel')
    if not isinstance(kernel, Streamed):
      kernel = self.param('kernel', normal(self.std, *self.axes), self.inputs + self.outputs)
    size_in, size_out = math.prod(self.inputs), math.prod(self.outputs)
    rows = x.shape[:x.ndim - len(self.inputs)]
    multiply, axes = products.product(self.products, self.rules), self._matrix_axes()
    if axes is not None and gather.is_gathered(self.rules, axes):
      multiply = functools.partial(gather.product, multiply, self.rules, axes)
    state = []
    if self.products == 'fp8_delayed':
      zeros = nn.with_partitioning(nn.initializers.zeros, (None, None))
      state = [self.param('history', zeros, (products.OPERANDS, products.HISTORY))]
    leaves = self.variables['params']
    x = x.reshape(*rows, size_in)
    if 'input_scale' in leaves:
      x = (x.astype(jnp.float32) * leaves['input_scale']).astype(x.dtype)
    if isinstance(kernel, Streamed):
      y, kernel = streamed_matmul(x, kernel), table(kernel, x.dtype).T
    elif isinstance(kernel, Quantized):
      values, scales = kernel.values.reshape(size_in, size_out), kernel.scales.reshape(-1, size_out)
      y, kernel = products.quantized(self.products, x, values, scales), _floats(values, scales)
    else:
      kernel = kernel.reshape(size_in, size_out)
      y = multiply(x, kernel, *state)
    if 'seen' in leaves:
      y = observed(y, x, leaves['seen'])
    if 'lora_a' in leaves:
      y = adapted.low_rank(x, y, kernel, leaves, self.rules)
    if self.use_bias:
      zeros = nn.with_partitioning(nn.initializers.zeros, self.axes[len(self.inputs):])
      bias = self.param('bias', zeros, self.outputs)
      y = _add_bias(y, bias.reshape(size_out))
    if 'adapter_down' in leaves:
      y = adapted.bottleneck(y, leaves, self.rules)
    return y.reshape(*rows, *self.outputs)

  def _matrix_axes(self) -> tuple[str | None, str | None] | None:
    """Logical names of the kernel as a matrix; None where a later one of merged axes is sharded."""
    inputs, outputs = self.axes[:len(self.inputs)], self.axes[len(self.inputs):]
    sharded = any(axes_of(axes) for axes in self.rules.spec(*inputs[1:], *outputs[1:]))
    return None if sharded else (inputs[0], outputs[0])


def _floats(values_KN, scales_PN):
  """What quantised values stand for; computed where an adapter asks for it alone."""
  scales_KN = jnp.repeat(scales_PN, len(values_KN) // len(scales_PN), axis=0)
  return values_KN.astype(jnp.float32) * scales_KN


@jax.custom_vjp
def _add_bias(y, bias_N):
  """Adds a float32 bias, whose gradient is a float32 sum: jax's own has the dtype of y."""
  return y + bias_N.astype(y.dtype)


_add_bias.defvjp(lambda y, bias_N: (_add_bias(y, bias_N), None),
                 lambda _, g: (g, g.sum(range(g.ndim - 1), dtype=jnp.float32)))


def embed(embedding_VD: Table, tokens: Int[Array, 'B T'],
          dtype: jax.typing.DTypeLike, rules: Rules = Rules(),
          noise_BTD: Float[Array, 'B T D'] | None = None) -> Float[Array, 'B T D']:
  """Looks up the row of each token, and casts what was looked up; `noise_BTD` is added to it.

  Devices that `rules` give parts of the vocabulary look up their own tokens and sum what they find:
  the compiler alone would gather the whole table on each.
  """
  if noise_BTD is not None:
    return embed(embedding_VD, tokens, dtype, rules) + noise_BTD.astype(dtype)
  if isinstance(embedding_VD, Streamed):
    return streamed_rows(embedding_VD, tokens, dtype)
  if isinstance(embedding_VD, Quantized):
    found, scales_V = _take(embedding_VD.values, tokens), embedding_VD.scales
    return (found.astype(jnp.float32) * scales_V[tokens][..., None]).astype(dtype)
  shards = rules.shards('vocab')
  if shards == 1 or len(embedding_VD) % shards:
    return _take(embedding_VD, tokens).astype(dtype)
  axes = axes_of(rules.vocab)

  def part(embedding, tokens):
    V = len(embedding)
    index = tokens - V * jax.lax.axis_index(axes)
    found = _take(embedding, jnp.clip(index, 0, V - 1)).astype(dtype)
    return jax.lax.psum(jnp.where(((index >= 0) & (index < V))[..., None], found, 0), axes)

  names = {'embedding': ('vocab', None), 'tokens': ('batch', 'length')}
  return per_device(part, rules, ('batch', 'length', None), names, embedding=embedding_VD,
                    tokens=tokens)


def table(embedding_VD: Table, dtype: jax.typing.DTypeLike) -> Float[Array, 'V D']:
  """An embedding as floats: one in few bits in this dtype, another as it is."""
  if not isinstance(embedding_VD, Quantized | Streamed):
    return embedding_VD
  if embedding_VD.scales is None:
    return embedding_VD.values
  values_VD = embedding_VD.values.astype(jnp.float32)
  return (values_VD * embedding_VD.scales[:, None]).astype(dtype)


@jax.custom_vjp
def _take(table_VD, tokens):
  """The rows of these tokens."""
  return platform.move(lambda table: jnp.take(table, tokens, axis=0), table_VD)


_take.defvjp(lambda table_VD, tokens: (_take(table_VD, tokens), (table_VD, tokens)),
             lambda saved, g: (jnp.zeros_like(saved[0]).at[saved[1]].add(g), None))


def logits(hidden_BTD: Float[Array, 'B T D'], embedding_VD: Table,
           bias_V: Float[Array, ' V'] | None = None, softcap: float | None = None
           ) -> Float[Array, 'B T V']:
  """Scores of every token of the vocabulary, float32; `cross_entropy` never needs them all at
  once."""
  if isinstance(embedding_VD, Streamed):
    logits_BTV = streamed_matmul(hidden_BTD, embedding_VD, dtype=jnp.float32)
  elif isinstance(embedding_VD, Quantized):
    logits_BTV = quantized_matmul(hidden_BTD, embedding_VD.values, embedding_VD.scales,
                                  dtype=jnp.float32, transposed=True)
  elif hidden_BTD.shape[1] == 1 and hidden_BTD.dtype == jnp.bfloat16:  # in decoding
    embedding_VD = embedding_VD.astype(hidden_BTD.dtype)
    logits_BTV = dot(hidden_BTD[:, 0], embedding_VD, transpose_b=True)[:, None]
  else:
    logits_BTV = jnp.einsum('btd,vd->btv', hidden_BTD, embedding_VD.astype(hidden_BTD.dtype),
                            preferred_element_type=jnp.float32)
  logits_BTV = logits_BTV if bias_V is None else logits_BTV + bias_V
  return logits_BTV if softcap is None else softcap * jnp.tanh(logits_BTV / softcap)


@jax.custom_vjp
def keep_gradient_whole(x: Any) -> Any:
  """x, whose cotangent is an array in memory: a TPU's products do not compute it again for every
  tile that reads it."""
  return x


keep_gradient_whole.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))


def dropout(x: jax.Array, rate: float, draws: Draws | None) -> jax.Array:
  """x [B, D] or [B, T, D] after dropout; without draws, as it is."""
  return x if draws is None else draws.dropout(x, rate)


def split(draws: Draws | None, count: int) -> tuple[Draws | None, ...]:
  """Draws for so many places of a layer."""
  return (None,) * count if draws is None else draws.split(count)
