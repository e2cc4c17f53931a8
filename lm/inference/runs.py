"""Ways to decode that need other runs beside the one that writes: amateurs, experts, drafts."""
from collections.abc import Callable
import dataclasses
from typing import Any, Optional

from lm.inference import guidance, speculative
from lm.inference.decoder import Decoder
from lm.inference.methods import Method

Load = Callable[[str], tuple[Any, Any]]  # from a run's directory to its module and parameters


@dataclasses.dataclass(frozen=True)
class ContrastiveDecoding:
  """See `guidance.contrastive_decoding`; the paper searches with 5 beams.

  amateur: directory of a run of a smaller model of the same vocabulary.
  method: None samples.
  """
  amateur: str
  plausibility: float = 0.1
  amateur_temperature: float = 1.0
  method: Optional[Method] = None

  def guided(self, own: Decoder, others: list[Decoder]) -> guidance.Guided:
    return guidance.contrastive_decoding(own, *others, self.plausibility, self.amateur_temperature)

  @property
  def runs(self) -> tuple[str, ...]:
    return (self.amateur,)


@dataclasses.dataclass(frozen=True)
class ClassifierFree:
  """See `guidance.classifier_free`.

  scale: 1 changes nothing, more follows the prompt more.
  method: None samples.
  """
  scale: float = 1.5
  method: Optional[Method] = None
  runs = ()

  def guided(self, own: Decoder, others: list[Decoder]) -> guidance.Guided:
    del others
    return guidance.classifier_free(own, self.scale)


@dataclasses.dataclass(frozen=True)
class DExperts:
  """See `guidance.experts`.

  expert, anti_expert: directories of runs of the same vocabulary, tuned to what is wanted and to
    what is not.
  method: None samples.
  """
  expert: str
  anti_expert: str
  alpha: float = 2.0
  plausibility: float = 0.0
  method: Optional[Method] = None

  def guided(self, own: Decoder, others: list[Decoder]) -> guidance.Guided:
    return guidance.experts(own, *others, self.alpha, self.plausibility)

  @property
  def runs(self) -> tuple[str, ...]:
    return self.expert, self.anti_expert


@dataclasses.dataclass(frozen=True)
class DraftRun:
  """Speculative decoding with drafts of another run; see `speculative.DraftModel`.

  run_dir: of a smaller model of the same vocabulary.
  """
  run_dir: str
  num_tokens: int = 4


Decoding = Method | ContrastiveDecoding | ClassifierFree | DExperts | DraftRun


def resolve(decoding: Decoding | None, module: Any, params: Any, load: Load
            ) -> tuple[Any, Any, Method | None]:
  """What writes (the model, or it and others together), its parameters, and the method."""
  if isinstance(decoding, DraftRun):
    return module, params, speculative.DraftModel(*load(decoding.run_dir), decoding.num_tokens)
  if not hasattr(decoding, 'guided'):
    return module, params, decoding
  modules, weights = zip((module, params), *map(load, decoding.runs))
  own, *others = map(Decoder, modules)
  return decoding.guided(own, others), weights, decoding.method
