"""What a model makes of held-out text: its objective's metrics, or bits per byte of whole documents
beside what general compressors need for the same bytes."""
import functools
import gzip
import lzma
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import tqdm

from lm.parallel.batches import GlobalBatch
from lm.parallel.distributed import Hosts
from lm.training.losses import token_nats
from lm.training.validation import HeldOut


def windows(tokens: np.ndarray, length: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
  """Cuts a document into overlapping windows that score every token once.

  The first window scores all of its tokens, each later one starts half a window further and scores
  its second half, so that every token but those of the first half has at least length / 2 tokens of
  context (strided evaluation; Press et al. 2020, arXiv:2012.15832, section 2.2, call it a sliding
  window).

  Yields:
    (first scored place, inputs [<= length], targets [<= length]); the input before the first token
    is 0.
  """
  inputs = np.concatenate([[0], tokens[:-1]]).astype(np.int32)
  stride = max(length // 2, 1)
  done = start = 0
  while done < len(tokens):
    end = min(start + length, len(tokens))
    yield done - start, inputs[start:end], tokens[start:end]
    done, start = end, start + stride


@functools.lru_cache(maxsize=2)
def _token_nats_of(module: nn.Module) -> Callable[[Any, Any], jax.Array]:
  """The jitted function from (params, batch) to the nats of each token, compiled once a module."""
  def score(params, batch):
    outputs, _ = module.apply({'params': params}, batch, method='outputs')
    return token_nats(outputs['tokens'], batch['decoder_target_tokens'])[0]

  mesh = module.rules.mesh
  return jax.jit(score, **({} if mesh is None else {'out_shardings': module.rules.sharding()}))


def document_nats(module: nn.Module, params: Any, documents: Sequence[np.ndarray], length: int,
                  batch_size: int, progress: bool = True, hosts: Hosts = Hosts()) -> np.ndarray:
  """Negative log-likelihood of each document, in nats: float64 [documents].

  All `hosts` call it; each brings the windows that its devices score, and gets every result.
  """
  score = hosts.same_program(_token_nats_of(module))
  where = GlobalBatch(module.rules, batch_size)
  cuts = [(i, cut) for i, tokens in enumerate(documents) for cut in windows(tokens, length)]
  nats = np.zeros(len(documents))
  for first in tqdm.trange(0, len(cuts), batch_size, desc='evaluate', unit=' batches',
                           disable=not (progress and hosts.is_main)):
    rows = cuts[first:first + batch_size]
    inputs, targets = np.zeros((2, batch_size, length), np.int32)
    for row, (_, (_, inputs_T, targets_T)) in enumerate(rows):
      inputs[row, :len(inputs_T)], targets[row, :len(targets_T)] = inputs_T, targets_T
    batch = where.place({'decoder_input_tokens': inputs[where.own],
                         'decoder_target_tokens': targets[where.own]})
    losses_BT = np.asarray(score(params, batch), np.float64)
    for losses_T, (document, (scored, inputs_T, _)) in zip(losses_BT, rows):
      nats[document] += losses_T[scored:len(inputs_T)].sum()
  return nats


def held_out(module: nn.Module, loss: Any, params: Any, loader: Any, progress: bool = True,
             hosts: Hosts = Hosts()) -> dict[str, float]:
  """The metrics of a loss over one epoch of a loader, and `unigram_entropy`; see `HeldOut`."""
  score = HeldOut(module, loss, loader, hosts, with_unigrams=True)
  with tqdm.tqdm(total=score.num_batches, desc='evaluate', unit=' batches',
                 disable=not (progress and hosts.is_main)) as bar:
    return score(params, bar.update)


def evaluate(module: nn.Module, params: Any, documents: Sequence[dict[str, Any]], length: int,
             batch_size: int, progress: bool = True, hosts: Hosts = Hosts()) -> dict[str, Any]:
  """Compares the model with `gzip -9` and `xz -9`, file by file.

  Args:
    documents: each with `name`, `text` and `tokens` (the last one is the end of document, which the
      model pays for too).
    length: tokens of a window; batch_size: windows at a time.
    hosts: who compute together, all with the same arguments.

  Returns:
    `bits_per_byte`, `loss` (nats a token), `perplexity`, `tokens`, `bytes`, `gzip_bits_per_byte`
    and `xz_bits_per_byte` (each file compressed alone), `xz_together_bits_per_byte` (all in one),
    `wins` (files where the model needs less than both) and `files`: name, bytes, bits_per_byte,
    gzip, xz.
  """
  nats = document_nats(module, params, [d['tokens'] for d in documents], length, batch_size,
                       progress, hosts)
  texts = [d['text'].encode() for d in documents]
  files = []
  for document, text, own in zip(documents, texts, nats):
    rate = lambda bits: float(bits) / max(len(text), 1)
    files.append({'name': document['name'], 'bytes': len(text),
                  'bits_per_byte': rate(own / math.log(2)),
                  'gzip': rate(8 * len(gzip.compress(text, 9))),
                  'xz': rate(8 * len(lzma.compress(text, preset=9)))})
  size, tokens = sum(map(len, texts)), sum(len(d['tokens']) for d in documents)
  total = lambda key: sum(f[key] * f['bytes'] for f in files) / size
  loss = float(nats.sum() / tokens)
  wins = sum(f['bits_per_byte'] < min(f['gzip'], f['xz']) for f in files)
  return {'bits_per_byte': total('bits_per_byte'), 'loss': loss,
          'perplexity': math.exp(min(loss, 700)), 'tokens': tokens, 'bytes': size,
          'gzip_bits_per_byte': total('gzip'),
          'xz_bits_per_byte': total('xz'),
          'xz_together_bits_per_byte': 8 * len(lzma.compress(b''.join(texts), preset=9)) / size,
          'wins': int(wins), 'files': files}
