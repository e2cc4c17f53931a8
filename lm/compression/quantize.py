"""Matrices in few bits, rounded to the nearest: the one place where a model's are.

`lm.inference` keeps matrices so while it runs, `RoundToNearest` in a run directory; GPTQ, AWQ and
SmoothQuant choose what is rounded, and round here.
"""
import dataclasses
from typing import Any, Literal, Optional

import jax
import jax.numpy as jnp

from lm.compression import matrices, Model
from lm.compression.matrices import Matrix
from lm.errors import UserError
from pallas_kernels.quantized_matmul import Quantized, quantize

Format = Literal['int8', 'int4', 'float8_e4m3fn']
BITS = {'int8': 8, 'int4': 4, 'float8_e4m3fn': 8}


@dataclasses.dataclass(frozen=True)
class Rounding:
  """How matrices are kept; what each method of quantisation is told.

  dtype: of the values.
  group_size: consecutive inputs that share a scale for each output, a divisor of the inputs of
    every target; None shares one among all inputs, 'tensor' among all outputs too.
  targets: patterns of whole paths of kernels. Others stay floats.
  embeddings: of the tokens, with a scale a token; None leaves them floats. A head that is tied to
    them is rounded with them.
  """
  dtype: Format = 'int8'
  group_size: Optional[int | Literal['tensor']] = None
  targets: tuple[str, ...] = ('.*',)
  embeddings: Optional[Literal['int8', 'float8_e4m3fn']] = 'int8'

  def __post_init__(self):
    if isinstance(self.group_size, int) and self.group_size < 1:
      raise ValueError(f'group_size={self.group_size} must be at least 1, None or "tensor"')

  def chosen(self, params: Any) -> dict[str, Matrix]:
    """The kernels that are rounded, by path.

    Raises:
      UserError: a pattern matches none, a group does not divide, or they are rounded already.
    """
    found = matrices.matching(params, self.targets)
    matrices.require_floats(params)
    for path, one in found.items():
      if isinstance(self.group_size, int) and one.K % self.group_size:
        near = [size for size in (16, 32, 64, 128, 256) if one.K % size == 0]
        raise UserError(f'group_size={self.group_size} does not divide the {one.K} inputs of '
                        f'{path}; take one that does, such as {near[-1] if near else one.K}, or '
                        'leave that kernel out of `targets`')
    return found

  def round(self, w_KN: jax.Array, scales: jax.Array | None = None
            ) -> tuple[jax.Array, jax.Array]:
    """Values [K, N] and scales, [N] or of groups [P, N]; of given scales the values alone are new.
    """
    groups = self.group_size if isinstance(self.group_size, int) else None
    if self.group_size == 'tensor' and scales is None:
      _, scales = quantize(w_KN.reshape(-1, 1), *self._bits)
      scales = jnp.broadcast_to(scales, w_KN.shape[1:])
    return quantize(w_KN, *self._bits, groups, floating=self.dtype == 'float8_e4m3fn',
                    scales=scales)

  @property
  def _bits(self):
    return (BITS[self.dtype],)

  def kept(self, one: Matrix, values_LKN: jax.Array, scales: jax.Array) -> Quantized:
    """What stands in the place of the leaf; scales [L, N] or [L, P, N]."""
    groups = scales.shape[1:-1]
    return Quantized(one.shaped(values_LKN), scales.reshape(*one.stack, *groups, *one.outputs))

  def nearest(self, one: Matrix, leaf: jax.Array) -> Quantized:
    """The leaf, rounded to the nearest."""
    return self.kept(one, *jax.vmap(self.round)(one.flat(leaf)))

  def embedding(self, leaf: jax.Array) -> Quantized:
    """An embedding [V, D], with a scale a row."""
    by_token = Rounding(self.embeddings).round(leaf.T)
    return Quantized(by_token[0].T, by_token[1])

  def all_nearest(self, params: Any) -> Any:
    """The parameters with every target, and the embeddings, rounded to the nearest."""
    chosen, one_by_one = self.chosen(params), jax.jit(self.nearest, static_argnums=0)
    return self.with_embeddings(matrices.replace(
        params, lambda path, leaf: one_by_one(chosen[path], leaf) if path in chosen else leaf))

  def with_embeddings(self, params: Any) -> Any:
    """The parameters with the embeddings of tokens rounded."""
    is_rounded = lambda path, leaf: (self.embeddings and matrices.is_embedding(path)
                                     and not matrices.is_quantized(leaf))
    return matrices.replace(params, lambda path, leaf: self.embedding(leaf)
                            if is_rounded(path, leaf) else leaf)


@jax.jit
def quantize_matrices(params: Any) -> Any:
  """Rounds the kernels of linear layers to 8 bits, with a scale for each output, and the embeddings
  of tokens, with a scale for each token: a quarter of float32's bytes.

  Activations stay in the compute dtype; so do experts, norms, biases, and learnt positions. What is
  in few bits already stays as it is.
  """
  how = Rounding()

  def rounded(path, leaf):
    one = None if matrices.is_quantized(leaf) else matrices.matrix_of(path, leaf)
    return leaf if one is None else how.nearest(one, leaf)
  return how.with_embeddings(matrices.replace(params, rounded))


@dataclasses.dataclass(frozen=True)
class RoundToNearest(Rounding):
  """Rounds each number to the nearest that there is: 8 bits ask for no more, and it for no data.

  activations: rounds what goes into the blocks' products too, each token by a scale of its own, and
    multiplies integers (`products='int8'`).
  """
  activations: bool = False

  def __post_init__(self):
    super().__post_init__()
    if self.activations and self.dtype != 'int8':
      raise ValueError(f'activations=True multiplies int8 by int8, and dtype={self.dtype!r}; take '
                       "dtype='int8', or leave activations as they are")

  def __call__(self, model: Model, calibration: Any) -> Model:
    """Asks nothing of the calibration."""
    del calibration
    config = with_products(model.config, 'int8' if self.activations else None)
    return model.after(self, self.all_nearest(model.params), config)


def with_products(config: Any, products: str | None) -> Any:
  """The config of a model, or of one with a head, whose blocks multiply in this kind."""
  for name in ('query', 'document', 'trunk'):
    if dataclasses.is_dataclass(getattr(config, name, None)):
      config = dataclasses.replace(config, **{name: with_products(getattr(config, name), products)})
  names = [field.name for field in dataclasses.fields(config)]
  return dataclasses.replace(config, products=products) if 'products' in names else config
