"""How the tensors of a file and the parameters of a model belong together."""
from collections.abc import Callable, Mapping
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from lm.errors import UserError
from lm.interop import architectures, mapping, sentence
from lm.interop.architectures import Architecture
from lm.interop.mapping import Place, Shape
from lm.models.heads import DualEncoderConfig
from lm.training import checkpoint_io
from lm.training.state import abstract_params

Leaf = Callable[[str, int | None], np.ndarray]  # (path, layer or None) -> numbers of ours


@dataclasses.dataclass(frozen=True)
class Plan:
  """What `read` and `write` find.

  hf: the content of config.json.
  model: our config.
  shapes: of our leaves, by path.
  places: where the tensors stand, by their names in the file.
  aliases: the name of a tensor that repeats another -> the name of that one.
  kept: names of tensors that are no parameters.
  own_head: whether a head stands in the file that config.json calls tied.
  imported: whether a file was read.
  """
  hf: dict[str, Any]
  model: Any
  shapes: dict[str, Shape]
  places: dict[str, Place]
  aliases: dict[str, str] = dataclasses.field(default_factory=dict)
  kept: tuple[str, ...] = ()
  own_head: bool = False
  imported: bool = False

  def shape(self, name: str) -> Shape:
    """Of their tensor."""
    place = self.places[self.aliases.get(name, name)]
    return place.layout.shape(place.shapes(self.shapes))

  def array(self, name: str, leaf: Leaf, dtype: Any) -> np.ndarray:
    """Their tensor, from our parameters."""
    return mapping.to_theirs(self.places[self.aliases.get(name, name)], leaf, dtype)


def trunk_of(model: Any) -> Any:
  """The config of what an architecture of Hugging Face is: the model, or what its head stands
  on."""
  return model.trunk if isinstance(model, DualEncoderConfig) else model


def of_trunk(model: Any) -> tuple[Any, str]:
  """The config of the trunk of any model, and what stands before the paths of its parameters."""
  if isinstance(model, DualEncoderConfig):
    return model.trunk, 'query/trunk/'
  return (model.trunk, 'trunk/') if hasattr(model, 'trunk') else (model, '')


def trunk_name(made: Plan) -> str:
  """What begins the names of a trunk's tensors."""
  return architectures.ARCHITECTURES[made.hf['model_type']].trunk


def trunk_params(model: Any, params: Any) -> Any:
  """The parameters of `trunk_of`."""
  return params['query']['trunk'] if isinstance(model, DualEncoderConfig) else params


def abstract(model: Any) -> Any:
  """Shapes and dtypes of a model's parameters."""
  return abstract_params(model.build(), jax.local_devices()[0])


def _places(architecture: Architecture, model: Any) -> tuple[dict[str, Shape], dict[str, Place]]:
  inside = 'query/trunk/' if isinstance(model, DualEncoderConfig) else ''
  shapes = {path: leaf.shape for path, leaf in checkpoint_io.flatten(abstract(model)).items()}
  rules = []
  for rule in architecture.rules(trunk_of(model)):
    paths = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
    rules.append(rule._replace(ours=tuple(inside + path for path in paths)))
  return shapes, mapping.places(rules, shapes)


def read(tensors: Mapping[str, Shape], dtype: str, hf: Mapping[str, Any], directory: pathlib.Path,
         source: str, own_head: bool = False) -> Plan:
  """The plan of a file.

  Args:
    tensors: shapes by name.
    dtype: of the weights; bfloat16 and narrower ones are computed in bfloat16.
    hf: the content of config.json.
    directory: where a modules.json may be.
    source: what messages call it.
    own_head: a head is there though config.json calls it tied, and is another (version 5 of
      transformers says so of all T5, and goes by the tensors).

  Raises:
    UserError: the architecture is not known, or a tensor is missing, of another shape or unknown.
  """
  hf = {**hf, 'tie_word_embeddings': False} if own_head else dict(hf)
  architecture = architectures.of(hf, source)
  names = {architecture.canonical(name): name for name in tensors}
  twice = [name for name in tensors if names[architecture.canonical(name)] != name]
  if twice:
    raise UserError(f'{source}: {twice[0]} and {names[architecture.canonical(twice[0])]} are two '
                    'names of one tensor; the file is damaged')
  kept = {key: name for key, name in names.items() if architectures.BUFFERS.fullmatch(key)}
  names = {key: name for key, name in names.items() if key not in kept}
  for alias, target in architecture.aliases.items():
    if target not in names and alias in names:  # saved under its other name
      names[target] = names.pop(alias)
  trunk = architecture.read(hf, {key: tensors[name] for key, name in names.items()})
  trunk = dataclasses.replace(trunk, dtype='float32' if dtype == 'float32' else 'bfloat16')
  model = sentence.read(directory, trunk)
  shapes, table = _places(architecture, model)
  aliases = {names.pop(alias): target for alias, target in architecture.aliases.items()
             if alias in names and alias not in table}
  mapping.check(table, shapes, {key: tensors[name] for key, name in names.items()}, source)
  return Plan(hf, model, shapes, {names[key]: place for key, place in table.items()},
              {alias: names[target] for alias, target in aliases.items()},
              tuple(kept.values()), own_head, imported=True)


def write(model: Any) -> Plan:
  """The plan of a model that no file was read for: canonical names, nothing twice.

  Raises:
    UserError: no architecture computes what the model does.
  """
  trunk = trunk_of(model)
  architecture = architectures.ARCHITECTURES[architectures.choose(trunk)]
  hf = {**architecture.config_to(trunk), 'torch_dtype': 'float32'}
  return Plan(hf, model, *_places(architecture, model))


def same(one: Any, other: Any) -> bool:
  """Whether two models are the same, however they are trained or run."""
  if not isinstance(one, DualEncoderConfig) or not isinstance(other, DualEncoderConfig):
    return architectures.same_model(one, other)
  head = lambda model: dataclasses.replace(model.query, trunk=other.trunk)
  return (other.document is None and head(one) == head(other)
          and architectures.same_model(one.trunk, other.trunk))
