"""`lm convert`: a run of other people's weights, or a directory of Hugging Face of a run."""
import argparse
import dataclasses
import pathlib
from typing import Any

from lm import config, run
from lm.data import objectives
from lm.errors import UserError
from lm.interop import adapters, convert
from lm.models.bert import BERTConfig
from lm.models.gpt import GPTConfig
from lm.models.heads import DualEncoderConfig
from lm.models.t5 import T5Config

# What a model that was pretrained so is trained on further.
OBJECTIVES = {GPTConfig: objectives.CausalLM(), T5Config: objectives.SpanCorruption(),
              BERTConfig: objectives.MaskedLM(framing=True),
              DualEncoderConfig: objectives.Contrastive(framing=True)}

CONFIG = """\
from __gin__ import dynamic_registration

from lm import run
from lm.data import tasks
from lm.data import vocabularies
from lm.training import loop
from lm.training import losses
from lm.training import optimizers
{imports}

FILES = None
SEQUENCE_LENGTH = {length}
BATCH_SIZE = 8
NUM_STEPS = 1000
LEARNING_RATE = 2e-5
WARMUP_STEPS = 100

run.Experiment.task = @tasks.TextTask()
run.Experiment.model = {model}
run.Experiment.objective = {objective}
run.Experiment.loss = @losses.{loss}()
run.Experiment.optimizer = @optimizers.AdamW()
run.Experiment.train = @loop.TrainConfig()

tasks.TextTask.files = %FILES
tasks.TextTask.vocabulary = @vocabularies.VocabularyConfig()
vocabularies.VocabularyConfig.kind = 'pretrained'
vocabularies.VocabularyConfig.path = {vocabulary!r}
optimizers.AdamW.schedule = @optimizers.Schedule()
optimizers.Schedule.learning_rate = %LEARNING_RATE
optimizers.Schedule.warmup_steps = %WARMUP_STEPS
loop.TrainConfig.sequence_length = %SEQUENCE_LENGTH
loop.TrainConfig.batch_size = %BATCH_SIZE
loop.TrainConfig.num_steps = %NUM_STEPS
{bindings}
"""


def execute(args: argparse.Namespace, bindings: list[tuple[str, str]]) -> dict[str, Any]:
  """Converts, and returns the parity certificate.

  Raises:
    UserError: the flags do not say one direction, or the conversion cannot be made.
  """
  if args.run_dir is None or (args.source is None) == (args.to is None):
    raise UserError('`lm convert` needs --run_dir=R and either --from=DIR_OR_FILE, to make that '
                    'run, or --to=DIR, to make a directory of it')
  if args.to is not None:
    experiment = run.open_experiment(args.gin_file, bindings, args.run_dir)
    if args.format == 'peft':
      result = adapters.write_peft(args.run_dir, experiment.model, args.to)
      print(f'{result["parameters"]:,} parameters of {result["modules"]} modules, as peft has them')
      return result
    result = convert.export_run(args.run_dir, experiment.model, args.to)
  else:
    write = lambda directory, model, path: _write_config(directory, model, path, bindings)
    result = convert.import_run(args.source, args.run_dir, write, args.tokenizer,
                                args.allow_pickle)
  print(_sentence(result))
  return result


def _write_config(directory: pathlib.Path, model: Any, vocabulary: pathlib.Path,
                  bindings: list[tuple[str, str]]) -> None:
  """Writes config.gin, all defaults included, as `lm train` does."""
  writer = _Writer()
  loss = 'Contrastive' if isinstance(model, DualEncoderConfig) else 'Prediction'
  reference, objective = writer.reference(model), writer.reference(OBJECTIVES[type(model)])
  path = directory / 'config.gin'
  path.write_text(CONFIG.format(
      imports='\n'.join(sorted(writer.imports)), length=min(512, model.max_length), loss=loss,
      model=reference, objective=objective, vocabulary=str(vocabulary),
      bindings='\n'.join(writer.bindings)), 'utf-8')
  config.parse([str(path)], bindings)
  config.build(run.Experiment)
  config.save(path)


class _Writer:
  """Collects the imports and bindings of frozen dataclasses."""

  def __init__(self):
    self.imports: set[str] = set()
    self.bindings: list[str] = []

  def reference(self, value: Any) -> str:
    """Binds the fields that differ from their defaults, and returns gin's word for the object."""
    module, _, name = type(value).__module__.rpartition('.')
    self.imports.add(f'from {module} import {name}')
    word = f'{name}.{type(value).__name__}'
    for field in dataclasses.fields(value):
      setting = getattr(value, field.name)
      if field.init and setting != field.default:
        text = self.reference(setting) if dataclasses.is_dataclass(setting) else repr(setting)
        self.bindings.append(f'{word}.{field.name} = {text}')
    return f'@{word}()'


def _sentence(result: dict[str, Any]) -> str:
  trip, logits = result['round_trip'], result['logits']
  text = f'{result["model_type"]}: {trip["tensors"]} tensors, each given back bit for bit'
  if logits['reference'] is None:
    return f'{text}; {logits["why"]}'
  largest = max(x['max_absolute_difference'] for x in logits['differences'].values())
  agreement = min(x['top1_agreement'] for x in logits['differences'].values())
  return (f'{text}; {logits["of"]} differ from those of {logits["reference"]} by at most '
          f'{largest:.1e}, and {agreement:.2%} have the same highest')
