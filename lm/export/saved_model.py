"""TensorFlow's SavedModel, for TensorFlow Serving: no jax is needed where it runs.

  1/                       the model, version 1; each signature has any batch and length:
    serving_default          rows of ids, as `programs.whole`
    prefill, decode, generate    of GPTs and encoder-decoders, as in `decoding`
    text                     strings in, where tensorflow-text has the tokenizer: out come strings
                             of what writes texts, else the outputs of serving_default
    assets.extra/tf_serving_warmup_requests    so that the server compiles before it answers
  batching.txt             for --enable_batching --batching_parameters_file

`tensorflow_model_server --model_base_path=$PWD/DIR --model_name=NAME --rest_api_port=8501` serves
it. XLA compiles once for each batch and length, so `text` pads rows to powers of two, and requests
of ids should do so too.
"""
from collections.abc import Callable, Sequence
import pathlib
from typing import Any

import numpy as np

from lm.errors import UserError
from lm.export import decoding, saved_model_text, warmup
from lm.export.artifact import imported, Model
from lm.export.certificate import Answer

VERSION = '1'
PLATFORMS = 'cpu', 'cuda', 'tpu'
BATCH_SIZES = 1, 4, 16
BATCHING = """\
# Requests are joined up to 16 rows. Those of ids are joined where their rows are equally long:
# the server would pad masks by numbers of its own, so it is not asked to.
max_batch_size { value: 16 }
batch_timeout_micros { value: 2000 }
max_enqueued_batches { value: 100 }
pad_variable_length_inputs: false
""" + ''.join(f'allowed_batch_sizes: {size}\n' for size in BATCH_SIZES)


class SavedModel:
  """Float32, of every family."""
  name, packages, is_exact = 'saved_model', ('tensorflow', 'tensorflow-text'), True

  def refusal(self, config: Any) -> str | None:
    """Of mixtures of experts alone."""
    return decoding.refusal(config)

  def write(self, model: Model, directory: pathlib.Path) -> dict[str, Any]:
    """Writes the model, its warm-up requests, and how requests are joined."""
    tf = imported('tensorflow')
    model = decoding.in_floats(model)
    module, signatures = build(model)
    text, why = saved_model_text.of_model(model, module.parts)
    if text is not None:
      module.tokenizer = text.tokenizer.tokenizer  # a resource, which is saved with the model
      signatures['text'] = text.signature
    tf.saved_model.save(module, directory / VERSION, signatures=signatures)
    requests = _requests(model, text is not None)
    warmup.write(directory / VERSION, requests)
    (directory / 'batching.txt').write_text(BATCHING, 'utf-8')
    return {'signatures': {name: _described(function) for name, function in signatures.items()},
            'text': why, 'warm_up_requests': len(requests)}

  def open(self, directory: pathlib.Path) -> Answer:
    """The signature serving_default, by TensorFlow's own loader."""
    return signature(directory, decoding.WHOLE)

  def rows(self, family: str) -> Callable[..., Any] | None:
    """See `Format`."""
    from lm.export.saved_model_rows import SavedModelRows  # which imports this file
    return SavedModelRows if family in ('GPT', 'T5') else None


FORMATS = {'saved_model': SavedModel()}


def signature(directory: pathlib.Path, name: str) -> Answer:
  """What answers by a signature of an artefact; raises as `load`."""
  return answer(load(directory, (name,)), name)


def load(directory: pathlib.Path, names: Sequence[str]) -> Any:
  """What TensorFlow loads of an artefact, with these signatures.

  Raises:
    UserError: one is missing, or the files are damaged.
  """
  tf = imported('tensorflow')
  imported('tensorflow_text')  # the operations of tokenizers
  try:
    loaded = tf.saved_model.load(directory / VERSION)
    for name in names:
      loaded.signatures[name]  # pylint: disable=pointless-statement
  except Exception as error:  # pylint: disable=broad-except; damage comes as many kinds
    raise UserError(f'{directory} holds no SavedModel with the signature {", ".join(names)} that '
                    f'TensorFlow {tf.__version__} can load ({str(error).splitlines()[0]}); export '
                    'it again') from error
  return loaded


def answer(loaded: Any, name: str) -> Answer:
  """What answers by a signature of what `load` gave."""
  tf, found = imported('tensorflow'), loaded.signatures[name]

  def call(arrays, loaded=loaded):  # which the function alone does not keep
    return {name: x.numpy() for name, x in found(**{
        name: tf.constant(x) for name, x in arrays.items()}).items()}

  return call


def build(model: Model, parts: list[decoding.Part] | None = None) -> tuple[Any, dict[str, Any]]:
  """A `tf.Module` with the parameters as variables, and its signatures.

  Args:
    parts: what becomes a signature; None is all of the model.
  """
  tf, jax2tf = imported('tensorflow'), imported('jax.experimental.jax2tf')
  module = tf.Module()
  flat = decoding.flat(model.params)
  module.params = {name.replace('/', '.'): tf.Variable(np.asarray(x), name=name)
                   for name, x in flat.items()}
  module.parts = {}
  for part in parts or decoding.parts(model):
    module.parts[part.name] = _function(tf, jax2tf, module, list(flat), part)
  return module, dict(module.parts)


def _function(tf, jax2tf, module, names, part):
  """The concrete function of a program, whose parameters are the module's variables."""
  call = jax2tf.convert(
      lambda params, arrays: part.call(decoding.nested(params), arrays),
      polymorphic_shapes=[dict.fromkeys(names, '...'), {
          name: f'({", ".join(map(str, shape))},)' for name, (shape, _) in part.inputs.items()}],
      polymorphic_constraints=part.limits, with_gradient=False,
      native_serialization_platforms=PLATFORMS)
  specs = {name: tf.TensorSpec([x if isinstance(x, int) else None for x in shape], dtype, name)
           for name, (shape, dtype) in part.inputs.items()}
  run = lambda **arrays: call({name: module.params[name.replace('/', '.')] for name in names},
                              arrays)
  return tf.function(run, autograph=False).get_concrete_function(**specs)


def _described(function: Any) -> dict[str, dict[str, str]]:
  """Names, dtypes and shapes of what a signature takes and gives."""
  arguments = function.structured_input_signature[1]
  describe = lambda x: f'{x.dtype.name}{["?" if n is None else n for n in x.shape]}'
  return {'inputs': {name: describe(x) for name, x in arguments.items()},
          'outputs': {name: describe(x) for name, x in function.structured_outputs.items()}}


def _requests(model: Model, has_text: bool) -> list[tuple[str, dict[str, np.ndarray]]]:
  """(signature, inputs) that are compiled before the server answers."""
  length = min(saved_model_text.SHORTEST, model.config.max_length)
  requests = []
  for size in BATCH_SIZES:
    rows = {name: np.ones((size, length), np.int32) for name in model.program.inputs}
    requests.append((decoding.WHOLE, rows))
    if has_text:
      requests.append(('text', saved_model_text.example(model, size)))
  return requests
