"""The parity certificate: how near our answers are to the reference's, and with which versions.

`parity.json` stands beside weights that were converted:

  round_trip   every tensor of theirs compared bit for bit with what our parameters give back
  logits       for four kinds of tokens the largest absolute and relative difference and the share
               of places with the same highest logit; or why they were not compared
  answers      some of the reference's logits. Where `transformers` is not installed, later
               conversions of the same weights (`sha256`) are compared with these
"""
from collections.abc import Callable, Mapping
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError
from lm.training.state import abstract_params

FILE = 'parity.json'
SEED = 0
ROWS, LENGTH = 2, 32  # of random, padded and out-of-distribution tokens
LARGEST_LOGITS = 1 << 26  # numbers; the longest input is cut so that its logits are no more
BLOCK_BYTES = 16 << 20  # of a tensor, compared at once
STORED = 128  # answers of each kind that are kept
LARGEST_COMPARED = 2 << 30  # bytes of float32; larger models need twice that to be compared

Inputs = dict[str, np.ndarray]  # tokens, mask [B, T]; of an encoder-decoder also decoder_tokens


def inputs(vocab_size: int, max_length: int, pad_id: int | None,
           encoder_decoder: bool) -> dict[str, Inputs]:
  """The four kinds of tokens, none of them `pad_id` but where padded."""
  rng = np.random.default_rng(SEED)
  ids = np.array([i for i in range(vocab_size) if i != pad_id], np.int32)
  length = min(LENGTH, max_length)
  longest = min(max_length, max(length, LARGEST_LOGITS // vocab_size))
  whole = lambda tokens: {'tokens': tokens, 'mask': np.ones(tokens.shape, bool)}
  padded = whole(rng.choice(ids, (ROWS, length)))
  padded['mask'] &= np.arange(length) < np.array([[length], [length // 2 + 1]])
  padded['tokens'] = np.where(padded['mask'], padded['tokens'], 0 if pad_id is None else pad_id)
  kinds = {
      'random': whole(rng.choice(ids, (ROWS, length))), 'padded': padded,
      'longest': whole(rng.choice(ids, (1, longest))),
      # One token over and over, and the last ids, which no text may ever have had.
      'out_of_distribution': whole(np.stack([
          np.full(length, ids[len(ids) // 2]), np.resize(ids[-length:], length)]))}
  if encoder_decoder:
    for kind in kinds.values():
      shape = kind['tokens'].shape[0], min(kind['tokens'].shape[1], LENGTH)
      kind['decoder_tokens'] = rng.choice(ids, shape).astype(np.int32)
  return kinds


def batch_of(features: Inputs) -> dict[str, np.ndarray]:
  """The features of `inputs` under SeqIO's names, those of all families at once."""
  tokens, segments = features['tokens'], features['mask'].astype(np.int32)
  batch = {'encoder_input_tokens': tokens, 'encoder_segment_ids': segments}
  if 'decoder_tokens' in features:
    return {**batch, 'decoder_input_tokens': features['decoder_tokens']}
  places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  return {**batch, 'decoder_input_tokens': tokens, 'decoder_segment_ids': segments,
          'masked_positions': places}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answer(module, has_logits, params, batch):
  with jax.default_matmul_precision('highest'):
    if not has_logits:
      return module.apply({'params': params}, batch, method='encode')
    scores = module.apply({'params': params}, batch, method='outputs')[0]['tokens']
    logits = jnp.einsum('bpd,vd->bpv', scores.hidden, scores.embedding)
    logits = logits if scores.bias is None else logits + scores.bias
    return logits if scores.softcap is None else scores.softcap * jnp.tanh(logits / scores.softcap)


def our_answers(config: Any, params: Any, features: Inputs) -> np.ndarray:
  """Float32 logits [B, T, V] at every place, or hidden states [B, T, D] of a model without head."""
  module = dataclasses.replace(config, dtype='float32').build()
  return np.asarray(_answer(module, _has_logits(config), params, batch_of(features)))


def _has_logits(config: Any) -> bool:
  return getattr(config, 'masked_lm', True) and getattr(config, 'decoder', True)


def auto_class(config: Any) -> str:
  """The class of `transformers` that has our head."""
  if hasattr(config, 'masked_lm'):
    return 'AutoModelForMaskedLM' if config.masked_lm else 'AutoModel'
  if hasattr(config, 'decoder'):
    return 'AutoModelForSeq2SeqLM' if config.decoder else 'AutoModelForTextEncoding'
  return 'AutoModelForCausalLM'


def reference(directory: pathlib.Path, config: Any) -> Callable[[Inputs], np.ndarray]:
  """Opens a directory of Hugging Face by `transformers`, in float32 on the CPU, and gives what
  answers as `our_answers` does.

  Args:
    config: ours, which says what head there is.
  """
  import torch  # Here: an extra, large.
  import transformers
  model = getattr(transformers, auto_class(config)).from_pretrained(
      directory, dtype=torch.float32, attn_implementation='eager').eval()
  if model.config.model_type == 'umt5':  # version 5 says True of all, and rescales by it
    model.config.tie_word_embeddings = getattr(config, 'tie_embeddings', True)

  def answer(features: Inputs) -> np.ndarray:
    arguments = {'input_ids': torch.tensor(features['tokens']).long(),
                 'attention_mask': torch.tensor(features['mask']).long()}
    if 'decoder_tokens' in features:
      arguments['decoder_input_ids'] = torch.tensor(features['decoder_tokens']).long()
    with torch.no_grad():
      result = model(**arguments)
    return result['logits' if 'logits' in result else 'last_hidden_state'].numpy()

  return answer


def versions() -> dict[str, str | None]:
  """Of all that has a part in the answers; None where it is not installed."""
  found: dict[str, str | None] = {'python': platform.python_version()}
  for package in ('lm', 'jax', 'flax', 'numpy', 'transformers', 'torch', 'safetensors',
                  'tokenizers', 'gguf'):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = None
  return found


def compare(ours: np.ndarray, theirs: np.ndarray, mask: np.ndarray) -> dict[str, float]:
  """Largest absolute difference, the same over the largest number, share of equal highest.

  Args:
    ours, theirs: [B, T, ...].
    mask: [B, T], the places that count.
  """
  ours, theirs = ours[mask], theirs[mask]
  difference = float(np.abs(ours - theirs).max())
  return {'max_absolute_difference': difference,
          'max_relative_difference': difference / float(np.abs(theirs).max()),
          'top1_agreement': float((ours.argmax(-1) == theirs.argmax(-1)).mean())}


def _sample(answers: np.ndarray, mask: np.ndarray) -> dict[str, list]:
  """Some of the numbers and of the highest, spread evenly over the places that count."""
  answers = answers[mask]
  rows = np.linspace(0, len(answers) - 1, min(STORED, len(answers))).astype(int)
  columns = np.arange(len(rows)) * 7919 % answers.shape[-1]
  return {'answers': [float(x) for x in answers[rows, columns]],
          'highest': answers[rows].argmax(-1).tolist()}


def compare_sample(ours: np.ndarray, stored: Mapping[str, list],
                   mask: np.ndarray) -> dict[str, float]:
  """As `compare`, where of the reference only a sample is known."""
  mine, numbers = _sample(ours, mask), np.array(stored['answers'])
  difference = float(np.abs(np.array(mine['answers']) - numbers).max())
  return {'max_absolute_difference': difference,
          'max_relative_difference': difference / float(np.abs(numbers).max()),
          'top1_agreement': float(np.mean(np.equal(mine['highest'], stored['highest'])))}


def is_live() -> bool:
  """Whether `transformers` and PyTorch are installed."""
  return all(map(importlib.util.find_spec, ('torch', 'transformers')))


def compare_logits(config: Any, load: Callable[[], Any], directory: pathlib.Path,
                   pad_id: int | None, earlier: Mapping[str, Any]) -> dict[str, Any]:
  """What a certificate says under `logits`.

  Args:
    config: of the model, or of its trunk.
    load: gives its parameters.
    directory: of Hugging Face, for `transformers` to open.
    pad_id: of that directory's config.json.
    earlier: a certificate of the same weights, or {}.

  Raises:
    UserError: `transformers` is installed and cannot open the directory.
  """
  count = sum(x.size for x in jax.tree.leaves(abstract_params(config.build(), jax.devices()[0])))
  live = is_live()
  answers = earlier.get('logits', {}).get('answers')
  if 4 * count > LARGEST_COMPARED:
    return {'reference': None, 'why': f'{count} parameters are too many to be held in memory '
            'twice; only the round trip was checked'}
  if not live and not answers:
    return {'reference': None, 'why': 'transformers is not installed and no earlier certificate '
            'has its answers to these weights; only the round trip was checked'}
  if live:
    try:
      theirs = reference(directory, config)
    except (OSError, ValueError, RuntimeError) as error:
      raise UserError(f'transformers cannot open {directory} ({error})') from error
  params, differences, kept = load(), {}, {}
  kinds = inputs(config.vocab_size, config.max_length, pad_id, getattr(config, 'decoder', False))
  for name, features in kinds.items():
    ours, mask = our_answers(config, params, features), features['mask']
    if 'decoder_tokens' in features:
      mask = np.ones(ours.shape[:2], bool)
    if live:
      wanted = theirs(features)
      differences[name], kept[name] = compare(ours, wanted, mask), _sample(wanted, mask)
    else:
      differences[name] = compare_sample(ours, answers[name], mask)
      kept[name] = answers[name]
    differences[name]['tokens'] = int(features['mask'].sum())
  return {'reference': 'transformers on PyTorch, CPU' if live else
          'answers of transformers in an earlier certificate',
          'of': 'logits' if _has_logits(config) else 'hidden states', 'dtype': 'float32',
          'seed': SEED, 'differences': differences, 'answers': kept}


def compare_tensors(theirs: Mapping[str, Any],
                    ours: Callable[[str], np.ndarray]) -> dict[str, Any]:
  """What a certificate says under `round_trip`: every tensor bit for bit, and a digest of them.

  Args:
    theirs: name -> `tensors.Tensor`.
    ours: the same tensor, from our parameters.
  """
  different, digest = [], hashlib.sha256()
  for name in sorted(theirs):
    tensor, mine = theirs[name], ours(name)
    digest.update(f'{name} {tensor.dtype} {list(tensor.shape)}'.encode())
    same = mine.shape == tensor.shape and mine.dtype == tensor.dtype
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, BLOCK_BYTES * rows // max(1, tensor.nbytes))
    for start in range(0, rows, step):
      block = _bytes(tensor.read_rows(start, min(start + step, rows)))
      digest.update(block.data)
      same = same and np.array_equal(block, _bytes(np.atleast_1d(mine)[start:start + step]))
    if not same:
      different.append(name)
  return {'tensors': len(theirs), 'different': different, 'sha256': digest.hexdigest()}


def _bytes(array: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def write(directory: pathlib.Path, certificate: Mapping[str, Any]) -> None:
  """Writes parity.json."""
  (directory / FILE).write_text(json.dumps(certificate, indent=1) + '\n', 'utf-8')


def read(directory: pathlib.Path) -> dict[str, Any]:
  """An earlier certificate of a directory, {} where there is none."""
  try:
    return json.loads((directory / FILE).read_text('utf-8'))
  except (OSError, ValueError):
    return {}
