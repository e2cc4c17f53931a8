"""ONNX: files and names as `optimum` has them, so that its classes load an artefact too.

  model.onnx                   of an encoder: rows in, outputs of `programs` out; of a GPT: the next
                               tokens and the keys and values before them in, all of them out
  encoder_model.onnx           of an encoder-decoder, with
  decoder_model.onnx           its first tokens, which also gives keys and values of the memory, and
  decoder_with_past_model.onnx its later ones
  *.onnx_data                  weights, where a file would be longer than 2 GB
  config.json, tokenizer.json  as `transformers` has them, where it knows the model

Batch, length and past may be any size, also 0 for the past. A GPT's rows may be padded on either
side, as `attention_mask` [B, past + T] says: its keys and values stand without gaps, so that what
is padding in the mask of a later call only has to be as much, not in the same place.
"""
from collections.abc import Callable, Mapping
import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError
from lm.export import programs
from lm.export.artifact import imported, Model
from lm.export.certificate import Answer
from lm.export.onnx_graph import Graph, OPSET, PACKAGES
from lm.export.onnx_lowering import known, Lowering, Value
from lm.interop import convert as convert_run
from lm.models.gpt import GPTConfig
from lm.models.t5 import T5Config

LARGEST = 2_000_000_000  # bytes of one file: protobuf ends at 2 GiB
LEAST = 9  # tokens from which on a cache is written as one window: `lm.layers.cache`
SYMBOLS = {'B': 'batch_size', 'T': 'sequence_length', 'P': 'past_sequence_length',
           'S': 'encoder_sequence_length', 'U': 'decoder_sequence_length'}
Arrays = dict[str, jax.Array]


class Part(NamedTuple):
  """One graph of an artefact.

  inputs: name to shape, in letters of SYMBOLS and sums of two, and dtype.
  """
  file: str
  inputs: Mapping[str, tuple[tuple[str | int, ...], str]]
  call: Callable[[Any, Arrays], Arrays]


def parts(model: Model) -> list[Part]:
  """The graphs of a model."""
  if isinstance(model.config, GPTConfig):
    return [_decoder(model)]
  if isinstance(model.config, T5Config) and model.config.decoder:
    return [_encoder(model), _first_decoder(model), _later_decoder(model)]
  program = model.program
  return [Part('model', {name: (shape, 'int32') for name, shape in program.inputs.items()},
               program.call)]


def _past(count: int, heads: int, d_head: int, kinds: Mapping[str, str]
          ) -> dict[str, tuple[tuple[str | int, ...], str]]:
  """Keys and values of each layer; kinds: word in the name to the letter of their length."""
  return {f'past_key_values.{i}.{kind}{word}': (('B', heads, letter, d_head), 'float32')
          for i in range(count) for kind, letter in kinds.items() for word in ('key', 'value')}


def _room(x_BKPH: jax.Array, T: Any) -> jax.Array:
  """With T places more."""
  B, K, _, H = x_BKPH.shape
  return jnp.concatenate([x_BKPH, jnp.zeros((B, K, T, H), x_BKPH.dtype)], axis=2)


def _turned(x: jax.Array, by_B: jax.Array) -> jax.Array:
  """Each row [T, ...] of x moved on by so many places, the last ones to its beginning."""
  T = x.shape[1]
  place_BT = jnp.arange(T) - by_B[:, None]
  place_BT = jnp.where(place_BT < 0, place_BT + T, place_BT)
  place_BT = jnp.where(place_BT >= T, place_BT - T, place_BT)
  index = place_BT.reshape(*place_BT.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)


def _decoder(model: Model) -> Part:
  """The next tokens of a GPT."""
  config, module = model.config, model.module

  def call(params, arrays):
    tokens_BT, mask_BS = arrays['input_ids'], arrays['attention_mask']
    T, S = tokens_BT.shape[1], mask_BS.shape[1]
    cut = lambda start, end: jax.lax.slice_in_dim(mask_BS, start, end, axis=1)
    length_B = cut(0, S - T).sum(1, dtype=jnp.int32)
    first_B = jnp.argmax(cut(S - T, S), axis=1).astype(jnp.int32)
    empty = config.init_cache(tokens_BT.shape[0], S)
    layers = [layer._replace(**{word: _room(arrays[f'past_key_values.{i}.{word}'], T)
                                for word in ('key', 'value')})
              for i, layer in enumerate(empty.layers)]
    cache = dataclasses.replace(empty, length_B=length_B, layers=layers)
    hidden_BTD, cache = module.apply({'params': params}, _turned(tokens_BT, -first_B), cache=cache)
    logits = module.apply({'params': params}, _turned(hidden_BTD, first_B), method='logits')
    return {'logits': logits, **{f'present.{i}.{word}': getattr(layer, word)
                                 for i, layer in enumerate(cache.layers)
                                 for word in ('key', 'value')}}

  inputs = {'input_ids': (('B', 'T'), 'int32'), 'attention_mask': (('B', 'P + T'), 'int32')}
  return Part('model', inputs | _past(config.num_layers, config.kv_heads, config.head_dim,
                                      {'': 'P'}), call)


