"""Embedding and softmax of a vocabulary in clusters, from frequent tokens to rare ones."""
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from lm.layers import linear, products
from lm.layers.heads import Scores
from lm.parallel.rules import Rules


class AdaptiveScores(NamedTuple):
  """Scores in two steps (arXiv:1609.04309, section 4): of frequent tokens and of each cluster of
  rarer ones, and of the tokens of each cluster.

  clusters: the first scores the frequent tokens and, behind them, the other clusters.
  """
  clusters: tuple[Scores, ...]

  def split(self, targets_BT: Int[Array, 'B T']
            ) -> list[tuple[Scores, Int[Array, 'B T'], Bool[Array, 'B T']]]:
    """Plain softmaxes, the target of each token in them, and which tokens take part.

    The loss of a token is the sum of its losses in those that it takes part in.
    """
    head, *tails = self.clusters
    start = head.embedding.shape[0] - len(tails)
    first_BT, parts = targets_BT, []
    for i, tail in enumerate(tails):
      size = tail.embedding.shape[0]
      inside_BT = (targets_BT >= start) & (targets_BT < start + size)
      first_BT = jnp.where(inside_BT, head.embedding.shape[0] - len(tails) + i, first_BT)
      parts.append((tail, jnp.clip(targets_BT - start, 0, size - 1), inside_BT))
      start += size
    return [(head, first_BT, jnp.ones_like(targets_BT, bool)), *parts]

  def log_probs(self) -> Float[Array, 'B T V']:
    """Of every token of the vocabulary, float32."""
    first, *rest = [jax.nn.log_softmax(scores.logits()) for scores in self.clusters]
    frequent = first.shape[-1] - len(rest)
    tails = [first[..., frequent + i, None] + log_probs for i, log_probs in enumerate(rest)]
    return jnp.concatenate([first[..., :frequent], *tails], axis=-1)


class AdaptiveEmbedding(nn.Module):
  """Owns a table for each cluster, which embeds tokens and scores them (adaptive inputs,
  arXiv:1809.10853, section 3), tied as in Transformer-XL.

  cutoffs: where the second and each further cluster begins; tokens are in order of frequency.
  div_val: cluster i has D / div_val**i dimensions, and a projection to D, which also its scores go
    through; only the first cluster's scores have one of their own. 1: none has a projection.
  """
  vocab_size: int
  d_model: int
  cutoffs: tuple[int, ...]
  div_val: int
  std: float
  rules: Rules = Rules()

  def setup(self):
    ends = (*self.cutoffs, self.vocab_size)
    self.sizes = [end - start for start, end in zip((0, *self.cutoffs), ends)]
    self.tables = [self._matrix(f'embedding_{i}', size, width)
                   for i, (size, width) in enumerate(zip(self.sizes, self._widths()))]
    if self.div_val > 1:
      self.projections = [self._matrix(f'projection_{i}', width, self.d_model)
                          for i, width in enumerate(self._widths())]
      self.out_projection = self._matrix('out_projection', self.d_model, self.d_model)
    self.cluster_embedding = self._matrix('cluster_embedding', len(self.cutoffs), self.d_model)
    zeros = nn.with_partitioning(nn.initializers.zeros, (None,))
    self.bias = self.param('bias', zeros, (self.vocab_size + len(self.cutoffs),))

  def _widths(self):
    return [self.d_model // self.div_val**i for i in range(len(self.cutoffs) + 1)]

  def _matrix(self, name, rows, columns):
    return self.param(name, linear.normal(self.std, None, 'embed'), (rows, columns))

  def __call__(self, tokens_BT: Int[Array, 'B T'], dtype: jax.typing.DTypeLike
               ) -> Float[Array, 'B T D']:
    """Embeds each token by its own cluster."""
    embedded, start = 0, 0
    for i, (table, size) in enumerate(zip(self.tables, self.sizes)):
      x = linear.embed(table, jnp.clip(tokens_BT - start, 0, size - 1), dtype)
      x = x if self.div_val == 1 else products.product(None, self.rules)(x, self.projections[i])
      inside_BT = (tokens_BT >= start) & (tokens_BT < start + size)
      embedded += jnp.where(inside_BT[..., None], x, 0)
      start += size
    return embedded

  def scores(self, hidden_BTD: Float[Array, 'B T D']) -> AdaptiveScores:
    """What scores the next token."""
    frequent, *rest = self.sizes
    head = jnp.concatenate([self.tables[0], self.cluster_embedding])
    if self.div_val == 1:
      hidden = [hidden_BTD] * len(self.sizes)
    else:
      out = [self.out_projection, *(x.T for x in self.projections[1:])]
      hidden = [products.product(None, self.rules)(hidden_BTD, x) for x in out]
    biases = jnp.split(self.bias, np.cumsum([frequent + len(rest), *rest[:-1]]))
    tables = [head, *self.tables[1:]]
    return AdaptiveScores(tuple(Scores(*one, rules=self.rules)
                                for one in zip(hidden, tables, biases)))

