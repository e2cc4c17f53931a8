"""Parameter-efficient tuning of any model: a few leaves are added to its parameters, and these, its
head, or its biases are all that trains.

Layers go by the leaves that they find (`lm/layers/adapted.py`), so a model with an adapter takes
the same batches, meshes, stacks and caches as without, and its parameters without those leaves are
the model that it was. Patterns are regular expressions of whole paths, as `optimizers.Group` has
them; `targets` are matched against kernels such as blocks/layers/attention/query/kernel.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any, Optional
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.errors import UserError
from lm.models.gpt import GPTConfig
from lm.parallel.rules import Rules

HEADS = '(.*/)?head/.*',  # what stands on a trunk, and is new
Names = tuple[str | None, ...]
Leaf = tuple[tuple[int, ...], Names, Callable]  # shape, logical axes, (key, shape) -> values


@dataclasses.dataclass(frozen=True)
class Tuning:
  """What adapts a model.

  trainable: patterns of the model's own parameters that train too.
  """
  trainable: tuple[str, ...] = dataclasses.field(default=HEADS, kw_only=True)

  def __post_init__(self):
    check_patterns(*self.trainable, *getattr(self, 'targets', ()))
    for name in ('rank', 'size', 'length', 'alpha'):
      if getattr(self, name, 1) <= 0:
        raise ValueError(f'{name}={getattr(self, name)} must be greater than 0')

  def leaves(self, boxed: Mapping[tuple[str, ...], nn.Partitioned]
             ) -> Iterator[tuple[tuple[str, ...], Leaf]]:
    """(path, leaf) of what is added to a model of these parameters."""
    del boxed
    return iter(())

  def is_own(self, name: str) -> bool:
    """Whether a leaf of this last name is one that was added, and trains."""
    del name
    return False

  def trains(self, path: str) -> bool:
    """Whether a parameter trains."""
    return self.is_own(path.rpartition('/')[2]) or matches(self.trainable, path)

  def add(self, params: Any, rng: jax.Array) -> Any:
    """New parameters, boxed as `init` gives them, with the leaves of the adapter."""
    flat = {_names(path): box for path, box in jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, nn.Partitioned))}
    tree = jax.tree.map(lambda x: x, params, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    for path, (shape, names, init) in self.leaves(flat):
      key = jax.random.fold_in(rng, zlib.crc32('/'.join(path).encode()))
      node = tree
      for name in path[:-1]:
        node = node[name]
      node[path[-1]] = nn.Partitioned(init(key, shape), names)
    return tree


@dataclasses.dataclass(frozen=True)
class LoRA(Tuning):
  """Adds alpha / rank A B to kernels (arXiv:2106.09685, section 4.1); `lm convert` merges it.

  A starts uniform in +-inputs**-0.5 (the reference code; the paper says Gaussian) and B at 0, so
  that training starts at the model as it was. There is no dropout of its own.

  targets: the kernels; the paper's are queries and values (section 4.2).
  rank_stabilized: alpha / rank**0.5 instead (rsLoRA, arXiv:2312.03732).
  """
  rank: int = 8
  alpha: float = 16.0
  targets: tuple[str, ...] = ('.*/(query|value)/kernel',)
  rank_stabilized: bool = False

  @property
  def scale(self) -> float:
    """What A B is multiplied by."""
    return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

  def leaves(self, boxed):
    """`lora_a` [K, R], `lora_b` [R, N] and the constant `lora_scale` beside each kernel."""
    for path in kernels(boxed, self.targets):
      stack, (K, N), (name_in, name_out) = _matrix(path, boxed[path])
      bound = K**-0.5
      uniform = lambda key, shape, bound=bound: jax.random.uniform(
          key, shape, minval=-bound, maxval=bound)
      yield (*path[:-1], 'lora_a'), _leaf(stack, (K, self.rank), (name_in, None), uniform)
      yield (*path[:-1], 'lora_b'), _leaf(stack, (self.rank, N), (None, name_out), _zeros)
      yield (*path[:-1], 'lora_scale'), _leaf(stack, (), (), self._constant)

  def _constant(self, key, shape):
    del key
    return jnp.full(shape, self.scale, jnp.float32)

  def is_own(self, name):
    """All but the scale."""
    return name in ('lora_a', 'lora_b')


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
  """LoRA of the directions of a kernel's columns, whose norms are learnt beside them
  (arXiv:2402.09353, section 4)."""

  def leaves(self, boxed):
    """LoRA's, and `magnitude` [N], what is added to the norms."""
    yield from super().leaves(boxed)
    for path in kernels(boxed, self.targets):
      stack, (_, N), (_, name_out) = _matrix(path, boxed[path])
      yield (*path[:-1], 'magnitude'), _leaf(stack, (N,), (name_out,), _zeros)

  def is_own(self, name):
    """LoRA's, and the magnitude."""
    return super().is_own(name) or name == 'magnitude'


