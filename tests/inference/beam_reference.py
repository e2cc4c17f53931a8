"""Beam search with diverse groups and forced words in plain Python, as the papers have it; and a
model that is a table."""
import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
  """The last two tokens of each row, and how many there are."""
  length_B: jax.Array
  last_B2: jax.Array

  def take(self, rows):
    return Pairs(self.length_B[rows], self.last_B2[rows])


@dataclasses.dataclass(frozen=True)
class Table:
  """A decoder whose next token follows from the last two alone."""
  num_tokens: int
  has_encoder: bool = False

  def prepare(self, params):
    return params

  def start(self, params, inputs_BT, lengths_B, num_places):
    at = lambda place_B: jnp.take_along_axis(inputs_BT, place_B[:, None], 1)
    last = jnp.concatenate([at(jnp.maximum(lengths_B - i, 0)) for i in (2, 1)], 1)
    return params[last[:, 0], last[:, 1]], Pairs(lengths_B, last)

  def extend(self, params, tokens_BT, cache):
    assert tokens_BT.shape[1] == 1
    last = jnp.concatenate([cache.last_B2[:, 1:], tokens_BT], 1)
    return params[last[:, 0], last[:, 1]][:, None], Pairs(cache.length_B + 1, last)

  def take(self, cache, rows):
    return cache.take(rows)

  def rewind(self, cache, length_B):
    return dataclasses.replace(cache, length_B=length_B)


def table(num_tokens, seed=0):
  """Logits [V, V, V]."""
  return np.random.default_rng(seed).normal(0, 1.5, (num_tokens,) * 3).astype(np.float32)


def log_probs(logits, text):
  """[V], float64; of a table."""
  row = logits[text[max(len(text) - 2, 0)], text[-1]].astype(np.float64)
  return row - np.log(np.exp(row).sum())


def met(words, text):
  """(which words a text has, how many of their tokens): see arXiv:1804.06609, section 3.1."""
  has, begun = set(), {}
  for token in text:
    for i, word in enumerate(words):
      if i not in has:
        at = begun.get(i, 0)
        begun[i] = at + 1 if word[at] == token else int(word[0] == token)
    ended = [i for i in begun if i not in has and begun[i] == len(words[i])]
    if ended:
      has.add(max(ended, key=lambda i: (len(words[i]), -i)))
      begun = {}
  return has, sum(len(words[i]) for i in has) + max(
      [at for i, at in begun.items() if i not in has], default=0)


def wanted(words, text):
  """The tokens that go on with a word, after `text`."""
  found = set()
  has, begun = met(words, text)[0], {}
  for start in range(len(text) + 1):  # the longest part of a word at the end of the text
    for i, word in enumerate(words):
      tail = tuple(text[start:])
      if i not in has and tail == tuple(word[:len(tail)]) and len(tail) < len(word):
        begun.setdefault(i, len(tail))
  for i, at in begun.items():
    found.add(words[i][at])
  return found


def allocate(candidates, words, num_beams):
  """The candidates that stay (arXiv:1804.06609, section 3.2); sorted, the best first."""
  num_banks = sum(map(len, words)) + 1
  banks = [[] for _ in range(num_banks)]
  for candidate in candidates:
    banks[met(words, candidate[2])[1]].append(candidate)
  sizes = [num_beams // num_banks] * num_banks
  sizes[-1] += num_beams % num_banks
  for i in reversed(range(num_banks)):
    spare = max(sizes[i] - len(banks[i]), 0)
    sizes[i] -= spare
    if i:
      sizes[i - 1] += spare
  kept = [one for bank, size in zip(banks, sizes) for one in bank[:size]]
  kept += [one for one in candidates if one not in kept][:num_beams - len(kept)]
  return kept


def search(logits, prompt, config, eos, words=()):
  """[(tokens, score), ...] of a prompt, the best first; those that lack words behind all others."""
  size = config.num_beams // config.num_groups
  groups = [{'live': [(0.0, ())], 'ended': [], 'open': True} for _ in range(config.num_groups)]
  for n in range(1, config.max_new_tokens + 1):
    taken = collections.Counter()
    for group in groups:
      if group['open']:
        _step(group, logits, prompt, config, eos, words, n, size, taken)
  ended = [one for group in groups for one in group['ended']]
  return [(list(text), score) for lacks, score, text in sorted(ended, key=lambda x: (x[0], -x[1]))]


def _step(group, logits, prompt, config, eos, words, n, size, taken):
  candidates, extra = [], set()
  for score, text in group['live']:
    values = log_probs(logits, [*prompt, *text])
    first = len(candidates)
    for token, value in enumerate(values):
      lacks = len(met(words, text)[0]) < len(words)
      if token != eos or (n > config.min_new_tokens and not lacks):
        total = score + value
        candidates.append((total - config.diversity_penalty * taken[token], total, (*text, token)))
    extra.add(max(candidates[first:]))
    extra |= {one for one in candidates[first:] if one[2][-1] in wanted(words, text)}
  candidates.sort(reverse=True)
  ends = lambda text: text[-1] == eos or n == config.max_new_tokens
  if words:
    candidates = [one for i, one in enumerate(candidates) if i < 2 * size or one in extra]
  choose = lambda among: allocate(among, words, size) if words else among[:size]
  for _, total, text in choose(candidates):
    if ends(text):
      lacks = len(met(words, text)[0]) < len(words)
      group['ended'].append((lacks, total / n**config.length_penalty, text))
  group['ended'] = sorted(group['ended'], key=lambda x: (x[0], -x[1]))[:size]
  live = choose([one for one in candidates if one[2][-1] != eos])
  group['live'] = [(total, text) for _, total, text in live]
  taken.update(text[-1] for _, _, text in live)
  is_full = len(group['ended']) == size
  if n == config.max_new_tokens or is_full and config.early_stopping is True:
    group['open'] = False
  elif is_full:
    exact = config.early_stopping == 'never' and config.length_penalty > 0
    longest = config.max_new_tokens if exact else n
    best = max(total for total, _ in group['live']) / longest**config.length_penalty
    group['open'] = best > min(score for _, score, _ in group['ended'])
