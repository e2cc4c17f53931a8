"""Models of another size: depth, width or a number of parameters in, a config out."""
import dataclasses
import functools
from typing import Any, Optional

import flax.linen as nn
import jax

NUM_ALIGNED = 32  # d_ff is a multiple of it, as matrix units like it


@functools.lru_cache(maxsize=4096)  # a search asks for the same again and again
def num_params(model: Any) -> int:
  """Parameters of a model's config, without making any; tied ones count once."""
  init = lambda: model.build().init(jax.random.key(0), method='initialize')['params']
  return sum(x.size for x in jax.tree.leaves(nn.meta.unbox(jax.eval_shape(init))))


def scaled(base: Any, num_layers: Optional[int] = None, d_model: Optional[int] = None,
           params: Optional[float] = None) -> Any:
  """The config of `base` at another depth, width or size; what is not given follows from it.

  The shape stays what it is in `base`: width over depth (Kaplan et al. 2020, arXiv:2001.08361,
  section 3.1, find that it matters little), d_ff over width, dimensions of a head, and query heads
  over key-value heads. So the width is a multiple of these heads' dimensions.

  Args:
    base: a config of any family, such as @gpt.GPTConfig().
    num_layers: of each stack.
    d_model: in dimensions; rounded to what the heads divide.
    params: how many shall be there; the nearest that this shape can reach is taken.

  Raises:
    ValueError: none of the three is given, or `params` with another one.
  """
  if params is None and num_layers is None and d_model is None:
    raise ValueError('nothing says how large the model shall be; give num_layers, d_model or '
                     'params')
  aspect, step = base.d_model / base.num_layers, base.head_dim * base.num_heads // base.kv_heads
  if params is None:
    depth = num_layers or max(1, round(d_model / aspect))
    return _shaped(base, depth, _round(d_model or depth * aspect, step))
  if num_layers is not None or d_model is not None:
    raise ValueError(f'params={params} decides the size, and num_layers={num_layers} or '
                     f'd_model={d_model} decides it again; give the one or the other')
  sized = lambda depth: _shaped(base, depth, _round(depth * aspect, step))
  low, high = 1, 2
  while num_params(sized(high)) < params:
    low, high = high, 2 * high
  while high - low > 1:  # the depth below `params`, and the one above
    middle = (low + high) // 2
    low, high = (middle, high) if num_params(sized(middle)) < params else (low, middle)
  widths = {max(1, _round(depth * aspect, step) // step + more) for depth in (low, high)
            for more in (-1, 0, 1)}
  choices = [_shaped(base, depth, step * width) for depth in (low, high) for width in widths]
  return min(choices, key=lambda config: abs(num_params(config) - params))


def _round(size: int | float, step: int) -> int:
  """The nearest positive multiple of `step`."""
  return max(1, round(size / step)) * step


def _shaped(base: Any, num_layers: int, d_model: int) -> Any:
  """`base` of this depth and width."""
  changes = {'num_layers': num_layers, 'd_model': d_model,
             'num_heads': max(1, d_model * base.num_heads // base.d_model),
             'd_ff': _round(base.d_ff * d_model / base.d_model, NUM_ALIGNED)}
  if getattr(base, 'num_kv_heads', None) is not None:
    changes['num_kv_heads'] = max(1, changes['num_heads'] * base.num_kv_heads // base.num_heads)
  return dataclasses.replace(base, **changes)
