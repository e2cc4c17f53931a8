"""Rows of a T5 and of a Transformer-XL that come and go write what each would write alone."""
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.errors import UserError
from lm.inference import generate, SamplingConfig
from lm.inference.model_rows import ModelRows
from lm.inference.requests import Request
from lm.inference.rows import RowEngine
from lm.inference.scores import score, Scorer
from lm.inference.decoder import Decoder
from lm.models.cache import CacheOptions
from lm.models.gpt import GPTConfig
from lm.models.t5 import T5Config
from lm.models.transformer_xl import TransformerXLConfig

EOS, LENGTH = 5, 24
SIZES = dict(vocab_size=37, max_length=LENGTH, d_model=16, num_layers=2, num_heads=2, d_ff=24,
             dtype='float32')
MODELS = {'T5': T5Config(**SIZES),
          'Transformer-XL': TransformerXLConfig(**SIZES, memory_length=6, scan_layers=True)}
GREEDY = SamplingConfig(temperature=0, max_new_tokens=9)
WARM = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=30)


def params_of(config):
  """Random parameters by numpy."""
  init = lambda: config.build().init(jax.random.key(0), method='initialize')['params']
  rng = np.random.default_rng(0)
  fill = lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype)
  return jax.tree.map(fill, nn.meta.unbox(jax.eval_shape(init)))


def bos_of(name):
  return None if name.startswith('T5') else 0


def requests(name):
  """Requests of many lengths and wishes."""
  rng = np.random.default_rng(1)
  wishes = GREEDY, WARM, dataclasses.replace(
      WARM, repetition_penalty=1.5, no_repeat_ngram_size=2, logit_bias=((EOS, 3.0),))
  return [Request(rng.integers(6, 37, length), wishes[i % 3], seed=i, eos_id=EOS,
                  bos_id=bos_of(name))
          for i, length in enumerate((0, 1, 4, 7, 11, 16, 17, 19, 22, 23, 2))]


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


@functools.cache
def built(name):
  """An engine of three rows, warmed up, its clock, and what `generate` writes."""
  config, clock, asked = MODELS[name], Clock(), requests(name)
  params = params_of(config)
  engine = RowEngine(ModelRows(config.build(), params, 3, LENGTH), clock)
  engine.warm_up(constrained=True)
  wanted = generate(config.build(), params, [x.prompt for x in asked], [x.sampling for x in asked],
                    [x.seed for x in asked], LENGTH, EOS, bos_of(name))
  return engine, clock, wanted


def run(engine):
  while engine.step():
    pass


def same(ticket, wanted):
  done = ticket.result(0)
  np.testing.assert_allclose(done.log_probs, wanted.log_probs[:len(done.tokens)], atol=1e-4)
  return done.tokens.tolist() == wanted.tokens.tolist() and done.stopped == wanted.stopped


@pytest.mark.supports('decoding', 'continuous batching of T5 and Transformer-XL')
@pytest.mark.parametrize('name', MODELS)
def test_each_text_is_the_plain_decoders_whatever_comes_and_goes(name):
  engine, _, wanted = built(name)
  compiled, tickets, listen = [], [], lambda name, *_, **__: compiled.append(name)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for i, request in enumerate(requests(name)):
      tickets.append(engine.submit(request))
      for _ in range(i % 4):
        engine.step()
    cancelled = engine.submit(requests(name)[3])
    engine.step()
    cancelled.cancel()
    run(engine)
    assert all(same(ticket, one) for ticket, one in zip(tickets, wanted, strict=True))
    assert cancelled.result(0).stopped == 'cancelled'
    assert not [one for one in compiled if 'compile' in one]
    jax.jit(lambda x: x + 1)(np.zeros(79))
    assert [one for one in compiled if 'compile' in one], 'the listener hears nothing'
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert {one.stopped for one in wanted} == {'eos', 'length', 'context'}


@pytest.mark.parametrize('name', MODELS)
def test_a_row_that_rests_stays_as_it_is(name):
  config, prompts = MODELS[name], [np.array([7, 8, 9]), np.array([10, 11])]
  found = []
  for rests in (0, 3):
    rows = ModelRows(config.build(), params_of(config), 3, LENGTH)
    for row, prompt in enumerate(prompts):
      rows.read(row, prompt, 9)
    for _ in range(rests):
      rows.extend([1], [12])
    found.append(rows.extend([0], [13])[0])
  np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_rows_go_on_while_others_wait_and_free_ones_are_taken_at_once():
  engine, _, wanted = built('T5')
  long = engine.submit(dataclasses.replace(requests('T5')[1], eos_id=-1))
  short = [engine.submit(dataclasses.replace(requests('T5')[0], sampling=SamplingConfig(
      temperature=0, max_new_tokens=2))) for _ in range(6)]
  for _ in range(8):
    engine.step()
  assert all(ticket.stopped for ticket in short) and len(long.tokens) == 8
  run(engine)
  assert long.stopped == 'context' and len(long.tokens) == LENGTH