@dataclasses.dataclass(frozen=True)
class Adapter(Tuning):
  """Adds relu(y down) up to what attention and feed-forward layers give, before their dropout and
  the residual sum (Houlsby et al., arXiv:1902.00751, section 2.1). It starts at 0.

  size: of the bottleneck.
  targets: kernels behind which it stands; Pfeiffer et al. (arXiv:2005.00247, section 3.3) have it
    behind the feed-forward layer alone: '.*/wo/kernel'.
  """
  size: int = 32
  targets: tuple[str, ...] = ('.*/(out|wo)/kernel',)

  def leaves(self, boxed):
    """`adapter_down` [N, R], `adapter_up` [R, N] and their biases beside each kernel."""
    for path in kernels(boxed, self.targets):
      stack, (_, N), (_, name) = _matrix(path, boxed[path])
      normal = lambda key, shape: 0.01 * jax.random.normal(key, shape)  # section 3.6
      at = lambda part, path=path: (*path[:-1], f'adapter_{part}')
      yield at('down'), _leaf(stack, (N, self.size), (name, None), normal)
      yield at('down_bias'), _leaf(stack, (self.size,), (None,), _zeros)
      yield at('up'), _leaf(stack, (self.size, N), (None, name), _zeros)
      yield at('up_bias'), _leaf(stack, (N,), (name,), _zeros)

  def is_own(self, name):
    """All that is added."""
    return name.startswith('adapter_')


@dataclasses.dataclass(frozen=True)
class PrefixTuning(Tuning):
  """Adds keys and values to each layer's attention, which all tokens see (arXiv:2101.00190, section
  4). They take no places: positions stay what they were in pretraining.

  length: P, keys a layer.
  init_std: of both; they are learnt as they are, without the reference code's network.
  targets: kernels of the keys of the attentions that are meant.
  """
  length: int = 16
  init_std: float = 0.02
  targets: tuple[str, ...] = ('.*/key/kernel',)

  def leaves(self, boxed):
    """`prefix_key` and `prefix_value` [P, K, H] beside the projections of each attention."""
    normal = lambda key, shape: self.init_std * jax.random.normal(key, shape)
    for path in kernels(boxed, self.targets):
      if (*path[:-2], 'position', 'kernel') in boxed:
        raise UserError('PrefixTuning does not go with the relative attention of Transformer-XL, '
                        'whose keys have distances; take LoRA')
      stack = boxed[path].value.shape[:1] if boxed[path].names[0] == 'layers' else ()
      K, H = boxed[path].value.shape[-2:]
      for name in ('prefix_key', 'prefix_value'):
        yield (*path[:-2], name), _leaf(stack, (self.length, K, H),
                                        (None, *boxed[path].names[-2:]), normal)

  def is_own(self, name):
    """Both."""
    return name in ('prefix_key', 'prefix_value')


@dataclasses.dataclass(frozen=True)
class PromptTuning(Tuning):
  """Learnt tokens before every document (arXiv:2104.08691, section 2), of a decoder: what it makes
  of them does not depend on the text, so that packed documents share them.

  They take the first places of the context. They start as tokens of the vocabulary; `prompt` is
  what is added to their embeddings.

  length: P, tokens.
  """
  length: int = 16

  def leaves(self, boxed):
    """`prompt` [P, D] beside the embedding of the tokens."""
    for path, box in boxed.items():
      if path[-1] == 'token_embedding':
        yield (*path[:-1], 'prompt'), _leaf((), (self.length, box.value.shape[1]),
                                            (None, box.names[1]), _zeros)

  def is_own(self, name):
    """The change of the embeddings."""
    return name == 'prompt'


@dataclasses.dataclass(frozen=True)
class BitFit(Tuning):
  """Trains biases alone (arXiv:2106.10199), of norms too, with the head; adds nothing."""
  trainable: tuple[str, ...] = dataclasses.field(default=('(.*/)?bias', *HEADS), kw_only=True)


