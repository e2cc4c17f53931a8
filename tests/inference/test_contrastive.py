"""Contrastive search is that of the paper, computed anew for every token."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.inference.contrastive import contrastive_search, ContrastiveConfig
from small_models import model

PLACES, NEW = 24, 9
PROMPTS = [[5, 7], [9], [40, 41, 9, 20, 8, 22, 33], [12, 50, 6]]


@functools.cache
def full(name):
  """(hidden states [rows, T, D], logits [rows, T, V]) of texts, without a cache."""
  decoder, params = model(name)
  apply = functools.partial(decoder.module.apply, {'params': params})

  @jax.jit
  def run(inputs, texts):
    if not decoder.has_encoder:
      hidden = apply(texts)[0]
    else:
      segments = (inputs >= 0).astype(jnp.int32)
      hidden = apply(jnp.tile(jnp.maximum(inputs, 0), (len(texts), 1)), texts,
                     jnp.tile(segments, (len(texts), 1)))
    return hidden, apply(hidden, method='logits')

  pad = lambda ids, fill: np.array([*ids, *[fill] * (PLACES - len(ids))])
  return lambda inputs, texts: run(pad(inputs, -1)[None], np.stack([pad(ids, 0) for ids in texts]))


def by_the_book(name, prompt, eos, config):
  """Equation 5 of arXiv:2202.06417."""
  encodes = model(name)[0].has_encoder
  inputs, text = ([*prompt, eos], [0]) if encodes else ([], list(prompt))
  start = len(text)
  while len(text) < start + NEW and (len(text) == start or text[-1] != eos):
    hidden, logits = full(name)(inputs, [text] * config.top_k)
    probs = np.asarray(jax.nn.softmax(logits[0, len(text) - 1]))
    tokens = np.argsort(-probs, kind='stable')[:config.top_k]
    hidden, _ = full(name)(inputs, [[*text, token] for token in tokens])
    unit = np.asarray(hidden / jnp.linalg.norm(hidden, axis=-1, keepdims=True))
    penalty = [(one[:len(text)] @ one[len(text)]).max() for one in unit]
    scores = (1 - config.alpha) * probs[tokens] - config.alpha * np.array(penalty)
    text.append(int(tokens[np.argmax(scores)]))
  return text[start:]


@pytest.mark.supports('decoding', 'contrastive search')
@pytest.mark.parametrize('name', ['llama', 't5_gated'])
def test_each_token_is_that_of_the_paper(name):
  decoder, params = model(name)
  prompts = [np.array(prompt) for prompt in PROMPTS]
  found = {}
  for alpha in (0.0, 0.4, 0.6):
    config = ContrastiveConfig(alpha=alpha, max_new_tokens=NEW)
    done = contrastive_search(decoder, params, prompts, config, 64, 9, None)
    found[alpha] = [one.tokens.tolist() for one in done]
    assert found[alpha] == [by_the_book(name, prompt, 9, config) for prompt in PROMPTS]
    assert all(one.stopped == ('eos' if one.tokens[-1] == 9 else 'length') for one in done)
  assert found[0.0] != found[0.6]
  backwards = contrastive_search(decoder, params, prompts[::-1], config, 64, 9, None)
  assert [one.tokens.tolist() for one in backwards[::-1]] == found[0.6]
  np.testing.assert_allclose(backwards[0].log_probs, done[-1].log_probs, atol=1e-5)


@pytest.mark.parametrize('changes, message', [({'top_k': 0}, 'top_k=0'), ({'alpha': 1.5}, 'alpha'),
                                              ({'max_new_tokens': 0}, 'max_new_tokens=0')])
def test_what_cannot_be_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    ContrastiveConfig(**changes)
