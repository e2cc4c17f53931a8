"""The sampler draws from exactly the filtered distribution."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from lm import main
from lm.commands import sampling_flags
from lm.errors import UserError
from lm.inference import filters
from lm.inference.constrain import Rule
from lm.inference.sampling import _invert, begin, choices, drawn_from, sample, SamplingConfig

DRAWS = 6000


def filtered(logits, config):
  """The specification, in float64 on sorted tokens: probabilities [V] after all filters."""
  scores = np.asarray(logits, np.float64) / config.temperature
  order = np.lexsort((np.arange(len(scores)), -scores))  # ties: the lower id first
  order = order[:config.top_k]
  probs = np.exp(scores[order] - scores.max())
  probs /= probs.sum()
  if config.top_p is not None and config.top_p < 1:
    before = np.concatenate([[0], np.cumsum(probs)[:-1]])
    order, probs = order[before < config.top_p], probs[before < config.top_p]
  full = np.zeros(len(scores))
  full[order] = probs / probs.sum()
  return full


@jax.jit
def run(logits, keys, asked):
  nothing = np.zeros((len(logits), 1), np.int32)
  return sample(logits, keys, asked, begin(asked, nothing, nothing[:, 0], 1))[0]


def choose(logits, keys, config):
  configs = [config] * len(logits) if isinstance(config, SamplingConfig) else config
  return run(logits, jax.random.split(keys, len(logits)) if keys.ndim == 0 else keys,
             choices(configs))


def draws(logits, config, seed=0):
  rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, len(logits)))
  return np.bincount(np.asarray(choose(rows, jax.random.key(seed), config)), minlength=len(logits))


def with_impossible(*logits):
  """Of one shape, so that a config compiles once; what is impossible must never be drawn."""
  return np.concatenate([logits, np.full(24 - len(logits), -np.inf)])


LOGITS = np.random.default_rng(0).normal(size=24) * 2
TIED = with_impossible(0.0, 1, 2, 1, 2, 2, 0, -1)


@pytest.mark.supports('decoding', 'temperature', 'top-k', 'top-p')
@pytest.mark.parametrize('logits', [LOGITS, TIED, np.zeros(24), with_impossible(3.0)])
@pytest.mark.parametrize('config', [
    SamplingConfig(temperature=1.0), SamplingConfig(temperature=0.5),
    SamplingConfig(temperature=1.3, top_k=1), SamplingConfig(temperature=1.3, top_k=4),
    SamplingConfig(temperature=1.0, top_k=1000), SamplingConfig(temperature=1.0, top_p=1.0),
    SamplingConfig(temperature=0.8, top_p=0.5), SamplingConfig(temperature=1.0, top_p=0.93),
    SamplingConfig(temperature=1.0, top_p=1e-6),
    SamplingConfig(temperature=1.0, top_k=5, top_p=0.7)], ids=str)
def test_draws_follow_the_filtered_distribution(logits, config):
  expected, counts = filtered(logits, config), draws(logits, config)
  assert not counts[expected == 0].any(), 'a token that the filters remove was drawn'
  kept = expected > 0
  if kept.sum() > 1:
    assert scipy.stats.chisquare(counts[kept], expected[kept] * DRAWS).pvalue > 1e-3


@pytest.mark.parametrize('config', [
    SamplingConfig(temperature=1.3, min_p=0.2), SamplingConfig(temperature=1.0, typical_p=0.5),
    SamplingConfig(temperature=0.9, eta_cutoff=0.3), SamplingConfig(mirostat_tau=1.2),
    SamplingConfig(temperature=2.0, bad_words=((5,),), top_p=0.8)], ids=str)
def test_draws_follow_the_scores_that_they_are_said_to_be_drawn_from(config):
  asked = choices([config])
  state = begin(asked, np.zeros((1, 1), np.int32), np.zeros(1, np.int32), 1)
  scores = np.asarray(drawn_from(jnp.asarray(LOGITS, jnp.float32)[None], asked, state)[0])
  expected, counts = scipy.special.softmax(scores), draws(LOGITS, config)
  kept = expected > 0
  assert 2 <= kept.sum() < 24 and not counts[~kept].any()
  assert scipy.stats.chisquare(counts[kept], expected[kept] * DRAWS,
                               sum_check=False).pvalue > 1e-3


def test_no_number_draws_a_token_of_no_probability():
  weights = jnp.array([[0.0, 0.25, 0, 0.5, 0, 0.25, 0, 0]])
  places = [int(_invert(weights, jnp.array([mass]))[0][0]) for mass in (0, 0.25, 0.7, 0.75, 1.0)]
  assert places == [1, 3, 3, 5, 3]  # the last: no sum exceeds it


@pytest.mark.supports('decoding', 'greedy')
def test_greedy_takes_the_most_probable_token_and_the_lower_id_of_equals():
  logits = jnp.array([[0.0, 5, 1], [2, 2, 2], [-jnp.inf, -1, -1]])
  tokens = choose(logits, jax.random.key(0), SamplingConfig(temperature=0))
  assert tokens.tolist() == [1, 0, 1] and tokens.dtype == jnp.int32


@pytest.mark.parametrize('config', [SamplingConfig(temperature=1e-30),
                                    SamplingConfig(temperature=1e-30, top_p=0.9),
                                    SamplingConfig(temperature=1e-30, top_k=3, top_p=0.9)], ids=str)
def test_a_vanishing_temperature_is_greedy(config):
  logits = jnp.asarray(LOGITS, jnp.float32)[None] * 1e3
  assert int(choose(logits, jax.random.key(0), config)[0]) == int(jnp.argmax(logits))


def test_the_nucleus_of_a_large_vocabulary_equals_that_of_sorting():
  logits = np.random.default_rng(1).normal(size=(1, 5000)).astype(np.float32).round(2)  # many ties
  scores = logits - logits.max()
  for top_p in (0.1, 0.4, 0.9, 0.999):
    one = lambda value: jnp.array([value])
    kept = filters.truncate(jnp.asarray(scores), one(0), one(top_p), one(0.0), one(1.0))
    kept = np.asarray(kept > -jnp.inf)[0]
    config = SamplingConfig(temperature=1.0, top_p=top_p)
    # Float32 sums may reach p one token away from where float64 sums do.
    assert abs(int(kept.sum()) - int((filtered(logits[0], config) > 0).sum())) <= 1
    assert logits[0][kept].min() >= logits[0][~kept].max()


def test_a_row_with_its_own_key_does_not_depend_on_the_other_rows():
  logits = jnp.asarray(np.random.default_rng(2).normal(size=(6, 50)), jnp.float32)
  keys = jax.random.split(jax.random.key(3), 6)
  config = SamplingConfig(top_p=0.9)
  together = choose(logits, keys, config)
  alone = jnp.concatenate([choose(logits[i:i + 1], keys[i:i + 1], config) for i in range(6)])
  assert together.tolist() == alone.tolist()


@pytest.mark.parametrize('field, value', [('temperature', -0.1), ('temperature', float('nan')),
                                          ('top_k', 0), ('top_p', 0.0), ('top_p', 1.5),
                                          ('max_new_tokens', 0)])
def test_a_value_out_of_range_is_refused_by_name(field, value):
  with pytest.raises(ValueError, match=f'{field}={value}'):
    SamplingConfig(**{field: value})


def test_flags_of_the_command_line_change_what_they_name(tmp_path):
  (tmp_path / 'schema.json').write_text('{}')
  flags = ['generate', '--prompt=a', '--min_p=0.1', '--stop=.', '--stop=\n', '--temperature=0.5']
  parse = lambda *more: main._parser().parse_known_args([*flags, *more])[0]
  default = SamplingConfig(top_k=3, temperature=1.0)
  expected = SamplingConfig(top_k=3, temperature=0.5, min_p=0.1, stop=('.', '\n'))
  assert sampling_flags.chosen(parse(), default) == expected
  schema = sampling_flags.chosen(parse(f'--json_schema={tmp_path}/schema.json'), default)
  assert schema.rule == Rule(json_schema='{}')
  with pytest.raises(UserError, match='one of regex'):
    sampling_flags.chosen(parse(f'--json_schema={tmp_path}/schema.json', '--regex=a'), default)
  with pytest.raises(UserError, match='top_p=2.0'):
    sampling_flags.chosen(parse('--top_p=2'), default)