@dataclasses.dataclass(frozen=True)
class Adapted:
  """A module whose `init` also makes the leaves of an adapter, and which says what trains; in all
  else it is the module.

  frozen: patterns of parameters that do not train, whatever the adapter says. Against them stands a
    parameter's path, and of stacked layers also that of each: blocks/layers/[0-3]/.* are four.
  """
  module: nn.Module
  adapter: Optional[Tuning]
  frozen: tuple[str, ...] = ()

  def __getattr__(self, name: str) -> Any:
    return getattr(self.module, name)

  def init(self, rng: jax.Array, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """New parameters of both.

    Raises:
      UserError: a pattern matches nothing that the model has.
    """
    variables = self.module.init(rng, *args, **kwargs)
    params = variables['params']
    if self.adapter is not None:
      params = self.adapter.add(params, rng)
    _refuse_unmatched(self.frozen, params)
    return {**variables, 'params': params}

  def trains(self, path: str) -> bool:
    """Whether the parameter of this path trains."""
    return trains(self.adapter, self.frozen, path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tunable:
  """What an experiment says of the parameters that train.

  adapter: what is added to the model and trains in its place.
  frozen: patterns of parameters that do not train, whatever the adapter says: blocks/layers/mlp/.*
    or, of single layers, blocks/layers/[0-3]/.*
  """
  adapter: Optional[Tuning] = None
  frozen: tuple[str, ...] = ()

  def build_model(self, rules: Rules) -> Any:
    """The experiment's model with its adapter, which says what trains."""
    return adapt(self.model.build(rules), self.adapter, self.frozen)

  def trainable(self, path: str) -> bool:
    """Whether the parameter of this path trains; it may name a layer: blocks/layers/3/mlp/wi/
    kernel."""
    return trains(self.adapter, self.frozen, path) and not self.optimizer.is_frozen(path)


def trains(adapter: Tuning | None, frozen: Sequence[str], path: str) -> bool:
  """Whether a parameter trains under an adapter, or none, and with these patterns frozen; the path
  may name one layer: blocks/layers/3/mlp/wi/kernel."""
  stacked = re.sub(r'(^|/)layers/\d+/', r'\1layers/', path)
  if matches(frozen, path) or matches(frozen, stacked):
    return False
  return adapter is None or adapter.trains(stacked)


def adapt(module: nn.Module, adapter: Tuning | None, frozen: Sequence[str]) -> Any:
  """The module with an adapter and frozen parameters; without either, the module itself.

  Raises:
    UserError: the adapter does not go with this model.
  """
  check_patterns(*frozen)
  config = module.config
  while hasattr(config, 'trunk'):
    config = config.trunk
  if isinstance(adapter, PromptTuning) and (
      not isinstance(config, GPTConfig) or config.positions == 'alibi'):
    raise UserError(f'PromptTuning goes with decoders such as GPT-2 and Llama, and not with '
                    f'{type(config).__name__}, whose other tokens a prompt would see, or with '
                    "positions='alibi'; take PrefixTuning or LoRA")
  return Adapted(module, adapter, tuple(frozen)) if adapter or frozen else module


def matches(patterns: Sequence[str], path: str) -> bool:
  """Whether one of the patterns matches the whole path."""
  return any(re.fullmatch(pattern, path) for pattern in patterns)


def check_patterns(*patterns: str) -> None:
  """Refuses what is no regular expression.

  Raises:
    ValueError: it names the pattern.
  """
  for pattern in patterns:
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(f'{pattern!r} is no regular expression: {error}; write .* for any '
                       'characters') from error


def kernels(boxed: Mapping[tuple[str, ...], nn.Partitioned], targets: Sequence[str]
            ) -> list[tuple[str, ...]]:
  """Paths of the kernels that the patterns match.

  Raises:
    UserError: one of them matches none.
  """
  paths = [path for path in boxed if path[-1] == 'kernel']
  for target in targets:
    if not any(matches([target], '/'.join(path)) for path in paths):
      raise UserError(f'targets={tuple(targets)}: {target!r} matches no kernel; the model has '
                      f'{", ".join("/".join(path) for path in paths)}')
  return [path for path in paths if matches(targets, '/'.join(path))]


def _refuse_unmatched(frozen: Sequence[str], params: Any) -> None:
  paths = []
  for path, box in jax.tree_util.tree_leaves_with_path(
      params, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
    names = _names(path)
    paths.append('/'.join(names))
    if 'layers' in names:
      place = names.index('layers') + 1
      paths += ['/'.join((*names[:place], str(i), *names[place:])) for i in range(len(box.value))]
  for pattern in frozen:
    if not any(matches([pattern], path) for path in paths):
      raise UserError(f'frozen={tuple(frozen)}: {pattern!r} matches no parameter; the model has '
                      f'{", ".join(path for path in paths if not re.search("layers/[0-9]", path))}')


def _names(path: tuple) -> tuple[str, ...]:
  """The dict keys of a leaf's path, whether it is boxed or not."""
  return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def _matrix(path: tuple[str, ...], box: nn.Partitioned
            ) -> tuple[tuple[int, ...], tuple[int, int], Names]:
  """Of a kernel: the layers before it, (L,) or (); inputs and outputs; and their logical axes.

  Merged axes are sharded as the first of them is, heads and not their dimensions.
  """
  stack = box.value.shape[:1] if box.names[0] == 'layers' else ()
  shape, names = box.value.shape[len(stack):], box.names[len(stack):]
  inputs = 2 if path[-2] == 'out' else 1  # attention's contracts heads and their dimensions
  sizes = math.prod(shape[:inputs]), math.prod(shape[inputs:])
  return stack, sizes, (names[0], names[inputs])


def _leaf(stack: tuple[int, ...], shape: tuple[int, ...], names: Names, init: Callable) -> Leaf:
  """A leaf of every layer, or one where there are none."""
  return (*stack, *shape), (*['layers'][:len(stack)], *names), init


def _zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  del key
  return jnp.zeros(shape)
