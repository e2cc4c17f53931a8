"""The model and the vocabulary of a run, for another run that goes on from its parameters.

config.gin of the new run holds what these functions return, field by field, and not that they were
called; so the fields can be bound as always (`--gin.bert.BERTConfig.remat="'full'"`), and nothing
is lost where the first run goes.
"""
from collections.abc import Callable
import dataclasses
import json
import pathlib
from typing import Any, Literal, Optional

from lm import config
from lm.data.vocabularies import VocabularyConfig
from lm.errors import UserError
from lm.models.bert import BERTConfig
from lm.models.gpt import GPTConfig
from lm.models.heads import DualEncoderConfig, EmbedderConfig
from lm.models.t5 import T5Config


def _saved(run_dir: str) -> pathlib.Path:
  directory = pathlib.Path(run_dir).expanduser()
  if not (directory / 'config.gin').exists():
    raise UserError(f'run_dir={run_dir!r} holds no config.gin, so it is no run; make one by '
                    '`lm train`, or of other people\'s weights by `lm convert --from`')
  return directory


def model(run_dir: str, head: Optional[Callable[..., Any]] = None,
          form: Optional[Literal['encoder', 'text_to_text', 'decoder', 'embedder']] = None,
          dropout_rate: Optional[float] = None, attention_dropout_rate: Optional[float] = None,
          dtype: Optional[str] = None, param_dtype: Optional[str] = None,
          products: Optional[str] = None, attention_implementation: Optional[str] = None) -> Any:
  """The config of a run's model, or of a head on its trunk.

  Args:
    run_dir: of `lm train` or `lm convert`.
    head: such as @heads.ClassifierConfig, with its fields bound but for the trunk, which is the
      run's model without the heads of its own; None for the run's whole model.
    form: of the task: only an 'encoder' has the head, and an 'embedder' vectors of two texts; None
      has the head if there is one.
    dropout_rate, attention_dropout_rate, dtype, param_dtype, products, attention_implementation: in
      place of the run's; None keeps them.

  Raises:
    UserError: there is no such run, its model does not take this form, or the form has no head.
  """
  own = config.value(_saved(run_dir) / 'config.gin', 'run.Experiment.model')
  changes = {'dropout_rate': dropout_rate, 'attention_dropout_rate': attention_dropout_rate,
             'dtype': dtype, 'param_dtype': param_dtype, 'products': products,
             'attention_implementation': attention_implementation}
  changes = {name: value for name, value in changes.items() if value is not None}
  if form == 'encoder' and head is None:
    raise UserError("form='encoder' has no head; bind HEAD, such as @heads.ClassifierConfig")
  if form == 'embedder':
    is_pair = isinstance(own, DualEncoderConfig)
    own = own if is_pair else DualEncoderConfig(EmbedderConfig(_trunk(own, False)))
  if head is None or form not in (None, 'encoder'):
    if not isinstance(own, _FORMS.get(form, object)):
      raise UserError(f'form={form!r} is not what a {type(own).__name__} reads, which {run_dir} has;'
                      " bind FORM='encoder', or INITIAL to another run")
    return _changed(own, changes)
  pooling = getattr(head(trunk=_trunk(own, True)), 'pooling', None)
  trunk = _trunk(own, pooling == 'pooler')
  if pooling == 'cls' and isinstance(trunk, GPTConfig):
    raise UserError("pooling='cls' is the first token, which in a GPT has seen no other; bind "
                    "heads.ClassifierConfig.pooling='last'")
  return head(trunk=_changed(trunk, changes))


_FORMS = {'text_to_text': T5Config, 'decoder': GPTConfig}


def _changed(own: Any, changes: dict[str, Any]) -> Any:
  """The config with other fields of its trunk, or of both."""
  if isinstance(own, DualEncoderConfig):
    sides = {name: _changed(getattr(own, name), changes) for name in ('query', 'document')
             if getattr(own, name) is not None}
    return dataclasses.replace(own, **sides)
  if hasattr(own, 'trunk'):
    return dataclasses.replace(own, trunk=_changed(own.trunk, changes))
  return dataclasses.replace(own, **changes)


def _trunk(own: Any, has_pooler: bool) -> Any:
  """What a head can stand on: the model without parameters that only its own heads need."""
  trunk = getattr(own, 'trunk', own)
  if isinstance(trunk, BERTConfig):
    return dataclasses.replace(trunk, masked_lm=False, sentence_classes=0,
                               pooler=trunk.pooler and has_pooler)
  if isinstance(trunk, T5Config):
    return dataclasses.replace(trunk, decoder=False)
  if isinstance(trunk, GPTConfig):
    return dataclasses.replace(trunk, tie_embeddings=True)
  return trunk


def vocabulary(run_dir: str, extra_ids: int = 0) -> VocabularyConfig:
  """The vocabulary of a run.

  Args:
    run_dir: of `lm train` or `lm convert`.
    extra_ids: ids are added at the top until there are so many, for an objective's own.

  Raises:
    UserError: the run has none.
  """
  directory = _saved(run_dir) / 'vocabulary'
  try:
    info = json.loads((directory / 'vocabulary.json').read_text('utf-8'))
  except OSError as error:
    raise UserError(f'run_dir={run_dir!r} holds no vocabulary ({error.strerror}); start it once '
                    'more by `lm train --run_dir`, which writes it') from error
  if info['kind'] == 'byte':
    return VocabularyConfig('byte', extra_ids=max(extra_ids, info['extra_ids']))
  return VocabularyConfig('pretrained', path=str(directory.absolute()), extra_ids=extra_ids)


# Read by lm/config_build.py: what is returned stands in config.gin, and not the call.
model.is_written_out = vocabulary.is_written_out = True
