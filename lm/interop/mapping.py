"""Other people's tensors and our parameters: a table of rules, exact both ways.

A `Rule` says where one of their tensors stands with us and how its numbers lie there. Our layers
are stacked, so a rule whose name holds {layer} speaks of every slice of a leaf:

    Rule('h.{layer}.mlp.c_fc.weight', 'blocks/layers/mlp/wi/kernel', Matrix(out_first=False))

Numbers move and never change: nothing here computes, so every rule is exact in both directions.
"""
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import numpy as np

from lm.errors import UserError

Shape = tuple[int, ...]
Part = tuple[int | tuple[()], np.ndarray]


class Layout(Protocol):
  """How arrays of ours (one, or several fused) lie in one tensor of theirs."""

  def shape(self, shapes: Sequence[Shape]) -> Shape:
    """Of theirs, from those of ours."""

  def to_theirs(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Ours as their tensor."""

  def to_ours(self, array: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
    """Their tensor as ours, of these shapes."""


@dataclasses.dataclass(frozen=True)
class Same:
  """The same array: embeddings, scales."""

  def shape(self, shapes):
    """Of theirs."""
    return tuple(shapes[0])

  def to_theirs(self, arrays):
    """Ours as theirs."""
    return arrays[0]

  def to_ours(self, array, shapes):
    """Theirs as ours."""
    return [array.reshape(shapes[0])]


@dataclasses.dataclass(frozen=True)
class Vector:
  """Biases: heads and dimensions of a head, or several of ours, one after another in one vector."""

  def shape(self, shapes):
    """Of theirs."""
    return (sum(map(math.prod, shapes)),)

  def to_theirs(self, arrays):
    """Ours as theirs."""
    return np.concatenate([array.reshape(-1) for array in arrays])

  def to_ours(self, array, shapes):
    """Theirs as ours."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(array, ends), shapes)]


@dataclasses.dataclass(frozen=True)
class Matrix:
  """Kernels [*inputs, *outputs] as one matrix; several of ours stand beside each other as outputs.

  inputs: number of leading axes of ours that are contracted (2 where heads are).
  out_first: theirs is [out, in], as `torch.nn.Linear` keeps it, not [in, out].
  """
  inputs: int = 1
  out_first: bool = True

  def flat(self, shape: Shape) -> tuple[int, int]:
    """Inputs and outputs of one of ours."""
    return math.prod(shape[:self.inputs]), math.prod(shape[self.inputs:])

  def shape(self, shapes):
    """Of theirs."""
    sizes = [self.flat(shape) for shape in shapes]
    size_in, size_out = sizes[0][0], sum(out for _, out in sizes)
    return (size_out, size_in) if self.out_first else (size_in, size_out)

  def to_theirs(self, arrays):
    """Ours as theirs."""
    parts = [array.reshape(self.flat(array.shape)) for array in arrays]
    matrix = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    return matrix.T if self.out_first else matrix

  def to_ours(self, array, shapes):
    """Theirs as ours."""
    matrix = array.T if self.out_first else array
    ends = np.cumsum([self.flat(shape)[1] for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(matrix, ends, axis=1), shapes)]


class Rule(NamedTuple):
  """theirs: a name, with {layer} where every layer has such a tensor.
  ours: the path of a leaf such as blocks/layers/mlp/wi/kernel, or several that theirs fuses.
  layout: how the numbers lie.
  layer: the one of a stacked leaf that the tensor fills, where the name holds no {layer}.
  """
  theirs: str
  ours: str | tuple[str, ...]
  layout: Layout = Same()
  layer: int | None = None


class Place(NamedTuple):
  """Where one tensor of theirs stands: paths of ours, the layer (None: not stacked), the layout."""
  paths: tuple[str, ...]
  layer: int | None
  layout: Layout

  def shapes(self, shapes: Mapping[str, Shape]) -> list[Shape]:
    """Of our arrays, without the axis of layers."""
    return [tuple(shapes[path][self.layer is not None:]) for path in self.paths]


def places(rules: Iterable[Rule], shapes: Mapping[str, Shape]) -> dict[str, Place]:
  """Every tensor of theirs by its name; `shapes` are those of our leaves by path."""
  found = {}
  for rule in rules:
    paths = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
    if '{layer}' in rule.theirs:
      for layer in range(shapes[paths[0]][0]):
        found[rule.theirs.format(layer=layer)] = Place(paths, layer, rule.layout)
    else:
      found[rule.theirs] = Place(paths, rule.layer, rule.layout)
  absent = set(shapes) - {path for place in found.values() for path in place.paths}
  assert not absent, f'no rule speaks of {sorted(absent)}'
  return found


def check(table: Mapping[str, Place], shapes: Mapping[str, Shape], theirs: Mapping[str, Shape],
          source: str) -> None:
  """Compares the table with the tensors that a source has.

  Raises:
    UserError: a tensor is missing, of another shape, or not in the table; the first of them is
      named, with both shapes.
  """
  wanted = {name: place.layout.shape(place.shapes(shapes)) for name, place in table.items()}
  wrong = [name for name in wanted if name in theirs and wanted[name] != tuple(theirs[name])]
  if wrong:
    raise UserError(
        f'{source}: {wrong[0]} has shape {list(theirs[wrong[0]])} and config.json asks for '
        f'{list(wanted[wrong[0]])}{_more(wrong)}; the two are not of one model')
  missing = [name for name in wanted if name not in theirs]
  if missing:
    raise UserError(f'{source}: {missing[0]} is missing, of shape {list(wanted[missing[0]])}'
                    f'{_more(missing)}; the file is damaged or config.json is of another model')
  extra = [name for name in theirs if name not in wanted]
  if extra:
    raise UserError(f'{source}: {extra[0]} of shape {list(theirs[extra[0]])} has no place in this '
                    f'architecture{_more(extra)}; config.json is of another model')


def _more(names):
  return f' (and {len(names) - 1} more)' if len(names) > 1 else ''


def to_ours(table: Mapping[str, Place], shapes: Mapping[str, Shape],
            read: Callable[[str], np.ndarray]) -> Iterator[tuple[str, Iterator[Part]]]:
  """(path, parts) of our leaves, as `run_weights.write_run_params` takes them.

  A part is (layer, or () for a leaf that is not stacked, array); each is read when its turn comes.
  """
  sources: dict[str, list[tuple[str, Place, int]]] = {}
  for name, place in table.items():
    for index, path in enumerate(place.paths):
      sources.setdefault(path, []).append((name, place, index))

  def parts(path):
    for name, place, index in sources[path]:
      ours = place.layout.to_ours(read(name), place.shapes(shapes))[index]
      yield () if place.layer is None else place.layer, ours

  for path in sources:
    yield path, parts(path)


def to_theirs(place: Place, leaf: Callable[[str, int | None], np.ndarray],
              dtype: Any) -> np.ndarray:
  """One tensor of theirs, from our leaves read by `leaf(path, layer)`."""
  return place.layout.to_theirs([leaf(path, place.layer) for path in place.paths]).astype(dtype)
