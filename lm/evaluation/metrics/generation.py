"""Metrics of generated text: BLEU, chrF and TER by sacrebleu, ROUGE by rouge-score, and diversity.

The language of the references is header['language'] (ISO 639, 'en' if absent). It chooses
sacrebleu's tokenizer of BLEU, as its own option --target-lang does ('zh' for Chinese), and splits
Chinese and Japanese into characters for TER. rouge-score's tokenizer knows a-z and 0-9 alone: for
other languages than English its tokens are those of BLEU, in lower case, that hold a letter or
digit; for English words are stemmed, as ROUGE-1.5.5 -m does. Of several references sacrebleu takes
all, rouge-score the best for each metric. BLEU, chrF, TER and self-BLEU are in per cent.

distinct-n is the number of distinct n-grams over the number of tokens (Li et al. 2016,
arXiv:1510.03055, section 5). self-BLEU is the mean BLEU of a prediction with the other predictions
for references (Zhu et al. 2018, arXiv:1802.01886, section 3.2), of at most 100 of them.

Reference: Post 2018, arXiv:1804.08771; Lin 2004, ROUGE.
"""
from collections.abc import Sequence
import itertools
from typing import Any

import numpy as np

from lm.errors import UserError
from lm.evaluation.metrics.contract import Header, name, Row, Scorer

ROUGE = 'rouge1', 'rouge2', 'rougeL', 'rougeLsum'
SELF_BLEU_OF = 100  # predictions; each is compared with all others
_LANGUAGES = {'eng': 'en', 'cmn': 'zh', 'zho': 'zh', 'chi': 'zh', 'jpn': 'ja', 'kor': 'ko'}


def language(header: Header) -> str:
  """The two letters of ISO 639-1 where sacrebleu asks for them: 'zh' of 'cmn' and 'zh-CN'."""
  code = (header.get('language') or 'en').replace('_', '-').split('-')[0].lower()
  return _LANGUAGES.get(code, code)


def scorer(header: Header, rows: Sequence[Row]) -> Scorer:
  """Of generation.

  Raises:
    UserError: an example has no reference, or sacrebleu lacks the tokenizer of the language.
  """
  for number, row in enumerate(rows):
    if not row['targets'] or isinstance(row['targets'], str):
      raise UserError(f'row {number} (id {row.get("id")!r}) of {name(header)} has no list of '
                      'references; give one or more')
  code = language(header)
  corpus, streams = sacrebleu(header, rows)
  predictions, references = [row['prediction'] for row in rows], [row['targets'] for row in rows]
  # The statistics of examples that sacrebleu's own significance tests resample.
  statistics = {key: np.array(metric._extract_corpus_statistics(predictions, streams), np.float64)
                for key, metric in corpus.items()}  # pylint: disable=protected-access
  notes = {key: str(metric.get_signature()) for key, metric in corpus.items()}
  tokenize = corpus['bleu'].tokenizer
  rouge, rouge_note = _rouge(predictions, references, code, tokenize)
  notes['rouge'] = rouge_note

  def score(indices):
    found = {}
    for key, metric in corpus.items():
      # One after the other, as sacrebleu adds them up.
      total = np.cumsum(statistics[key][indices], axis=0)[-1].tolist()
      found[key] = metric._compute_score_from_stats(total).score
    found |= {key: np.mean(values[indices]) for key, values in rouge.items()}
    return {key: float(value) for key, value in found.items()}

  whole, diversity_notes = _diversity(predictions, tokenize, code)
  each = np.array([corpus['chrf']._compute_score_from_stats(row.tolist()).score
                   for row in statistics['chrf']])
  return Scorer(each, 'chrf of the example', score, whole, notes | diversity_notes)


def sacrebleu(header: Header, rows: Sequence[Row]) -> tuple[dict[str, Any], list[Any]]:
  """sacrebleu's metrics by our names, and the references as it wants them, [references, examples];
  None where an example has fewer than others.

  Raises:
    UserError: sacrebleu lacks the tokenizer of the language.
  """
  from sacrebleu.metrics import BLEU, CHRF, TER
  code = language(header)
  asian = code in ('zh', 'ja')
  streams = list(itertools.zip_longest(*(row['targets'] for row in rows)))
  try:
    return {'bleu': BLEU(trg_lang=code), 'chrf': CHRF(),
            'ter': TER(normalized=asian, asian_support=asian)}, streams
  except RuntimeError as error:
    raise UserError(f'sacrebleu lacks the tokenizer for {code!r}; pip install "sacrebleu[{code}]"'
                    ) from error


class _Tokens:
  """What rouge-score takes for a tokenizer."""

  def __init__(self, tokenize):
    self._tokenize = tokenize

  def tokenize(self, text: str) -> list[str]:
    return [token for token in self._tokenize(text.lower()).split()
            if any(map(str.isalnum, token))]


def _rouge(predictions, references, code, tokenize):
  """F-measures by metric, [examples], and how they were taken."""
  from rouge_score import rouge_scorer
  own = None if code == 'en' else _Tokens(tokenize)
  score = rouge_scorer.RougeScorer(ROUGE, use_stemmer=code == 'en', tokenizer=own).score_multi
  found = [score(texts, prediction) for texts, prediction in zip(references, predictions)]
  values = {key: np.array([one[key].fmeasure for one in found]) for key in ROUGE}
  how = 'stemmed' if own is None else f"tokens of sacrebleu's {tokenize.signature()}, not stemmed"
  return values, f'mean F-measure, {how}, best reference; a line is a sentence of rougeLsum'


def _diversity(predictions, tokenize, code):
  """distinct-n and self-BLEU, and what to know of them."""
  from sacrebleu.metrics import BLEU
  tokens = [tokenize(prediction).split() for prediction in predictions]
  total = sum(map(len, tokens))
  if not total:
    return {}, {'distinct_1': 'absent: all predictions are empty'}
  found = {f'distinct_{n}': len({gram for words in tokens
                                 for gram in zip(*(words[i:] for i in range(n)))}) / total
           for n in (1, 2, 3)}
  some = [predictions[i * len(predictions) // SELF_BLEU_OF] for i in range(SELF_BLEU_OF)
          ] if len(predictions) > SELF_BLEU_OF else predictions
  if len(some) < 2:
    return found, {'self_bleu': 'absent: there is one prediction'}
  bleu = BLEU(trg_lang=code, effective_order=True)  # as sacrebleu asks for of single sentences
  found['self_bleu'] = float(np.mean([
      bleu.sentence_score(text, [*some[:i], *some[i + 1:]]).score for i, text in enumerate(some)]))
  return found, {'self_bleu': f'of {len(some)} of {len(predictions)} predictions'}