def _encoder(model: Model) -> Part:
  def call(params, arrays):
    hidden = model.module.apply({'params': params}, programs.batch(arrays), method='encode')
    return {'last_hidden_state': hidden}

  rows = ('B', 'T'), 'int32'
  return Part('encoder_model', {'input_ids': rows, 'attention_mask': rows}, call)


def _decoded(model, params, arrays, cache, memory, mask, kinds):
  """Logits, and keys and values of these kinds."""
  apply = lambda *args, method: model.module.apply({'params': params}, *args, method=method)
  hidden, cache = apply(arrays['input_ids'], memory, mask, None, cache, method='decode')
  present = {f'present.{i}.{kind}.{word}': getattr(getattr(layer, field), word)
             for i, layer in enumerate(cache.layers) for kind, field in kinds.items()
             for word in ('key', 'value')}
  return {'logits': apply(hidden, method='logits'), **present}


def _first_decoder(model: Model) -> Part:
  """The first tokens of an encoder-decoder's output."""
  def call(params, arrays):
    cache = model.config.init_cache(*arrays['input_ids'].shape)
    return _decoded(model, params, arrays, cache, arrays['encoder_hidden_states'],
                    arrays['encoder_attention_mask'], {'decoder': 'tokens', 'encoder': 'memory'})

  return Part('decoder_model', {
      'encoder_attention_mask': (('B', 'S'), 'int32'), 'input_ids': (('B', 'T'), 'int32'),
      'encoder_hidden_states': (('B', 'S', model.config.d_model), 'float32')}, call)


def _later_decoder(model: Model) -> Part:
  """The next tokens of an encoder-decoder's output; all rows have equally many."""
  config = model.config

  def call(params, arrays):
    B, T = arrays['input_ids'].shape
    kept = lambda i, kind: [arrays[f'past_key_values.{i}.{kind}.{word}']
                            for word in ('key', 'value')]
    P = arrays['past_key_values.0.decoder.key'].shape[2]
    empty = config.init_cache(B, P + T)
    layers = [layer._replace(tokens=type(layer.tokens)(*[_room(x, T) for x in kept(i, 'decoder')]),
                             memory=type(layer.tokens)(*kept(i, 'encoder')))
              for i, layer in enumerate(empty.layers)]
    cache = dataclasses.replace(empty, length_B=jnp.full((B,), P, jnp.int32), layers=layers,
                                memory_segment_ids=arrays['encoder_attention_mask'])
    return _decoded(model, params, arrays, cache, None, None, {'decoder': 'tokens'})

  return Part('decoder_with_past_model', {
      'encoder_attention_mask': (('B', 'S'), 'int32'), 'input_ids': (('B', 'T'), 'int32'),
      **_past(config.decoder_layers, config.num_heads, config.head_dim,
              {'decoder.': 'P', 'encoder.': 'S'})}, call)


def convert(part: Part, params: Any, longest: int | None) -> Any:
  """The `onnx.ModelProto` of a graph.

  Args:
    longest: tokens that a row may have; None is any number.

  Raises:
    UserError: an operation has no form.
  """
  limits = [f'T >= {LEAST}'] + [f'T <= {longest}'] * (longest is not None)
  letters = sorted({letter for shape, _ in part.inputs.values() for dim in shape
                    if isinstance(dim, str) for letter in dim.split(' + ')})
  limits = [x.replace('T', SYMBOLS['T']) for x in limits if 'T' in letters]
  sizes = dict(zip(letters, export.symbolic_shape(
      ', '.join(SYMBOLS[letter] for letter in letters), constraints=limits)))
  dims = lambda shape: tuple(sum(sizes[letter] for letter in dim.split(' + '))
                             if isinstance(dim, str) else dim for dim in shape)
  specs = {name: jax.ShapeDtypeStruct(dims(shape), dtype)
           for name, (shape, dtype) in part.inputs.items()}
  jaxpr, shapes = jax.make_jaxpr(part.call, return_shape=True)(params, specs)
  graph = Graph()
  helper, types = graph.onnx.helper, graph.onnx.TensorProto
  values, infos = {}, []
  for name, spec in specs.items():
    for axis, dim in enumerate(spec.shape):
      if not isinstance(dim, int):
        graph.symbols.setdefault(str(dim), (name, axis))
    is_integer = spec.dtype == np.int32
    infos.append(helper.make_tensor_value_info(
        name, types.INT64 if is_integer else types.FLOAT, _labels(spec.shape)))
    values[name] = Value(spec.shape, spec.shape, None,
                         graph.cast(name, np.int32) if is_integer else name)
  lowering = Lowering(graph)
  weights = [known(x, jax.tree_util.keystr(path, simple=True, separator='.'))
             for path, x in jax.tree.leaves_with_path(params)]
  try:
    found = lowering.run(jaxpr.jaxpr, jaxpr.consts, [*weights, *[values[name] for name in
                                                                 sorted(values)]])
  except NotImplementedError as error:
    raise UserError(f'{error} of this model has no form in ONNX here; choose another format, such '
                    'as stablehlo') from error
  outputs = []
  for name, value in sorted(zip(sorted(shapes), found, strict=True), key=_place):
    graph.nodes.append(helper.make_node('Identity', [lowering.full(value)], [name]))
    outputs.append(helper.make_tensor_value_info(name, types.FLOAT, _labels(value.shape)))
  return graph.model(part.file, infos, outputs)


