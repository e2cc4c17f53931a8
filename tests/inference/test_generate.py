"""Completions are those of the full forward pass, whatever shares their batch."""
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.errors import UserError
from lm.inference import complete, generate, SamplingConfig
from lm.inference.decoder import cast_matrices
from lm.models.gpt import GPTConfig
from lm.models.t5 import T5Config

GPT2 = GPTConfig(vocab_size=61, max_length=48, d_model=32, num_layers=2, num_heads=4, d_ff=64,
                 dtype='float32', init_std=0.3)
LLAMA = dataclasses.replace(GPT2, norm='rmsnorm', positions='rotary', activation='swiglu',
                            num_kv_heads=2, use_bias=False, tie_embeddings=False)
SCANNED = dataclasses.replace(LLAMA, scan_layers=True)
MODELS = pytest.mark.parametrize('model', [GPT2, SCANNED], ids=['gpt2', 'scanned llama'])
GREEDY = SamplingConfig(temperature=0, max_new_tokens=8)
WARM = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=8)
NO_EOS = -1


@functools.cache
def params_of(model):
  """Random parameters by numpy: compiling the initialiser would cost more than all the decoding."""
  init = lambda: model.build().init(jax.random.key(0), method='initialize')['params']
  rng = np.random.default_rng(0)
  fill = lambda x: jnp.asarray(rng.normal(0.3, 0.3, x.shape) if x.ndim == 1 else
                               rng.normal(0, 0.3, x.shape), x.dtype)
  return jax.tree.map(fill, nn.meta.unbox(jax.eval_shape(init)))


def run(model, prompts, config, seed=0, eos_id=NO_EOS, max_length=None):
  return generate(model.build(), params_of(model), prompts, config, seed,
                  max_length or model.max_length, eos_id)


def some_prompts(*lengths):
  rng = np.random.default_rng(0)
  return [rng.integers(3, 61, length) for length in lengths]


@functools.lru_cache
def full_logits(model):
  module = model.build()

  @jax.jit
  def logits(params, tokens):
    hidden, _ = module.apply({'params': params}, tokens)
    return module.apply({'params': params}, hidden, method='logits')
  return lambda inputs: np.asarray(logits(params_of(model), jnp.asarray(
      np.pad(inputs, (0, model.max_length - len(inputs)))[None])))[0, :len(inputs)]


@MODELS
def test_greedy_completions_and_log_probs_are_those_of_the_full_forward_pass(model):
  prompts = some_prompts(0, 5, 15, 20)
  for prompt, done in zip(prompts, run(model, prompts, GREEDY)):
    logits = full_logits(model)(np.concatenate([[0], prompt, done.tokens[:-1]]).astype(np.int32))
    new = jax.nn.log_softmax(logits[len(prompt):])
    assert len(done.tokens) == len(new) == 8 and done.stopped == 'length'
    assert done.tokens.tolist() == new.argmax(-1).tolist()
    np.testing.assert_allclose(done.log_probs, new[np.arange(8), done.tokens], atol=2e-5)


def test_an_encoder_decoder_completes_each_prompt_as_its_full_forward_pass():
  model = T5Config(vocab_size=61, max_length=32, d_model=16, num_layers=2, num_heads=2, d_ff=24,
                   dtype='float32', scan_layers=True)
  module, params, prompts = model.build(), params_of(model), some_prompts(0, 5, 20)

  @jax.jit
  def likeliest(inputs, outputs):
    hidden = module.apply({'params': params}, inputs, outputs)
    return module.apply({'params': params}, hidden, method='logits')[0, -1].argmax()

  for prompt, done in zip(prompts, run(model, prompts, GREEDY, eos_id=1)):
    inputs, outputs = jnp.asarray([[*prompt, 1]], jnp.int32), [0]
    for token in done.tokens[:3]:
      assert int(likeliest(inputs, jnp.asarray([outputs], jnp.int32))) == token
      outputs.append(int(token))


@pytest.mark.supports('decoding', 'KV cache of ragged batches')
@pytest.mark.parametrize('model', [GPT2, LLAMA, SCANNED], ids=['gpt2', 'llama', 'scanned llama'])
def test_ragged_cached_decoding_equals_the_full_forward_pass(model):
  module, variables = model.build(), {'params': params_of(model)}
  tokens = jnp.asarray(np.random.default_rng(1).integers(3, 61, (3, 24)), jnp.int32)
  full = module.apply(variables, tokens)[0]
  lengths = jnp.array([1, 9, 16])
  cache = model.init_cache(3, 24)
  hidden, cache = module.apply(variables, tokens[:, :16], cache=cache)
  np.testing.assert_allclose(hidden, full[:, :16], atol=1e-5)
  cache = dataclasses.replace(cache, length_B=lengths)
  step = jax.jit(lambda token, cache: module.apply(variables, token, cache=cache))
  for i in range(8):
    token = jnp.take_along_axis(tokens, lengths[:, None] + i, axis=1)
    hidden, cache = step(token, cache)
    expected = jnp.take_along_axis(full, lengths[:, None, None] + i, axis=1)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)


