"""What requests ask of scores is done to them as transformers does it, row by row."""
import functools
import json

import jax
import jax.numpy as jnp
import make_sampling_references as references
from make_sampling_references import CASES, EOS, V
import numpy as np
import pytest

from lm.errors import UserError
from lm.inference.sampling import begin, choices, drawn_from, sample, SamplingConfig, Sizes

ROWS, PLACES = 3, 16
NAMES = [','.join(f'{name}={value}' for name, value in case.items())[:60] for case in CASES]
scores_of, drawn = jax.jit(drawn_from), jax.jit(sample)


@functools.cache
def config_of(number):
  tuples = {name: tuple(map(tuple, CASES[number][name])) for name in ('logit_bias', 'bad_words')
            if name in CASES[number]}
  return SamplingConfig(**{'temperature': 1.0, **CASES[number], **tuples})


def state_of(asked, texts, prompt=10):
  """Of texts whose first tokens are the prompt."""
  texts = np.asarray(texts)
  state = begin(asked, texts, np.full(len(texts), texts.shape[1]), PLACES)
  return state._replace(prompt_B=jnp.full(len(texts), prompt))


def close(found, expected):
  np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
  kept = ~np.isinf(expected)
  # Scores have the largest subtracted: a softmax does not see it.
  shift = np.where(kept.any(1), np.max(found, 1) - np.max(expected, 1), 0)[:, None]
  np.testing.assert_allclose((found - shift)[kept], expected[kept], atol=3e-5)


@pytest.mark.supports('decoding', 'min-p', 'typical', 'eta', 'repetition penalty',
                      'no-repeat n-grams', 'bad words', 'logit bias', 'minimum new tokens')
@pytest.mark.parametrize('number', range(len(CASES)), ids=NAMES)
def test_scores_are_those_of_transformers(number):
  logits, texts = references.inputs()
  asked = choices([config_of(number)] * ROWS, EOS)
  stored = np.array(json.loads(references.FILE.read_text())[number], np.float32)
  close(np.asarray(scores_of(logits, asked, state_of(asked, texts))),
        np.where(np.isnan(stored), -np.inf, stored))


@pytest.mark.parametrize('number', range(len(CASES)), ids=NAMES)
def test_what_is_stored_is_what_transformers_says(number):
  pytest.importorskip('torch', reason="pip install 'lm[parity]'")
  pytest.importorskip('transformers', reason="pip install 'lm[parity]'")
  stored = np.array(json.loads(references.FILE.read_text())[number], np.float32)
  close(references.transformed(CASES[number]), np.where(np.isnan(stored), -np.inf, stored))


def test_a_row_does_not_see_what_others_ask():
  logits, texts = references.inputs()
  configs = [config_of(number) for number in range(len(CASES))] + [
      SamplingConfig(temperature=0), SamplingConfig(presence_penalty=1.0), SamplingConfig(top_k=1),
      SamplingConfig(mirostat_tau=2.0), SamplingConfig()]
  asked = choices(configs, EOS)
  keys = jax.random.split(jax.random.key(0), len(configs))
  state = state_of(asked, texts[[2] * len(configs)])
  together = drawn(logits[[1] * len(configs)], keys, asked, state)
  for row in range(0, len(configs), 2):
    same = np.array([row, row, row])
    alone = drawn(logits[[1, 1, 1]], keys[same], jax.tree.map(lambda x: x[same], asked),
                  jax.tree.map(lambda x: x[same], state))
    for one, all_rows in zip(jax.tree.leaves(alone), jax.tree.leaves(together)):
      np.testing.assert_array_equal(one[0], all_rows[row])


def test_a_bad_word_needs_all_its_tokens():
  config = SamplingConfig(temperature=1.0, bad_words=((2, 2, 5), (2, 7)))
  asked = choices([config] * ROWS)
  state = begin(asked, np.full((ROWS, 2), 2), np.array([1, 2, 0]), PLACES)
  banned = np.isinf(scores_of(np.zeros((ROWS, V), np.float32), asked, state))
  assert [np.flatnonzero(row).tolist() for row in banned] == [[7], [5, 7], []]


@pytest.mark.supports('decoding', 'presence penalty', 'frequency penalty')
def test_presence_and_frequency_count_what_was_completed():
  logits, texts = references.inputs()
  asked = choices([SamplingConfig(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25),
                   SamplingConfig(temperature=1.0, frequency_penalty=-0.25),
                   SamplingConfig(temperature=1.0)])
  expected = logits.copy()
  for row, (present, each) in enumerate(((0.5, 0.25), (0, -0.25), (0, 0))):
    for token in range(V):
      count = (texts[row, 6:] == token).sum()
      expected[row, token] -= present * (count > 0) + each * count
  close(np.asarray(scores_of(logits, asked, state_of(asked, texts, prompt=6))), expected)


