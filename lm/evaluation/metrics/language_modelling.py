"""Perplexities of text, and bits per byte: the same nats divided by different lengths.

With N the negative log-likelihood of all texts together, in nats (the end of each text included,
where the task scores it), over their words W, tokens K and UTF-8 bytes B:

    word_perplexity = exp(N / W)    token_perplexity = exp(N / K)    bits_per_byte = N / (B ln 2)

Tokens are the model's, so that a token perplexity compares models of one vocabulary alone. Words
are what the task counts: of WikiText's tokenised text what spaces separate, and one end of line a
line (Merity et al. 2016, arXiv:1609.07843, section 4; so does Penn Treebank's tradition). Bytes are
of the raw text, so that bits per byte compare any models. Sums come before the division: long texts
count more, as in lm-evaluation-harness.
"""
from collections.abc import Sequence
import math

import numpy as np

from lm.errors import UserError
from lm.evaluation.metrics.contract import Header, name, numbers, Row, Scorer

NOTES = {'word_perplexity': 'exp(nats / words), words as the task counts them',
         'token_perplexity': "exp(nats / tokens), comparable for one vocabulary alone"}


def scorer(header: Header, rows: Sequence[Row]) -> Scorer:
  """Of language modelling.

  Raises:
    UserError: nats are not finite or below 0 (log-likelihoods in their place), or there are no
      words, tokens or bytes.
  """
  nats = np.array([numbers(header, [row], 'scores', len(row['scores'])).sum() for row in rows])
  if nats.min() < 0:
    raise UserError(f'row {int(nats.argmin())} of {name(header)} has {nats.min():.4g} nats; they '
                    'are negative log-likelihoods, 0 or more')
  sizes = {unit: numbers(header, rows, unit) for unit in ('words', 'tokens', 'bytes')}
  for unit, counts in sizes.items():
    if counts.sum() <= 0:
      raise UserError(f'{name(header)} has no {unit} to divide by; evaluate text that has some')

  def score(indices):
    total = nats[indices].sum()
    of = {unit: total / counts[indices].sum() for unit, counts in sizes.items()
          if counts[indices].sum()}
    found = {f'{unit[:-1]}_perplexity': math.exp(of[unit]) for unit in ('words', 'tokens')
             if of.get(unit, 700) < 700}  # beyond it no float holds the perplexity
    if 'bytes' in of:
      found['bits_per_byte'] = float(of['bytes'] / math.log(2))
    return found

  per_byte = nats / np.maximum(sizes['bytes'], 1) / math.log(2)
  return Scorer(-per_byte, '-bits_per_byte', score, notes=NOTES)
