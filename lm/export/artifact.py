"""What a format is, the table of them, and how an artefact is made and opened."""
from collections.abc import Callable, Sequence
import dataclasses
import importlib
import json
import pathlib
import shutil
from typing import Any, Protocol

import jax
import numpy as np

from lm.data import vocabularies
from lm.data.examples import chat
from lm.data.vocabularies import Vocabulary
from lm.errors import UserError
from lm.export import certificate, programs
from lm.export.certificate import Answer
from lm.export.programs import Program
from lm.inference.rows import Rows
from lm.interop.tensors import new_directory

# Of --format: the module of this room whose FORMATS has it.
FORMATS = {
    'onnx': 'onnx_format', 'onnx_int8': 'onnx_quantize', 'onnx_qdq': 'onnx_quantize',
    'saved_model': 'saved_model', 'stablehlo': 'stablehlo',
    'litert': 'litert', 'litert_dynamic': 'litert', 'litert_int8': 'litert',
    'gguf': 'gguf', 'gguf_q8_0': 'gguf', 'gguf_q4_0': 'gguf',
}

LARGEST_DIFFERENCE = 0.01  # of the largest answer, where a format is exact up to rounding

# How a model is built to be exported: what no platform's kernel computes.
PLAIN = {'dtype': 'float32', 'scan_layers': False, 'attention_implementation': 'reference'}


@dataclasses.dataclass(frozen=True)
class Model:
  """What is exported, built as PLAIN says.

  config, module, params: as `lm.run.load` gives them.
  run_dir, step: where they are from.
  labels: names of the classes of its head, in their order, where they are known.
  """
  config: Any
  module: Any
  params: Any
  vocabulary: Vocabulary
  run_dir: pathlib.Path
  step: int
  labels: Sequence[str] = ()

  @property
  def program(self) -> Program:
    """What it computes of whole rows."""
    return programs.whole(self.config, self.module)


class Format(Protocol):
  """One kind of artefact.

  name: of --format.
  packages: whose versions the certificate names.
  is_exact: whether its answers are the run's up to rounding; else they are near.
  """
  name: str
  packages: tuple[str, ...]
  is_exact: bool

  def refusal(self, config: Any) -> str | None:
    """Why this format does not take a model, if it does not: half a sentence, with the fix."""

  def write(self, model: Model, directory: pathlib.Path) -> dict[str, Any]:
    """Writes all but vocabulary and certificate; returns what the certificate says beside.

    Raises:
      UserError: the model has a part that the format cannot hold.
    """

  def open(self, directory: pathlib.Path) -> Callable[[dict[str, np.ndarray]],
                                                      dict[str, np.ndarray]]:
    """What answers as `Model.program`, from the files alone: int32 inputs by name to outputs.

    Raises:
      UserError: the files cannot be read.
    """


class WritingFormat(Format, Protocol):
  """A format whose artefacts write texts token by token."""

  def rows(self, family: str) -> Callable[..., Rows] | None:
    """What opens a family's artefact as `Rows`: (directory, max_length, num_rows=...); None where
    it writes no texts."""


def find(name: str) -> Format:
  """The format of a name.

  Raises:
    UserError: there is none.
  """
  if name not in FORMATS:
    raise UserError(f'--format={name} is none of {", ".join(sorted(FORMATS))}; safetensors, which '
                    'transformers opens, are written by `lm convert --run_dir=R --to=DIR`')
  return importlib.import_module(f'lm.export.{FORMATS[name]}').FORMATS[name]


def imported(package: str) -> Any:
  """A package of the extra [export].

  Raises:
    UserError: it is not installed.
  """
  try:
    return importlib.import_module(package)
  except ImportError as error:
    raise UserError(f"{package} cannot be imported ({error}); `pip install 'lm[export]'` brings "
                    'it') from error