@pytest.mark.parametrize('config', [GREEDY, WARM], ids=['greedy', 'sampling'])
@MODELS
def test_a_completion_does_not_depend_on_what_shares_its_batch(model, config):
  prompts = some_prompts(3, 0, 15, 20)
  together = run(model, prompts, config, seed=5)
  backwards = run(model, prompts[::-1], config, seed=5)[::-1]
  assert [c.tokens.tolist() for c in together] == [c.tokens.tolist() for c in backwards]
  for i in (0, 1, 2):
    alone, = run(model, prompts[i:i + 1], config, seed=5)
    assert alone.tokens.tolist() == together[i].tokens.tolist()


def test_seeds_belong_to_requests():
  short, long = some_prompts(4, 9)
  tokens = lambda *args: [c.tokens.tolist() for c in run(GPT2, *args)]
  first = tokens([short, long, short], WARM, [1, 2, 3])
  assert first == tokens([short, long, short], WARM, [3, 2, 1])[::-1]
  assert first[0] != first[2], 'another seed gave the same completion'
  same = tokens([short, long, short], WARM, 1)
  assert same[0] == same[2] == first[0]
  with pytest.raises(ValueError, match='3 seeds for 2 prompts'):
    run(GPT2, [short, long], WARM, seed=[1, 2, 3])


def test_a_full_context_cuts_the_completion_and_says_so():
  config = dataclasses.replace(GREEDY, max_new_tokens=40)
  short, long, longest = run(GPT2, some_prompts(8, 45, 47), config)
  assert (len(short.tokens), short.stopped) == (40, 'length')
  assert (len(long.tokens), long.stopped) == (3, 'context')
  assert (len(longest.tokens), longest.stopped) == (1, 'context')
  logits = full_logits(GPT2)
  for prompt, done in zip(some_prompts(8, 45, 47), (short, long, longest)):
    inputs = np.concatenate([[0], prompt, done.tokens[:-1]]).astype(np.int32)
    assert done.tokens.tolist() == logits(inputs)[len(prompt):].argmax(-1).tolist()


def test_a_prompt_that_fills_the_context_is_refused():
  with pytest.raises(UserError, match='prompt 1 has 48 tokens.*at most 47'):
    run(GPT2, some_prompts(3, 48), GREEDY)


def test_a_completion_stops_at_the_end_of_the_document_and_its_neighbours_go_on():
  prompts = some_prompts(5, 6, 7)
  free = run(GPT2, prompts, GREEDY)
  eos = int(free[1].tokens[3])
  for whole, done in zip(free, run(GPT2, prompts, GREEDY, eos_id=eos)):
    tokens = whole.tokens.tolist()
    end = tokens.index(eos) + 1 if eos in tokens else len(tokens)
    assert done.tokens.tolist() == tokens[:end] and len(done.log_probs) == end
    assert done.stopped == ('eos' if eos in tokens else 'length')


def test_casting_matrices_once_changes_no_bit_of_the_bfloat16_model():
  model = dataclasses.replace(LLAMA, dtype='bfloat16', num_layers=1)
  apply = jax.jit(lambda p: model.build().apply({'params': p}, jnp.arange(12)[None])[0])
  params = params_of(model)
  assert (apply(params) == apply(cast_matrices(params, 'bfloat16'))).all()


def test_no_prompts_give_no_completions():
  assert run(GPT2, [], GREEDY) == []


class Letters:
  """a..z are 3..28; id 1 ends a document."""
  eos_id = 1

  def encode(self, text):
    return np.array([ord(c) - ord('a') + 3 for c in text], np.int32)

  def decode(self, ids):
    return ''.join(chr(i - 3 + ord('a')) if i > 2 else f'<{i}>' for i in ids)


def test_text_in_text_out():
  vocabulary = Letters()
  for prompt in ('abc', ''):
    result, = complete(GPT2.build(), params_of(GPT2), vocabulary, [prompt], WARM, 0, 48)
    done, = run(GPT2, [vocabulary.encode(prompt)], WARM, eos_id=1)
    assert result['prompt'] == prompt and result['tokens'] == done.tokens.tolist()
    text = done.tokens[:-1] if done.stopped == 'eos' else done.tokens
    assert result['text'] == vocabulary.decode(text) and result['stopped'] == done.stopped