def _place(output):
  """Layers in their order."""
  return [(part.isdigit(), int(part) if part.isdigit() else part) for part in output[0].split('.')]


def _labels(shape):
  return [dim if isinstance(dim, int) else str(dim) for dim in shape]


class ONNX:
  """Float32, by ONNX Runtime."""
  name, packages, is_exact = 'onnx', PACKAGES, True

  def refusal(self, config: Any) -> str | None:
    """Of mixtures of experts alone."""
    if getattr(getattr(config, 'trunk', config), 'moe', None) is not None:
      return ('experts multiply groups of rows whose sizes the router decides, and ONNX has no '
              'such product; decode it by `lm generate`')
    return None

  def write(self, model: Model, directory: pathlib.Path) -> dict[str, Any]:
    """Every graph, and what `transformers` wants beside."""
    params = model.params
    if hasattr(model.config, 'unstack'):
      params = model.config.unstack(params)
    trunk = getattr(model.config, 'trunk', model.config)
    longest = model.config.max_length if getattr(trunk, 'positions', '') == 'learned' else None
    for part in parts(model):
      save(convert(part, params, longest), directory / f'{part.file}.onnx')
    convert_run.write_beside(model.run_dir, model.config, model.vocabulary, directory,
                             model.labels)
    return {'opset': OPSET}

  def open(self, directory: pathlib.Path) -> Answer:
    """What answers as the whole program, from nothing before."""
    if (directory / 'encoder_model.onnx').exists():
      return _pair(*(session(directory / f'{name}.onnx')
                     for name in ('encoder_model', 'decoder_model')))
    return _whole(session(directory / 'model.onnx'))

  def rows(self, family: str) -> Callable[..., Any] | None:
    """See `Format`."""
    from lm.export import onnx_rows  # which imports this file
    return {'GPT': onnx_rows.GPTRows, 'T5': onnx_rows.T5Rows}.get(family)


def save(model: Any, path: pathlib.Path, largest: int = LARGEST) -> None:
  """Writes a graph; its weights into a file of their own where it would be too long."""
  onnx = imported('onnx')
  size = sum(len(x.raw_data) for x in model.graph.initializer)
  apart = {'save_as_external_data': True, 'location': f'{path.name}_data', 'size_threshold': 1024}
  onnx.save_model(model, path, **(apart if size > largest else {}))
  onnx.checker.check_model(path)


_FAILURES = ('Fail', 'InvalidProtobuf', 'NoSuchFile', 'InvalidGraph', 'NotImplemented',
             'RuntimeException', 'InvalidArgument')


def session(path: pathlib.Path) -> Any:
  """Opens a graph by ONNX Runtime.

  Raises:
    UserError: it cannot.
  """
  runtime = imported('onnxruntime')
  state, options = runtime.capi.onnxruntime_pybind11_state, runtime.SessionOptions()
  options.log_severity_level = 3
  try:
    return runtime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
  except tuple(getattr(state, name) for name in _FAILURES) as error:
    why = str(error).partition('failed:')[2] or str(error)
    raise UserError(f'ONNX Runtime {runtime.__version__} cannot open {path} ({why.strip()}); '
                    'export it again, or take the version of its certificate') from error


def run(graph: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """All outputs by name, of inputs that may be int32."""
  feeds = {x.name: arrays[x.name].astype(np.int64 if x.type == 'tensor(int64)' else np.float32)
           for x in graph.get_inputs()}
  return dict(zip([x.name for x in graph.get_outputs()], graph.run(None, feeds)))


def _whole(graph) -> Answer:
  """With an empty past, if there is one."""
  past = {x.name: x.shape for x in graph.get_inputs() if x.name.startswith('past')}

  def answer(arrays):
    B = len(arrays['input_ids'])
    empty = {name: np.zeros((B, shape[1], 0, shape[3]), np.float32)
             for name, shape in past.items()}
    found = run(graph, {**arrays, **empty})
    return {name: x for name, x in found.items() if not name.startswith('present')}

  return answer


def _pair(encoder, decoder) -> Answer:
  def answer(arrays):
    memory = run(encoder, arrays)['last_hidden_state']
    found = run(decoder, {'input_ids': arrays['decoder_input_ids'],
                           'encoder_hidden_states': memory,
                           'encoder_attention_mask': arrays['attention_mask']})
    return {'logits': found['logits']}

  return answer


FORMATS = {'onnx': ONNX()}