def test_the_text_grows_by_what_is_drawn():
  logits = np.zeros((ROWS, V), np.float32)
  asked = choices([SamplingConfig(temperature=1.0, no_repeat_ngram_size=1)] * ROWS)
  keys = jax.random.split(jax.random.key(1), ROWS)
  state, seen = begin(asked, np.zeros((ROWS, 2), np.int32), np.array([1, 2, 1]), PLACES), []
  for step in range(V // 4):
    tokens, _, state = drawn(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, step), asked,
                             state)
    seen.append(tokens)
  assert all(len({0, *row}) == 1 + V // 4 for row in np.stack(seen, 1).tolist())
  assert state.length_B.tolist() == [V // 4 + 1, V // 4 + 2, V // 4 + 1]


def test_only_allowed_tokens_are_drawn_whatever_is_forbidden():
  logits, texts = references.inputs()
  logits, texts = np.pad(logits, ((0, 0), (0, 8)), constant_values=9), texts
  allowed = np.zeros((ROWS, 2), np.uint32)
  allowed[0, 0], allowed[1, 1], allowed[2] = 1 << 31 | 1 << 4, 1 << 7, (1 << EOS, 0)
  asked = choices([SamplingConfig(temperature=1.0), SamplingConfig(temperature=1.0, top_k=3),
                   SamplingConfig(temperature=1.0, min_new_tokens=5)], EOS)
  kept = np.asarray(jax.jit(drawn_from)(logits, asked, state_of(asked, texts), allowed)) > -np.inf
  # The last may only end, and may not end: what is not allowed stays out.
  assert [np.flatnonzero(row).tolist() for row in kept] == [[4, 31], [39], [EOS]]


@pytest.mark.supports('decoding', 'mirostat')
def test_mirostat_steers_the_surprise_of_a_text():
  zipf = -1.1 * np.log(np.arange(1, 1001)).astype(np.float32)
  log2 = np.asarray(jax.nn.log_softmax(zipf)) / np.log(2)
  taus = np.array([2.75, 3.5, 5.0])  # the likeliest token is of 2.5 bits
  asked = choices([SamplingConfig(temperature=1.0, mirostat_tau=tau) for tau in taus])

  @jax.jit
  def text(state):
    def step(state, t):
      keys = jax.vmap(jax.random.fold_in, (0, None))(jax.random.split(jax.random.key(0), 3), t)
      tokens, _, after = sample(jnp.broadcast_to(zipf, (3, 1000)), keys, asked, state)
      return after, (tokens, state.mu_B, after.mu_B)
    return jax.lax.scan(step, state, jnp.arange(600))[1]

  tokens, before, after = text(begin(asked, np.zeros((3, 1), np.int32), np.ones(3, np.int32), 1))
  bits = -log2[np.asarray(tokens)]
  assert before[0].tolist() == (2 * taus).tolist()
  np.testing.assert_allclose(after, before - 0.1 * (bits - taus), atol=1e-4)
  assert (bits <= np.maximum(before, -log2[0]) + 1e-4).all()
  np.testing.assert_allclose(bits[100:].mean(0), taus, rtol=0.02)


@pytest.mark.parametrize('field, value', [
    ('min_new_tokens', 200), ('logit_bias', ((-1, 2.0),)), ('bad_words', ((),)),
    ('repetition_penalty', 0.0), ('frequency_penalty', float('nan')), ('no_repeat_ngram_size', 0),
    ('min_p', 0.0), ('typical_p', 1.5), ('eta_cutoff', -0.1), ('mirostat_tau', 0.0)])
def test_what_cannot_be_asked_is_refused_by_name(field, value):
  with pytest.raises(ValueError, match=f'{field}='):
    SamplingConfig(**{field: value})


def test_tables_have_the_usual_sizes_until_a_request_needs_more():
  small, large = choices([SamplingConfig()]), choices([
      SamplingConfig(bad_words=((1,) * 9,), logit_bias=tuple((i, 1.0) for i in range(20)))])
  assert small.sequences_BNW.shape == (1, 16, 8) and large.sequences_BNW.shape == (1, 32, 16)
  with pytest.raises(UserError, match='room for: 16 of 8 tokens'):
    choices([SamplingConfig(bad_words=((1,) * 9,))], room=Sizes())
