"""Likelihoods are those of each text alone, however texts are packed and what they share."""
import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.data.vocabularies import ByteVocabulary
from lm.errors import UserError
from lm.evaluation import likelihood, likelihood_rows
from lm.layers.moe import MoEConfig
from lm.models.bert import BERTConfig
from lm.models.gpt import GPTConfig
from lm.models.t5 import T5Config
from lm.models.transformer_xl import TransformerXLConfig

V, LONGEST = 37, 48
GPT2 = GPTConfig(vocab_size=V, max_length=LONGEST, d_model=16, num_layers=3, num_heads=4, d_ff=24,
                 dtype='float32', scan_layers=True)
LLAMA = dataclasses.replace(GPT2, num_kv_heads=2, norm='rmsnorm', positions='rotary',
                            activation='swiglu', use_bias=False, tie_embeddings=False)
MODELS = {
    'gpt2': GPT2, 'llama': LLAMA,
    'alibi, unrolled': dataclasses.replace(GPT2, positions='alibi', scan_layers=False),
    'local layers': dataclasses.replace(LLAMA, attention_pattern='LG', window=3,
                                        logits_softcap=3.0),
    'experts': dataclasses.replace(LLAMA, num_layers=1, moe=MoEConfig(num_experts=3, d_ff=8)),
    'transformer_xl': TransformerXLConfig(vocab_size=V, max_length=LONGEST, memory_length=4,
                                          d_model=16, num_layers=2, num_heads=2, d_ff=24,
                                          cutoffs=(10, 20), div_val=2, dtype='float32'),
    't5': T5Config(vocab_size=V, max_length=LONGEST, d_model=16, num_layers=2, num_heads=2, d_ff=24,
                   dtype='float32', scan_layers=True)}


@functools.cache
def params_of(config):
  """Random parameters by numpy: compiling the initialiser would cost more than scoring."""
  init = lambda: config.build().init(jax.random.key(0), method='initialize')['params']
  rng = np.random.default_rng(0)
  fill = lambda x: jnp.asarray(rng.normal(0.3, 0.3, x.shape) if x.ndim == 1 else
                               rng.normal(0, 0.4, x.shape), x.dtype)
  return jax.tree.map(fill, nn.meta.unbox(jax.eval_shape(init)))


def score(config, requests, **options):
  return likelihood.score(config.build(), params_of(config), requests, progress=False, **options)


@functools.cache
def log_probs_of(config):
  """From inputs alone in a row to log-probabilities [LONGEST, V]."""
  module = config.build()

  @jax.jit
  def run(params, batch):
    outputs, _ = module.apply({'params': params}, batch, method='outputs')
    return outputs['tokens'].log_probs()[0]
  return lambda batch: np.asarray(run(params_of(config), batch), np.float64)


def alone(config, context, continuation):
  """(log-likelihood, greedy) by the whole softmax of one row without packing; padding stands behind
  and is seen by nobody, but for an encoder's, which is a segment of its own."""
  pad = lambda ids: np.pad(np.asarray(ids, np.int32), (0, LONGEST - len(ids)))[None]
  if isinstance(config, T5Config):
    batch = {'encoder_input_tokens': pad(context),
             'encoder_segment_ids': pad(np.ones_like(context)),
             'decoder_input_tokens': pad([0, *continuation[:-1]])}
    first = 0
  else:
    batch = {'decoder_input_tokens': pad([*context, *continuation][:-1])}
    first = len(context) - 1
  rows = log_probs_of(config)(batch)[first:first + len(continuation)]
  return (rows[np.arange(len(rows)), continuation].sum(),
          rows.argmax(-1).tolist() == list(continuation))