def test_deadlines_rules_and_broken_listeners_end_their_own_request_alone():
  engine, clock, wanted = built('Transformer-XL')
  one, two = requests('Transformer-XL')[:2]
  heard = []

  class Only:
    def mask(self):
      bits = np.zeros(2, np.uint32)
      bits[0] = 1 << 7 | 1 << 9
      return bits

    def advance(self, token):
      heard.append(token)

  class Broken(Only):
    def mask(self):
      raise RuntimeError('nothing may follow')

  def fail(tokens, log_probs):
    raise RuntimeError('gone')

  late = engine.submit(dataclasses.replace(one, deadline=clock.now + 2, eos_id=-1))
  waiting = [engine.submit(one) for _ in range(2)]
  overdue = engine.submit(dataclasses.replace(one, deadline=clock.now + 1))
  ruled = engine.submit(dataclasses.replace(two, constraint=Only()))
  broken = engine.submit(dataclasses.replace(two, constraint=Broken()))
  deaf = engine.submit(dataclasses.replace(two, on_tokens=fail))
  while engine.step():
    clock.now += 1
  assert late.stopped == 'deadline' and len(late.tokens) == 2
  assert overdue.stopped == 'deadline' and not overdue.tokens
  assert all(same(ticket, wanted[0]) for ticket in waiting)
  assert set(heard) <= {7, 9} and heard == ruled.tokens and ruled.stopped == 'context'
  assert broken.stopped == 'cancelled' and 'nothing may' in str(broken.error)
  assert deaf.stopped == 'cancelled' and str(deaf.error) == 'gone'
  assert same(next(t for t in [engine.submit(one)] if run(engine) is None), wanted[0])


@pytest.mark.parametrize('name', ['T5', 'Transformer-XL'])
def test_other_tokens_are_told_with_the_models_own_probabilities(name):
  engine, _, _ = built(name)
  request = requests(name)[4]
  ticket = engine.submit(dataclasses.replace(request, num_top=4))
  run(engine)
  before = [EOS] if name == 'T5' else [0]
  context = [*request.prompt, *before] if name == 'T5' else [*before, *request.prompt]
  config = MODELS[name]
  found, = score(config.build(), params_of(config), [(context, ticket.tokens)], 4, LENGTH)
  tokens, values = zip(*ticket.top)
  np.testing.assert_array_equal(np.stack(tokens), found.top_tokens)
  np.testing.assert_allclose(np.stack(values), found.top_log_probs, atol=1e-4)


def test_what_cannot_be_answered_is_refused():
  engine, _, _ = built('T5')
  with pytest.raises(UserError, match='24 tokens, which leaves no room'):
    engine.submit(Request(np.zeros(24), eos_id=EOS))
  words = tuple((token, 1.0) for token in range(20))
  with pytest.raises(UserError, match='16 bad words and biased tokens'):
    engine.submit(Request(np.zeros(2), SamplingConfig(logit_bias=words), eos_id=EOS))
  with pytest.raises(UserError, match='the prompt is empty'):
    built('Transformer-XL')[0].submit(Request(np.zeros(0), bos_id=None))
  assert not engine.step()


# The last piece begins 50 tokens earlier: more than a rolling cache takes back.
LONGEST = 270
GPT = GPTConfig(vocab_size=37, max_length=LONGEST, d_model=16, num_layers=2, num_heads=2, d_ff=24,
                dtype='float32', positions='learned')
CACHES = {'plain': (GPT, None),
          'rolling': (dataclasses.replace(GPT, positions='rotary', attention_pattern='L',
                                          window=40), CacheOptions(rolling=True))}


@pytest.mark.parametrize('name', CACHES)
def test_scores_in_pieces_are_those_at_once_and_compile_nothing(name):
  config, options = CACHES[name]
  params, decoder = params_of(config), Decoder(config.build(), cache=options)
  scorer = Scorer(decoder, decoder.prepare(params), 3, LONGEST)
  scorer.warm_up()
  rng = np.random.default_rng(0)
  texts = [rng.integers(6, 37, size) for size in (1, 2, 63, 64, 65, 200, 256, 257, 269, 270, 271,
                                                  700)]
  wanted = score(config.build(), params, [([0], text) for text in texts], 3, LONGEST)
  compiled, listen = [], lambda name, *_, **__: compiled.append(name)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for text, one in zip(texts, wanted, strict=True):
      *pauses, found = scorer.pieces([0], text)
      assert len(pauses) >= len(text) // 64 and not any(pauses)
      np.testing.assert_array_equal(found.tokens, text)
      np.testing.assert_allclose(found.log_probs, one.log_probs, atol=2e-4)
      np.testing.assert_allclose(found.top_log_probs, one.top_log_probs, atol=2e-4)
      np.testing.assert_array_equal(found.top_tokens, one.top_tokens)
    assert not [one for one in compiled if 'compile' in one]
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  with pytest.raises(UserError, match='the text is empty'):
    scorer.pieces([], [])
