"""Models that write together: each token is that of the formula over full forward passes."""
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.inference.beam import beam_search, BeamConfig
from lm.inference.generate import generate
from lm.inference.guidance import (classifier_free, contrastive_decoding, experts, Guided, Member)
from lm.inference.sampling import SamplingConfig
from small_models import model

HERE = pathlib.Path(__file__).resolve().parent
PLACES, NEW = 24, 8
PROMPTS = [[5, 7], [9], [40, 41, 9, 20, 8, 22, 33], [12, 50, 6]]
EOS = 9
GREEDY = SamplingConfig(temperature=0, max_new_tokens=NEW)


def changed(params, seed):
  """Another model of the same shapes."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: x + 0.1 * jnp.asarray(rng.normal(size=x.shape), x.dtype), params)


@functools.cache
def three(name):
  """A decoder, and parameters of three models."""
  decoder, params = model(name)
  return decoder, (params, changed(params, 1), changed(params, 2))


@functools.cache
def full(name):
  """log p of the next token [V] after a text, of one of three models, without a cache."""
  decoder, params = three(name)

  @jax.jit
  def run(params, inputs, text, length):
    apply = functools.partial(decoder.module.apply, {'params': params})
    segments = (inputs >= 0).astype(jnp.int32)
    hidden = apply(jnp.maximum(inputs, 0), text, segments) if decoder.has_encoder else (
        apply(text)[0])
    return apply(hidden, method='logits')[0, length - 1]

  pad = lambda ids, fill: np.array([[*ids, *[fill] * (PLACES - len(ids))]])
  return lambda which, inputs, text: np.asarray(
      run(params[which], pad(inputs, -1), pad(text, 0), len(text)))


def by_the_formula(name, prompt, score):
  """Greedy tokens of `score`, which takes a function from (model, what it reads) to logits."""
  text = []
  for _ in range(NEW):
    def logits(which, read):
      if model(name)[0].has_encoder:
        return full(name)(which, [*read, EOS], [0, *text])
      return full(name)(which, [], [*read, *text])
    text.append(int(np.argmax(score(logits, prompt))))
    if text[-1] == EOS:
      break
  return text


def log_softmax(x):
  return np.asarray(jax.nn.log_softmax(x))


def formulas(decoder):
  """name: (guided decoder, number of models, scores of the next token)."""
  def contrastive(logits, prompt):
    expert, amateur = log_softmax(logits(0, prompt)), log_softmax(logits(1, prompt) / 0.5)
    return np.where(expert >= np.log(0.1) + expert.max(), expert - amateur, -np.inf)

  def free(scale, away):
    def score(logits, prompt):
      without = log_softmax(logits(0, away or prompt[-1:]))
      return without + scale * (log_softmax(logits(0, prompt)) - without)
    return score

  dexperts = lambda logits, prompt: (
      logits(0, prompt) + 1.3 * (logits(1, prompt) - logits(2, prompt)))
  long = (8, 3, 11, 30, 5, 9, 22, 13, 4, 4, 6, 8, 10, 3, 3, 5, 7)[:PLACES - NEW - 1]
  return {
      'contrastive': (contrastive_decoding(decoder, decoder, 0.1, 0.5), 2, contrastive),
      'free': (classifier_free(decoder, 1.7, long), 1, free(1.7, long)),
      'experts': (experts(decoder, decoder, decoder, 1.3), 3, dexperts)}


@pytest.mark.supports('decoding', 'contrastive decoding', 'classifier-free guidance', 'DExperts')
@pytest.mark.parametrize('name, formula', [('llama', 'contrastive'), ('llama', 'free'),
                                           ('t5_gated', 'experts')])
def test_each_token_is_that_of_the_formula(name, formula):
  decoder, params = three(name)
  guided, count, score = formulas(decoder)[formula]
  prompts = [np.array(prompt) for prompt in PROMPTS]
  run = lambda prompts: [done.tokens.tolist() for done in generate(
      guided, params[:count], prompts, GREEDY, 0, 64, EOS, None)]
  found = run(prompts)
  assert found == [by_the_formula(name, prompt, score) for prompt in PROMPTS]
  assert found == run(prompts[::-1])[::-1], 'neighbours changed a text'
  assert found != [by_the_formula(name, prompt, lambda logits, prompt: logits(0, prompt))
                   for prompt in PROMPTS]


@pytest.mark.parametrize('number', range(2))
def test_classifier_free_guidance_is_that_of_transformers(number):
  case = json.loads((HERE / 'reference_guidance.json').read_text())[number]
  decoder, params = model('stories260K')
  negative = None if case['negative'] is None else tuple(case['negative'])
  prompts, wanted = zip(*case['completions'])
  done = generate(classifier_free(decoder, case['scale'], negative), (params,),
                  [np.array(prompt) for prompt in prompts],
                  dataclasses.replace(GREEDY, max_new_tokens=12), 0, 64, case['eos'], None)
  assert [one.tokens.tolist() for one in done] == list(wanted)


def test_one_beam_of_two_members_is_their_greedy_text():
  """A beam takes rows of the cache: those of each member are its own."""
  decoder, (params, *_) = three('llama')
  guided, prompts = classifier_free(decoder, 3.0), list(map(np.asarray, PROMPTS))
  greedy = generate(guided, (params,), prompts, GREEDY, 0, PLACES, EOS, None)
  config = BeamConfig(num_beams=1, max_new_tokens=NEW)
  found = beam_search(guided, (params,), prompts, config, PLACES, EOS, None)
  assert [one.tokens.tolist() for one, in found] == [one.tokens.tolist() for one in greedy]


def test_beams_search_what_models_say_together():
  decoder, params = three('llama')
  guided = Guided((decoder,), (Member(0, 3.0), Member(0, -2.0, 'same')))
  prompts = [np.array(prompt) for prompt in PROMPTS]
  config = BeamConfig(num_beams=3, max_new_tokens=NEW)
  both = beam_search(guided, params[:1], prompts, config, 64, EOS, None)
  alone = beam_search(decoder, params[0], prompts, config, 64, EOS, None)
  for ours, theirs in zip(both, alone):  # 3 log p - 2 log p
    assert ours[0].tokens.tolist() == theirs[0].tokens.tolist()
    np.testing.assert_allclose(ours[0].score, theirs[0].score, rtol=1e-4)


@pytest.mark.parametrize('members, message', [
    ((Member(prompt='last'),), 'must read the prompt'), ((Member(), Member(1)), 'members speak'),
    ((Member(), Member(temperature=0.0)), 'temperature')])
def test_members_that_cannot_be_are_refused(members, message):
  decoder, _ = model('llama')
  with pytest.raises(ValueError, match=message):
    Guided((decoder,), members)


def test_models_of_different_vocabularies_are_refused():
  decoder, _ = model('llama')
  other = dataclasses.replace(decoder.module.config, vocab_size=54).build()
  with pytest.raises(ValueError, match=r'vocabularies of \[53, 54\]'):
    contrastive_decoding(decoder, dataclasses.replace(decoder, module=other))