def export(model: Model, form: Format, out: str) -> dict[str, Any]:
  """Makes the directory `out`, whole or not at all; returns its certificate.

  Raises:
    UserError: the format refuses the model, the vocabulary has more ids than the model, or the
      directory stands already or cannot be written; or a format that is exact is not.
  """
  reason = programs.refusal(model.config) or form.refusal(model.config)
  if reason:
    raise UserError(f'--format={form.name} does not take this {programs.family(model.config)}: '
                    f'{reason}')
  if model.vocabulary.size > model.config.vocab_size:
    raise UserError(f'the vocabulary of {model.run_dir} has {model.vocabulary.size} ids and the '
                    f'model vocab_size={model.config.vocab_size}; it is of another run')
  with new_directory(out) as unfinished:
    facts = form.write(model, unfinished)
    model.vocabulary.save(unfinished / 'vocabulary')
    template = model.run_dir / 'vocabulary' / chat.FILE
    if template.exists():
      shutil.copyfile(template, unfinished / 'vocabulary' / chat.FILE)
    result = _certify(model, form, unfinished, facts)
    worst = max(x['max_relative_difference'] for kind in result['differences'].values()
                for x in kind.values())
    if form.is_exact and not worst <= LARGEST_DIFFERENCE:
      raise UserError(f'the artefact differs from the run by {worst:.1e} of the largest answer, '
                      f'and {form.name} should be exact, so none is made; choose another format')
    text = json.dumps(result, indent=1) + '\n'
    (unfinished / certificate.FILE).write_text(text, 'utf-8')
  return result


def _certify(model: Model, form: Format, directory: pathlib.Path, facts: dict[str, Any]
             ) -> dict[str, Any]:
  program = model.program
  ours, theirs = form.open(directory), certificate.run_answer(program, model.params)
  kinds = certificate.inputs(program, model.config.vocab_size, model.config.max_length,
                             model.vocabulary.pad_id)
  differences = {}
  for name, arrays in kinds.items():
    mask = arrays['attention_mask']
    if 'decoder_input_ids' in arrays:
      mask = np.ones(arrays['decoder_input_ids'].shape, np.int32)
    differences[name] = certificate.compare(ours(arrays), theirs(arrays), mask)
  found = certificate.files(directory)
  return {'format': form.name, 'family': programs.family(model.config), 'step': model.step,
          'vocabulary': model.vocabulary.digest, 'inputs': list(program.inputs),
          'max_length': model.config.max_length, 'labels': list(model.labels), **facts,
          'differences': differences,
          'latency': certificate.latency(ours, theirs, kinds['random']),
          'size': sum(file['bytes'] for file in found.values()),
          'parameters': sum(x.size for x in jax.tree.leaves(model.params)),
          'versions': certificate.versions(form.packages), 'files': found}


def open_artifact(directory: str) -> tuple[Answer, Vocabulary, dict[str, Any]]:
  """What answers from an artefact, its vocabulary, and its certificate.

  Raises:
    UserError: it is not whole, or its vocabulary is another's.
  """
  path = pathlib.Path(directory)
  found = certificate.read(path)
  vocabulary = _vocabulary(path, found)
  return find(found['format']).open(path), vocabulary, found


def open_rows(directory: str, **options: Any) -> tuple[Rows, Vocabulary, dict[str, Any]]:
  """What writes texts from an artefact, its vocabulary, and its certificate.

  Args:
    options: num_rows, texts at once.

  Raises:
    UserError: it is not whole, or its vocabulary is another's, or it writes no texts.
  """
  path = pathlib.Path(directory)
  found = certificate.read(path)
  vocabulary, form = _vocabulary(path, found), find(found['format'])
  make = form.rows(found['family']) if hasattr(form, 'rows') else None
  if make is None:
    raise UserError(f'{path} holds a {found["family"]} as {found["format"]}, which writes no texts '
                    'here; export a GPT or a T5 by --format=onnx or saved_model, or take its run')
  return make(path, found['max_length'], **options), vocabulary, found


def _vocabulary(path, found):
  vocabulary = vocabularies.load(path / 'vocabulary')
  if vocabulary.digest != found['vocabulary']:
    raise UserError(f'{path / "vocabulary"} is {vocabulary.digest} and the model was exported with '
                    f'{found["vocabulary"]}; copy both from one artefact')
  return vocabulary