def some_requests(rng, number=14):
  """Contexts that are shared, begin others, or are alone; continuations that begin others, too."""
  draw = lambda length: rng.integers(1, V, length).tolist()
  found = []
  for _ in range(number // 7):
    context, start = draw(rng.integers(1, 12)), draw(3)
    found += [(context, start + draw(2)), (context, start + draw(6)), (context, start),
              (context, start), (context + start, draw(1)), (draw(5), start),
              (draw(rng.integers(1, 25)), draw(rng.integers(1, 20)))]
  return found


def greedy_of(config, context, length):
  """What the model itself goes on with."""
  ids = []
  for _ in range(length):
    ids.append(next(v for v in range(V) if alone(config, context, [*ids, v])[1]))
  return ids


@pytest.mark.supports('evaluation', 'log-likelihood of continuations (GPT, Transformer-XL, T5)')
@pytest.mark.parametrize('name', MODELS)
def test_packed_texts_have_the_likelihood_that_each_has_alone(name):
  config, rng = MODELS[name], np.random.default_rng(0)
  requests = some_requests(rng)
  context = rng.integers(1, V, 6).tolist()
  best = greedy_of(config, context, 3)
  requests += [(context, best), (context, [*best[:-1], best[-1] % (V - 1) + 1])]
  found = score(config, requests, batch_size=2)
  wanted = [alone(config, *request) for request in requests]
  np.testing.assert_allclose([x.log_likelihood for x in found], [x for x, _ in wanted], atol=2e-4)
  assert [x.greedy for x in found] == [greedy for _, greedy in wanted]
  assert found[-2].greedy and not found[-1].greedy


def test_beginnings_that_are_shared_are_computed_once():
  rng = np.random.default_rng(1)
  context, choices = rng.integers(1, V, 20), [rng.integers(1, V, 5) for _ in range(4)]
  texts = [likelihood_rows.Text(np.concatenate([context, choice[:-1]]), choice)
           for choice in choices]
  tokens = lambda shares: sum(int((shape.batch['decoder_segment_ids'] > 0).sum())
                              for shape in likelihood_rows.pack(texts, shares, LONGEST, 16))
  assert tokens(True) == 20 + 4 * 4 and tokens(False) == 4 * 24
  # One-token choices of one context are one text, whatever the model shares.
  texts = [likelihood_rows.Text(context, choice[:1]) for choice in choices]
  assert tokens(False) == 20


@pytest.mark.parametrize('shares', [True, False])
def test_packing_asks_for_every_target_of_every_text_behind_its_own_input(shares):
  rng, texts = np.random.default_rng(2), []
  for i in range(200):
    inputs = rng.integers(1, 4 if i % 2 else 1000, int(rng.integers(1, 60 if i % 9 else 700)))
    texts.append(likelihood_rows.Text(inputs, rng.integers(1, 9, rng.integers(1, len(inputs) + 1))))
  seen, filled, room = [], 0, 0
  shapes = likelihood_rows.pack(texts, shares, 1024, 4)
  assert len(shapes) <= 4
  for shape in shapes:
    batch, T = shape.batch, shape.batch['decoder_input_tokens'].shape[1]
    assert len(batch['scored_places']) % shape.batch_size == 0
    filled, room = filled + (batch['decoder_segment_ids'] > 0).sum(), room + T * len(
        batch['scored_places'])
    for number, row, slots in shape.answers:
      text, places = texts[number], batch['scored_places'][row, slots]
      assert batch['scored_targets'][row, slots].tolist() == text.targets.tolist()
      inputs = text.inputs[-len(places):]
      assert batch['decoder_input_tokens'][row, places].tolist() == inputs.tolist()
      depths = len(text.inputs) - len(places) + np.arange(len(places))
      assert batch['decoder_positions'][row, places].tolist() == depths.tolist()
      seen.append(number)
  assert sorted(seen) == list(range(200))
  assert filled > 0.8 * room


def test_meshes_of_8_devices_give_the_likelihoods_of_one(child_with_devices):
  script = pathlib.Path(__file__).with_name('sharded_likelihood.py')
  found = child_with_devices(script)
  assert len(found) == 3 and all(difference < 1e-4 for *_, difference in found), found


def test_a_long_context_loses_its_beginning():
  context, continuation = np.arange(60) % 30 + 1, [3, 1, 4]
  found, = score(GPT2, [(context, continuation)])
  kept = context[-(LONGEST + 1 - 3):]
  assert found.log_likelihood == pytest.approx(alone(GPT2, kept, continuation)[0], abs=1e-4)
  found, = score(GPT2, [(context, continuation)], max_length=10)
  assert found.log_likelihood == pytest.approx(alone(GPT2, kept[-8:], continuation)[0], abs=1e-4)


@pytest.mark.parametrize('request_, message', [
    (([1], []), 'request 1 has an empty continuation'),
    (([], [1]), 'request 1 has an empty context'),
    (([1], [2] * (LONGEST + 1)), f'a continuation of {LONGEST + 1} tokens, .* sees {LONGEST}')])
def test_requests_that_nobody_could_answer_are_refused(request_, message):
  with pytest.raises(UserError, match=message):
    score(GPT2, [([1], [2]), request_])


def test_a_model_of_masked_tokens_is_refused():
  config = BERTConfig(vocab_size=V, max_length=8, d_model=8, num_layers=1, num_heads=2, d_ff=8)
  with pytest.raises(UserError, match='BERT gives a text no likelihood'):
    likelihood.score(config.build(), {}, [([1], [2])])


class Letters:
  """A vocabulary of somebody else: letters, and merges of a space with what follows it."""
  eos_id, bos_id = 1, 2

  def __init__(self, begins):
    self.begins = begins

  def encode_batch(self, texts, num_threads=1):
    del num_threads
    joined = [text.replace(' ', '_') for text in texts]
    return [np.array([ord(x[-1]) + 128 * (len(x) > 1) for x in _pieces(text)], np.int32)
            for text in joined]

  def encode_pair(self, text):
    del text
    return type('Marked', (), {'ids': np.array([2] if self.begins else [], np.int32)})


def _pieces(text):
  while text:
    size = 2 if text[0] == '_' and len(text) > 1 else 1
    yield text[:size]
    text = text[size:]


def test_spaces_of_a_context_go_to_its_continuation():
  a, b, space_b = ord('a'), ord('b'), ord('b') + 128
  split = lambda begins, *pair: [x.tolist() for x in
                                 likelihood.tokenize(Letters(begins), [pair])[0]]
  assert split(False, 'a', ' b') == split(False, 'a ', 'b') == [[a], [space_b]]
  assert split(True, 'a ', 'b') == [[2, a], [space_b]]
  assert split(False, '', 'ab') == split(True, '', 'ab') == [[2], [a, b]]
  assert split(False, ' ', 'b') == [[2], [space_b]]


def test_documents_of_our_own_vocabulary_begin_as_in_training():
  vocabulary = ByteVocabulary()
  (context, continuation), (whole, _) = likelihood.tokenize(vocabulary, [('a', 'b'), ('', 'b')])
  assert context.tolist() == [0, 100] and continuation.tolist() == [101] and whole.tolist() == [0]
  (context, continuation), = likelihood.tokenize(vocabulary, [('a ', 'b')], encodes=True)
  assert context.tolist() == [100, vocabulary.eos_id] and continuation.tolist() == [35, 101]


@pytest.mark.parametrize('size', [1, 9, 10, 11, 25, 40])
def test_windows_hold_every_token_once_and_are_whole(size):
  ids = np.arange(1, size + 1)
  cuts = list(likelihood.windows(ids, 0, 10))
  assert np.concatenate([continuation for _, continuation in cuts]).tolist() == ids.tolist()
  for i, (context, continuation) in enumerate(cuts):
    whole = np.concatenate([context, continuation])
    assert whole.tolist() == list(range(whole[0], whole[-1] + 1))
    assert len(whole) == (min(size, 10) if i == 0 else 10) + 1


BYTES = dataclasses.replace(LLAMA, vocab_size=259)


@pytest.mark.supports('evaluation', 'word and byte perplexity, multiple choice: predictions')
def test_predictions_of_choices_and_texts_say_what_was_scored():
  examples = [{'id': 'q', 'contexts': ['Is it?', 'Is it?'], 'continuations': [' yes', ' nö'],
               'label': 1},
              {'id': 'p', 'contexts': ['', ''], 'continuations': ['He is.', 'He are.'], 'label': 0}]
  module, params = BYTES.build(), params_of(BYTES)
  predict = functools.partial(likelihood.predict_choices, module, params, ByteVocabulary(),
                              progress=False)
  rows = predict(examples)
  encode = lambda text: [0, *ByteVocabulary().encode(text)]
  wanted = [alone(BYTES, *pair)[0] for pair in (
      (encode('Is it?'), encode(' yes')[1:]), (encode('Is it?'), encode(' nö')[1:]),
      (encode(''), encode('He is.')[1:]), (encode(''), encode('He are.')[1:]))]
  np.testing.assert_allclose(rows[0]['scores'] + rows[1]['scores'], wanted, atol=1e-4)
  assert rows[0] | {'scores': 0} == {
      'id': 'q', 'inputs': 'Is it?', 'targets': 1, 'prediction': int(wanted[1] > wanted[0]),
      'lengths': [4, 4], 'greedy': [False, False], 'scores': 0}
  with pytest.raises(UserError, match="continuation '' of 'Is it.' has no token"):
    predict([examples[0] | {'continuations': [' yes', '']}])


def test_a_long_text_is_scored_window_by_window():
  text = 'Once upon a time,  there\nwas a cat. ' * 3
  row, = likelihood.predict_texts(BYTES.build(), params_of(BYTES), ByteVocabulary(),
                                  [{'id': 't', 'text': text}], progress=False)
  ids = ByteVocabulary().encode(text)
  nats = -sum(alone(BYTES, *window)[0] for window in likelihood.windows(ids, 0, LONGEST))
  assert row['scores'][0] == pytest.approx(nats, abs=1e-3)
  assert (row['words'], row['tokens'], row['bytes']) == (25, len(text), len(text))
