"""A worker of `lm serve` with a tiny model of random weights, or one that only counts slowly."""
import functools
import os
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.data.examples import chat
from lm.data.vocabularies import ByteVocabulary
from lm.export import programs
from lm.inference.engine import Engine, EngineConfig
from lm.inference.infill import FIM as Sentinels
from lm.inference.scores import Scorer
from lm.models.bert import BERTConfig
from lm.models.gpt import GPTConfig
from lm.models.heads import ClassifierConfig, EmbedderConfig, TaggerConfig
from lm.serving import filters, worker
from lm.serving.reader import Batching, Reader
from lm.serving.writer import NUM_TOP, Writer

SIZES = dict(vocab_size=300, max_length=48, d_model=16, num_layers=1, num_heads=2, d_ff=16,
             dtype='float32', init_std=0.4, scan_layers=False)
TRUNK = BERTConfig(**SIZES, masked_lm=False, sentence_classes=0, pooler=False)
CONFIGS = {'gpt': GPTConfig(**SIZES), 'talk': GPTConfig(**SIZES),
           'classify': ClassifierConfig(TRUNK, 3),
           'tag': TaggerConfig(TRUNK, 3), 'embed': EmbedderConfig(TRUNK)}
LABELS = 'red', 'green', 'blue'
LETTERS = str.maketrans('abcdefghijklmnop', '0123456789abcdef')
FIM = Sentinels(292, 293, 294)


class Vocabulary(ByteVocabulary):
  """Bytes, with tokens around a text."""
  special_tokens = ByteVocabulary.special_tokens | {'cls_id': 290, 'sep_id': 291}


@functools.cache
def made(kind):
  """The module and its parameters."""
  module, rng = CONFIGS[kind].build(), np.random.default_rng(0)
  shapes = nn.meta.unbox(jax.eval_shape(lambda: module.init(
      jax.random.key(0), method='initialize')['params']))
  return module, jax.tree.map_with_path(lambda path, x: jnp.asarray(
      0.4 * rng.normal(size=x.shape) + (path[-1].key == 'scale'), x.dtype), shapes)


def backend(kind):
  """What a worker computes with."""
  if kind in ('slow', 'says'):
    return Slow() if kind == 'slow' else Says()
  if kind.startswith('filter='):
    words = filters.Words(kind.removeprefix('filter='))
    return Mortal(words, filters.Privacy(), judge(), 0.9)
  if kind == 'fill':
    return filler()
  module, params = made(kind)
  if kind in ('gpt', 'talk'):
    engine = Engine(module, params, EngineConfig(num_rows=4, cache_tokens=256), 48)
    talks = (chat.open_template(ByteVocabulary(), 'plain'), FIM) if kind == 'talk' else (None, None)
    return Writer(engine, ByteVocabulary(), *talks,
                  Scorer(engine.decoder, engine.params, NUM_TOP, 48))
  program = programs.whole(CONFIGS[kind], module)
  return Reader(functools.partial(jax.jit(program.call), params), list(program.inputs), kind,
                Vocabulary(), 48, LABELS, Batching(4, 0.002))


def judge():
  """A classifier of harm: what holds a % is harmful."""
  def answer(arrays):
    ids = np.asarray(arrays['input_ids'])
    is_harmful = (ids == ByteVocabulary().encode('%')[0]).any(1)
    return {'logits': np.stack([0 * is_harmful, 8.0 * is_harmful - 4], 1)}
  return Reader(answer, ['input_ids'], 'classify', Vocabulary(), 48, ('harmless', 'harmful'),
                Batching(4, 0.0))


class Blanks(Vocabulary):
  """Bytes, and a token for what is missing."""
  mask_id = 299


def filler():
  """A masked language model that puts the same letters into every blank."""
  def answer(arrays):
    logits = np.zeros((*np.shape(arrays['input_ids']), 300))
    logits[..., Blanks().encode('u%o0a')] = range(20, 10, -2)
    return {'logits': logits}
  return Reader(answer, ['input_ids'], 'fill', Blanks(), 48, (), Batching(4, 0.0))


class Mortal(filters.Filter):
  """A filter that dies of one text."""

  def submit(self, job, tell):
    if 'die now' in job['text']:
      os._exit(1)
    super().submit(job, tell)


class Says:
  """Writes the text that its prompt spells: pieces between blanks, two letters a byte."""
  abilities, facts = ('complete', 'chat'), {'max_length': 1 << 20}

  def __init__(self):
    self._left = {}

  def warm_up(self):
    pass

  def submit(self, job, tell):
    prompt = job['prompt'] if isinstance(job['prompt'], str) else job['prompt'][-1]['content']
    pieces = [bytes.fromhex(piece.translate(LETTERS)).decode() for piece in prompt.split()]
    wants_tokens = job['top'] is not None
    self._left[job['id']] = iter(pieces), tell, wants_tokens

  def cancel(self, number):
    if number in self._left:
      self._left.pop(number)[1]({'done': 'cancelled'})

  def step(self):
    for number, (pieces, tell, wants_tokens) in list(self._left.items()):
      piece = next(pieces, None)
      if piece is None:
        del self._left[number]
        tell({'text': '', 'done': 'eos', 'new_tokens': 7, 'prompt_tokens': 1})
      else:
        tell({'text': piece, **({'tokens': [piece], 'log_probs': [0.0]} if wants_tokens else {})})
    return 0 if self._left else None


class Slow:
  """Writes a number each 20 ms, up to max_new_tokens."""
  abilities, facts = ('complete',), {'max_length': 1 << 20}

  def __init__(self):
    self._jobs, self._tells = {}, {}

  def warm_up(self):
    pass

  def submit(self, job, tell):
    self._jobs[job['id']], self._tells[job['id']] = [0, job['sampling']['max_new_tokens']], tell

  def cancel(self, number):
    if self._jobs.pop(number, None):
      self._tells.pop(number)({'done': 'cancelled'})

  def step(self):
    if not self._jobs:
      return None
    time.sleep(0.02)
    for number, (count, last) in list(self._jobs.items()):
      done = count + 1 == last
      end = {'done': 'length', 'new_tokens': last, 'prompt_tokens': 1} if done else {}
      self._tells[number]({'text': f'{count} ', **end})
      self._jobs[number][0] += 1
      if done:
        del self._jobs[number], self._tells[number]
    return 0


if __name__ == '__main__':
  worker.main(functools.partial(backend, sys.argv[1]))
